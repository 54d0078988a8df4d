"""VeRPO: a passed unit test counts by how rarely the group passes it, beside passing them all.

Paper: "VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation", arXiv 2601.03525. Only its abstract has
been read: it names a sum of the weights of passed tests, weights by each test's difficulty as estimated from the
execution statistics of training, and the outcome of all tests beside it.

    p_j       = share of the group's G codes that pass test j
    w_j       = (1 - p_j) / Σ_k (1 - p_k)          equal weights where every code passes every test
    dense_i   = Σ_j w_j·1[code i passes test j]
    reward_i  = (1 - β)·dense_i + β·1[code i passes all tests],   β = 1/2

Departures from the paper:
 1. The form of w_j and of the mixture is ours; the abstract gives neither.
 2. The statistics are those of the group itself, not of training so far.
 3. A row without tests has no reward (NaN).

Runs code as `unit_tests` does: in bubblewrap.

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B
         --reward_funcs verpo
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vigor.rewards.agreement import score_groups
from vigor.rewards.base import Reward
from vigor.rewards.compose import column_of
from vigor.rewards.unit_tests import SANDBOX, Runner, run_tests, runner_of
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass


def difficulty_weights(passed_GJ: Sequence[Sequence[bool]]) -> list[float]:
    """(J,) weights of the tests, not negative and with sum 1, from which codes pass which tests."""
    failed_J = [sum(not passed for passed in test) / len(passed_GJ) for test in zip(*passed_GJ, strict=True)]
    total = sum(failed_J)
    return [failed / total if total else 1 / len(failed_J) for failed in failed_J]


def verpo_rewards(passed_GJ: Sequence[Sequence[bool]], outcome_weight: float = 0.5) -> list[float]:
    """(G,) rewards in [0, 1] of one prompt's codes, from a table of G codes by J tests.

    Raises:
        ValueError: rows of different lengths.
    """
    weights_J = difficulty_weights(passed_GJ)
    dense_G = [sum(w for w, passed in zip(weights_J, code, strict=True) if passed) for code in passed_GJ]
    return [
        (1 - outcome_weight) * dense + outcome_weight * all(code)
        for dense, code in zip(dense_G, passed_GJ, strict=True)
    ]


def verpo(
    *,
    runner: Runner | str = SANDBOX,
    column: str = "tests",
    outcome_weight: float = 0.5,
    unsafe_local_exec: bool = False,
) -> Reward:
    """The weighted tests and the outcome, in [0, 1]; NaN where the row has no tests.

    Args:
        runner: the function that runs the tests, or the dotted path to it, see `unit_tests`.
        column: data set column with the tests, the same number for every row of a group.
        outcome_weight: β, in [0, 1].
        unsafe_local_exec: run the code WITHOUT isolation, see `unit_tests`.

    Raises:
        ValueError: no sandbox can run here, no such runner, or β outside [0, 1]; when scoring, groups that are cut, or
            verdicts on different numbers of tests within one group.
    """
    if not 0 <= outcome_weight <= 1:
        raise ValueError(f"verpo: outcome_weight={outcome_weight} must lie in [0, 1].")
    run = runner_of(runner, unsafe_local_exec, "verpo")

    def judge(texts: BatchTexts, rows: range) -> list[float | None]:
        tests = column_of(texts, column, "verpo")
        passed = run_tests(run, [texts.completions[row] for row in rows], [tests[row] for row in rows], "verpo")
        table = [code for code in passed if code]
        found = iter(verpo_rewards(table, outcome_weight) if table else [])
        return [next(found) if code else None for code in passed]

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return score_groups(rollouts, judge)

    return Reward(name="verpo", needs=frozenset({"text", "group"}), score=score, columns=(column,))
