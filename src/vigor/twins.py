"""Two wordings of one question side by side: rows 2k and 2k+1 of a data set, kept in one generation batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


def check_twins(pairs: Sequence[Any], column: str, prompts_a_batch: int) -> None:
    """Refuses a data set whose rows 2k and 2k+1 are not pairs, and a batch that would cut a pair in two.

    Args:
        pairs: the column that pairs them: one value a row.
        column: its name.
        prompts_a_batch: P, the prompts of a generation batch.

    Raises:
        ValueError: an odd number of rows or of prompts a batch, a row without its twin, or a value that several pairs
            share.
    """
    if prompts_a_batch % 2:
        raise ValueError(
            f"a generation batch of {prompts_a_batch} prompts cuts a pair in two: make it an even number, for example "
            f"{prompts_a_batch + 1} (per_device_train_batch_size × processes × steps_per_generation / num_generations)."
        )
    if len(pairs) % 2:
        raise ValueError(f"the data set has {len(pairs)} rows: two wordings of each question are an even number.")
    seen: set[str] = set()
    for row in range(0, len(pairs), 2):
        if pairs[row] != pairs[row + 1]:
            raise ValueError(
                f"rows {row} and {row + 1} of the data set are no pair: {column}={pairs[row]!r} and "
                f"{pairs[row + 1]!r}. Put the two wordings of a question one after the other, with an equal {column!r}."
            )
        if repr(pairs[row]) in seen:
            raise ValueError(
                f"rows {row} and {row + 1} of the data set repeat {column}={pairs[row]!r}: give each question another."
            )
        seen.add(repr(pairs[row]))


class TwinSampler(Sampler[int]):
    """Row numbers from a sampler of pairs: for pair k first 2k, then 2k+1, each `repeats` times in a row."""

    def __init__(self, pairs: Sampler[int], repeats: int) -> None:
        self.pairs = pairs
        self.repeats = repeats

    def __iter__(self) -> Iterator[int]:
        for pair in self.pairs:
            for row in (2 * pair, 2 * pair + 1):
                yield from [row] * self.repeats

    def __len__(self) -> int:
        return 2 * self.repeats * len(self.pairs)  # type: ignore[arg-type]  # TRL's has a length


def twin_sampler(trainer: Any, data: Any, *, train: bool) -> TwinSampler | None:
    """The order of the rows where a reward compares twins, else None.

    As in TRL's own sampler a generation batch comes once for each update that is made from it.

    Raises:
        ValueError: see `check_twins`.
    """
    if (column := trainer.twin_column) is None:
        return None
    args = trainer.args
    if not train:
        batch = args.per_device_eval_batch_size * trainer.accelerator.num_processes
        check_twins(list(data[column]), column, batch // trainer.num_generations_eval)
        pairs = RepeatSampler(range(len(data) // 2), 1, seed=args.seed)
        return TwinSampler(pairs, trainer.num_generations_eval)
    prompts = args.generation_batch_size // trainer.num_generations
    check_twins(list(data[column]), column, prompts)
    repeats = trainer.num_iterations * args.steps_per_generation
    pairs = RepeatSampler(range(len(data) // 2), 1, prompts // 2, repeats, trainer.shuffle_dataset, args.seed)
    return TwinSampler(pairs, trainer.num_generations)
