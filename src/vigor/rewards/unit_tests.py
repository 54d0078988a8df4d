"""Unit tests: does the completion's code pass the tests that come with the prompt?

Method: execution rewards as in DeepSeek-R1 (arXiv 2501.12948); the share of passed tests as in CURE
(Gen-Verse/CURE@69fe174 `optimization/reward.py`).

    reward(y) = 1[all tests pass]      or, with partial=True,      tests passed / tests

The code is the last fenced block of the completion, or all of it where there is none.

The code runs in bubblewrap (`vigor.evaluation.code_tasks.run_tests`, a pool of sandboxes that are used again). Where
bubblewrap cannot run, the reward is refused as it is made, before any model is loaded. Another `runner` is a function

    run(codes: list[str], tests: list[Any]) -> list[list[bool]]

which says for each code which of its tests pass; `tests` holds the data set's cells. Rewards lie below `evaluation` and
know the sandbox by name only, as they know a runner of the user's.

Departures from the papers:
 1. A row without tests has no reward (NaN).

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B
         --reward_funcs unit_tests
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.compose import column_of, imported
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Runner = Callable[[list[str], list[Any]], Sequence[Sequence[bool]]]
"""(codes, tests) -> for each code, whether it passes each of its tests."""

SANDBOX = "vigor.evaluation.code_tasks.run_tests"
"""The runner that runs code in bubblewrap."""

_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def code_of(text: str) -> str:
    """The last fenced block of a completion; the whole text where there is none."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1]) if blocks else text


def runner_of(runner: Runner | str, unsafe_local_exec: bool, reward: str) -> Runner:
    """The function that runs the tests, known to work here if it is ours.

    Without isolation it warns of what that means (RuntimeWarning).

    Raises:
        ValueError: bubblewrap cannot run here, the dotted path names nothing, or isolation is given up beside a runner
            that answers for its own.
    """
    if unsafe_local_exec:
        if runner != SANDBOX:
            raise ValueError(
                f"reward {reward!r}: unsafe_local_exec=True is for the runner that comes with vigor; {runner!r} "
                "isolates code in its own way, or not. Give one of the two."
            )
        without = imported("vigor.evaluation.sandbox.Sandbox", reward)(unsafe_local_exec=True)
        return functools.partial(imported(SANDBOX, reward), runner=without)
    if runner == SANDBOX and (why := _no_sandbox()) is not None:
        raise ValueError(
            f'reward {reward!r} runs generated code: {why} As options: "{reward}(runner=my_module.my_function)", or '
            f'"{reward}(unsafe_local_exec=True)", where the code can do on this machine whatever you can.'
        )
    return imported(runner, reward) if isinstance(runner, str) else runner


@functools.cache
def _no_sandbox() -> str | None:
    """Why no sandbox can be started here, and the remedy; None where one was."""
    try:
        imported("vigor.evaluation.sandbox.check", "unit_tests")()
    except RuntimeError as error:
        return str(error)
    return None


def run_tests(runner: Runner, texts: Sequence[str], tests: Sequence[Any], reward: str) -> list[list[bool] | None]:
    """For each completion, which tests its code passes; None where there are no tests.

    Raises:
        ValueError: the runner answered for another number of codes.
    """
    rows = [i for i, cell in enumerate(tests) if cell]
    verdicts = runner([code_of(texts[i]) for i in rows], [tests[i] for i in rows]) if rows else []
    if len(verdicts) != len(rows):
        raise ValueError(f"reward {reward!r}: the runner got {len(rows)} codes and answered for {len(verdicts)}.")
    passed: list[list[bool] | None] = [None] * len(tests)
    for i, verdict in zip(rows, verdicts, strict=True):
        passed[i] = list(map(bool, verdict))
    return passed


def unit_tests(
    *, runner: Runner | str = SANDBOX, column: str = "tests", partial: bool = False, unsafe_local_exec: bool = False
) -> Reward:
    """1 if the code passes all its tests, else 0; NaN where the row has no tests.

    Args:
        runner: the function that runs the tests, or the dotted path to it; by default in bubblewrap.
        column: data set column with the tests, in the form that the runner reads.
        partial: the share of passed tests instead.
        unsafe_local_exec: run the code WITHOUT isolation, with your rights on this machine: it can read, change and
            delete your files, read your keys and use the network. For machines that can be thrown away.

    Raises:
        ValueError: no sandbox can run here, or no such runner; when scoring, one that answers for another number of
            codes.
    """
    run = runner_of(runner, unsafe_local_exec, "unit_tests")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        values: list[float | None] = []
        tests = column_of(rollouts, column, "unit_tests")
        for passed in run_tests(run, rollouts.completion_texts, tests, "unit_tests"):
            share = sum(passed) / len(passed) if passed else None
            values.append(share if share is None or partial else float(share == 1.0))
        return from_values(values, rollouts)

    return Reward(name="unit_tests", needs=frozenset({"text"}), score=score, columns=(column,))
