"""What all figures share: colours, panels, lines, and writing a figure to a file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r2m_async.runs.records import Records, column
from r2m_async.whole import write_file

T = TypeVar("T")

LINE_STYLES = ("-", "--", ":", "-.")
"""Drawn through, dashed, dotted, dash-dotted."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Six colours of Okabe and Ito's palette, which colour-blind readers can tell apart."""
GREY = "#8a8a8a"
"""For what is there for comparison only."""


def chosen(drawn: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """Returns the entries of `drawn` that `names` names, in the order of `drawn`. If none is named, it returns all."""
    return {name: one for name, one in drawn.items() if name in names} or dict(drawn)


def color_cycle(number: int) -> list[str]:
    """Returns `number` colours. After the sixth they begin anew."""
    return [COLORS[place % len(COLORS)] for place in range(number)]


def line_cycle(number: int) -> list[dict[str, str]]:
    """Returns matplotlib's `color` and `ls` for `number` lines, so that up to 24 lines look different.

    The colours are used up first as lines drawn through, then as dashed, dotted and dash-dotted ones.
    """
    return [{"color": color, "ls": LINE_STYLES[at // len(COLORS) % 4]} for at, color in enumerate(color_cycle(number))]


def grid(num_rows: int, num_columns: int) -> tuple[Figure, np.ndarray]:
    """Returns a new figure and its empty panels, an array [num_rows, num_columns] of axes.

    The panels of one column share their x axis.
    """
    figure = Figure(figsize=(10, 0.6 + 2.4 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharex="col", squeeze=False)
    for panel in axes.flat:
        bare(panel)
    return figure, axes


def bare(axes: Axes) -> None:
    """Gives a panel a light grid, and takes away its frame at the top and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)


def line(axes: Axes, steps: Records, key: str, color: str, label: str | None = None) -> None:
    """Draws one metric against the step.

    steps: records with a `step`. key: the metric. Where a record lacks it, the line has a gap.
    """
    # The points of a short run are marked, because a single point draws no line.
    marker = "." if len(steps) <= 30 else ""
    axes.plot(column(steps, "step"), column(steps, key), color=color, lw=1.3, marker=marker, label=label)


def legend_above(figure: Figure, axes: Axes) -> None:
    """Puts one legend above all panels, with the labels of the panel `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format that the suffix of `path` names, or as PNG without one. Returns `path`.

    Raises DiskError.
    """
    # Drawn in memory first, so that the file is written in one go and a reader never finds half of it.
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format=path.suffix[1:] or "png")
    write_file(path, image.getbuffer())
    return path
