"""SIGTERM and SIGINT: the first finishes the optimizer step, saves and stops; the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from vigor.outside import running

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt(TrainerCallback):
    """Stops a training run at the end of the step in which a signal came to any of its processes.

    The time it takes is that of the rest of the step and of one checkpoint. Outside of `catching` signals do what they
    always did.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.stopped_by: int | None = None
        """The signal at which the run was stopped and saved, in every process alike; one that comes after the last step
        changes nothing."""
        self._caught: int | None = None
        self._seconds = 0.0
        self._began = time.perf_counter()

    @contextmanager
    def catching(self) -> Iterator[Interrupt]:
        """Handles the signals within; in another thread than the main one there is nothing to handle."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self._caught = number
        for each in SIGNALS:  # the second time the kernel ends the process, whatever it is in the middle of
            signal.signal(each, signal.SIG_DFL)
        about = f", about {self._seconds:.1f} s a step," if self._seconds else ""
        if waiting := running():
            about += f" which has been waiting for {waiting},"
        print(
            f"{signal.Signals(number).name}: finishing this optimizer step{about} and saving. A second signal stops at "
            "once; the checkpoints stay whole.",
            file=sys.stderr,
            flush=True,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock from which the notice tells how long a step takes."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks the engine for a checkpoint and the end, in all processes at the same step."""
        self._seconds = time.perf_counter() - self._began
        self.stopped_by = self._of_any_process()
        if self.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True

    def _of_any_process(self) -> int | None:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self._caught
        numbers = accelerator.gather(torch.tensor([self._caught or 0], device=accelerator.device))
        return int(numbers.max()) or None


def exit_status(number: int) -> int:
    """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + number
