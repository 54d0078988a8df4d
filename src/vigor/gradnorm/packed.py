"""Packed rows: several sequences one after the other in a row, as padding-free training and its collators lay them out.

They are taken apart before a pass: each becomes a row of its own, and the engine makes its own micro-batches of like
length. So a packed sequence has the norm that it has alone, whatever the model does with packed rows: no attention
kernel has to keep its sequences apart, no recurrent state has to be cut, and positions start at 0 in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

OnLogits = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Unpacked:
    """N sequences of a packed (B, L) batch, right-padded to T tokens, in the order of rows and places in them."""

    input_ids_NT: Int[Tensor, "N T"]
    """0 on padding."""
    attention_mask_NT: Bool[Tensor, "N T"]
    completion_mask_NT: Bool[Tensor, "N T"]
    row_N: Int[Tensor, " N"]
    """The packed row of each sequence."""
    column_NT: Int[Tensor, "N T"]
    """Where each token stood in it; 0 on padding."""
    shape: tuple[int, int]
    """(B, L)."""

    def pack(self, x_NT: Shaped[Tensor, "N T"]) -> Shaped[Tensor, "B L"]:
        """One value a token, laid out as the packed batch was; 0 on its padding."""
        x_BL = x_NT.new_zeros(self.shape)
        real = self.attention_mask_NT
        x_BL[self.row_N[:, None].expand_as(real)[real], self.column_NT[real]] = x_NT[real]
        return x_BL

    def reported(self, on_logits: OnLogits) -> OnLogits:
        """A callback that gets places in the packed batch instead of places in the unpacked one."""

        def unpacked(n_M: Tensor, at_M: Tensor, logits_MV: Tensor, token_M: Tensor) -> None:
            on_logits(self.row_N[n_M], self.column_NT[n_M, at_M], logits_MV, token_M)

        return unpacked


def unpack(
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, ...] | None,
    completion_mask: Shaped[Tensor, "B L"],
    *,
    position_ids: Int[Tensor, "B L"] | None = None,
    sequence_ids: Int[Tensor, "B L"] | None = None,
) -> Unpacked:
    """Takes a packed batch apart; one of `position_ids` and `sequence_ids` says where its sequences begin.

    Args:
        input_ids: int64 token ids.
        attention_mask: 1 on real tokens; None if all are. Where sequences end it cannot say.
        completion_mask: 1 on the counted tokens. From labels of transformers' and TRL's collators: `labels != -100`.
        position_ids: a sequence begins where they do not go on by one, and must begin at 0: as transformers'
            `DataCollatorWithFlattening` and TRL's `padding_free=True` have it. Padding that `attention_mask` does not
            name, at position 0 each, counts as sequences of one token.
        sequence_ids: the same id on the tokens of a sequence (transformers' `seq_idx`), other ids on its neighbours;
            negative on padding.

    Raises:
        ValueError: neither or both of the two are given, shapes differ, a sequence begins at another position than 0,
            an id comes back after another, or the first token of a sequence is counted.
    """
    B, L = _check(input_ids, attention_mask, completion_mask, position_ids, sequence_ids)
    real_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if sequence_ids is not None:
        real_BL = real_BL & (sequence_ids >= 0)
    rows: list[int] = []
    columns: list[Tensor] = []
    for b in range(B):
        at_K = real_BL[b].nonzero().squeeze(1)
        if not len(at_K):
            continue
        begins_K = torch.ones_like(at_K, dtype=torch.bool)
        if position_ids is not None:
            places_K = position_ids[b, at_K]
            begins_K[1:] = places_K.diff() != 1
            first = places_K[begins_K]
            if (first != 0).any():
                raise ValueError(
                    f"unpack: in row {b} a sequence begins at position {int(first[first != 0][0])}, but the norm is "
                    "that of the sequence by itself, which begins at position 0. Give position_ids that restart at 0, "
                    "or sequence_ids instead."
                )
        else:
            assert sequence_ids is not None
            ids_K = sequence_ids[b, at_K]
            begins_K[1:] = ids_K.diff() != 0
            ids = ids_K[begins_K].tolist()
            again = next((i for i in ids if ids.count(i) > 1), None)
            if again is not None:
                raise ValueError(
                    f"unpack: in row {b} the sequence id {again} comes back after another. Give the tokens of a "
                    "sequence one after the other, and each sequence an id of its own."
                )
        parts = at_K.tensor_split(begins_K.nonzero().squeeze(1)[1:].cpu())
        rows += [b] * len(parts)
        columns += parts
    first_counted = [i for i, at in enumerate(columns) if completion_mask[rows[i], at[0]]]
    if first_counted:
        i = first_counted[0]
        raise ValueError(
            f"unpack: completion_mask marks the first token of sequence {i} (row {rows[i]}, column "
            f"{int(columns[i][0])}), but nothing predicts it. Give each sequence at least one prompt token, "
            "such as BOS."
        )
    row_N = torch.tensor(rows, dtype=torch.int64, device=input_ids.device)
    longest = max((len(at) for at in columns), default=0)
    column_NT = row_N.new_zeros(len(rows), longest)
    real_NT = torch.zeros_like(column_NT, dtype=torch.bool)
    for i, at in enumerate(columns):
        column_NT[i, : len(at)], real_NT[i, : len(at)] = at, True
    ids_NT = input_ids[row_N[:, None], column_NT].masked_fill(~real_NT, 0)
    counted_NT = completion_mask.bool()[row_N[:, None], column_NT] & real_NT
    return Unpacked(ids_NT, real_NT, counted_NT, row_N, column_NT, (B, L))


def _check(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    position_ids: Tensor | None,
    sequence_ids: Tensor | None,
) -> tuple[int, int]:
    if (position_ids is None) == (sequence_ids is None):
        raise ValueError(
            "unpack: give position_ids or sequence_ids, not both and not neither: one says where the sequences of a "
            "packed row begin."
        )
    named = {
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "position_ids": position_ids,
        "sequence_ids": sequence_ids,
    }
    for name, x in named.items():
        if x is not None and (x.shape != input_ids.shape or x.ndim != 2):
            raise ValueError(
                f"unpack: input_ids has shape {tuple(input_ids.shape)}, but {name} {tuple(x.shape)}; both must be "
                "(B, L). A block-diagonal mask is not needed: position_ids or sequence_ids say what it says."
            )
    B, L = input_ids.shape
    return B, L
