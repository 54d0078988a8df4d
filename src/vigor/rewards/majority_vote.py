r"""Majority vote (TTRL): 1 if the completion's answer is the one that most of the group gave.

Paper: "TTRL: Test-Time Reinforcement Learning", arXiv 2504.16084; code PRIME-RL/TTRL@3e2cc93
`verl/verl/workers/reward_manager/ttrl.py`, `utils/reward_score/ttrl/ttt_metrics.py`.

    label  = most common answer among the G completions of the prompt; of equally common ones the first met
    reward = 1[answer(y) ≡ label]

Votes are counted by the answers' text; math-verify then decides which answers equal the label (`votes`, `check`). A
completion without an answer casts no vote and gets 0; where no completion has one, all get 0.

Votes and training are separable: the paper samples 64, lets all vote and trains on the first 32. That is
`num_generations=64` and `majority_vote(trained=32)`: the others have no opinion (NaN) and thus no advantage.

Departures from the paper and its code:
 1. The answer is the content of the last \boxed{} without white space at its ends; theirs normalises LaTeX further.
    `votes="math"` counts equivalent answers together.
 2. All completions are trained on unless `trained` says otherwise, and G is the run's `num_generations`.
 3. Completions that only vote still pass through the loss with advantage 0, so they count in a token mean.

Command: vigor train --config lab --reward_funcs majority_vote
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.agreement import Equality, Extract, Ties, boxed_answer, equality, majority, matches, score_groups
from vigor.rewards.base import Reward, unshaped
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass


def majority_vote(
    *,
    votes: Equality = "string",
    check: Equality = "math",
    ties: Ties = "first",
    trained: int | None = None,
    extract: Extract = boxed_answer,
) -> Reward:
    """1 for the answer of the majority, else 0.

    Args:
        votes: when two answers are one vote: "string", "math" or a function (answer, known) -> bool.
        check: when an answer equals the label.
        ties: "first", or "none": a tie gives no label, and 0 to all.
        trained: rewards the first so many completions of each group; None rewards all.
        extract: the answer of a completion's text, None where it has none.

    Raises:
        ValueError: an unknown comparison or rule for ties, or `trained` is below 2.
    """
    if trained is not None and trained < 2:
        raise ValueError(
            f"majority_vote: trained={trained} leaves nothing to compare; give at least 2, or None for all."
        )
    same_vote, same_answer = equality(votes), equality(check)
    majority([], ties=ties)

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        answers = [extract(texts.completions[row]) for row in rows]
        return matches(answers, majority(answers, same_vote, ties), same_answer)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return score_groups(rollouts, judge)

    def only_trained(scores_PG: Tensor) -> Tensor:
        rewards_PG = scores_PG.clone()
        rewards_PG[:, trained:] = float("nan")
        return rewards_PG

    shape = unshaped if trained is None else only_trained
    return Reward(name="majority_vote", needs=frozenset({"text", "group"}), score=score, shape=shape)
