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
_METHODS = (
    Method("vigor", "intrinsic", "prompts", "forward + backward", "arXiv 2605.09920", "rank of -√T·‖∇NLL‖"),
    Method(
        "self_certainty", "intrinsic", "prompts", "forward", "arXiv 2505.19590", "mean KL(uniform ‖ policy): Intuitor"
    ),
    Method("accuracy", "verifiable", "prompts + answers", _NONE, "arXiv 2402.03300", "answer equals the reference"),
    Method("format", "control", "prompts", _NONE, "arXiv 2506.10947", "has a non-empty \\boxed{} answer"),
    Method("random", "control", "prompts", _NONE, "arXiv 2506.10947", "a coin toss"),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}

_SPEC = re.compile(r"(?P<name>[a-z_][a-z0-9_]*)(?:\((?P<options>.*)\))?")


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
    shown = ", ".join(f"{key}={value}" for key, value in chosen.items())
    return replace(reward, name=f"{name}({shown})" if shown else name)


def is_reward_spec(text: str) -> bool:
    """True if the text names one of our rewards, with or without options."""
    match = _SPEC.fullmatch(text.strip())
    return match is not None and match["name"] in METHODS


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """("vigor", {"ties": "index"}) from "vigor(ties=index)"; values are Python literals or bare words.

    Raises:
        ValueError: the spec is not of that form.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"cannot read the reward {spec!r}; write a name, or name(option=value, ...).")
    options: dict[str, Any] = {}
    for part in filter(None, (match["options"] or "").split(",")):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key.isidentifier() or not value:
            raise ValueError(f"cannot read {part.strip()!r} in the reward {spec!r}; write option=value.")
        if key in options:
            raise ValueError(f"the reward {spec!r} gives the option {key!r} twice.")
        options[key] = _literal(value)
    return match["name"], options


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
