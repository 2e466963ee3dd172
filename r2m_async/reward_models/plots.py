"""Figures of the training of reward models, drawn from the files that the training wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from r2m_async.runs.drawing import color_cycle, grid, legend_above, line, save
from r2m_async.runs.records import Records, column, read_metrics


def plot_reward_training(directories: Mapping[str, Path], out: Path) -> Path:
    """Draws `reward_training_figure` from each model's metrics.jsonl, writes it to `out`, and returns `out`.

    directories: the folder of each model (`RUN/seed-N`), by the label that the figure shows.
    """
    models = {label: read_metrics(path / "metrics.jsonl") for label, path in directories.items()}
    return save(reward_training_figure(models), out)


def plot_training_states(directories: Mapping[str, Path], out: Path) -> Path:
    """Draws `training_states_figure` from each model's evaluation.jsonl, writes it to `out`, and returns `out`.

    directories: the folder of each model (`RUN/seed-N`), by the label that the figure shows.
    """
    models = {label: read_metrics(path / "evaluation.jsonl") for label, path in directories.items()}
    return save(training_states_figure(models), out)


def reward_training_figure(models: Mapping[str, Records]) -> Figure:
    """Loss, accuracy and standard deviation of the rewards against the step, in one colour per model.

    models: records of metrics.jsonl, by label. In the accuracy panel, lines are training batches and points are
        held-out pairs.
    """
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
    """The measurements of BSR Fig. 1-3 against the step, in one colour per model.

    The panels show the norm of the head's weights, the distance between the hidden states of a pair's two responses,
    the norm of hidden states, and the dispersion of that norm.

    models: records of evaluation.jsonl, by label. Solid lines are held-out pairs, dashed lines training pairs. For a
        single model the second and the third panel have bands of one standard deviation on either side.
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
                # Bands of several models would cover each other.
                if len(models) == 1:
                    panel.fill_between(step, mean - std, mean + std, color=color, alpha=0.12, lw=0)
            dispersion.plot(step, column(records, f"{name}/norm_dispersion"), **drawn)
    labels = ("norm of the\nhead's weights", "||h_w - h_l||", "||h||", "||h||, std / mean")
    for [panel], label in zip(axes, labels, strict=True):
        panel.set_ylabel(label)
    axes[-1][0].set_xlabel("step")
    legend_above(figure, apart)
    return figure
