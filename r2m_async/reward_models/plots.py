"""Figures of the training of reward models, from the files it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from r2m_async.runs.drawing import color_cycle, grid, legend_above, line, save
from r2m_async.runs.records import Records, column, read_metrics


def plot_reward_training(directories: Mapping[str, Path], out: Path) -> Path:
    """Writes `reward_training_figure` of labelled folders of `reward_training`."""
    models = {label: read_metrics(path / "metrics.jsonl") for label, path in directories.items()}
    return save(reward_training_figure(models), out)


def plot_training_states(directories: Mapping[str, Path], out: Path) -> Path:
    """Writes `training_states_figure` of labelled folders of `reward_training`."""
    models = {label: read_metrics(path / "evaluation.jsonl") for label, path in directories.items()}
    return save(training_states_figure(models), out)


def reward_training_figure(models: Mapping[str, Records]) -> Figure:
    """Loss, accuracy (a line for the batches, points for held-out pairs) and spread of the rewards, of each model."""
    labels = {"loss": "loss", "accuracy": "accuracy", "reward/std": "standard deviation\nof rewards"}
    figure, axes = grid(len(labels), 1)
    for (label, steps), color in zip(models.items(), color_cycle(len(models)), strict=True):
        for [panel], key in zip(axes, labels, strict=True):
            line(panel, steps, key, color, label=label)
        held_out = column(steps, "held_out/accuracy")
        axes[1][0].plot(column(steps, "step"), held_out, "o", color=color, ms=5, label=f"{label}, held-out pairs")
    for [panel], label in zip(axes, labels.values(), strict=True):
        panel.set_ylabel(label)
    axes[-1][0].set_xlabel("step")
    legend_above(figure, axes[1][0])
    return figure


def training_states_figure(models: Mapping[str, Records]) -> Figure:
    """BSR Fig. 1-3 over the steps: norm of the head, distance of a pair's states, norms of states and their dispersion.

    Held-out pairs are drawn through, training pairs dashed; bands are standard deviations, of one model alone.
    """
    figure, axes = grid(4, 1)
    [head], [apart], [norms], [dispersion] = axes
    for (label, records), color in zip(models.items(), color_cycle(len(models)), strict=True):
        step = column(records, "step")
        head.plot(step, column(records, "head/weight_norm"), color=color, marker=".")
        for name, style in (("held_out", "-"), ("training", "--")):
            drawn = {"color": color, "ls": style, "marker": ".", "label": f"{label}, {name.replace('_', '-')} pairs"}
            for panel, key in ((apart, "difference_norm"), (norms, "norm_mean")):
                mean, std = column(records, f"{name}/{key}"), column(records, f"{name}/{key.removesuffix('_mean')}_std")
                panel.plot(step, mean, **drawn)
                if len(models) == 1:
                    panel.fill_between(step, mean - std, mean + std, color=color, alpha=0.12, lw=0)
            dispersion.plot(step, column(records, f"{name}/norm_dispersion"), **drawn)
    labels = ("norm of the\nhead's weights", "||h_w - h_l||", "||h||", "||h||, std / mean")
    for [panel], label in zip(axes, labels, strict=True):
        panel.set_ylabel(label)
    axes[-1][0].set_xlabel("step")
    legend_above(figure, apart)
    return figure
