"""Draws the figures of a run, and of several runs compared, from the files in their run directories.

    plot_run(directory)                                      reward.png, ages.png, loss.png, stages.png
    compare_runs({"vanilla": [...], "R2M": [...]}, out)      several set-ups, each with its seeds, in one figure

A function ending in `_figure` makes a figure from records that were read before, and writes nothing. A report or a
notebook can use it.

The proxy reward is the one that the policy is trained on. The gold reward is the true quality, where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from r2m_async.config import R2MConfig
from r2m_async.runs.drawing import COLORS, GREY, bare, grid, legend_above, line, line_cycle, save
from r2m_async.runs.records import (
    Records,
    binned,
    column,
    has,
    kl_of_versions,
    mean_curve,
    read_metrics,
    read_trace,
    reward_functions,
    samples_kl,
)
from r2m_async.runs.trace import belongs_to_a_step, last_steps, row_of

KL_LABEL = "KL from the reference (nats per response)"
STEP_LABEL = "policy step"
REWARDS = (("reward/mean", "proxy", "proxy reward"), ("reward/gold", "gold", "gold reward"))
"""For each row of panels: the metric of a step, the metric of an evaluation, and the label of the axis."""
NUM_TRACED_STEPS = 4
"""The number of steps that `stages.png` shows, the last ones."""


def plot_run(directory: Path) -> list[Path]:
    """Draws the figures of a run into its directory, and returns their paths.

    A figure with nothing to show is left out. directory: a run directory.

    Raises DiskError, and DataError if a record cannot be read.
    """
    config = R2MConfig.from_yaml(directory / "config.yaml")
    steps, evaluations = read_metrics(directory / "metrics.jsonl"), read_metrics(directory / "evaluation.jsonl")
    trace = read_trace(directory / "trace.jsonl")
    figures: dict[str, Figure] = {}
    if steps:
        figures["reward"] = reward_figure(steps, evaluations)
        figures["ages"] = ages_figure(steps, config)
        figures["loss"] = loss_figure(steps)
    if any(interval["method"] == "train" for interval in trace):
        figures["stages"] = stages_figure(trace)
    return [save(figure, directory / f"{name}.png") for name, figure in figures.items()]


def compare_runs(
    directories: Mapping[str, Sequence[Path]],
    out: Path,
    curves: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
) -> Path:
    """Draws `comparison_figure` of several runs into the file `out`, and returns its path.

    directories: for each label the run directories, which differ in their seed. curves: those of `comparison_figure`.

    Raises DiskError, and DataError if a record cannot be read.
    """
    runs = {label: [read_metrics(path / "metrics.jsonl") for path in paths] for label, paths in directories.items()}
    return save(comparison_figure(runs, curves), out)


def reward_figure(steps: Records, evaluations: Records) -> Figure:
    """Draws the rewards of a run: the proxy reward, below it the gold reward if it is known, then each reward function.

    steps, evaluations: records of metrics.jsonl and of evaluation.jsonl. Each reward is drawn against the step at the
    left and against the KL at the right. Evaluations are points with their standard errors.
    """
    rows = REWARDS if has(steps, "reward/gold") or has(evaluations, "gold") else REWARDS[:1]
    rows = (*rows, *((key, key, key.removeprefix("reward/")) for key in reward_functions(steps)))
    figure, axes = grid(len(rows), 2)
    evaluated = column(evaluations, "step")
    for (by_step, by_kl), (key, name, label) in zip(axes, rows, strict=True):
        line(by_step, steps, key, COLORS[0], label="training rollouts")
        by_kl.plot(samples_kl(steps), column(steps, key), "o", color=COLORS[0], ms=3, alpha=0.5, mew=0)
        held_out = {name: (COLORS[1], "held-out prompts")}
        if name == "proxy":
            held_out["frozen"] = (GREY, "held-out prompts, reward model as it came")
        for reward, (color, label_of_it) in held_out.items():
            if has(evaluations, reward):
                points = {"fmt": "o", "color": color, "ms": 4.5, "elinewidth": 1, "capsize": 2}
                # Reward functions come without an error.
                values, errors = column(evaluations, reward), np.nan_to_num(column(evaluations, f"{reward}_se"))
                by_step.errorbar(evaluated, values, errors, label=label_of_it, **points)
                by_kl.errorbar(kl_of_versions(evaluated, steps), values, errors, **points)
        by_step.set_ylabel(label)
    _label_bottom(axes)
    legend_above(figure, axes[0][0])
    return figure


def ages_figure(steps: Records, config: R2MConfig) -> Figure:
    """Draws how old the policy and the head were that each step used, and the bounds of both ages.

    steps: records of metrics.jsonl. config: of the run, for the bounds. An age is in steps.
    """
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
    """Draws the losses of a run and the KL to the reference, one above the other.

    steps: records of metrics.jsonl. The head's loss is drawn if a head learns. The critic's loss and explained
    variance are drawn if there is a critic.
    """
    labels = {
        "policy/loss": "policy loss",
        "head/loss": "head loss",
        "critic/loss": "critic loss",
        "critic/explained_variance": "explained variance",
        "kl/sequence": "KL (nats per response)",
    }
    shown = [key for key in labels if key in ("policy/loss", "kl/sequence") or has(steps, key)]
    figure, axes = grid(len(shown), 1)
    for [panel], key in zip(axes, shown, strict=True):
        line(panel, steps, key, COLORS[0])
        panel.set_ylabel(labels[key])
    axes[-1][0].set_xlabel(STEP_LABEL)
    return figure


def stages_figure(trace: Records, num_steps: int = NUM_TRACED_STEPS) -> Figure:
    """Draws which stage worked on which step at what time, over the last `num_steps` policy steps.

    trace: records of trace.jsonl, at least one of which is a `train`.

    A bar begins when the stage was free to work on the call. A `weights` call that ran beside another call begins
    when it was asked for.
    """
    start, end, shown = last_steps(trace, num_steps)
    rows = {row: place for place, row in enumerate(sorted({row_of(interval) for interval in shown}))}
    numbers = sorted({interval["step"] for interval in shown if belongs_to_a_step(interval)})
    colors = {number: COLORS[number % len(COLORS)] for number in numbers}
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for interval in shown:
        left, right = max(interval["start"], start) - start, min(interval["end"], end) - start
        color = colors[interval["step"]] if belongs_to_a_step(interval) else _other(interval)[0]
        axes.barh(rows[row_of(interval)], right - left, left=left, height=0.72, color=color, ec="white", lw=0.4)
    axes.set_yticks(list(rows.values()), [name for _, _, name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, end - start)
    axes.set_xlabel(f"time (s; 0 is {start:.1f} s after the run began)")
    bare(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    others = dict(_other(interval)[::-1] for interval in shown if not belongs_to_a_step(interval))
    legend = {f"due step {number}": colors[number] for number in numbers} | others
    handles = [Patch(color=color, label=label) for label, color in legend.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=9)
    return figure


def comparison_figure(
    runs: Mapping[str, Sequence[Records]], curves: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
) -> Figure:
    """Draws the rewards of several set-ups in one figure.

    runs: for each label the records of metrics.jsonl, once for each seed.
    curves: for each label `step`, and under `proxy`, `proxy_half_width`, `gold` and `gold_half_width` the mean over seeds at
        each step and half the width of its interval, None where it is not known. A label with curves has a
        band in the place of thin lines.

    The proxy reward is above, and the gold reward below if it is known.

    A thick line is the mean over the seeds of a label. Each seed has a thin line too, or the label its band, unless there
    are more labels than colours. Against the step (left), the mean ends where the shortest run ends. Against the KL
    (right), the steps of all seeds are put into bins with equally many steps and averaged, which compares the rewards at
    the same KL.
    """
    everything = [record for seeds in runs.values() for seed in seeds for record in seed]
    rows = REWARDS if has(everything, "reward/gold") else REWARDS[:1]
    figure, axes = grid(len(rows), 2)
    for (by_step, by_kl), (key, name, axis_label) in zip(axes, rows, strict=True):
        for (label, seeds), drawn in zip(runs.items(), line_cycle(len(runs)), strict=True):
            thin, thick = drawn | {"lw": 0.7, "alpha": 0.45}, drawn | {"lw": 2.2}
            of_seeds = [(column(seed, "step"), samples_kl(seed), column(seed, key)) for seed in seeds]
            # With more labels than colours, labels differ in their line style alone, which a thin line does not show.
            few, own = len(runs) <= len(COLORS), (curves or {}).get(label)
            if own and few:
                steps, mean, half = (np.array(own[of], float) for of in ("step", name, f"{name}_half_width"))
                by_step.fill_between(steps, mean - half, mean + half, color=drawn["color"], alpha=0.15, lw=0)
            for step, kl, reward in of_seeds if few and not own else ():
                by_step.plot(step, reward, **thin)
                by_kl.plot(*binned(kl, reward), **thin)
            num_seeds = f"{len(seeds)} seed" + "s" * (len(seeds) != 1)
            by_step.plot(*mean_curve([(step, reward) for step, _, reward in of_seeds]), label=label, **thick)
            kls, rewards = (np.concatenate([curve[place] for curve in of_seeds]) for place in (1, 2))
            by_kl.plot(*binned(kls, rewards), label=f"{label} ({num_seeds})", **thick)
        by_step.set_ylabel(axis_label)
    _label_bottom(axes)
    legend_above(figure, axes[0][1])
    return figure


def _other(interval: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the colour and the name of an interval whose work belongs to no step."""
    return ("black", "load weights") if interval["method"] == "load_weights" else ("#c8c8c8", "evaluation")


def _label_bottom(axes: np.ndarray) -> None:
    axes[-1][0].set_xlabel(STEP_LABEL)
    axes[-1][1].set_xlabel(KL_LABEL)
