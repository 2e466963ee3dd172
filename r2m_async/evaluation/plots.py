"""Figures of what `r2m reward-model eval`, `r2m policy-states` and `r2m bon` measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from r2m_async.runs.drawing import COLORS, bare, grid, legend_above, line_cycle, save


def plot_reward_evaluation(results: Mapping[str, Any], out: Path) -> Path:
    """Writes `reward_evaluation_figure` to `out`, and returns `out`.

    `results` are those of `reward_models.evaluate`.
    """
    return save(reward_evaluation_figure(results), out)


def plot_policy_states(results: Mapping[str, Any], out: Path) -> Path:
    """Writes `policy_states_figure` to `out`, and returns `out`.

    `results` are those of `policy_states.policy_states`.
    """
    return save(policy_states_figure(results), out)


def policy_states_figure(results: Mapping[str, Any]) -> Figure:
    """Similarity by layer, similarity against rewards, and drift of policies (R2M Fig. 1, 2 and 9b).

    The last two are left out if they were not measured.
    """
    similarity = results["similarity"]
    drawn = [
        (_draw_similarity, similarity),
        (_draw_reward_differences, similarity if similarity["points"] else None),
        (_draw_drift, results["drift"]),
    ]
    return _panels(drawn, str(results["policy"]))


def reward_evaluation_figure(results: Mapping[str, Any]) -> Figure:
    """A panel for each part that was evaluated.

    The parts are tau on the splits, RM-Bench, norms of hidden states, their effective rank, similarity by layer, and
    similarity against rewards.
    """
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
    """Draws each part that is there into a panel of its own, three panels in a row.

    drawn: functions that draw, each with its part of the results.
    """
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
    """Kendall's tau of each split, with standard errors."""
    taus, errors = ([one[key] for one in splits.values()] for key in ("tau", "tau_se"))
    _bars(axes, list(splits), taus, np.nan_to_num(errors))
    axes.set_ylabel("Kendall's tau (± standard error)")


def _draw_rm_bench(axes: Axes, rm_bench: Mapping[str, Any]) -> None:
    """RM-Bench's grid of accuracies, as colours and numbers."""
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
    """Dispersion of the norms of hidden states, for each set of texts."""
    _bars(axes, list(states), [one["norm_dispersion"] for one in states.values()])
    axes.set_ylabel("norms of scored states, std / mean")


def _draw_ranks(axes: Axes, states: Mapping[str, Any]) -> None:
    """Effective rank of hidden states, for each set of texts."""
    _bars(axes, list(states), [one["effective_rank"] for one in states.values()])
    axes.set_ylabel(f"effective rank of {next(iter(states.values()))['num']} states")


def _draw_similarity(axes: Axes, similarity: Mapping[str, Any]) -> None:
    """Similarity of texts of the same and of opposite preference, by layer."""
    for key, color in (("same", COLORS[0]), ("cross", COLORS[1])):
        axes.plot(similarity[key], marker="o", ms=4, color=color, label=f"{key} preference")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("similarity, (1 + cosine) / 2")
    axes.legend(frameon=False, fontsize=8)


def _draw_reward_differences(axes: Axes, similarity: Mapping[str, Any]) -> None:
    """A point for each drawn pair of texts: the difference of their rewards against their similarity."""
    axes.plot(*np.transpose(similarity["points"]), "o", color=COLORS[2], ms=3, alpha=0.6, mew=0)
    axes.set_xlabel(f"similarity in layer {similarity['layer']}")
    axes.set_ylabel("difference of rewards")
    axes.set_title(f"r = {similarity['correlation']:.2f}", fontsize=9)


def _draw_drift(axes: Axes, drift: Mapping[str, Any]) -> None:
    """Cosines between the hidden states of all policies, as colours and numbers."""
    cosines, names = np.array(drift["cosine"]), [Path(name).name for name in drift["policies"]]
    axes.imshow(cosines, cmap="viridis", vmax=1)
    for (row, place), value in np.ndenumerate(cosines):
        axes.text(place, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white")
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.grid(False)
    axes.set_title("cosine of the same texts' states", fontsize=9)


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], errors: Sequence[float] | None = None) -> None:
    """A bar for each label, with error bars if `errors` are given."""
    places = range(len(labels))
    axes.bar(places, values, yerr=errors, color=COLORS[0], width=0.7, capsize=3)
    axes.set_xticks(places, [label.replace("_", "\n").replace(" ", "\n") for label in labels], fontsize=7)
    axes.grid(False, axis="x")


def plot_best_of_n(results: Mapping[str, Any], out: Path, *, band: str) -> Path:
    """Writes `best_of_n_figure` to `out`, and returns `out`."""
    return save(best_of_n_figure(results, band=band), out)


def best_of_n_figure(results: Mapping[str, Any], *, band: str) -> Figure:
    """Gains of proxy and gold over one sample against KL, with a line for each reward model of `results["models"]`.

    band: what is shaded on either side of a line: `se`, as `best_of_n.measure_best_of_n` gives it, or `half_width`.
        Nothing is shaded if there are more lines than colours.
    """
    figure, [axes] = grid(1, 2)
    shaded = len(results["models"]) <= len(COLORS)  # more bands would hide the lines
    for panel, key in zip(axes, ("proxy", "gold"), strict=True):
        for (model, curves), drawn in zip(results["models"].items(), line_cycle(len(results["models"])), strict=True):
            values, errors = np.array(curves[key]), np.nan_to_num(np.array(curves[f"{key}_{band}"], dtype=float))
            panel.plot(results["kl"], values, marker=".", label=Path(model).name, **drawn)
            if shaded:
                panel.fill_between(
                    results["kl"], values - errors, values + errors, color=drawn["color"], alpha=0.12, lw=0
                )
        panel.set_ylabel(f"{key} reward of the best of n,\nless that of one sample")
        panel.set_xlabel("KL = log n - (n - 1) / n (nats)")
    legend_above(figure, axes[0])
    return figure
