"""Rollouts: the one value that flows from generation to rewards.

Axes: B rows (completions), P prompts, G completions a prompt (B = P*G, group-major), L prompt + completion tokens,
T completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Message = Mapping[str, Any]
Text = str | Sequence[Message]
"""A prompt or completion: plain text, or a conversation of role/content messages."""


@dataclass(frozen=True)
class BatchTexts:
    """The texts of the rows of all processes, group-major: what a reward that compares completions reads."""

    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Those columns that such a reward names, one value a row."""


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions of one process, with everything a reward may look at.

    Rows are group-major: rows p*G … p*G+G-1 are the completions of one prompt. A process of a distributed run may hold
    parts of groups; rewards therefore score rows, and only the shaping that follows needs whole groups.

    Raises:
        ValueError: the tensors disagree in shape, a completion token is not attended to, or a row's first token is
            marked as a completion token (nothing predicts it).
    """

    input_ids_BL: Int[Tensor, "B L"]
    """int64: prompt and completion, padded on either side."""
    attention_mask_BL: Shaped[Tensor, "B L"]
    """1 on real tokens, 0 on padding; any dtype."""
    completion_mask_BL: Shaped[Tensor, "B L"]
    """Any dtype: 1 on the tokens that the loss counts: the sampled ones, the first EOS included, nothing after it."""
    group_size: int
    """G, the completions sampled for each prompt."""
    prompts: Sequence[Text] = ()
    completions: Sequence[Text] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The data set's other columns, repeated per completion."""
    truncated_B: Bool[Tensor, " B"] | None = None
    """True where sampling stopped at the token budget instead of at an EOS."""
    micro_step: int = 0
    """When the rollouts were sampled, in forward-backward passes since training began: another for each batch."""
    first_row: int = 0
    """Index of this process's first row in the batch of all processes."""
    batch_texts: BatchTexts | None = None
    """The texts of all processes' rows; None where these rows are the whole batch, or no reward compares texts."""

    def __post_init__(self) -> None:
        shape = self.input_ids_BL.shape
        for name in ("attention_mask_BL", "completion_mask_BL"):
            mask = getattr(self, name)
            if mask.shape != shape:
                raise ValueError(f"Rollouts: {name} has shape {tuple(mask.shape)}, but input_ids_BL {tuple(shape)}.")
        if self.group_size < 1:
            raise ValueError(f"Rollouts: group_size must be at least 1, got {self.group_size}.")
        completion, attended = self.completion_mask_BL.bool(), self.attention_mask_BL.bool()
        if (completion & ~attended).any():
            raise ValueError("Rollouts: completion_mask_BL marks tokens that attention_mask_BL leaves out.")
        first_token = attended & (attended.cumsum(dim=1) == 1)
        if (completion & first_token).any():
            row = int((completion & first_token).any(dim=1).nonzero()[0])
            raise ValueError(
                f"Rollouts: row {row} has no prompt: its first token is marked as a completion token, but nothing "
                "predicts it. Give each row at least one prompt token, such as BOS."
            )

    @classmethod
    def from_token_ids(
        cls,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        group_size: int,
        pad_token_id: int,
        device: torch.device | str = "cpu",
        **others: Any,
    ) -> Rollouts:
        """Right-pads ragged token ids into one batch; `others` are the remaining fields.

        Raises:
            ValueError: the two lists have different lengths.
        """
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(f"Rollouts: {len(prompt_ids)} prompts but {len(completion_ids)} completions.")
        rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
        attention = torch.zeros((len(rows), width), dtype=torch.int64)
        completion = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            attention[i, : len(row)] = 1
            completion[i, len(prompt) : len(row)] = 1
        return cls(ids.to(device), attention.to(device), completion.to(device), group_size=group_size, **others)

    def __len__(self) -> int:
        return self.input_ids_BL.shape[0]

    @property
    def lengths_B(self) -> Int[Tensor, " B"]:
        """int64: T, the number of counted completion tokens of each row."""
        return self.completion_mask_BL.bool().sum(dim=1)

    def whole_batch(self) -> tuple[BatchTexts, int]:
        """The texts of whole groups, and the index of this process's first row among them.

        Raises:
            ValueError: these rows are part of a batch whose other texts were not gathered.
        """
        if self.batch_texts is not None:
            return self.batch_texts, self.first_row
        if len(self) % self.group_size:
            raise ValueError(
                f"Rollouts: {len(self)} rows are not whole groups of {self.group_size}, and the other processes' texts "
                "were not gathered. Give all rows of a group, or batch_texts and first_row."
            )
        return BatchTexts(self.completion_texts, self.columns), 0

    @property
    def completion_texts(self) -> list[str]:
        """The completions as plain text (the contents of the messages where they are conversations)."""
        return [text_of(completion) for completion in self.completions]


def text_of(text: Text) -> str:
    """The plain text of a prompt or completion; message contents are joined by newlines.

    A message without content (one that only calls tools) is an empty line; of a list of parts, the text parts count.
    """
    if isinstance(text, str):
        return text
    return "\n".join(_content(message) for message in text)


def _content(message: Message) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part["type"] == "text")


@dataclass(frozen=True)
class Row:
    """One sequence without its padding."""

    ids_L: Int[Tensor, " L"]
    completion_L: Bool[Tensor, " L"]
    positions_L: Int[Tensor, " L"]
    """Where each token stood in the padded batch."""


def real_tokens(ids_BL: Int[Tensor, "B L"], mask_BL: Shaped[Tensor, "B L"]) -> list[tuple[int, ...]]:
    """The tokens of each row that its mask has, as numbers of Python's."""
    rows = zip(ids_BL.tolist(), mask_BL.tolist(), strict=True)
    return [tuple(token for token, real in zip(*row, strict=True) if real) for row in rows]


def strip_padding(
    input_ids_BL: Int[Tensor, "B L"],
    attention_mask_BL: Shaped[Tensor, "B L"],
    completion_mask_BL: Shaped[Tensor, "B L"],
) -> list[Row]:
    """The rows of a batch without their padding, wherever it stands.

    A stripped row starts at position 0, as it did when it was sampled; with absolute positions (GPT-2) a row scored
    with left padding in place would be another sequence.

    Raises:
        ValueError: the tensors are not (B, L), or a row's first token is counted (nothing predicts it).
    """
    shapes = [tuple(t.shape) for t in (input_ids_BL, attention_mask_BL, completion_mask_BL)]
    if len(shapes[0]) != 2 or shapes.count(shapes[0]) != 3:
        raise ValueError(
            f"input_ids, attention_mask and completion_mask must be (B, L) of one shape; got {shapes[0]}, {shapes[1]} "
            f"and {shapes[2]}."
        )
    rows: list[Row] = []
    for ids, attended, counted in zip(
        input_ids_BL, attention_mask_BL.bool(), completion_mask_BL.bool() & attention_mask_BL.bool(), strict=True
    ):
        positions = attended.nonzero().squeeze(1)
        row = Row(ids[positions], counted[positions], positions)
        if row.completion_L[:1].any():
            raise ValueError(
                f"completion_mask marks the first token of row {len(rows)}, but nothing predicts it. Give each row at "
                "least one prompt token, such as BOS."
            )
        rows.append(row)
    return rows


def identical_rows(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows, those with the same tokens and the same counted positions together, in order."""
    groups: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((tuple(row.ids_L.tolist()), tuple(row.completion_L.tolist())), []).append(i)
    return list(groups.values())
