"""Shows a run in the terminal while it goes on: as a live table, or as plain lines if the output is no terminal.

    with LiveTable(config) as table, Ring.of(config, table.message, on_status=table.ring) as ring:
        while not ring.finished:
            table.update(ring.step(), ring.controller.evaluations)

`r2m watch` shows the same of a run that another process drives: `watching.py`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from r2m_async.config import R2MConfig
from r2m_async.errors import DiskError
from r2m_async.ring.status import RingStatus
from r2m_async.runs.status import Status, write_status
from r2m_async.runs.view import NUM_ROWS, View, evaluation_line, rendered, status_line, step_line
from r2m_async.standard_output import can_be_redrawn, say

STATUS_EVERY = 2.0
"""Seconds from one status.json to the next."""
QUIET_AFTER = 60.0
"""Seconds without a line of plain output, after which a line says what the run does."""


class LiveTable:
    """Shows the last steps, the last evaluation and what each stage does. Use it as a context manager.

    In a run's directory (`follow`) it keeps status.json, from which others see the same.
    """

    def __init__(self, config: R2MConfig, time_of: Callable[[], float] = time.monotonic) -> None:
        """config: of the run. Without `logging.live`, plain lines are printed in a terminal too. time_of: a clock."""
        self._config, self._time_of = config, time_of
        self._rows: list[Mapping[str, float]] = []
        self._evaluations: Sequence[Mapping[str, float]] = ()
        self._notice, self._done, self._total = "", 0, 0
        self._ring: RingStatus | None = None
        self._directory: Path | None = None
        self._began = self._said = time_of()
        self._over = threading.Event()
        # It must not keep Python from ending: the process may be given up while it stands in a call of a broken disk.
        self._ticker = threading.Thread(target=self._ticks, name="r2m-status", daemon=True)
        console = Console(file=sys.stdout)
        self._live: Live | None = None
        if config.logging.live and can_be_redrawn(sys.stdout):
            self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._over.set()
        self._ticker.join(timeout=2 * STATUS_EVERY)
        # The last frame stays on the screen, where nothing is under way any more.
        self._notice, self._ring = "", None
        self._keep_status("finished" if kind is None else f"{kind.__name__}: {error}")
        if self._live:
            self._live.stop()

    def follow(self, directory: Path) -> None:
        """Keeps status.json in the directory of a run from now on."""
        self._directory = directory

    def ring(self, status: RingStatus) -> None:
        """Takes what the ring does now."""
        self._ring = status

    def update(self, metrics: Mapping[str, float], evaluations: Sequence[Mapping[str, float]]) -> None:
        """Takes the metrics of a step and all evaluations so far, and shows what is new.

        metrics: values by name, or empty if there is no new step.
        """
        new, self._evaluations = evaluations[len(self._evaluations) :], list(evaluations)
        self._notice = ""
        if metrics:
            # A new list: the thread that draws the table may be reading the old one.
            self._rows = [*self._rows, metrics][-NUM_ROWS:]
        if self._live:
            self._live.refresh()
            return
        if metrics:
            self._say(step_line(self._view()))
        for evaluation in new:
            self._say(evaluation_line(evaluation))

    def message(self, text: str, done: int = 0, total: int = 0) -> None:
        """Says what the run is busy with until the next step, for example building models.

        done, total: the parts of that work, shown as a bar. A total of 0 shows none. Plain output prints a text once.
        """
        if not self._live and text != self._notice:
            self._say(text)
        self._notice, self._done, self._total = text, done, total

    def tell(self, text: str) -> None:
        """Says something that stays on the screen, above the table."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)

    def render(self) -> RenderableType:
        """Returns what the terminal shows now. A thread of rich calls this four times a second."""
        return rendered(self._view(), self._live.console.height if self._live else sys.maxsize)

    def tick(self) -> None:
        """Writes status.json. In plain output, says what the run does after `QUIET_AFTER` seconds without a line."""
        self._keep_status()
        if not self._live and self._time_of() - self._said >= QUIET_AFTER:
            self._say(status_line(self._status()))

    def _ticks(self) -> None:
        while not self._over.wait(STATUS_EVERY):
            self.tick()

    def _keep_status(self, ended: str = "") -> None:
        # The run itself says that the disk is full, at the next write that matters.
        if self._directory is not None:
            with contextlib.suppress(DiskError):
                write_status(self._directory, self._status(ended))

    def _status(self, ended: str = "") -> Status:
        return Status(
            busy_with=self._notice,
            done=self._done,
            total=self._total,
            seconds=self._time_of() - self._began,
            ring=self._ring,
            ended=ended,
        )

    def _view(self) -> View:
        evaluation = self._evaluations[-1] if self._evaluations else None
        return View(config=self._config, steps=self._rows, evaluation=evaluation, status=self._status())

    def _say(self, line: str) -> None:
        self._said = self._time_of()
        say(line)
