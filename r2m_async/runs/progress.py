"""Shows work on reward models in the terminal: as progress bars, or as plain lines if there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

from r2m_async.standard_output import can_be_redrawn, say

NUM_PLAIN_LINES = 10
"""The number of lines that plain output prints for each model, if it takes less than `QUIET_AFTER` for each of them."""
QUIET_AFTER = 10.0
"""Seconds without a line of plain output, after which the next thing that is done prints one."""


class TrainingProgress:
    """Shows one progress bar for each model that is trained, and one for each other work. Use it as a context manager."""

    def __init__(self, live: bool, time_of: Callable[[], float] = time.monotonic) -> None:
        """live: False prints plain lines, in a terminal too. time_of: a clock, in seconds."""
        console = Console(file=sys.stdout)
        self._progress = Progress(console=console) if live and can_be_redrawn(sys.stdout) else None
        self._tasks: dict[int | str, TaskID] = {}
        self._time_of, self._said = time_of, time_of()

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def message(self, text: str) -> None:
        """Prints one line, above the bars if there are any."""
        if self._progress:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._said = self._time_of()
            say(text)

    def work(self, text: str, done: int, total: int) -> None:
        """Shows that `done` of `total` parts of some work are done. `done` rises up to `total`.

        text: what work it is. In a terminal its bar is gone at the end.
        """
        if not self._progress:
            self._say_if_quiet(f"{text}: {done}/{total}")
            return
        if text not in self._tasks:
            self._tasks[text] = self._progress.add_task(text, total=total)
        self._progress.update(self._tasks[text], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(text))

    def update(self, seed: int, metrics: Mapping[str, float], num_steps: int) -> None:
        """Shows that a model has taken a step.

        seed: the model's seed, by which its bar is found.
        metrics: the metrics of the step, with `step` counted from 1.
        num_steps: the steps that the model will take in all.
        """
        step = int(metrics["step"])
        text = f"seed {seed}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if "held_out/accuracy" in metrics:
            text += f"  held out {metrics['held_out/accuracy']:.3f}"
        if self._progress:
            if seed not in self._tasks:
                self._tasks[seed] = self._progress.add_task(text, total=num_steps)
            self._progress.update(self._tasks[seed], completed=step, description=text)
        # A line whenever a tenth of the steps is done.
        elif step * NUM_PLAIN_LINES // num_steps > (step - 1) * NUM_PLAIN_LINES // num_steps:
            self.message(f"step {step}/{num_steps}  {text}")
        else:
            self._say_if_quiet(f"step {step}/{num_steps}  {text}")

    def _say_if_quiet(self, line: str) -> None:
        if self._time_of() - self._said >= QUIET_AFTER:
            self.message(line)
