"""Per-sequence gradient norms: ‖∇_θ NLL_b‖₂ for each row b of a batch, without touching `.grad`.

Needs torch and a causal language model that maps `(input_ids, attention_mask)` to an output with `.logits`.

    api.py         sequence_grad_norms: which method, micro-batches, the self-check
    loop.py        the definition: one row, one forward, one backward
    batched.py     one forward and one backward for many rows, no parameter gradient
    route.py       how a model's operations are routed for that
    capture.py     what the routed backward pass adds up
    squares.py     squared norms from a layer's inputs and output gradients
    parameters.py  what a norm covers
    mode.py        dropout off, gradient checkpointing kept
"""

from vigor.gradnorm.api import SelfCheckFailed, sequence_grad_norms
from vigor.gradnorm.capture import UnsupportedModule
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.parameters import select_parameters

__all__ = ["SelfCheckFailed", "UnsupportedModule", "scoring_mode", "select_parameters", "sequence_grad_norms"]
