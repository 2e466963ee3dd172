"""PNG plots from run directories.

    plot_run(directory)                                      reward.png, ages.png, loss.png, stages.png
    compare_runs({"vanilla": [...], "R2M": [...]}, out)      several set-ups, each with its seeds, in one figure

Every figure is made by a function of what was read from disk, so that a report or a notebook can draw its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from r2m_async.config import R2MConfig
from r2m_async.runs.drawing import COLORS, GREY, bare, grid, legend_above, line, line_cycle, save
from r2m_async.runs.records import Records, binned, column, mean_curve, read_metrics, read_records, samples_kl

KL_LABEL = "KL from the reference (nats per response)"
STEP_LABEL = "policy step"
REWARDS = (("reward/mean", "proxy", "proxy reward"), ("reward/gold", "gold", "gold reward"))
"""Step metric, evaluation metric, axis label."""
METHODS = ("generate", "embed", "proximal", "score", "train", "weights", "update", "judge")
"""In the order in which a step passes through them."""
NUM_TRACED_STEPS = 4


def plot_run(directory: Path) -> list[Path]:
    """Writes the run's PNGs into its directory; those with nothing to show are left out."""
    config = R2MConfig.from_yaml(directory / "config.yaml")
    steps, evaluations = read_metrics(directory / "metrics.jsonl"), read_metrics(directory / "evaluation.jsonl")
    trace = read_records(directory / "trace.jsonl")
    figures: dict[str, Figure] = {}
    if steps:
        figures["reward"] = reward_figure(steps, evaluations)
        figures["ages"] = ages_figure(steps, config)
        figures["loss"] = loss_figure(steps)
    if any(interval["method"] == "train" for interval in trace):
        figures["stages"] = stages_figure(trace)
    return [save(figure, directory / f"{name}.png") for name, figure in figures.items()]


