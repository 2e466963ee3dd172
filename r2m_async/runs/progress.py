"""Shows the training of reward models in the terminal: as progress bars, or as plain lines if there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

NUM_PLAIN_LINES = 10
"""The number of lines that plain output prints for each model."""


class TrainingProgress:
    """Shows one progress bar for each model that is trained. Use it as a context manager."""

    def __init__(self, live: bool) -> None:
        """live: False prints plain lines, in a terminal too."""
        console = Console(file=sys.stdout)
        self._progress = Progress(console=console) if live and console.is_terminal else None
        self._tasks: dict[int, TaskID] = {}
        self._reading: TaskID | None = None
        self._tenths = 0

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
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def texts(self, done: int, total: int) -> None:
        """Shows that a frozen backbone has read `done` of `total` texts. `done` rises up to `total`."""
        text = "frozen backbone: texts read once"
        if self._progress:
            if self._reading is None:
                self._reading = self._progress.add_task(text, total=total)
            self._progress.update(self._reading, completed=done, total=total)
        elif (tenths := done * NUM_PLAIN_LINES // total) > self._tenths or done == total:
            print(f"{text}: {done}/{total}", flush=True)
            self._tenths = tenths % NUM_PLAIN_LINES

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
            print(f"step {step}/{num_steps}  {text}", flush=True)
