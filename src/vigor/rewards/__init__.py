"""Rewards by name: one file a method, one line here.

`get("vigor")` is the paper's setting; any key in `get("vigor(ties=index)")` is visibly the user's.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vigor.rewards.base import Reward


@dataclass(frozen=True)
class Method:
    """A line of the registry: where a method lives and what `vigor methods` says of it."""

    name: str
    family: str
    needs: str
    """What the user must have: "prompts", or "prompts + answers"."""
    cost: str
    """What it adds to a step, in passes over the completions."""
    paper: str
    summary: str

    @property
    def module(self) -> str:
        return f"vigor.rewards.{self.name}"


_NONE = "none"
_ANSWERS = "prompts + answers"
_LENGTHS = "prompts + answers + lengths"
_METHODS = (
    Method("vigor", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "rank of -√T·‖∇NLL‖"),
    Method(
        "self_certainty", "intrinsic", "prompts", "forward", "arXiv 2505.19590", "mean KL(uniform ‖ policy): Intuitor"
    ),
    Method("vigor_no_sqrt", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "rank of -‖∇NLL‖"),
    Method("vigor_zscore", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "z-score of -√T·‖∇NLL‖"),
    Method("vigor_raw", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "-√T·‖∇NLL‖ as it is"),
    Method(
        "vigor_focal", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "vigor, weighted by entropy"
    ),
    Method("head_grad_norm", "intrinsic", "prompts", "forward", "own", "rank of -√T·‖∇NLL‖ over the head"),
    Method("logit_grad_norm", "intrinsic", "prompts", "forward", "own", "rank of -√T·‖∇NLL‖ over the logits"),
    Method("entropy", "intrinsic", "prompts", "forward", "arXiv 2505.22660", "- mean token entropy: RENT"),
    Method("em_rl_token", "intrinsic", "prompts", "forward", "arXiv 2505.15134", "- sum of token entropies: EM-RL"),
    Method("em_rl_sequence", "intrinsic", "prompts", "forward", "arXiv 2505.15134", "log π(y): EM-RL"),
    Method("sar", "intrinsic", "prompts", "2 forwards", "arXiv 2509.05489", "perplexity drop due to the question: SAR"),
    Method("logprob", "intrinsic", "prompts", "forward", "own", "rank of the mean log-probability"),
    Method("logprob_sum", "intrinsic", "prompts", "forward", "own", "rank of log π(y)"),
    Method("logprob_min", "intrinsic", "prompts", "forward", "own", "rank of the least token log-probability"),
    Method("mean_prob", "intrinsic", "prompts", "forward", "own", "rank of the mean token probability"),
    Method("max_prob", "intrinsic", "prompts", "forward", "arXiv 1610.02136", "rank of the mean of max π"),
    Method("margin", "intrinsic", "prompts", "forward", "own", "rank of the mean of π₁ - π₂"),
    Method("collision", "intrinsic", "prompts", "forward", "own", "rank of the mean of Σπ²"),
    Method("token_rank", "intrinsic", "prompts", "forward", "own", "rank of - mean log-rank of the tokens"),
    Method("majority_vote", "agreement", "prompts", _NONE, "arXiv 2504.16084", "the group's majority answer: TTRL"),
    Method("empo", "agreement", "prompts", _NONE, "arXiv 2504.05812", "share of the group that agrees: EMPO"),
    Method(
        "co_rewarding_1",
        "agreement",
        "prompts + paraphrases",
        _NONE,
        "arXiv 2508.00410",
        "majority answer of the paraphrased prompt: Co-Reward",
    ),
    Method(
        "co_rewarding_2",
        "agreement",
        "prompts",
        "extra sampling",
        "arXiv 2508.00410",
        "majority answer of an EMA teacher",
    ),
    Method("rlpr", "reference", _ANSWERS, "2 forwards", "arXiv 2506.18254", "gain in the reference's mean probability"),
    Method(
        "verifree", "reference", _ANSWERS, "forward", "arXiv 2505.21493", "probability of the reference, leave-one-out"
    ),
    Method(
        "reference_logprob", "reference", _ANSWERS, "forward", "arXiv 2602.03979", "log-likelihood of the reference"
    ),
    Method("jepo", "reference", _ANSWERS, "forward", "arXiv 2503.19618", "gain in the bound on log π(reference): JEPO"),
    Method("nover", "reference", _ANSWERS, "forward", "arXiv 2505.16022", "rank of the reference's perplexity"),
    Method("accuracy", "verifiable", _ANSWERS, _NONE, "arXiv 2402.03300", "answer equals the reference"),
    Method("multiple_choice", "verifiable", _ANSWERS, _NONE, "arXiv 2511.02463", "the right letter"),
    Method("exact_match", "verifiable", _ANSWERS, _NONE, "arXiv 1606.05250", "answer equals the reference as text"),
    Method("regex_match", "verifiable", _ANSWERS, _NONE, "arXiv 2110.14168", "what a pattern finds is the reference"),
    Method(
        "keyword_chain",
        "verifiable",
        "prompts + answers + keywords",
        _NONE,
        "arXiv 2601.18533",
        "the reference's keywords, in order: RLVRR",
    ),
    Method("unit_tests", "verifiable", "prompts + tests + sandbox", _NONE, "arXiv 2501.12948", "code passes its tests"),
    Method(
        "verpo",
        "verifiable",
        "prompts + tests + sandbox",
        _NONE,
        "arXiv 2601.03525",
        "passed tests, rare ones count more",
    ),
    Method(
        "tiers",
        "verifiable",
        "prompts + answers + keywords",
        _NONE,
        "arXiv 2601.22491",
        "a graded reward in steps: SSL",
    ),
    Method("noisy", "verifiable", _ANSWERS, _NONE, "arXiv 2510.00915", "accuracy through an erring verifier"),
    Method("overlong", "verifiable", "prompts", _NONE, "arXiv 2503.14476", "penalty near the token budget: DAPO"),
    Method("l1_exact", "verifiable", _LENGTHS, _NONE, "arXiv 2503.04697", "accuracy - α·|asked length - T|"),
    Method(
        "l1_max", "verifiable", _LENGTHS, _NONE, "arXiv 2503.04697", "accuracy · (room left below the asked length)"
    ),
    Method("kimi_length", "verifiable", _ANSWERS, _NONE, "arXiv 2501.12599", "short right answers of the group gain"),
    Method(
        "cosine_length", "verifiable", _ANSWERS, _NONE, "arXiv 2502.03373", "accuracy scaled by a cosine of the length"
    ),
    Method("repetition", "verifiable", "prompts", _NONE, "arXiv 2502.03373", "penalty for repeated n-grams"),
    Method("language_consistency", "verifiable", "prompts", _NONE, "arXiv 2501.12948", "share of words in one script"),
    Method("format", "control", "prompts", _NONE, "arXiv 2506.10947", "has a non-empty \\boxed{} answer"),
    Method("random", "control", "prompts", _NONE, "arXiv 2506.10947", "a coin toss"),
    Method("contains", "control", "prompts", _NONE, "arXiv 2506.10947", 'the word "python" occurs'),
    Method(
        "incorrect_label",
        "control",
        "prompts + wrong answers",
        _NONE,
        "arXiv 2506.10947",
        "answer equals a wrong label",
    ),
    Method("inverse", "control", _ANSWERS, _NONE, "arXiv 2506.10947", "1 - accuracy"),
    Method("both", "control", _ANSWERS, _NONE, "arXiv 2506.10947", "format and accuracy at once"),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}

_SPEC = re.compile(r"(?P<name>[a-z_][a-z0-9_]*)(?:\((?P<options>.*)\))?")

_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)
_BARE = re.compile(r"[\w./:+-]+")


def get(spec: str, **options: Any) -> Reward:
    """The reward that a name, or a name with options such as "vigor(ties=index, temperature=1.0)", stands for.

    Its `name` is the spec as given, so that two variants of one method can run side by side.

    Raises:
        ValueError: unknown name or option, or a spec that cannot be read.
    """
    name, written = parse_spec(spec)
    if name not in METHODS:
        raise ValueError(f"unknown reward {name!r}; the rewards are: {', '.join(METHODS)} (see `vigor methods`).")
    factory = getattr(import_module(METHODS[name].module), name)
    chosen = {**written, **options}
    known = inspect.signature(factory).parameters
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(
            f"reward {name!r} has no option {', '.join(map(repr, unknown))}; it has: {', '.join(known) or 'none'}."
        )
    reward: Reward = factory(**chosen)
    shown = ", ".join(f"{key}={_written(value)}" for key, value in chosen.items())
    return replace(reward, name=f"{name}({shown})" if shown else name)


def is_reward_spec(text: str) -> bool:
    """True if the text names one of our rewards, with or without options."""
    match = _SPEC.fullmatch(text.strip())
    return match is not None and match["name"] in METHODS


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """("vigor", {"ties": "index"}) from "vigor(ties=index)"; values are Python literals, bare words or specs.

    A comma inside quotes or brackets belongs to its value: "both(first=format, second=random(p=0.3, seed=1))".

    Raises:
        ValueError: the spec is not of that form.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"cannot read the reward {spec!r}; write a name, or name(option=value, ...).")
    options: dict[str, Any] = {}
    for part in _split(match["options"] or ""):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key.isidentifier() or not value:
            raise ValueError(f"cannot read {part.strip()!r} in the reward {spec!r}; write option=value.")
        if key in options:
            raise ValueError(f"the reward {spec!r} gives the option {key!r} twice.")
        options[key] = _literal(value)
    return match["name"], options


def _split(options: str) -> list[str]:
    """The pieces between the commas that stand outside quotes and brackets; empty pieces are left out."""
    pieces, depth = [""], 0
    for token in _TOKEN.findall(options):
        depth += (token in "([{") - (token in ")]}")
        if token == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece for piece in pieces if piece]


def _written(value: Any) -> str:
    """The value so that a spec with it can be read again; a reward or function by its name."""
    from vigor.rewards.base import Reward

    if isinstance(value, Reward):
        return value.name
    if not isinstance(value, str):
        return str(value.__qualname__) if callable(value) else repr(value)
    bare = _BARE.fullmatch(value) is not None and _literal(value) == value
    return value if bare or is_reward_spec(value) else repr(value)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
