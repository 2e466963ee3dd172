"""Lays out what a run shows in a terminal while it goes on: `r2m train` shows it of itself, `r2m watch` of any run.

A metric that was not measured is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r2m_async.config import R2MConfig
from r2m_async.ring.status import RingStatus, StageStatus
from r2m_async.runs.records import reward_functions
from r2m_async.runs.status import Status

NUM_ROWS = 12
"""The most steps that the table shows, the last ones."""
_FOLDED = 6
"""Letters of a heading's word that stand in one line, at least."""
NUM_STAGES = 12
"""The most stages that are listed one by one. Of more rollout actors the first are listed, and the others counted."""
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
_LINES = {
    "tokens": (
        ("", "throughput/tokens_per_s", "{:.0f}/s"),
        ("per response", "length/mean", "{:.1f}"),
        ("trained of generated", "length/trained_over_generated", "{:.0%}"),
    ),
    "waited for": (
        ("groups", "wait/rollouts", "{:.2f} s"),
        ("embeddings", "wait/annotators", "{:.2f} s"),
        ("head", "wait/head", "{:.2f} s"),
        ("publication", "time/publish_stall", "{:.2f} s"),
        ("slowest: rollout", "wait/slowest_rollout", "{:.0f}"),
    ),
    "lost": (
        ("issued again", "ledger/reissued", "{:.0f}"),
        ("given up", "ledger/voided", "{:.0f}"),
        ("refused", "ledger/fenced", "{:.0f}"),
        ("rings built anew", "restarts/ring", "{:.0f}"),
        ("annotators restarted", "restarts/annotators", "{:.0f}"),
        ("queue restarted", "restarts/queue", "{:.0f}"),
    ),
}
"""For each line about the last step, its parts: a name, the metric, and how it is printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is known of a run at one moment."""

    config: R2MConfig
    steps: Sequence[Mapping[str, float]]
    """The metrics of the last steps."""
    evaluation: Mapping[str, float] | None
    """The metrics of the last evaluation."""
    status: Status


def rendered(view: View, height: int) -> RenderableType:
    """Returns what a terminal shows of a run. height: the lines of the terminal; the table of steps takes what is left."""
    status, ring = view.status, view.status.ring
    parts: list[RenderableType] = [_header(view)]
    if status.busy_with:
        count = f"{status.done} of {status.total}"
        parts.append(
            with_bar(status.busy_with, status.done, status.total, count) if status.total else Text(status.busy_with)
        )
    lines = dict(_lines(view))
    if lines:
        parts.append(_labelled(lines))
    if ring is not None:
        parts.append(_stages(ring))
    if view.evaluation is not None:
        parts.append(Text(evaluation_line(view.evaluation), overflow="fold"))
    if view.steps:
        above = len(parts) + len(lines) + (0 if ring is None else min(len(ring.stages), NUM_STAGES + 1)) + 2
        parts.append(_Steps(view.steps[-max(3, min(NUM_ROWS, height - above)) :]))
    return Group(*parts)


def _header(view: View) -> RenderableType:
    step, num_steps = step_of(view.steps), view.config.run.num_steps
    times = f"elapsed {clock(view.status.seconds)}  left {time_left(view)}"
    return with_bar(f"{view.config.run.name}  step {step}/{num_steps}", step, num_steps, times)


def _lines(view: View) -> Sequence[tuple[str, str]]:
    """Label and text of each line about the present state and about the last step."""
    lines: list[tuple[str, str]] = []
    ring, config = view.status.ring, view.config
    last = view.steps[-1] if view.steps else {}
    if own := {"reward/model_mean": "model"} | {key: key.removeprefix("reward/") for key in reward_functions([last])}:
        parts = [f"{name} {last[key]:.3f}" for key, name in own.items() if key in last]
        if len(parts) > 1:
            lines.append(("reward", "  ".join(parts)))
    for label, parts_of_line in _LINES.items():
        told = [f"{name} {form.format(last[key])}".strip() for name, key, form in parts_of_line if key in last]
        if told:
            lines.append((label, "  ".join(told)))
    if ring is not None:
        share = ring.queue_bytes / config.queue.max_bytes
        full = f"{share:.0%} of {config.queue.max_bytes / 2**20:.0f} MiB  {ring.groups_in_flight} groups in flight"
        lines.append(("queue", full))
        bounds = f"policy at most {config.scheduling.max_policy_age}, head at most {config.scheduling.max_head_age}"
        lines.append(("ages", bounds))
        lines.append(("fleet", f"{ring.actors} of {config.rollouts.num_actors} rollout actors"))
        if ring.driver:
            lines.append(("waiting for", f"{ring.driver} ({ring.driver_seconds:.0f} s)"))
        if ring.evaluating is not None:
            done = f"policy {ring.evaluating}: {ring.answered} of {ring.to_answer} prompts answered"
            lines.append(("evaluation", done))
    return lines


