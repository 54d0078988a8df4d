"""VIGOR: the completions that fit the policy best are those whose likelihood gradient is smallest.

Paper: Wen et al., "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward", arXiv 2605.09920; code
ZJUSCL/VIGOR@52eee72 `src/open_r1/intuitor_trainer.py` l.994-1110 (norm), l.1490-1503 (ranks).

    score(y) = -√T · ‖∇_θ NLL(y|x)‖₂,   NLL = mean over the T completion tokens, EOS included
    reward   = rank of the score within the group, mapped to [-1, 1]

Departures from the paper:
 1. None in the formula.
Departures from the official code (a setting in brackets switches one back):
 1. Squares are summed in float32/float64, not in the gradients' bfloat16, which rounds norms by 1-6 %
    (`accumulation="gradient_dtype"`).
 2. Equal scores share their mean rank; there the earlier row loses (`ties="index"`).
 3. The norm is taken at the sampling temperature; there always at 1 (`temperature=1.0`).
 4. Dropout is off while scoring; there it is on.
 5. All trainable parameters count; there those named "lora" alone, if there are any (`parameters="lora"`).
 6. Scores of completions that were cut off are handled by `VigorConfig.truncated`, within the group.
 7. With `accumulation="gradient_dtype"` the norm is rounded as there, but √T and the product stay in float32.
 8. The optional weighting by entropy or token probability, off in every recipe, is a reward of its own: `vigor_focal`.

Command: vigor train --config lab --reward_funcs vigor
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from vigor.gradnorm.loop import Accumulation
from vigor.gradnorm.parameters import Parameters
from vigor.rewards.base import Reward, Score, compose, gated, negate, ranked, times_length
from vigor.rollouts import Rollouts
from vigor.shaping import Ties
from vigor.signals import PolicyPass


def grad_norm(
    parameters: Parameters = "trainable", temperature: float | None = None, accumulation: Accumulation = "float32"
) -> Score:
    """The signal ‖∇_θ NLL‖₂ of each row; lower fits better."""

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return policy.grad_norms(parameters, temperature=temperature, accumulation=accumulation)

    return signal


def vigor(
    *,
    parameters: Parameters = "trainable",
    ties: Ties = "average",
    temperature: float | None = None,
    accumulation: Accumulation = "float32",
    min_spread: float = 0.0,
) -> Reward:
    """VIGOR's reward; without arguments, the paper's.

    Args:
        parameters: what the norm is taken over, see `vigor.gradnorm.select_parameters`.
        ties: "average" or "index", see `vigor.shaping.rank`.
        temperature: of the logits under the norm; None is the temperature of sampling.
        accumulation: "float32" or "gradient_dtype", see `vigor.gradnorm.sequence_grad_norms`.
        min_spread: groups whose scores have a standard deviation below this share of their mean get reward 0; 0 gates
            nothing, as in the paper.

    Raises:
        ValueError: unknown `ties` or `accumulation`, a temperature that is not positive, or a negative min_spread.
    """
    if ties not in get_args(Ties) or accumulation not in get_args(Accumulation):
        raise ValueError(
            f"vigor: ties={ties!r} must be one of {get_args(Ties)} and accumulation={accumulation!r} one of "
            f"{get_args(Accumulation)}."
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"vigor: temperature must be positive, got {temperature}.")
    if not min_spread >= 0:
        raise ValueError(f"vigor: min_spread must not be negative, got {min_spread}.")
    plain = parameters == "trainable" and temperature is None and accumulation == "float32"
    return compose(
        "vigor",
        {"grad_norm", "full_norm"} if plain else "grad_norm",
        grad_norm(parameters, temperature, accumulation),
        times_length(0.5),
        negate,
        shape=gated(ranked(ties), min_spread) if min_spread else ranked(ties),
    )
