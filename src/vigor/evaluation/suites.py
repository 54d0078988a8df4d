"""The benchmarks of `vigor eval` and the suites that they form. Plain names: no harness, no data, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Family = Literal["math", "code", "choice", "instructions", "lab"]

TASK_FOLDER = Path(__file__).parent / "tasks"
"""The task files, for `lm_eval --include_path`."""

TRAINING_PROMPT = "Let’s think step by step and output the final answer within \\boxed{}."
"""The system prompt of the VIGOR paper's training on MATH, 3B settings (its `config_demo.yaml`)."""


class EvalError(ValueError):
    """An evaluation that cannot be run as asked; the message says what, where, why and the remedy."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its name on the command line, and what it needs."""

    name: str
    family: Family
    summary: str

    @property
    def task(self) -> str:
        """Its name in lm-evaluation-harness."""
        return "vigor_" + self.name.replace(":", "_").replace("-", "_")

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs code that the model wrote."""
        return self.family == "code"


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("gsm8k", "math", "GSM8K test, 1,319 word problems"),
        Benchmark("math500", "math", "MATH-500"),
        Benchmark("amc", "math", "AMC 2022 and 2023, 83 problems, 8 samples at temperature 0.6"),
        Benchmark("aime24", "math", "AIME 2024, 30 problems, 8 samples at temperature 0.6"),
        Benchmark("aime25", "math", "AIME 2025, 30 problems, 8 samples at temperature 0.6"),
        Benchmark("humaneval", "code", "HumanEval, 164 functions"),
        Benchmark("mbpp", "code", "MBPP sanitized, test split, 257 programs"),
        Benchmark("livecodebench", "code", "LiveCodeBench, releases v5 and v6, 342 problems"),
        Benchmark("cruxeval", "code", "CRUXEval-O, 800 output predictions"),
        Benchmark("mmlu_pro", "choice", "MMLU-Pro, 12,032 questions with up to ten options"),
        Benchmark("ifeval", "instructions", "IFEval, 541 prompts with checkable instructions"),
        Benchmark("lab:math", "lab", "the task that the lab trains on, 4 samples at temperature 1"),
        Benchmark("lab:math-hard", "lab", "the same with larger numbers"),
        Benchmark("lab:code", "lab", "the output of short programs"),
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "paper": ("gsm8k", "math500", "amc", "livecodebench", "cruxeval", "mmlu_pro", "ifeval"),
    "math": ("gsm8k", "math500", "amc", "aime24", "aime25"),
    "code": ("humaneval", "mbpp", "livecodebench", "cruxeval"),
    "general": ("mmlu_pro", "ifeval"),
    "lab": ("lab:math", "lab:math-hard", "lab:code"),
}


def select(tasks: Sequence[str] | None, suite: str | None) -> list[Benchmark]:
    """The benchmarks of the named tasks, of a suite, or of both, in their order and each once.

    Raises EvalError for an unknown task or suite, and where neither is given.
    """
    if suite is not None and suite not in SUITES:
        raise EvalError(f"--suite {suite}: there is no such suite; choose one of {', '.join(SUITES)}.")
    names = [*(SUITES[suite] if suite is not None else ()), *(tasks or ())]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise EvalError(f"--tasks {' '.join(unknown)}: there is no such task; choose from {', '.join(BENCHMARKS)}.")
    if not names:
        raise EvalError(f"nothing to evaluate: name --tasks ({', '.join(BENCHMARKS)}) or a --suite.")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def system_prompt(benchmark: Benchmark, prompt: str) -> str | None:
    """What is put before a question: ``prompt`` is "training", "none", or a text for every task.

    "training" concerns mathematics only; the other tasks ask for their format in the question itself.
    """
    if prompt == "training":
        return TRAINING_PROMPT if benchmark.family == "math" else None
    return None if prompt == "none" else prompt
