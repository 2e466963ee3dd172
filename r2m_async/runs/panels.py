"""Makes the panels of a report, each a figure of plotly as plain data, from the records of one run or of several.

A panel with nothing to show says which metric is missing. A run that lacks a metric is named below the panel. Nothing
that was not measured is drawn. A long run is thinned: each point is then the mean of as many steps as the note says.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.config import R2MConfig
from r2m_async.ring.simulator import physical_bound, times_of_run
from r2m_async.runs.drawing import COLORS, GREY
from r2m_async.runs.records import Records, binned, column, has, kl_of_versions, reward_functions, samples_kl
from r2m_async.runs.trace import belongs_to_a_step, last_steps, row_of

MAX_POINTS = 1000
"""The most points of a curve. A run with more steps is thinned."""
NUM_TRACED_STEPS = 12
"""The number of steps that the timeline shows, the last ones."""
MAX_BARS = 3000
"""The most calls that the timeline shows. With more of them it shows fewer steps."""
DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
"""How the series of a panel differ where colours tell runs apart."""
_KL, _NATS, _STEP = "kl/sequence", "KL from the reference (nats per response)", "policy step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a report knows of a run: the records of the files in its directory."""

    path: Path
    label: str
    """What the run is called in the report. No two runs of a report have the same label."""
    config: R2MConfig
    steps: Records
    """Of metrics.jsonl."""
    evaluations: Records
    """Of evaluation.jsonl."""
    samples: Records
    """Of samples.jsonl."""
    trace: Records
    """Of trace.jsonl."""
    resumes: Records
    """Of resumes.jsonl, which a run has that was resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A part of a report with one figure."""

    title: str
    figure: dict[str, Any] | None
    """`data` and `layout` as `Plotly.newPlot` takes them. None if there is nothing to show."""
    notes: tuple[str, ...]
    """What a reader must know of it: what is missing, and what was averaged."""
    wide: bool = False
    """Whether it takes the whole width of the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """One metric of a panel."""

    name: str
    key: str
    """The metric in the records."""
    evaluated: bool = False
    """Whether it is a metric of the evaluations. It is then drawn as points, with the error `KEY_se` if there is one."""
    bound: Callable[[R2MConfig], float] | None = None
    """If it is given, the series is this number of the config in place of a metric, drawn across."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curves:
    """A panel that shows metrics against the step."""

    title: str
    axis: str
    """The label of the y axis, with the unit."""
    series: tuple[_Series, ...]
    needs: str = ""
    """What a run needs to have the metrics, told where they are missing."""


def sections(runs: Sequence[Run]) -> list[tuple[str, list[Panel]]]:
    """Returns the panels of a report, as (heading, panels) in the order of the page. runs: at least one."""
    return [
        ("Rewards", [*(_curves(one, runs) for one in _rewards(runs)), *_against_kl(runs), _against_time(runs)]),
        ("Policy", [_curves(one, runs) for one in (*_POLICY, *_critic(runs))]),
        ("Reward head", [_curves(one, runs) for one in _HEAD]),
        ("Staleness", [_curves(one, runs) for one in (*_AGES, *_by_age(runs))]),
        ("Speed", [_throughput(runs), *(_curves(one, runs) for one in _SPEED), *map(_timeline, runs)]),
        ("What was lost and done again", [_curves(one, runs) for one in _LOSSES]),
    ]


# Which metrics


def _rewards(runs: Sequence[Run]) -> Iterator[_Curves]:
    yield _Curves(
        title="Proxy reward",
        axis="reward",
        series=(
            _Series(name="training rollouts", key="reward/mean"),
            _Series(name="held-out, present head", key="proxy", evaluated=True),
            _Series(name="held-out, whole reward by the model as it came", key="reward", evaluated=True),
        ),
        needs="held-out prompts need evaluation.every",
    )
    yield _Curves(
        title="Gold reward",
        axis="reward",
        series=(
            _Series(name="training rollouts", key="reward/gold"),
            _Series(name="held-out", key="gold", evaluated=True),
        ),
        needs="needs evaluation.gold",
    )
    for key in dict.fromkeys(key for run in runs for key in reward_functions(run.steps)):
        yield _Curves(
            title=f"Reward function {key.removeprefix('reward/')}",
            axis="reward",
            series=(
                _Series(name="training rollouts", key=key),
                _Series(name="held-out", key=key, evaluated=True),
            ),
        )


