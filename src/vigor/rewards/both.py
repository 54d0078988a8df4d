"""Both: 1 where two rewards are both 1, such as a right answer in the right form.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/ttrl/verifier/auto_verify.py` (`A_AND_B`).

    reward(y) = A(y) · B(y),   A, B in {0, 1}

Departures from the paper and its code:
 1. A and B must be 0 or 1; there any value but 0 counts as 1.
 2. Where A or B has no opinion (NaN), neither has this one.

Command: vigor train --config lab --reward_funcs both
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import inner, verdicts
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def both(*, first: str | Reward = "format", second: str | Reward = "accuracy") -> Reward:
    """1 where both rewards are 1, else 0.

    Args:
        first: A, a reward or its spec; its values are 0 and 1.
        second: B, likewise. For three, nest: both(first=format, second=both(...)).

    Raises:
        ValueError: no such reward, one that is shaped within its group, or two that ask for different teachers; when
            scoring, a value other than 0 and 1.
    """
    parts = [inner(first, "both"), inner(second, "both")]
    teachers = {part.teacher: part.name for part in parts if part.teacher is not None}
    if len(teachers) > 1:
        raise ValueError(f"both: {' and '.join(teachers.values())} ask for different teachers; a run has one.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        one, other = (verdicts(part, "both", rollouts, policy) for part in parts)
        return one * other

    return Reward(
        name="both",
        teacher=next(iter(teachers), None),
        needs=parts[0].needs | parts[1].needs,
        score=score,
        # What pairs two wordings of a prompt is the first column of the reward that compares them.
        columns=tuple(dict.fromkeys(c for p in sorted(parts, key=lambda p: "twin" not in p.needs) for c in p.columns)),
    )
