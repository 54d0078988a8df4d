r"""Incorrect label: 1 if the answer equals a label that is known to be wrong. A control.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/data/*_incorrect`: there it is a data set, the prompts on which a model's majority answer is wrong, with that
answer in place of the label.

    reward(y) = 1[answer(y) ≡ wrong label]

Where the wrong label comes from:
    source="column"     a data set column, as in the paper.
    source="majority"   the most common wrong answer of the group itself, by its text; of several the first met. It
                        needs the right answers, to know what is wrong.

Departures from the paper and its code:
 1. source="majority" is ours: it makes the control available wherever right answers are known.
 2. Where there is no wrong label (an empty cell, or a group without a wrong answer) there is no reward (NaN).

Command: vigor train --config lab --reward_funcs "incorrect_label(source=majority)"
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from vigor.rewards.accuracy import accuracy, final_answer
from vigor.rewards.agreement import boxed_answer, majority, score_groups
from vigor.rewards.base import Reward
from vigor.rewards.compose import column_of
from vigor.rewards.math_equal import MathVerifier
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass

Source = Literal["column", "majority"]


def incorrect_label(*, source: Source = "column", column: str | None = None, timeout_s: float = 5.0) -> Reward:
    """1 for the wrong label, 0 for any other answer; NaN where there is no wrong label.

    Args:
        source: "column" or "majority".
        column: data set column: of the wrong label (None: `wrong_answer`), or with source="majority" of the right
            answer (None: `answer`).
        timeout_s: seconds that one comparison may take.

    Raises:
        ValueError: another source; with "majority", when scoring, groups that are cut.
    """
    if source not in get_args(Source):
        raise ValueError(f"incorrect_label: source={source!r} must be one of {', '.join(get_args(Source))}.")
    read = column or ("wrong_answer" if source == "column" else "answer")
    verifier = MathVerifier(timeout_s=timeout_s)

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        completions = [texts.completions[row] for row in rows]
        references = [final_answer(column_of(texts, read, "incorrect_label")[row]) for row in rows]
        right = verifier.verify(completions, references)
        answers = [
            boxed_answer(text) if verdict == 0.0 else None for text, verdict in zip(completions, right, strict=True)
        ]
        return verifier.verify(completions, [majority(answers)] * len(rows))

    def of_majority(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return score_groups(rollouts, judge)

    return Reward(
        name="incorrect_label",
        needs=frozenset({"text"} if source == "column" else {"text", "group"}),
        score=accuracy(column=read, timeout_s=timeout_s).score if source == "column" else of_majority,
        columns=(read,),
    )
