"""Shows a run in the terminal while it goes on: as a live table, or as plain lines if the output is no terminal.

    with LiveTable(config) as table, Ring.of(config, table.message) as ring:
        while not ring.finished:
            table.update(ring.step(), ring.controller.evaluations)

A metric that a step does not have is left blank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r2m_async.config import R2MConfig

NUM_ROWS = 12
"""The number of steps that the table shows, the last ones."""
COLUMNS = {
    "step": ("step", "{:.0f}"),
    "proxy": ("reward/mean", "{:.3f}"),
    "gold": ("reward/gold", "{:.3f}"),
    "KL": ("kl/sequence", "{:.2f}"),
    "policy age mean": ("age/policy_mean", "{:.1f}"),
    "max": ("age/policy_max", "{:.0f}"),
    "head age": ("age/head", "{:.0f}"),
    "responses/s": ("throughput/responses_per_s", "{:.1f}"),
    "idle: rollouts": ("idle/rollouts", "{:.0%}"),
    "annotators": ("idle/annotators", "{:.0%}"),
    "policy": ("idle/policy_learner", "{:.0%}"),
    "head": ("idle/head_learner", "{:.0%}"),
}
"""For each heading, the metric in its column and how the metric is printed. The ages are in steps."""
EVALUATION_REWARDS = ("reward", "proxy", "frozen", "gold")
"""The rewards of an evaluation: the whole reward, that of the present head, that of the reward model as it came, and the
gold reward."""


class LiveTable:
    """Shows the last steps and the last evaluation of a run. Use it as a context manager."""

    def __init__(self, config: R2MConfig) -> None:
        """config: of the run. Without `logging.live`, plain lines are printed in a terminal too."""
        self._config = config
        self._rows: list[Mapping[str, float]] = []
        self._evaluations: Sequence[Mapping[str, float]] = ()
        self._notice, self._done, self._total = "", 0, 0
        self._began = time.monotonic()
        console = Console(file=sys.stdout)
        self._live: Live | None = None
        if config.logging.live and console.is_terminal:
            self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._notice = ""  # the last frame stays on the screen, where nothing is under way any more
            self._live.stop()

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
            print(self._step_line(metrics), flush=True)
        for evaluation in new:
            print(_evaluation_line(evaluation), flush=True)

    def message(self, text: str, done: int = 0, total: int = 0) -> None:
        """Says what the run is busy with until the next step, for example building models.

        done, total: the parts of that work, shown as a bar. A total of 0 shows none. Plain output prints a text once.
        """
        if not self._live and text != self._notice:
            print(text, flush=True)
        self._notice, self._done, self._total = text, done, total

    def tell(self, text: str) -> None:
        """Says something that stays on the screen, above the table."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def render(self) -> RenderableType:
        """Returns what the terminal shows now. A thread of rich calls this four times a second."""
        parts: list[RenderableType] = [self._header()]
        if self._notice:
            parts.append(_with_bar(self._notice, self._done, self._total) if self._total else Text(self._notice))
        if self._rows:
            parts.append(self._table())
        if self._evaluations:
            parts.append(Text(_evaluation_line(self._evaluations[-1])))
        return Group(*parts)

    def _header(self) -> RenderableType:
        step, num_steps = self._step, self._config.run.num_steps
        times = f"elapsed {_clock(time.monotonic() - self._began)}  ETA {self._eta()}"
        return _with_bar(f"{self._config.run.name}  step {step}/{num_steps}", step, num_steps, times)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        for metrics in self._rows:
            table.add_row(*(_cell(metrics, key, form) for key, form in COLUMNS.values()))
        return table

    def _step_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._config.run.num_steps}"]
        shown = [(heading, *COLUMNS[heading]) for heading in list(COLUMNS)[1:]]
        parts += [f"{heading} {_cell(metrics, key, form)}" for heading, key, form in shown if key in metrics]
        return "  ".join([*parts, f"ETA {self._eta()}"])

    @property
    def _step(self) -> int:
        return int(self._rows[-1].get("step", 0)) if self._rows else 0

    def _eta(self) -> str:
        """Returns the time that the rest of the run will take, from the mean duration of the steps that are shown."""
        seconds = [row["time/step"] for row in self._rows if "time/step" in row]
        if not seconds:
            return "?"
        return _clock(sum(seconds) / len(seconds) * (self._config.run.num_steps - self._step))


def _with_bar(text: str, done: int, total: int, after: str = "") -> RenderableType:
    line = Table.grid(padding=(0, 2))
    line.add_row(Text(text), ProgressBar(total=total, completed=done, width=30), Text(after))
    return line


def _evaluation_line(evaluation: Mapping[str, float]) -> str:
    parts = [f"evaluation of policy {evaluation.get('step', 0):.0f}"]
    for name in EVALUATION_REWARDS:
        # Without reward functions, clipping and penalties the whole reward is that of the model.
        same = name == "reward" and evaluation.get(name) in (evaluation.get("proxy"), evaluation.get("frozen"))
        if name in evaluation and not same:
            parts.append(f"{name} {evaluation[name]:.3f} ± {evaluation.get(f'{name}_se', 0):.3f}")
    if "length" in evaluation:
        parts.append(f"length {evaluation['length']:.1f}")
    return "  ".join(parts)


def _cell(metrics: Mapping[str, float], key: str, form: str) -> str:
    return form.format(metrics[key]) if key in metrics else ""


def _clock(seconds: float) -> str:
    """Returns a duration as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