_POLICY = (
    _Curves(title="KL from the reference", axis="nats per response", series=(_Series(name="KL", key=_KL),)),
    _Curves(title="Policy loss", axis="loss", series=(_Series(name="loss", key="policy/loss"),)),
    _Curves(
        title="Entropy of the policy",
        axis="nats per token",
        series=(_Series(name="entropy", key="policy/entropy_estimate"),),
    ),
    _Curves(
        title="Length of responses",
        axis="tokens",
        series=(
            _Series(name="training rollouts", key="length/mean"),
            _Series(name="held-out", key="length", evaluated=True),
        ),
    ),
    _Curves(
        title="Responses that end by themselves", axis="share", series=(_Series(name="share", key="length/finished"),)
    ),
    _Curves(
        title="Share of the clip and of the mask",
        axis="share of units",
        series=(_Series(name="clipped", key="policy/clip_share"), _Series(name="masked", key="policy/masked_share")),
    ),
    _Curves(
        title="Gradient norm, before clipping", axis="norm", series=(_Series(name="norm", key="policy/grad_norm"),)
    ),
)


def _critic(runs: Sequence[Run]) -> Iterator[_Curves]:
    if any(run.config.critic.model for run in runs):
        yield _Curves(
            title="Critic loss",
            axis="loss",
            series=(_Series(name="loss", key="critic/loss"),),
            needs="needs critic.model",
        )
        yield _Curves(
            title="Explained variance of the critic",
            axis="share",
            series=(_Series(name="explained variance", key="critic/explained_variance"),),
            needs="needs critic.model",
        )


_HEAD = (
    _Curves(
        title="Head against the frozen reward model, on held-out prompts",
        axis="reward",
        series=(
            _Series(name="present head", key="proxy", evaluated=True),
            _Series(name="reward model as it came", key="frozen", evaluated=True),
        ),
        needs="needs evaluation.every and a reward.model",
    ),
    _Curves(
        title="Accuracy against the gold reward",
        axis="share of pairs",
        series=(
            _Series(name="present head", key="proxy_accuracy", evaluated=True),
            _Series(name="reward model as it came", key="frozen_accuracy", evaluated=True),
        ),
        needs="needs evaluation.every and evaluation.gold",
    ),
    _Curves(
        title="Pairs that the head ranks as their rewards do",
        axis="share",
        series=(_Series(name="agreement", key="head/agreement"),),
        needs="needs a head.variant that learns",
    ),
    _Curves(
        title="Entropy of the rewards in a group",
        axis="nats",
        series=(_Series(name="entropy", key="head/group_reward_entropy"),),
        needs="needs a head.variant that learns",
    ),
    _Curves(
        title="Head loss",
        axis="loss",
        series=(_Series(name="loss", key="head/loss"), _Series(name="Bradley-Terry", key="head/bradley_terry")),
        needs="needs a head.variant that learns",
    ),
    _Curves(
        title="Gap between best and worst of a group",
        axis="reward",
        series=(_Series(name="gap", key="head/gap"),),
        needs="needs a head.variant that learns",
    ),
)
_AGES = (
    _Curves(
        title="Age of the policy",
        axis="steps",
        series=(
            _Series(name="oldest group", key="age/policy_max"),
            _Series(name="mean over groups", key="age/policy_mean"),
            _Series(name="scheduling.max_policy_age", key="", bound=lambda config: config.scheduling.max_policy_age),
        ),
    ),
    _Curves(
        title="Age of the head",
        axis="steps",
        series=(
            _Series(name="head that scored", key="age/head"),
            _Series(name="scheduling.max_head_age", key="", bound=lambda config: config.scheduling.max_head_age),
        ),
    ),
)


def _by_age(runs: Sequence[Run]) -> Iterator[_Curves]:
    prefix, name = "policy_age_", "/effective_sample_size"
    ages = {
        key.removeprefix(prefix).removesuffix(name)
        for run in runs
        for one in run.steps
        for key in one
        if key.startswith(prefix) and key.endswith(name)
    }
    of_ages = tuple(_Series(name=f"age {age}", key=f"{prefix}{age}{name}") for age in sorted(ages, key=int))
    yield _Curves(
        title="Effective sample size, by policy age",
        axis="share of the samples",
        series=of_ages or (_Series(name="all ages", key="policy/effective_sample_size"),),
    )
    yield _Curves(
        title="Learner against rollout engine",
        axis="nats per token",
        series=(_Series(name="mean difference of log-probabilities", key="policy/mismatch_mean"),),
    )


