"""PNG plots of the reward-model laboratory, of what its files have; `plots` has the ring's and best-of-n's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from r2m_async.runs.drawing import COLORS, bare, color_cycle, grid, legend_above, line, save
from r2m_async.runs.records import Records, column, read_metrics


def plot_reward_training(directories: Mapping[str, Path], out: Path) -> Path:
    """Writes `reward_training_figure` of labelled folders of `reward_training`."""
    models = {label: read_metrics(path / "metrics.jsonl") for label, path in directories.items()}
    return save(reward_training_figure(models), out)


def plot_training_states(directories: Mapping[str, Path], out: Path) -> Path:
    """Writes `training_states_figure` of labelled folders of `reward_training`."""
    models = {label: read_metrics(path / "evaluation.jsonl") for label, path in directories.items()}
    return save(training_states_figure(models), out)


def plot_reward_evaluation(results: Mapping[str, Any], out: Path) -> Path:
    """Writes `reward_evaluation_figure` of `reward_evaluation.evaluate`'s results."""
    return save(reward_evaluation_figure(results), out)


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


def plot_policy_states(results: Mapping[str, Any], out: Path) -> Path:
    """Writes `policy_states_figure` of `policy_states.policy_states`'s results."""
    return save(policy_states_figure(results), out)


def policy_states_figure(results: Mapping[str, Any]) -> Figure:
    """Similarity by layer and, where there are, against rewards and between policies (R2M Fig. 1, 2 and 9b)."""
    similarity = results["similarity"]
    drawn = [
        (_draw_similarity, similarity),
        (_draw_reward_differences, similarity if similarity["points"] else None),
        (_draw_drift, results["drift"]),
    ]
    return _panels(drawn, str(results["policy"]))


def reward_evaluation_figure(results: Mapping[str, Any]) -> Figure:
    """A panel for each part that was evaluated: splits, RM-Bench, norms, ranks, similarity by layer and against rewards."""
    drawn = [
        (_draw_splits, results["splits"]),
        (_draw_rm_bench, results["rm_bench"]),
        (_draw_norms, results["states"]),
        (_draw_ranks, results["states"]),
        (_draw_similarity, results["similarity"]),
        (_draw_reward_differences, results["similarity"]),
    ]
    return _panels(drawn, str(results["model"]))


def _panels(drawn: Sequence[tuple[Callable[[Axes, Any], None], Any]], title: str) -> Figure:
    """Of the parts that there are, three in a row."""
    shown = [(draw, part) for draw, part in drawn if part]
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(figsize=(0.4 + 4.2 * num_columns, 0.4 + 3.2 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel, (draw, part) in zip(axes.flat, shown, strict=False):
        bare(panel)
        draw(panel, part)
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_splits(axes: Axes, splits: Mapping[str, Any]) -> None:
    taus, errors = ([one[key] for one in splits.values()] for key in ("tau", "tau_se"))
    _bars(axes, list(splits), taus, np.nan_to_num(errors))
    axes.set_ylabel("Kendall's tau (± standard error)")


def _draw_rm_bench(axes: Axes, rm_bench: Mapping[str, Any]) -> None:
    axes.imshow(rm_bench["all"]["grid"], vmin=0, vmax=1, cmap="RdYlGn")
    for (row, place), value in np.ndenumerate(np.array(rm_bench["all"]["grid"])):
        axes.text(place, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
    styles = ("concise", "detailed", "markdown")
    axes.set_xticks(range(3), styles, fontsize=8)
    axes.set_yticks(range(3), styles, fontsize=8)
    axes.grid(False)
    axes.set_xlabel("style of the rejected response")
    axes.set_ylabel("style of the chosen one")
    axes.set_title("RM-Bench, accuracy (mean of domains)", fontsize=9)


def _draw_norms(axes: Axes, states: Mapping[str, Any]) -> None:
    _bars(axes, list(states), [one["norm_dispersion"] for one in states.values()])
    axes.set_ylabel("norms of scored states, std / mean")


def _draw_ranks(axes: Axes, states: Mapping[str, Any]) -> None:
    _bars(axes, list(states), [one["effective_rank"] for one in states.values()])
    axes.set_ylabel(f"effective rank of {next(iter(states.values()))['num']} states")


def _draw_similarity(axes: Axes, similarity: Mapping[str, Any]) -> None:
    for key, color in (("same", COLORS[0]), ("cross", COLORS[1])):
        axes.plot(similarity[key], marker="o", ms=4, color=color, label=f"{key} preference")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("similarity, (1 + cosine) / 2")
    axes.legend(frameon=False, fontsize=8)


def _draw_reward_differences(axes: Axes, similarity: Mapping[str, Any]) -> None:
    axes.plot(*np.transpose(similarity["points"]), "o", color=COLORS[2], ms=3, alpha=0.6, mew=0)
    axes.set_xlabel(f"similarity in layer {similarity['layer']}")
    axes.set_ylabel("difference of rewards")
    axes.set_title(f"r = {similarity['correlation']:.2f}", fontsize=9)


def _draw_drift(axes: Axes, drift: Mapping[str, Any]) -> None:
    cosines, names = np.array(drift["cosine"]), [Path(name).name for name in drift["policies"]]
    axes.imshow(cosines, cmap="viridis", vmax=1)
    for (row, place), value in np.ndenumerate(cosines):
        axes.text(place, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white")
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.grid(False)
    axes.set_title("cosine of the same texts' states", fontsize=9)


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], errors: Sequence[float] | None = None) -> None:
    places = range(len(labels))
    axes.bar(places, values, yerr=errors, color=COLORS[0], width=0.7, capsize=3)
    axes.set_xticks(places, [label.replace("_", "\n").replace(" ", "\n") for label in labels], fontsize=7)
    axes.grid(False, axis="x")
