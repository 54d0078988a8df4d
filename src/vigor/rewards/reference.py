r"""Where a reference answer goes: after the completion's own reasoning, in the place of its answer.

Two ways to mark an answer, chosen by `answer`:
 - "boxed": the last \boxed{...} whose braces balance; the opener is "\boxed{", the closer "}".
 - "tags": <answer>...</answer> after the reasoning, the form that the papers of this family prompt for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from vigor.continuation import plain, prompt_and_completion, scorer_of, splice
from vigor.rewards.accuracy import final_answer
from vigor.rewards.boxed import last_boxed
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Answer = Literal["boxed", "tags"]
_TAGGED = re.compile(r"\s*(?:<think>)?.*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_TAGS = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True)
class Slot:
    """How a completion is cut and what is put there."""

    cut: Callable[[str], int | None]
    """Character at which a completion's reasoning ends, its opener included; None where it has no answer."""
    before: str = ""
    """Scored before the reference."""
    after: str = ""
    """Scored after the reference."""
    opener: str | None = None
    """Put at the end of a completion that has no answer, unscored; None leaves such a completion out."""


@dataclass(frozen=True)
class Placed:
    """A reference put after a completion's reasoning, as token ids."""

    context: list[int]
    """The prompt, and the completion as far as it is kept."""
    continuation: list[int]
    """What is scored."""
    reasoning: int
    """Tokens of the context behind the prompt."""


def boxed_cut(text: str) -> int | None:
    r"""The character after the last "\boxed{" whose braces balance."""
    content = last_boxed(text)
    return None if content is None else text.rfind(f"\\boxed{{{content}}}") + len("\\boxed{")


def tags_cut(text: str) -> int | None:
    """The character after "<answer>" in a completion whose tags are exactly right.

    Exactly right: reasoning, </think>, <answer>, the answer, </answer>, and nothing else; each tag once, <think> at the
    very start or, where the prompt wrote it, not at all.
    """
    found = _TAGGED.fullmatch(text)
    tags = _TAGS.findall(text)
    expected = ["</think>", "<answer>", "</answer>"]
    right = tags == expected or (tags == ["<think>", *expected] and text.lstrip().startswith("<think>"))
    return found.start(1) if found is not None and right else None


MARKED: Mapping[Answer, Slot] = {"boxed": Slot(boxed_cut), "tags": Slot(tags_cut)}
"""Where a completion marks its answer; one that does not is left out."""
OPENED: Mapping[Answer, Slot] = {
    "boxed": Slot(boxed_cut, opener=" \\boxed{"),
    "tags": Slot(tags_cut, opener="\n<answer>"),
}
"""As `MARKED`, with the opener put at the end of a completion that marks no answer."""


def slot_of(slots: Mapping[Answer, Slot], answer: Answer, reward: str) -> Slot:
    """The slot for a way to mark answers.

    Raises:
        ValueError: an unknown way.
    """
    if answer not in get_args(Answer):
        raise ValueError(f"{reward}: answer={answer!r} must be one of {', '.join(get_args(Answer))}.")
    return slots[answer]


def references_of(rollouts: Rollouts, column: str, reward: str) -> list[str | None]:
    r"""(B,) reference answers; a worked solution stands for what it boxes, a missing or blank one is None.

    Raises:
        ValueError: the rollouts have no such column.
    """
    if column not in rollouts.columns:
        raise ValueError(
            f"reward {reward!r}: the rollouts have no column {column!r} (columns: {sorted(rollouts.columns)})."
        )
    answers = [final_answer(None if value is None else str(value)) for value in rollouts.columns[column]]
    return [(answer or "").strip() or None for answer in answers]


def placed(
    rollouts: Rollouts, policy: PolicyPass, references: Sequence[str | None], slot: Slot, reward: str
) -> list[Placed | None]:
    """Each row's reference in its slot; None where the completion is left out.

    Left out are rows without a reference or without a counted token, and those without an answer where the slot has no
    opener.

    Raises:
        ValueError: the pass has no tokenizer.
    """
    if policy.tokenizer is None:
        raise ValueError(f"reward {reward!r} puts the reference before the policy: give PolicyPass its tokenizer.")
    found: list[Placed | None] = []
    for (prompt, completion), reference in zip(prompt_and_completion(rollouts), references, strict=True):
        if reference is None or not completion:
            found.append(None)
            continue
        ids, text = plain(policy.tokenizer, completion)
        at = slot.cut(text)
        if at is None and slot.opener is None:
            found.append(None)
            continue
        scored = slot.before + reference + slot.after
        if at is None:
            context, continuation = splice(policy.tokenizer, prompt, ids, len(text), scored, unscored=slot.opener or "")
        else:
            context, continuation = splice(policy.tokenizer, prompt, ids, at, scored)
        found.append(Placed(context, continuation, len(context) - len(prompt)))
    return found


def without_reasoning(rollouts: Rollouts, policy: PolicyPass, references: Sequence[str | None]) -> list[Placed | None]:
    """Each row's reference straight after its prompt; None without a reference or a counted token.

    The rows of one prompt are equal, and equal rows are computed once.
    """
    found: list[Placed | None] = []
    for (prompt, completion), reference in zip(prompt_and_completion(rollouts), references, strict=True):
        if reference is None or not completion:
            found.append(None)
        else:
            found.append(Placed(*splice(policy.tokenizer, prompt, [], 0, reference), 0))
    return found


def texts_of(rows: Sequence[Placed | None]) -> list[tuple[list[int], list[int]] | None]:
    """(context, text) of each placed reference, None for None: what `vigor.rewards.base.Auxiliary` takes."""
    return [None if row is None else (row.context, row.continuation) for row in rows]


def logps_of(policy: PolicyPass, rows: Sequence[Placed | None]) -> list[Tensor | None]:
    """log π of every token of each continuation, None for None."""
    some = [row for row in rows if row is not None]
    values = iter(scorer_of(policy).logps([row.context for row in some], [row.continuation for row in some]))
    return [None if row is None else next(values) for row in rows]