_SPEED = (
    _Curves(
        title="Share of time without work",
        axis="share",
        series=tuple(
            _Series(name=name, key=f"idle/{key}")
            for name, key in (
                ("rollouts", "rollouts"),
                ("annotators", "annotators"),
                ("policy learner", "policy_learner"),
                ("head learner", "head_learner"),
            )
        ),
    ),
    _Curves(
        title="What the policy learner waited for",
        axis="seconds per step",
        series=(
            _Series(name="groups", key="wait/rollouts"),
            _Series(name="embeddings", key="wait/annotators"),
            _Series(name="head version", key="wait/head"),
            _Series(name="publication", key="time/publish_stall"),
        ),
    ),
    _Curves(
        title="Response tokens trained, of those generated",
        axis="share",
        series=(_Series(name="share", key="length/trained_over_generated"),),
    ),
    _Curves(
        title="Response tokens per second",
        axis="tokens/s",
        series=(_Series(name="tokens", key="throughput/tokens_per_s"),),
    ),
    _Curves(title="Bytes in the queue", axis="bytes", series=(_Series(name="bytes", key="queue/bytes"),)),
)
_LOSSES = (
    _Curves(
        title="Groups that were issued again, given up, or whose late answer was refused",
        axis="groups so far",
        series=(
            _Series(name="issued again", key="ledger/reissued"),
            _Series(name="given up", key="ledger/voided"),
            _Series(name="refused", key="ledger/fenced"),
        ),
    ),
    _Curves(
        title="Rollout actors, and rings built anew",
        axis="number",
        series=(
            _Series(name="rollout actors", key="rollouts/actors"),
            _Series(name="rings built anew", key="restarts/ring"),
        ),
    ),
)


# Figures


def _curves(panel: _Curves, runs: Sequence[Run]) -> Panel:
    """Draws metrics of all runs against the step."""
    drawn = _Drawing(runs, [one.name for one in panel.series])
    for place, run in enumerate(runs):
        missing = []
        for number, series in enumerate(panel.series):
            records = run.evaluations if series.evaluated else run.steps
            if series.bound is not None:
                if run.steps:
                    drawn.across(place, number, column(run.steps, "step"), series.bound(run.config))
            elif not has(records, series.key):
                missing.append(series)
            elif series.evaluated:
                errors = column(records, f"{series.key}_se")
                drawn.points(place, number, column(records, "step"), column(records, series.key), errors)
            else:
                drawn.line(place, number, *drawn.thinned(column(records, "step"), column(records, series.key)))
        drawn.lacks(place, missing)
    return drawn.panel(panel.title, _STEP, panel.axis, panel.needs)


def _against_kl(runs: Sequence[Run]) -> Iterator[Panel]:
    """Draws the rewards against the KL to the reference, as R2M's Fig. 5 does."""
    for title, key, name in (("Proxy", "reward/mean", "proxy"), ("Gold", "reward/gold", "gold")):
        series = (_Series(name="training rollouts", key=key), _Series(name="held-out", key=name, evaluated=True))
        drawn = _Drawing(runs, [one.name for one in series])
        for place, run in enumerate(runs):
            kl, rewards = samples_kl(run.steps), column(run.steps, key)
            known = np.isfinite(kl) & np.isfinite(rewards)
            if known.any():
                drawn.line(place, 0, *binned(kl, rewards))
            evaluated = kl_of_versions(column(run.evaluations, "step"), run.steps)
            held_out = has(run.evaluations, name) and np.isfinite(evaluated).any()
            if held_out:
                values, errors = (column(run.evaluations, one) for one in (name, f"{name}_se"))
                order = np.argsort(evaluated, kind="stable")  # a KL that falls again would draw the line back
                drawn.points(place, 1, evaluated[order], values[order], errors[order])
            drawn.lacks(place, [one for one, there in zip(series, (known.any(), held_out), strict=True) if not there])
        notes = "a line joins the means of steps of about the same KL, which are those of the policies that sampled"
        needs = "needs evaluation.gold" if name == "gold" else "held-out prompts need evaluation.every"
        yield drawn.panel(f"{title} reward against KL", _NATS, "reward", needs, notes)


def _against_time(runs: Sequence[Run]) -> Panel:
    series = _Series(name="training rollouts", key="reward/mean")
    drawn = _Drawing(runs, [series.name])
    for place, run in enumerate(runs):
        if has(run.steps, series.key) and has(run.steps, "time/since_start"):
            minutes = column(run.steps, "time/since_start") / 60
            drawn.line(place, 0, *drawn.thinned(minutes, column(run.steps, series.key)))
        else:
            drawn.lacks(place, [series])
    return drawn.panel("Proxy reward against time", "minutes that the ring has run", "reward")


