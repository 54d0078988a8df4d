r"""EMPO: the share of the group that agrees with the completion, which minimises semantic entropy.

Paper: "Right Question is Already Half the Answer", arXiv 2504.05812; code QingyangZhang/EMPO@c5eccd4
`trl/src/open_r1/rewards.py`, `semantic_uncertainty.py`.

    p_k    = n_k / G for the clusters of equivalent answers among the G completions of a prompt
    reward = p of the completion's cluster; 0 without an answer, and for all where no two completions agree

Clusters are greedy: an answer joins the first cluster whose first member it equals. "No two agree" is the paper's rule
that the entropy of the clusters must stay below log G.

Departures from the paper and its code:
 1. The answer is the content of the last \boxed{}; equivalence is math-verify's (`equal`).
 2. A completion without an answer is a cluster of its own for the entropy.
 3. The free-form version's verifier model, and its -0.5 for a missing answer, are not part of this reward. Its rule
    that a group without a large enough cluster gets 0 is `min_share` (0.2 there, 0.25 in the verl version).

Command: vigor train --config lab --reward_funcs empo
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.agreement import Equality, Extract, boxed_answer, cluster, equality, score_groups, shares
from vigor.rewards.base import Reward
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass


def empo(*, equal: Equality = "math", min_share: float = 0.0, extract: Extract = boxed_answer) -> Reward:
    """The share of the completion's semantic cluster, in [0, 1].

    Args:
        equal: when two answers are the same: "string", "math" or a function (answer, known) -> bool.
        min_share: a group whose largest share is below this gets 0.
        extract: the answer of a completion's text, None where it has none.

    Raises:
        ValueError: an unknown comparison, or `min_share` outside [0, 1].
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"empo: min_share must lie in [0, 1], got {min_share}.")
    same = equality(equal)

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        share = shares(cluster([extract(texts.completions[row]) for row in rows], same))
        agreed = max(share) * len(rows) > 1 and max(share) >= min_share
        return list(share) if agreed else [0.0] * len(rows)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return score_groups(rollouts, judge)

    return Reward(name="empo", needs=frozenset({"text", "group"}), score=score)
