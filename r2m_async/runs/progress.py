"""A training that is no ring, in the terminal: a progress bar, or a plain line now and then where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

NUM_PLAIN_LINES = 10


class TrainingProgress:
    """One bar per model."""

    def __init__(self, live: bool) -> None:
        console = Console(file=sys.stdout)
        self._progress = Progress(console=console) if live and console.is_terminal else None
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def message(self, text: str) -> None:
        if self._progress:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def update(self, seed: int, metrics: Mapping[str, float], num_steps: int) -> None:
        """A step of the model with this seed, of `num_steps`."""
        step = int(metrics["step"])
        text = f"seed {seed}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if "held_out/accuracy" in metrics:
            text += f"  held out {metrics['held_out/accuracy']:.3f}"
        if self._progress:
            if seed not in self._tasks:
                self._tasks[seed] = self._progress.add_task(text, total=num_steps)
            self._progress.update(self._tasks[seed], completed=step, description=text)
        elif step * NUM_PLAIN_LINES // num_steps > (step - 1) * NUM_PLAIN_LINES // num_steps:
            print(f"step {step}/{num_steps}  {text}", flush=True)