def _throughput(runs: Sequence[Run]) -> Panel:
    """Draws responses per second below the bound of the busiest stage."""
    series = _Series(name="responses", key="throughput/responses_per_s")
    drawn = _Drawing(runs, [series.name, "bound of the busiest stage"])
    notes = []
    for place, run in enumerate(runs):
        if not has(run.steps, series.key):
            drawn.lacks(place, [series])
            continue
        step, speed = column(run.steps, "step"), column(run.steps, series.key)
        drawn.line(place, 0, *drawn.thinned(step, speed))
        name = drawn.of(place)
        bound = _responses_per_second_at_most(run)
        if bound is None:
            notes.append(f"no bound{name}: its trace has no rollouts or no training")
            continue
        drawn.across(place, 1, step, bound)
        seconds = np.nansum(column(run.steps, "time/step"))
        if not seconds:
            notes.append(f"how far the bound was reached is not known{name}: no step has its time/step")
            continue
        reached = np.nansum(column(run.steps, "throughput/responses")) / seconds
        notes.append(f"{reached:.3g} of at most {bound:.3g} responses/s were reached{name}: {reached / bound:.0%}")
    told = "the bound is one of mean stage times of the run's trace (`r2m plan --times`), each stage as fast as it was"
    return drawn.panel("Throughput against its bound", _STEP, "responses/s", "", *notes, told)


def _responses_per_second_at_most(run: Run) -> float | None:
    """The throughput of a run if its busiest stage never waited. None if the trace lacks the methods it takes."""
    if not {"generate", "train"} <= {interval["method"] for interval in run.trace if interval["step"] >= 0}:
        return None
    seconds = physical_bound(run.config, times_of_run([dict(interval) for interval in run.trace]))
    responses = run.config.rollouts.prompts_per_step * run.config.rollouts.group_size
    return responses / seconds if seconds > 0 else None


def _timeline(run: Run) -> Panel:
    """Draws which stage worked on which step at what time, over the last steps of a run."""
    title = f"Stages over the last steps of {run.label}"
    if not any(interval["method"] == "train" for interval in run.trace):
        return Panel(title=title, figure=None, notes=("not recorded: trace.jsonl has no training step",), wide=True)
    num_steps = NUM_TRACED_STEPS
    start, end, shown = last_steps(run.trace, num_steps)
    while len(shown) > MAX_BARS and num_steps > 1:
        num_steps -= 1
        start, end, shown = last_steps(run.trace, num_steps)
    rows = sorted({row_of(interval) for interval in shown})
    bars: dict[str, list[Mapping[str, Any]]] = {}
    for interval in shown[:MAX_BARS]:
        color = COLORS[interval["step"] % len(COLORS)] if belongs_to_a_step(interval) else GREY
        bars.setdefault("#222222" if interval["method"] == "load_weights" else color, []).append(interval)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [row_of(one)[2] for one in ones],
            "base": [max(one["start"], start) - start for one in ones],
            "x": [min(one["end"], end) - max(one["start"], start) for one in ones],
            "hovertext": [_told(one) for one in ones],
            "hoverinfo": "text",
            "marker": {"color": color, "line": {"color": "white", "width": 0.5}},
            "showlegend": False,
        }
        for color, ones in bars.items()
    ]
    layout = _layout(f"seconds; 0 is {start:.1f} s after the run began", "")
    layout |= {"barmode": "overlay", "height": 110 + 24 * len(rows), "bargap": 0.25}
    layout["yaxis"] |= {
        "categoryorder": "array",
        "categoryarray": [name for *_, name in reversed(rows)],
        "automargin": True,
    }
    layout["xaxis"] |= {"range": [0, end - start]}
    told = "colours tell steps apart; grey is an evaluation, black a load of weights"
    cut = (f"the first {MAX_BARS} of {len(shown)} calls are shown",) if len(shown) > MAX_BARS else ()
    return Panel(title=title, figure={"data": data, "layout": layout}, notes=(told, *cut), wide=True)


def _told(interval: Mapping[str, Any]) -> str:
    step = f"step {interval['step']}" if interval["step"] >= 0 else "evaluation"
    told = f"{interval['stage']} {interval['method']}, {step}, {interval['end'] - interval['start']:.3g} s"
    return html.escape(told)


