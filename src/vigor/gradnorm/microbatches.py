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
OWN_COST = {"cpu": 32}
"""What a pass costs by itself at the least, in tokens: its Python, and products of few rows, which run slowly.
Elsewhere 1024."""


def own_cost(device: str, sides: int) -> int:
    """What a pass costs by itself, in tokens: the more of them, the less a token costs.

    Args:
        device, sides: as for `most_tokens`.
    """
    return max(OWN_COST.get(device, 1024), ACTIVATIONS // max(1, sides) // 10)


def most_tokens(device: str, tokens: int, sides: int, *, whole: bool, checkpointing: bool) -> int:
    """Most tokens of a micro-batch that the library chooses, for a model that names its decoder.

    Args:
        device: its type.
        tokens: of all rows of the call, padded to the longest, as a training step would have them.
        sides: inputs and outputs of all matrices together, for one token.
        whole: whether the call may need the memory of a training step: where all micro-batches are held for the update
            anyway, and for estimates, which are for speed, unless activations are checkpointed.
        checkpointing: whether activations are computed again.
    """
    least, full = SPEED.get(device, (2048, 4096))
    if not whole:
        half = 0 if checkpointing else tokens // 2
        full = max(least, min(full, half))
    return min(TOKENS, max(full, ACTIVATIONS // max(1, sides)))


def micro_batches(
    lengths: Sequence[int], micro_batch: int | None, most_tokens: int, own_cost: int, apart: Sequence[int] = ()
) -> list[list[int]]:
    """Indices in ascending length, in runs of at most `micro_batch` rows, or, if None, in those that cost least.

    A run is padded to its longest row: it costs that many tokens a row, and `own_cost`. It has at most `most_tokens`,
    or one row; rows on either side of a length in `apart` are never in the same.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost, starts = [0], [0]  # of the best runs of the first n rows: what they cost, and where the last one starts
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best = cost[stop - 1] + (longest + own_cost if micro_batch is None else 1)
        start = stop - 1
        for first in range(stop - 2, -1, -1):
            rows = stop - first
            if rows * longest > most_tokens if micro_batch is None else rows > micro_batch:
                break
            if apart and any(lengths[order[first]] <= n < longest for n in apart):
                break
            through = cost[first] + (rows * longest + own_cost if micro_batch is None else 1)
            if through < best:
                best, start = through, first
        cost.append(best)
        starts.append(start)
    batches, stop = [], len(order)
    while stop:
        batches.append(order[starts[stop] : stop])
        stop = starts[stop]
    return batches[::-1]
