"""Reward functions of the user's: what goes wrong in one says which function, at which step, and what it gave back."""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import iscoroutinefunction
from numbers import Real
from typing import Any

from vigor.terminal import printable

NOTICE_S = 60.0
"""Seconds after which a reward function that has not come back is named on stderr; then after twice that, and so on."""
_running: dict[str, float] = {}
"""Functions that have been entered and not left, and when; there is one main thread of training in a process."""


class RewardError(RuntimeError):
    """A reward function of the user's raised, or gave back something else than a number or None a completion."""


def watched(function: Callable[..., Any], step: Callable[[], int]) -> Callable[..., Any]:
    """The function under the same name, its exceptions and results checked.

    Args:
        function: a reward function as TRL takes it, async or not.
        step: the optimizer step that is being made, for messages.

    Raises:
        RewardError: when it is called: the function raised, or did not give one number or None for each completion.
            NaN counts as None: no opinion. Infinite values are the guard's affair.
    """
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = str(getattr(inner, "__name__", type(inner).__name__))

    @contextmanager
    def told() -> Iterator[None]:
        try:
            with _notice(name, step()):
                yield
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__} at step {step()}: {error}\n{_own_frames(error)}"
            ) from error

    if iscoroutinefunction(inner) or iscoroutinefunction(type(inner).__call__):

        async def watch_async(**kwargs: Any) -> list[float]:
            with told():
                return _numbers(await function(**kwargs), len(kwargs["completions"]), name, step())

        watch_async.__name__ = name
        return watch_async

    def watch(**kwargs: Any) -> list[float]:
        with told():
            return _numbers(function(**kwargs), len(kwargs["completions"]), name, step())

    watch.__name__ = name
    return watch


def running() -> str:
    """ "the reward 'slow' for 75 s" for the function that is being waited for; "" where none is."""
    return ", ".join(f"the reward {name!r} for {time.monotonic() - began:.0f} s" for name, began in [*_running.items()])


def _numbers(given: Any, count: int, name: str, step: int) -> list[float]:
    """The values as floats, NaN for None."""
    wanted = f"expected a list of {count} numbers, one a completion, None for no opinion"
    if given is None or isinstance(given, str | bytes | dict) or not hasattr(given, "__len__"):
        raise RewardError(f"reward {name!r} gave back {_kind(given)} at step {step}: {wanted}.")
    values: Sequence[Any] = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(values) != count:
        raise RewardError(f"reward {name!r} gave back {len(values)} values at step {step}: {wanted}.")
    found = []
    for row, value in enumerate(values):
        number = value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array of one number
        if number is not None and not isinstance(number, Real):
            told = f"{_kind(number)} for completion {row}"
            raise RewardError(f"reward {name!r} gave back {told} at step {step}: {wanted}.")
        found.append(math.nan if number is None else float(number))
    return found


@contextmanager
def _notice(name: str, step: int) -> Iterator[None]:
    """Says on stderr that a function has not come back, each time twice as late: Python cannot end it from outside."""
    over = threading.Event()
    _running[name] = time.monotonic()

    def watch() -> None:
        wait = NOTICE_S
        while not over.wait(wait):
            print(
                f"Waiting for {running()} (step {step}, process {os.getpid()}). Ctrl-C twice ends the run at once; its "
                "checkpoints stay whole.",
                file=sys.stderr,
                flush=True,
            )
            wait *= 2

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _running.pop(name, None)


def _own_frames(error: BaseException) -> str:
    """The lines of code between our call and the exception."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return printable("".join(traceback.format_list(frames[-6:])).rstrip())


def _kind(value: Any) -> str:
    return "None" if value is None else f"{value!r}"[:40] + f" ({type(value).__name__})"