class _Drawing:
    """Gathers what a panel shows, and what it lacks.

    One run: colours tell the series apart. Several runs: colours tell runs apart, and dashes the series.
    """

    def __init__(self, runs: Sequence[Run], series: Sequence[str]) -> None:
        self._runs, self._series = runs, [html.escape(name) for name in series]
        self._data: list[dict[str, Any]] = []
        self._missing: dict[str, list[str]] = {}
        self._per_point = 1
        if len(runs) > 1 and len(series) > 1:
            for number, name in enumerate(self._series):
                line = {"color": GREY, "dash": DASHES[number % len(DASHES)]}
                self._data.append(
                    {"type": "scatter", "mode": "lines", "x": [None], "y": [None], "name": name, "line": line}
                )

    def of(self, place: int) -> str:
        """How the notes name a run: not at all if it is the only one."""
        return f" by {self._runs[place].label}" if len(self._runs) > 1 else ""

    def thinned(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the means of neighbouring points, at most `MAX_POINTS` of them. A mean leaves out what is unknown."""
        per_point = -(-len(x) // MAX_POINTS)
        if per_point <= 1:
            return x, y
        self._per_point = max(self._per_point, per_point)
        places = range(0, len(x), per_point)
        known = [y[first : first + per_point][np.isfinite(y[first : first + per_point])] for first in places]
        means = [one.mean() if len(one) else np.nan for one in known]
        return np.array([x[first : first + per_point].mean() for first in places]), np.array(means)

    def line(self, place: int, number: int, x: np.ndarray, y: np.ndarray) -> None:
        """Draws a series of a run as a line, with a gap where y is unknown."""
        mode = "lines+markers" if len(x) <= 30 else "lines"  # a single point draws no line
        self._data.append(self._trace(place, number, x, y) | {"mode": mode})

    def across(self, place: int, number: int, x: np.ndarray, bound: float) -> None:
        """Draws a bound of a run, as a line from the first to the last x."""
        drawn = self._trace(place, number, x[[0, -1]], np.array([bound, bound])) | {"mode": "lines"}
        if len(self._runs) == 1:
            drawn["line"] = {"color": "#444444", "width": 1, "dash": "dash"}
        self._data.append(drawn)

    def points(self, place: int, number: int, x: np.ndarray, y: np.ndarray, errors: np.ndarray) -> None:
        """Draws a series of a run as points with their errors, where these are known."""
        drawn = self._trace(place, number, x, y) | {"mode": "lines+markers"}
        drawn["marker"] = {"size": 7, "symbol": ("circle", "diamond", "square")[number % 3]}
        if np.isfinite(errors).any():
            drawn["error_y"] = {"type": "data", "array": _plain(errors), "thickness": 1, "width": 2}
        self._data.append(drawn)

    def _trace(self, place: int, number: int, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        several = len(self._runs) > 1
        color = COLORS[(place if several else number) % len(COLORS)]
        name = self._series[number]
        return {
            "type": "scatter",
            "x": _plain(x),
            "y": _plain(y),
            "name": f"{html.escape(self._runs[place].label)}: {name}" if several else name,
            "line": {"color": color, "width": 1.5, "dash": DASHES[number % len(DASHES)] if several else "solid"},
            "meta": {"run": place},
            "showlegend": not several and len(self._series) > 1,
        }

    def lacks(self, place: int, missing: Sequence[_Series]) -> None:
        """Notes that a run has nothing of these series."""
        for series in missing:
            file = "evaluation.jsonl" if series.evaluated else "metrics.jsonl"
            self._missing.setdefault(f"{series.key} ({file})", []).append(self._runs[place].label)

    def panel(self, title: str, x: str, y: str, needs: str = "", *notes: str) -> Panel:
        """Returns the panel. x, y: labels of the axes. needs: what a run needs to have all series."""
        drawn = any("meta" in trace for trace in self._data)
        told = []
        for key, labels in self._missing.items():
            who = "" if len(labels) == len(self._runs) else f" by {', '.join(labels)}"
            told.append(f"not measured{who}: {key}")
        if told and needs:
            told.append(needs)
        if not drawn:
            return Panel(title=title, figure=None, notes=tuple(told))
        if self._per_point > 1:
            told.insert(0, f"each point is the mean of {self._per_point} steps")
        layout = _layout(x, y)
        values = {one for trace in self._data if "meta" in trace for one in trace["y"] if one is not None}
        if len(values) == 1:  # plotly would centre it: a share of 1 between 0 and 2, a count of 0 between -1 and 1
            (value,) = values
            layout["yaxis"]["range"] = sorted((0.0, 1.1 * value)) if value else [-0.05, 1.0]
        return Panel(title=title, figure={"data": self._data, "layout": layout}, notes=(*notes, *told))


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999"}
    return {
        "height": 270,
        "margin": {"l": 58, "r": 12, "t": 8, "b": 44},
        "font": {"size": 12},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        "xaxis": {**axis, "title": {"text": x, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 6}, "automargin": True},
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them: what is not finite is None, a gap."""
    return [float(value) if np.isfinite(value) else None for value in values]
