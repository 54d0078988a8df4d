"""For the tests of `vigor eval`: a tiny model with a byte tokenizer, a model that knows the answers, a few problems."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vigor.cli import main
from vigor.evaluation import data, results
from vigor.evaluation import model as evaluated
from vigor.evaluation.suites import BENCHMARKS, TRAINING_PROMPT

Answer = Callable[[str, Mapping[str, str]], str]
"""(benchmark, document) -> what the model writes."""


def tiny_model(folder: Path, *, seed: int = 0, chat: bool = False) -> str:
    """A random model of two layers that reads bytes; its context holds every benchmark's prompts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    if chat:
        fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2**17,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Oracle(LM):
    """Answers every document of the named benchmarks with a function of it; counts what it is asked."""

    def __init__(self, names: Sequence[str], answer: Answer, data_dir: str | None) -> None:
        super().__init__()
        self.asked = 0
        self._texts = {doc["prompt"]: answer(name, doc) for name in names for doc in data.documents(name, data_dir)}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.asked += len(requests)
        return [self._texts[request.args[0].removeprefix(f"{TRAINING_PROMPT}\n\n")] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise AssertionError("no benchmark asks for log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise AssertionError("no benchmark asks for log-likelihoods")


def evaluate_with(
    answer: Answer, names: Sequence[str], folder: Path, patch: pytest.MonkeyPatch, data_dir: Path | None, *more: str
) -> dict[str, Any]:
    """results.json of the command itself; in place of the tiny model's back-end a function answers."""
    where = None if data_dir is None else str(data_dir)
    patch.setattr(evaluated, "load", lambda *args, **kwargs: Oracle(names, answer, where))
    model = str(folder / "model")
    if not os.path.isdir(model):
        tiny_model(folder / "model")
    out = folder / "out"
    flags = [] if where is None else ["--data_dir", where]
    flags += ["--output_dir", str(out), "--cache_dir", str(folder / f"cache-{id(answer)}"), *more]
    assert main(["eval", model, "--tasks", *names, *flags]) == 0
    return results.read(out)


def right(name: str, doc: Mapping[str, str]) -> str:
    """The reference in the form that the benchmark asks for."""
    row, gold = json.loads(doc["row"]), doc["gold"]
    if BENCHMARKS[name].family in ("math", "lab"):
        return f"First this, then that. So the answer is \\boxed{{{gold}}}."
    if name == "mmlu_pro":
        return f"Two of them cannot be. Thus the answer is ({gold})."
    if name == "cruxeval":
        return f"It runs through.\n\nassert f({row['input']}) == {gold}"
    if name == "humaneval":
        return f"Here it is:\n```python\n{row['prompt']}{gold}\n```\nThat is all."
    if name == "mbpp":
        return f"```python\n{gold}\n```"
    return f"```python\n{looked_up(row)}\n```"


def wrong(name: str, doc: Mapping[str, str]) -> str:
    """An answer of the same form that is not right."""
    row, gold = json.loads(doc["row"]), doc["gold"]
    if BENCHMARKS[name].family in ("math", "lab"):
        return f"So the answer is \\boxed{{{perturbed(gold)}}}."
    if name == "mmlu_pro":
        return f"Thus the answer is ({'B' if gold == 'A' else 'A'})."
    if name == "cruxeval":
        return f"assert f({row['input']}) == ('wrong', {gold})"
    if name == "humaneval":
        return f"```python\ndef {row['entry_point']}(*args, **kwargs):\n    return 'wrong'\n```"
    if name == "mbpp":
        with warnings.catch_warnings():  # some references hold invalid escapes
            warnings.simplefilter("ignore")
            names = [node.name for node in ast.parse(gold).body if isinstance(node, ast.FunctionDef)]
        return (
            "```python\n" + "\n".join(f"def {name}(*args, **kwargs):\n    return 'wrong'" for name in names) + "\n```"
        )
    return f"```python\n{looked_up(row, wrong=True)}\n```"


def perturbed(gold: str) -> str:
    """Another number: one more than an integer, else one that no benchmark has for an answer."""
    return str(int(gold) + 1) if gold.lstrip("-").isdigit() else "104729"


def looked_up(row: Mapping[str, Any], *, wrong: bool = False) -> str:
    """LiveCodeBench has no reference solutions: a program that looks each test's answer up, or alters it."""
    tests = row["public_test_cases"]
    if tests[0]["testtype"] == "stdin":
        answers = {test["input"]: test["output"] for test in tests}
        return f"answers = {answers!r}\nprint({'-1, ' if wrong else ''}answers[sys.stdin.read()], end='')"
    calls = [([json.loads(line) for line in t["input"].split("\n")], json.loads(t["output"])) for t in tests]
    body = f"        found = next(y for x, y in {calls!r} if x == list(args))\n"
    body += f"        return {'[found, found]' if wrong else 'found'}\n"
    return f"class Solution:\n    def {row['metadata']['func_name']}(self, *args):\n{body}"


PROBLEMS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"id": "gsm8k/test/0", "problem": "A hen lays 3 eggs a day. How many in 400 days?", "answer": "1200"},
        {"id": "gsm8k/test/1", "problem": "Ann has 5 pens and loses 2. How many are left?", "answer": "3"},
    ],
    "math500": [
        {"problem": "Halve $\\pi$.", "answer": "\\frac{\\pi}{2}", "level": 1, "subject": "Algebra", "solution": "s"},
        {
            "problem": "Name the taller, Eve or Bo.",
            "answer": "\\text{Eve}",
            "level": 2,
            "subject": "C",
            "solution": "t",
        },
    ],
    "amc": [
        {"id": "amc83/0", "problem": "What is $100+42$?", "answer": "142"},
        {"id": "amc83/1", "problem": "What is $3-7$?", "answer": "-4"},
    ],
    "aime24": [{"id": "aime24/60", "problem": "Find $200+4$.", "answer": "204"}],
    "aime25": [
        {"id": "aime25/i/1", "problem": "Find $7\\cdot10$.", "answer": "70"},
        {"id": "aime25/ii/1", "problem": "Find $4\\cdot7$.", "answer": "28"},
    ],
    "humaneval": [
        {
            "id": "HumanEval/0",
            "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """The sum of xs."""\n',
            "answer": "    return sum(xs)\n",
            "entry_point": "total",
            "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
        }
    ],
    "mbpp": [
        {
            "id": "mbpp/11",
            "prompt": "Write a function to double a number.",
            "answer": "def double(x):\n    return 2 * x",
            "task_id": 11,
            "split": "test",
            "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
            "test_imports": [],
        }
    ],
    "livecodebench": [
        {
            "id": "lcb/abc1_a",
            "prompt": "Add two numbers.\n\nSample Input 1\n\n2 3",
            "answer": None,
            "starter_code": "",
            "platform": "atcoder",
            "contest_id": "abc1",
            "difficulty": "easy",
            "metadata": {},
            "public_test_cases": [{"input": "2 3\n", "output": "5", "testtype": "stdin"}],
            "private_test_cases": [{"input": "2 4\n", "output": "6", "testtype": "stdin"}],
        },
        {
            "id": "lcb/7",
            "prompt": "Reverse a list.",
            "answer": None,
            "starter_code": "class Solution:\n    def flip(self, xs: List[int]) -> List[int]:\n        ",
            "platform": "leetcode",
            "contest_id": "weekly-1",
            "difficulty": "easy",
            "metadata": {"func_name": "flip"},
            "public_test_cases": [{"input": "[1, 2]", "output": "[2, 1]", "testtype": "functional"}],
            "private_test_cases": [{"input": "[3]", "output": "[3]", "testtype": "functional"}],
        },
    ],
    "cruxeval": [
        {
            "id": "cruxeval/sample_0",
            "answer": "'ab'",
            "code": "def f(s):\n    return s[::-1]",
            "input": "'ba'",
            "output": "'ab'",
        }
    ],
    "mmlu_pro": [
        {
            "id": "mmlu_pro/70",
            "prompt": "Which is a metal?",
            "answer": "B",
            "options": ["Air", "Tin"],
            "subject": "law",
        },
        {"id": "mmlu_pro/71", "prompt": "Which is even?", "answer": "C", "options": ["1", "3", "4"], "subject": "math"},
    ],
    "ifeval": [
        {
            "id": "ifeval/1000",
            "prompt": "Write two words without a comma, all in lower case.",
            "answer": None,
            "key": 1000,
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        },
        {
            "id": "ifeval/1001",
            "prompt": "Write at least 4 words.",
            "answer": None,
            "key": 1001,
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"relation": "at least", "num_words": 4}],
        },
    ],
}
for number, problem in enumerate(PROBLEMS["math500"]):
    problem["unique_id"] = f"test/algebra/{number}.json"
    problem["id"] = f"math500/{problem['unique_id']}"


def write_problems(folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]] = PROBLEMS) -> Path:
    """A data folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in rows.items():
        text = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
        (folder / data.SOURCES[name].file).write_text(text, "utf-8")
    return folder
