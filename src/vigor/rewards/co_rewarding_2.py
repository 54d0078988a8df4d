r"""Co-rewarding-II: 1 if the answer is the one that most completions of a slowly moving teacher gave.

Paper: "Co-rewarding: Stable Self-supervised RL for Eliciting Reasoning in LLMs", arXiv 2508.00410; code
tmlr-group/Co-rewarding@6c60ea4 `Co-rewarding-II/verl/workers/reward_manager/co_rewarding_II.py`,
`sharding_manager/fsdp_vllm.py`.

    teacher   ← α(t) · policy + (1 - α(t)) · teacher                        before the rollouts of each step t
    α(t)      = α_end + ½ (α_start - α_end) (1 + cos(π (t - 1) / steps))    0.01 → 1e-5
    label(x)  = most common answer among the teacher's G completions of x
    reward(y) = 1[answer(y) = label(x)]; 0 where no teacher completion has an answer

The teacher starts as the policy. VigorTrainer keeps it (`vigor.ema`: float32, the trainable weights alone, so LoRA's
adapters under LoRA), samples from it in the generation batch and hands its texts over as the column
`teacher_completion`; a data set that brings such a column of its own is refused.

Departures from the paper and its code:
 1. The teacher gives as many completions as the policy, G; there 8.
 2. Of equally common answers the first met is the label; the code's rule was not read.
 3. The teacher samples from random numbers of its own, so that watching this reward (weight 0) changes no sample.

Command: vigor train --config lab --reward_funcs co_rewarding_2
"""

from __future__ import annotations

from torch import Tensor

from vigor.ema import CosineRate, TeacherPlan
from vigor.rewards.agreement import Equality, Extract, boxed_answer, equality, majority, matches, score_groups
from vigor.rewards.base import TEACHER, Reward
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass


def co_rewarding_2(
    *,
    start: float = 0.01,
    end: float = 1e-5,
    on_cpu: bool = False,
    equal: Equality = "string",
    extract: Extract = boxed_answer,
) -> Reward:
    """1 for the answer of the teacher's majority, else 0.

    Args:
        start: the teacher's rate α at the first step.
        end: its rate at the last step.
        on_cpu: keeps the teacher's weights in the CPU's memory.
        equal: when two answers are the same: "string", "math" or a function (answer, known) -> bool.
        extract: the answer of a completion's text, None where it has none.

    Raises:
        ValueError: an unknown comparison, or a rate outside [0, 1]. When scoring: rollouts without the teacher's texts.
    """
    same = equality(equal)

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        teacher = [extract(texts.columns[TEACHER][row]) for row in rows]
        return matches([extract(texts.completions[row]) for row in rows], majority(teacher, same), same)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        if TEACHER not in rollouts.whole_batch()[0].columns:
            raise ValueError(
                f"reward 'co_rewarding_2': the rollouts have no column {TEACHER!r} with the teacher's completions. "
                "VigorTrainer samples them; in a loop of your own, sample inside `EMA.swapped`."
            )
        return score_groups(rollouts, judge)

    plan = TeacherPlan(CosineRate(start, end), on_cpu)
    return Reward(name="co_rewarding_2", needs=frozenset({"text", "group"}), score=score, teacher=plan)
