r"""Accuracy: 1 if the completion's answer is equivalent to the reference. Needs labels; the ceiling, and the yardstick.

Method: RL from verifiable rewards as in DeepSeekMath (arXiv 2402.03300) and DeepSeek-R1 (arXiv 2501.12948); equivalence
by the math-verify library.

    reward(y) = 1[answer(y) ≡ reference]

The last \boxed{} content is compared as text first; math-verify decides what that leaves open.

Departures from the papers:
 1. A row without a reference answer has no reward (NaN) rather than 0.
 2. math-verify runs in a process of its own with a hard timeout: its own timeout is a signal, which works on the main
    thread only, and an expression that hangs would stall the step.

Command: vigor train --config lab --reward_funcs accuracy
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.boxed import last_boxed
from vigor.rewards.math_equal import MathVerifier
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def final_answer(reference: str | None) -> str | None:
    """A worked solution stands for what it boxes, as in MATH's `solution` column; anything else for itself."""
    boxed = None if reference is None else last_boxed(reference)
    return reference if boxed is None else boxed


def accuracy(*, column: str = "answer", timeout_s: float = 5.0) -> Reward:
    """1 for a right answer, 0 for a wrong, missing or undecidable one; NaN where the row has no reference.

    Args:
        column: data set column with the reference answer, or with a solution that boxes it.
        timeout_s: seconds that one comparison may take.
    """
    verifier = MathVerifier(timeout_s=timeout_s)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        if column not in rollouts.columns:
            raise ValueError(
                f"reward 'accuracy': the rollouts have no column {column!r} (columns: {sorted(rollouts.columns)})."
            )
        references = [final_answer(reference) for reference in rollouts.columns[column]]
        return from_values(verifier.verify(rollouts.completion_texts, references), rollouts)

    return Reward(name="accuracy", needs=frozenset({"text"}), score=score, columns=(column,))
