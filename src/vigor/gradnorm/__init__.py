"""Per-sequence gradient norms: ‖∇_θ NLL_b‖₂ for each row b of a batch, without touching `.grad`.

Needs torch and a causal language model that maps `(input_ids, attention_mask)` to an output with `.logits`.
"""

from vigor.gradnorm.api import sequence_grad_norms
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.parameters import select_parameters

__all__ = ["scoring_mode", "select_parameters", "sequence_grad_norms"]
