"""Watches a run that another process drives, on this machine or on one that shares the disk: what `r2m watch` shows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from r2m_async.runs.directory import config_of_run
from r2m_async.runs.records import bytes_of, records_in
from r2m_async.runs.status import FILE, Status, read_status
from r2m_async.runs.view import NUM_ROWS, View, evaluation_line, rendered, status_line, step_line
from r2m_async.standard_output import can_be_redrawn

EVERY = 1.0
"""Seconds from one look at the directory to the next."""
SILENT_AFTER = 15.0
"""Seconds without a new status, after which a run is said to give no sign of life. A new one comes every other second."""
_LAST_BYTES = 2**18
"""The bytes at the end of a file with which reading begins: some hundred steps."""


class Tail:
    """The last records of a file that another process appends to."""

    def __init__(self, path: Path) -> None:
        """path: of a JSONL file. It need not be there yet."""
        self._path = path
        self._at: int | None = None
        """Up to which byte the file was read. None: it was not."""
        self.records: list[dict[str, Any]] = []
        """The last records, at most `NUM_ROWS`."""

    def read(self) -> list[dict[str, Any]]:
        """Reads what was appended since, and returns the new records. Raises DataError if they cannot be read."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return []
        if self._at is not None and size < self._at:  # a resumed run has cut off what it does again
            self._at, self.records = None, []
        first = self._at is None
        begin = max(0, size - _LAST_BYTES) if self._at is None else self._at
        try:
            data = bytes_of(self._path, begin)
        except FileNotFoundError:  # removed since
            return []
        # A line may be half written. At the beginning the first line may be half read.
        data = data[: data.rfind(b"\n") + 1]
        self._at = begin + len(data)
        if first and begin > 0:
            data = data[data.find(b"\n") + 1 :]
        new = records_in(data, f"{self._path}, from byte {self._at - len(data)}", {"step": Real}, only_numbers=True)
        self.records = [*self.records, *new][-NUM_ROWS:]
        return new


class Watched:
    """A run that is watched. `look` reads what is new in its directory."""

    def __init__(self, path: Path, time_of: Callable[[], float] = time.monotonic) -> None:
        """path: a run directory. time_of: a clock, in seconds. Raises ConfigError if it is no run directory."""
        self.config = config_of_run(path)
        self._path, self._time_of = path, time_of
        self._steps, self._evaluations = Tail(path / "metrics.jsonl"), Tail(path / "evaluation.jsonl")
        self._status: Status | None = None
        self._changed = time_of()

    def look(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Reads what is new, and returns the metrics of new steps and of new evaluations. Raises DataError."""
        # The status first: the steps are then at least as new, so that after the end none is missing.
        status = read_status(self._path)
        if status != self._status:
            self._status, self._changed = status, self._time_of()
        return self._steps.read(), self._evaluations.read()

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last step that was seen, or nothing if there is none."""
        return self._steps.records[-1] if self._steps.records else {}

    @property
    def ended(self) -> bool:
        """Whether the run says that it has ended, or says nothing at all."""
        return self._status is None or bool(self._status.ended)

    def view(self) -> View:
        """Returns what is known of the run."""
        evaluations = self._evaluations.records
        status = self._status or Status()
        if self._status is None and self._steps.records:
            status = Status(seconds=self._steps.records[-1].get("time/since_start", 0.0))
        return View(
            config=self.config,
            steps=self._steps.records,
            evaluation=evaluations[-1] if evaluations else None,
            status=status,
        )

    def life(self) -> str:
        """Returns a line that says whether the run goes on. Empty: it does, as far as is known."""
        status = self._status
        if status is None:
            return f"{self._path} has no {FILE}: the run has not begun, or an older version of r2m-async drove it"
        if status.ended:
            return f"ended at {status.at}: {status.ended}"
        if (silent := self._time_of() - self._changed) >= SILENT_AFTER:
            who = f"process {status.process} on {status.host}"
            return f"no sign of life for {silent:.0f} s; the last was at {status.at}, of {who}"
        return ""

    def render(self, height: int) -> RenderableType:
        """Returns what a terminal of `height` lines shows."""
        life = self.life()
        shown = rendered(self.view(), height - bool(life))
        return Group(shown, Text(life, style="bold")) if life else shown


def watch(path: Path, once: bool = False) -> dict[str, Any]:
    """Shows a run until it has ended: in a terminal as a table, elsewhere as plain lines.

    once: shows it as it is now, and returns. Returns the metrics of the last step, or nothing if there is none. Raises
    ConfigError if it is no run directory, and DataError.
    """
    run = Watched(path)
    console = Console(file=sys.stdout)
    run.look()
    if once:
        console.print(run.render(console.height if sys.stdout.isatty() else sys.maxsize))
        return run.last
    if not can_be_redrawn(sys.stdout):
        for line in _lines(run):
            print(line, flush=True)
        return run.last
    with Live(get_renderable=lambda: run.render(console.height), console=console, refresh_per_second=2):
        while not run.ended:
            time.sleep(EVERY)
            run.look()
    return run.last


def _lines(run: Watched) -> Iterator[str]:
    """Yields plain lines: what is known, and then each new step and evaluation, until the run has ended."""
    view, told = run.view(), ""
    if view.steps:
        yield step_line(view)
    if view.evaluation is not None:
        yield evaluation_line(view.evaluation)
    if not run.ended:
        yield status_line(view.status)
    while not run.ended:
        if (life := run.life()) and not told:
            yield life
        told = life
        time.sleep(EVERY)
        steps, evaluations = run.look()
        if steps:
            yield step_line(run.view())
        yield from map(evaluation_line, evaluations)
    yield run.life()
