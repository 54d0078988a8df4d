"""Micro-batches: which rows are scored in one pass.

Few enough that a pass needs less memory than a training step of the same rows, enough that products run at full speed,
and of like length, for padding is computed too.
"""

from __future__ import annotations

from collections.abc import Sequence

ACTIVATIONS, LOGITS, TOKENS = 1 << 25, 1 << 28, 16_384
"""Most inputs and outputs of linear maps (numbers), most logits where the head cannot be run apart, and most tokens of
a micro-batch chosen by the library. It is to need less memory than a training step of the same rows."""
SPEED = {"cpu": (512, 2048)}
"""Tokens at which matrix products run near full speed, and at which nothing more is gained. More activations are
allowed to reach the former anyway, and the latter where it is no more than half of the call's tokens and activations
are not checkpointed, or the call is `whole`. Elsewhere (2048, 4096)."""
ENOUGH, PADDING = 256, 0.15
"""Once a micro-batch holds this many tokens, the next longer row joins only if at most this share is padding."""


def most_tokens(device: str, tokens: int, sides: int, *, whole: bool, checkpointing: bool) -> int:
    """Most tokens of a micro-batch that the library chooses, for a model that names its decoder.

    Args:
        device: its type.
        tokens: of all rows of the call.
        sides: inputs and outputs of all matrices together, for one token.
        whole: whether the call may need the memory of a training step: where all micro-batches are held for the update
            anyway, and for estimates, which are for speed.
        checkpointing: whether activations are computed again.
    """
    least, full = SPEED.get(device, (2048, 4096))
    if not whole:
        half = 0 if checkpointing else tokens // 2
        full = max(least, min(full, half))
    return min(TOKENS, max(full, ACTIVATIONS // max(1, sides)))


def micro_batches(
    lengths: list[int], micro_batch: int | None, most_tokens: int, apart: Sequence[int] = ()
) -> list[list[int]]:
    """Indices in ascending length, in runs of at most `micro_batch` rows, or, if None, of like length; rows on either
    side of a length in `apart` are never together."""
    batches: list[list[int]] = []
    real = 0
    for b in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rows = len(batches[-1]) + 1 if batches else 1
        tokens = rows * lengths[b]  # b is the longest so far, and all are padded to it
        if micro_batch is not None:
            fits = rows <= micro_batch
        else:
            wasteful = real >= ENOUGH and tokens - real - lengths[b] > PADDING * tokens
            fits = tokens <= most_tokens and not wasteful
        if batches and any(lengths[batches[-1][-1]] <= n < lengths[b] for n in apart):
            fits = False
        if batches and fits:
            batches[-1].append(b)
            real += lengths[b]
        else:
            batches.append([b])
            real = lengths[b]
    return batches
