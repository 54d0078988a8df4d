"""Per-sequence gradient norms: ‖∇_θ NLL_b‖₂ for each row b of a batch, without touching `.grad`.

Needs torch and a causal language model that maps `(input_ids, attention_mask)` to an output with `.logits`.

    api.py         sequence_grad_norms: the entry point
    fused.py       fused_grad_norms: the norms, and the update from the same pass
    engine.py      which method runs on which rows, the self-check, falling back
    microbatches.py    which rows are scored in one pass
    verdicts.py    which micro-batches the self-check compares
    diagnosis.py   which module a failed one names
    lengths.py     rows that may not share a micro-batch
    packed.py      rows that hold several sequences, taken apart
    loop.py        the definition: one row, one forward, one backward
    batched.py     one forward and one backward for many rows, no parameter gradient
    head.py        the output head by itself: logits of counted positions, a few rows at a time
    vocabulary.py  the head of a long sequence, a slice of the vocabulary at a time
    route.py       how a model's modules are wrapped for that
    watch.py       the function mode that sees their operations
    matrices.py    linear maps, experts and embeddings
    maps.py        the autograd functions that these become
    values.py      what is known of tensors that stem from parameters
    constants.py   tensors that do not depend on the batch
    tokens.py      which sequence a picked token belongs to
    capture.py     what a routed backward pass brings
    norms.py       squared norms of matrices: exact, or estimated by a sketch
    squares.py     the arithmetic of the exact ones
    kept.py        what the update needs of the pass
    memory.py      how much of that there will be
    parameters.py  what a norm covers
    sharded.py     what is different where FSDP2 or ZeRO-3 shards the model
    partitioned.py    whole weights where ZeRO-3 partitions them
    mode.py        dropout off, gradient checkpointing kept
"""

from vigor.gradnorm.api import sequence_grad_norms
from vigor.gradnorm.capture import UnsupportedModule
from vigor.gradnorm.engine import SelfCheckFailed
from vigor.gradnorm.fused import FusedNorms, fused_grad_norms
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.packed import Unpacked, unpack
from vigor.gradnorm.parameters import select_parameters

__all__ = [
    "FusedNorms",
    "SelfCheckFailed",
    "Unpacked",
    "UnsupportedModule",
    "fused_grad_norms",
    "scoring_mode",
    "select_parameters",
    "sequence_grad_norms",
    "unpack",
]
