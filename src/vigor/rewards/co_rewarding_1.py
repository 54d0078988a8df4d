r"""Co-rewarding-I (Co-Reward): 1 if the answer is the one that most completions of the paraphrased question gave.

Paper: "Co-rewarding: Stable Self-supervised RL for Eliciting Reasoning in LLMs", arXiv 2508.00410, first version titled
"Co-Reward"; code tmlr-group/Co-rewarding@6c60ea4 `Co-rewarding-I/verl/workers/reward_manager/co_reward.py`.

    label(x)  = most common answer among the completions of x', the other wording of the question x
    reward(y) = 1[answer(y) = label(x)]; 0 where no completion of x' has an answer

Both wordings are prompts of the data set and both are trained on. Rows 2k and 2k+1 are the two wordings of one question
and share a value of their own in the column `pair`; VigorTrainer keeps them in one generation batch. Paraphrases come
with the data: `python -m vigor.lab.paraphrase` makes them for the lab's tasks, a language model for others.

Departures from the paper and its code:
 1. Of equally common answers the first met is the label; the code's rule was not read.
 2. White space at the ends of an answer does not count.

Command: python -m vigor.lab.paraphrase --task lab:math --questions 2048 --out pairs.jsonl &&
    vigor train --config lab --prompts pairs.jsonl --reward_funcs co_rewarding_1
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.agreement import Equality, Extract, boxed_answer, equality, majority, matches, score_groups
from vigor.rewards.base import Reward
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass


def co_rewarding_1(*, column: str = "pair", equal: Equality = "string", extract: Extract = boxed_answer) -> Reward:
    """1 for the majority's answer on the other wording, else 0.

    Args:
        column: data set column with one value for the two wordings of a question, and another for each question.
        equal: when two answers are the same: "string", "math" or a function (answer, known) -> bool.
        extract: the answer of a completion's text, None where it has none.

    Raises:
        ValueError: an unknown comparison. When scoring: a batch that does not hold both wordings of a question once.
    """
    same = equality(equal)

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        twins = _twins(texts, rows, column)
        label = majority([extract(texts.completions[row]) for row in twins], same)
        return matches([extract(texts.completions[row]) for row in rows], label, same)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        if column not in rollouts.whole_batch()[0].columns:
            raise ValueError(
                f"reward 'co_rewarding_1': the rollouts have no column {column!r} (columns: "
                f"{sorted(rollouts.columns)})."
            )
        return score_groups(rollouts, judge)

    return Reward(name="co_rewarding_1", needs=frozenset({"text", "group", "twin"}), score=score, columns=(column,))


def _twins(texts: BatchTexts, rows: range, column: str) -> range:
    """The rows of the group that answers the other wording."""
    size, pair = len(rows), texts.columns[column][rows.start]
    starts = [s for s in range(0, len(texts.completions), size) if texts.columns[column][s] == pair]
    if len(starts) != 2:
        raise ValueError(
            f"reward 'co_rewarding_1': the generation batch of {len(texts.completions) // size} prompts holds "
            f"{len(starts)} with {column}={pair!r}, not 2. The two wordings of a question must be rows 2k and 2k+1 of "
            f"the data set, with a value of their own in {column!r}, and a generation batch an even number of prompts."
        )
    start = starts[1] if starts[0] == rows.start else starts[0]
    return range(start, start + size)
