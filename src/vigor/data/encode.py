"""From a prompt to token ids, with the special tokens inside a user's text kept as text.

A tokenizer looks for its control tokens anywhere in the string it is given, so ``<|im_end|>`` typed into a data set
row closes the user's turn. Here such prompts go through a *twin* of the tokenizer in which every control token has
another, unguessable name: what the template wrote is renamed with it, what the row wrote is not, and one ordinary
pass over the whole text gives the ids. Prompts without control tokens take the tokenizer's own path, untouched.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vigor.data.rows import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt, ready for generation.

    Plain text gives ``tokenizer(prompt)["input_ids"]``. A conversation goes through the chat template with
    ``add_generation_prompt``, or with ``continue_final_message`` where the last turn is the assistant's.
    Control tokens written inside the prompt become ordinary text. Control tokens are the tokenizer's special tokens
    and those other added tokens that look like markup (``<tool_call>``, ``[IMG]``). In an assistant's turn only the
    special ones count, because templates and models mean ``<think>`` there.

    Raises DataError for a conversation without a chat template, and for a prompt with control tokens under a
    tokenizer that is not backed by the `tokenizers` library. Errors of the chat template itself
    (`jinja2.TemplateError`) pass upward.
    """
    control = _control_tokens(tokenizer)
    if isinstance(prompt, str):
        if control.everywhere is None or not control.everywhere.search(prompt):
            return list(tokenizer(prompt)["input_ids"])
        return _twin(tokenizer).backend.encode(prompt).ids

    if tokenizer.chat_template is None and "chat_template" not in (chat_template_kwargs or {}):
        raise DataError(
            "the prompts are conversations (lists of role/content messages), but the tokenizer "
            f"{tokenizer.name_or_path!r} has no chat template: give plain text prompts and no --system_prompt, or a "
            "tokenizer with a chat template (instruction-tuned models have one)"
        )
    continued = prompt[-1]["role"] == "assistant"
    options: dict[str, Any] = {
        **(chat_template_kwargs or {}),
        "add_generation_prompt": not continued,
        "continue_final_message": continued,
    }
    messages, hidden = _hide_control_tokens(prompt, control)
    if not hidden:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return list(encoded["input_ids"])

    twin = _twin(tokenizer)
    text = twin.rename(str(tokenizer.apply_chat_template(messages, tokenize=False, **options)))
    for placeholder, written in hidden.items():
        text = text.replace(placeholder, written)
    return twin.backend.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class _ControlTokens:
    """Patterns that find control tokens, longest first as the tokenizer does; None where there are none."""

    everywhere: re.Pattern[str] | None
    special: re.Pattern[str] | None


@dataclass(frozen=True)
class _Twin:
    """The tokenizer's backend with its control tokens under other names: the same ids, unreachable from a row."""

    backend: Tokenizer
    names: dict[str, str]
    pattern: re.Pattern[str]

    def rename(self, text: str) -> str:
        return self.pattern.sub(lambda found: self.names[found[0]], text)


# Listing thousands of added tokens costs milliseconds, so patterns and twins are kept until tokens are added.
_Version = tuple[int, tuple[str, ...]]
_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[_Version, _ControlTokens]] = WeakKeyDictionary()
_twins: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[_Version, _Twin]] = WeakKeyDictionary()


def _version(tokenizer: PreTrainedTokenizerBase) -> _Version:
    return len(tokenizer), tuple(tokenizer.all_special_tokens)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    version = _version(tokenizer)
    known = _controls.get(tokenizer)
    if known is None or known[0] != version:
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        markup = {token.content for token in added if _MARKUP.fullmatch(token.content)}
        known = (version, _ControlTokens(_any_of(special | markup), _any_of(special)))
        _controls[tokenizer] = known
    return known[1]


def _any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted((s for s in strings if s), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _hide_control_tokens(
    prompt: Sequence[Mapping[str, str]], control: _ControlTokens
) -> tuple[list[Message], dict[str, str]]:
    """The messages with a placeholder for every control token in their contents, and what each stands for.

    Only the tokens are hidden, not the whole content, so that a template that trims or splits contents still does.
    """
    nonce = secrets.token_hex(8)
    hidden: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        placeholder = f"\ue000{nonce}t{len(hidden)}\ue001"
        hidden[placeholder] = found[0]
        return placeholder

    messages = []
    for message in prompt:
        pattern = control.special if message["role"] == "assistant" else control.everywhere
        content = message["content"] if pattern is None else pattern.sub(hide, message["content"])
        messages.append({**message, "content": content})
    return messages, hidden


def _twin(tokenizer: PreTrainedTokenizerBase) -> _Twin:
    """The tokenizer's twin, made on first use and again if tokens have been added since."""
    if not tokenizer.is_fast:
        raise DataError(
            f"a prompt holds a control token of {tokenizer.name_or_path!r}, and this tokenizer is not backed by the "
            "tokenizers library, which is needed to keep it as text: use a fast tokenizer, or remove the token from "
            "the prompt"
        )
    version = _version(tokenizer)
    known = _twins.get(tokenizer)
    if known is None or known[0] != version:
        known = (version, _make_twin(tokenizer.backend_tokenizer))
        _twins[tokenizer] = known
    return known[1]


def _make_twin(backend: Tokenizer) -> _Twin:
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    nonce = secrets.token_hex(8)
    names = {
        token["content"]: f"\ue002{nonce}t{token['id']}\ue003"
        for token in state["added_tokens"]
        if token["special"] or _MARKUP.fullmatch(token["content"])
    }
    for token in state["added_tokens"]:
        if token["content"] in names:
            # Normalisers may rewrite the new name; matching it in the raw text keeps it whole.
            token.update(content=names[token["content"]], normalized=False)
    model = state["model"]
    # A control token that is also an entry of the model's vocabulary must go from there too, or a word-level or
    # unigram model finds it in the row's text on its own.
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    twin = Tokenizer.from_str(json.dumps(state))
    moved = [old for old, new in names.items() if twin.token_to_id(new) != backend.token_to_id(old)]
    if moved:
        raise DataError(
            f"the ids of the control tokens {', '.join(sorted(moved)[:5])} do not survive a rename in this tokenizer, "
            "so control tokens inside prompts cannot be kept as text: remove them from the prompts"
        )
    pattern = _any_of(names)
    assert pattern is not None, "a twin is only made for a prompt that holds a control token"
    return _Twin(twin, names, pattern)