def compare_runs(directories: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Writes `comparison_figure` of labelled runs; the runs of one label differ in their seed."""
    runs = {label: [read_metrics(path / "metrics.jsonl") for path in paths] for label, paths in directories.items()}
    return save(comparison_figure(runs), out)


def reward_figure(steps: Records, evaluations: Records) -> Figure:
    """Proxy above gold (where known), each against step and against KL; evaluations as points with standard errors."""
    rows = REWARDS if _has(steps, "reward/gold") or _has(evaluations, "gold") else REWARDS[:1]
    figure, axes = grid(len(rows), 2)
    step, kl = column(steps, "step"), column(steps, "kl/sequence")
    evaluated = column(evaluations, "step")
    for (by_step, by_kl), (key, name, label) in zip(axes, rows, strict=True):
        line(by_step, steps, key, COLORS[0], label="training rollouts")
        by_kl.plot(samples_kl(steps), column(steps, key), "o", color=COLORS[0], ms=3, alpha=0.5, mew=0)
        judges = {name: (COLORS[1], "held-out prompts")}
        if name == "proxy":
            judges["frozen"] = (GREY, "held-out prompts, reward model as it came")
        for judge, (color, judged) in judges.items():
            if _has(evaluations, judge):
                points = {"fmt": "o", "color": color, "ms": 4.5, "elinewidth": 1, "capsize": 2}
                values, errors = column(evaluations, judge), np.nan_to_num(column(evaluations, f"{judge}_se"))
                by_step.errorbar(evaluated, values, errors, label=judged, **points)
                by_kl.errorbar(_kl_of(evaluated, step, kl), values, errors, **points)
        by_step.set_ylabel(label)
    _label_bottom(axes)
    legend_above(figure, axes[0][0])
    return figure


def ages_figure(steps: Records, config: R2MConfig) -> Figure:
    """Policy and head ages against their bounds."""
    figure, [[policy], [head]] = grid(2, 1)
    line(policy, steps, "age/policy_max", COLORS[0], label="oldest group")
    line(policy, steps, "age/policy_mean", COLORS[5], label="mean over groups")
    line(head, steps, "age/head", COLORS[2], label="head that scored")
    scheduling = config.scheduling
    for axes, bound, name in (
        (policy, scheduling.max_policy_age, "max_policy_age"),
        (head, scheduling.max_head_age, "max_head_age"),
    ):
        axes.axhline(bound, color="black", lw=1, ls="--", zorder=1, label=f"scheduling.{name} = {bound}")
        axes.set_ylim(-0.1 * (bound + 1), bound + 0.2 * (bound + 1))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    policy.set_ylabel("policy age (steps)")
    head.set_ylabel("head age (steps)")
    head.set_xlabel(STEP_LABEL)
    return figure


def loss_figure(steps: Records) -> Figure:
    """Policy loss, head loss (where a head learns), the critic's and what it explains (where there is one), and KL, one
    above the other."""
    labels = {
        "policy/loss": "policy loss",
        "head/loss": "head loss",
        "critic/loss": "critic loss",
        "critic/explained_variance": "explained variance",
        "kl/sequence": "KL (nats per response)",
    }
    shown = [key for key in labels if key in ("policy/loss", "kl/sequence") or _has(steps, key)]
    figure, axes = grid(len(shown), 1)
    for [panel], key in zip(axes, shown, strict=True):
        line(panel, steps, key, COLORS[0])
        panel.set_ylabel(labels[key])
    axes[-1][0].set_xlabel(STEP_LABEL)
    return figure


def stages_figure(trace: Records, num_steps: int = NUM_TRACED_STEPS) -> Figure:
    """Who worked on which step when, over the last policy steps. A bar includes the wait for the stage's own queue."""
    trained = sorted(interval["end"] for interval in trace if interval["method"] == "train")
    first = min(interval["start"] for interval in trace)
    start, end = (trained[-num_steps - 1] if len(trained) > num_steps else first), trained[-1]
    shown = [interval for interval in trace if interval["end"] > start and interval["start"] < end]
    rows = {row: place for place, row in enumerate(sorted({_row(interval) for interval in shown}))}
    numbers = sorted({interval["step"] for interval in shown if _by_step(interval)})
    colors = {number: COLORS[number % len(COLORS)] for number in numbers}
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for interval in shown:
        left, right = max(interval["start"], start) - start, min(interval["end"], end) - start
        color = colors[interval["step"]] if _by_step(interval) else _other(interval)[0]
        axes.barh(rows[_row(interval)], right - left, left=left, height=0.72, color=color, ec="white", lw=0.4)
    axes.set_yticks(list(rows.values()), [name for _, _, name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, end - start)
    axes.set_xlabel(f"time (s; 0 is {start:.1f} s after the run began)")
    bare(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    others = dict(_other(interval)[::-1] for interval in shown if not _by_step(interval))
    legend = {f"due step {number}": colors[number] for number in numbers} | others
    handles = [Patch(color=color, label=label) for label, color in legend.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=9)
    return figure


def comparison_figure(runs: Mapping[str, Sequence[Records]]) -> Figure:
    """Proxy above gold, each against step and against KL: a thick line for the mean over seeds and, where there are no
    more labels than colours, a thin one per seed.

    The mean against step ends where the shortest run ends. Against KL, all steps of a label's seeds are pooled, cut
    into bins of equally many steps and averaged: the reward at matched KL.
    """
    everything = [record for seeds in runs.values() for seed in seeds for record in seed]
    rows = REWARDS if _has(everything, "reward/gold") else REWARDS[:1]
    figure, axes = grid(len(rows), 2)
    for (by_step, by_kl), (key, _, axis_label) in zip(axes, rows, strict=True):
        for (label, seeds), drawn in zip(runs.items(), line_cycle(len(runs)), strict=True):
            thin, thick = drawn | {"lw": 0.7, "alpha": 0.45}, drawn | {"lw": 2.2}
            curves = [(column(seed, "step"), samples_kl(seed), column(seed, key)) for seed in seeds]
            for step, kl, reward in curves if len(runs) <= len(COLORS) else ():
                by_step.plot(step, reward, **thin)
                by_kl.plot(*binned(kl, reward), **thin)
            num_seeds = f"{len(seeds)} seed" + "s" * (len(seeds) != 1)
            by_step.plot(*mean_curve([(step, reward) for step, _, reward in curves]), label=label, **thick)
            kls, rewards = (np.concatenate([curve[place] for curve in curves]) for place in (1, 2))
            by_kl.plot(*binned(kls, rewards), label=f"{label} ({num_seeds})", **thick)
        by_step.set_ylabel(axis_label)
    _label_bottom(axes)
    legend_above(figure, axes[0][1])
    return figure


# Numbers


def _kl_of(versions: np.ndarray, step: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """The KL of policy versions: a step's record has that of the version it started from, so step v + 1 has v's."""
    known = np.isfinite(kl)
    return np.interp(versions + 1, step[known], kl[known]) if known.any() else np.full_like(versions, np.nan)


def _has(records: Records, key: str) -> bool:
    return bool(np.isfinite(column(records, key)).any())


# Drawing


def _row(interval: Mapping[str, Any]) -> tuple[int, tuple[int, ...], str]:
    """Sorts by method, then by number; a rollout actor is one row whatever it does."""
    stage, method = interval["stage"], interval["method"]
    if stage.startswith("rollout"):
        method, name = METHODS[0], stage
    else:
        name = f"{stage}: {method}"
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return place, tuple(map(int, re.findall(r"\d+", stage))), name


def _by_step(interval: Mapping[str, Any]) -> bool:
    return interval["method"] != "load_weights" and interval["step"] >= 0


def _other(interval: Mapping[str, Any]) -> tuple[str, str]:
    """Colour and name of what belongs to no step."""
    return ("black", "load weights") if interval["method"] == "load_weights" else ("#c8c8c8", "evaluation")


def _label_bottom(axes: np.ndarray) -> None:
    axes[-1][0].set_xlabel(STEP_LABEL)
    axes[-1][1].set_xlabel(KL_LABEL)