def _labelled(lines: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines.items():
        grid.add_row(label, Text(text))
    return grid


def _stages(ring: RingStatus) -> Table:
    """A line for each stage: what it does, and for how long. Of many rollout actors the last ones are counted."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="ellipsis", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    actors = [stage for stage in ring.stages if stage.name.startswith("rollout")]
    too_many = max(0, len(ring.stages) - NUM_STAGES)
    counted = actors[max(1, len(actors) - too_many) :] if too_many else []
    for stage in ring.stages:
        if stage not in counted:
            grid.add_row(stage.name, Text(_does(stage)), f"{stage.seconds:.1f} s" if stage.seconds else "")
        elif stage is counted[0]:
            doing = Counter(one.does.partition(":")[0] for one in counted)
            told = ", ".join(f"{number} {does}" for does, number in doing.most_common(4))
            grid.add_row(f"{len(counted)} more", Text(told), "")
    return grid


def _does(stage: StageStatus) -> str:
    return stage.does + (f" and {stage.others} more" if stage.others else "")


class _Steps:
    """The table of the last steps, with the columns that the terminal has room for. No number is ever cut."""

    def __init__(self, steps: Sequence[Mapping[str, float]]) -> None:
        self._steps = steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = {
            heading.replace("/", " /"): [_cell(metrics, key, form) for metrics in self._steps]
            for heading, (key, form) in COLUMNS.items()
            if any(key in metrics for metrics in self._steps)
        }
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        widths = _widths(columns, options.max_width)
        for heading, width in widths.items():
            table.add_column(heading, justify="right", overflow="fold", width=width)
        for row in zip(*(columns[heading] for heading in widths), strict=True):
            table.add_row(*row)
        yield table


def _widths(columns: Mapping[str, Sequence[str]], room: int) -> dict[str, int]:
    """The width of each column that there is room for, the first ones. A heading's words are folded where they must be."""
    words = {heading: max(map(len, heading.split())) for heading in columns}
    widths: dict[str, int] = {}
    for heading, cells in columns.items():
        width = max(*map(len, cells), min(words[heading], _FOLDED))
        if sum(widths.values()) + len(widths) + width > room:
            break
        widths[heading] = width
    spare = room - sum(widths.values()) - len(widths) + 1
    for heading, width in widths.items():
        more = min(spare, max(0, words[heading] - width))
        widths[heading], spare = width + more, spare - more
    return widths


def with_bar(text: str, done: int, total: int, after: str = "") -> RenderableType:
    """Returns a line with a bar, which is full at `done == total`. after: a text behind the bar."""
    line = Table.grid(padding=(0, 2))
    line.add_row(Text(text), ProgressBar(total=total, completed=done, width=24), Text(after))
    return line


# Plain lines


def step_line(view: View) -> str:
    """Returns the last step of a run as a line of text."""
    last = view.steps[-1]
    parts = [f"step {step_of(view.steps)}/{view.config.run.num_steps}"]
    shown = [(heading, *COLUMNS[heading]) for heading in list(COLUMNS)[1:]]
    parts += [f"{heading} {_cell(last, key, form)}" for heading, key, form in shown if key in last]
    return "  ".join([*parts, f"left {time_left(view)}"])


def status_line(status: Status) -> str:
    """Returns what a run does now as a line of text."""
    parts = []
    if status.busy_with:
        parts.append(status.busy_with + (f" ({status.done} of {status.total})" if status.total else ""))
    if (ring := status.ring) is not None:
        parts += [f"{one.name} {_does(one)} ({one.seconds:.0f} s)" for one in ring.stages if one.working]
        if ring.evaluating is not None:
            parts.append(f"evaluation of policy {ring.evaluating}: {ring.answered} of {ring.to_answer} prompts")
        if ring.driver and len(parts) == 0:
            parts.append(f"waiting for {ring.driver} ({ring.driver_seconds:.0f} s)")
    return f"after {clock(status.seconds)}: " + ("; ".join(parts) or "nothing is known of what it does")


def evaluation_line(evaluation: Mapping[str, float]) -> str:
    """Returns an evaluation as a line of text."""
    parts = [f"evaluation of policy {evaluation.get('step', 0):.0f}"]
    for name in EVALUATION_REWARDS:
        # Without reward functions, clipping and penalties the whole reward is that of the model.
        same = name == "reward" and evaluation.get(name) in (evaluation.get("proxy"), evaluation.get("frozen"))
        if name in evaluation and not same:
            parts.append(f"{name} {evaluation[name]:.3f} ± {evaluation.get(f'{name}_se', 0):.3f}")
    if "length" in evaluation:
        parts.append(f"length {evaluation['length']:.1f}")
    return "  ".join(parts)


# Numbers


def step_of(steps: Sequence[Mapping[str, float]]) -> int:
    """Returns the number of the last step, or 0 if there is none."""
    step = steps[-1].get("step", 0) if steps else 0
    return int(step) if math.isfinite(step) else 0


def time_left(view: View) -> str:
    """Returns the time that the rest of the run will take, from the mean duration of the steps that are known."""
    seconds = [row["time/step"] for row in view.steps if math.isfinite(row.get("time/step", math.nan))]
    if not seconds:
        return "?"
    return clock(sum(seconds) / len(seconds) * (view.config.run.num_steps - step_of(view.steps)))


def clock(seconds: float) -> str:
    """Returns a duration as hours:minutes:seconds, or `?` if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _cell(metrics: Mapping[str, float], key: str, form: str) -> str:
    return form.format(metrics[key]) if key in metrics else ""
