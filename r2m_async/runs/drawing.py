"""What all figures share: colours, panels, lines, and how a figure is written."""

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
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by all readers."""
GREY = "#8a8a8a"


def chosen(drawn: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """What is named, in the order of `drawn`; all of it where none is."""
    return {name: one for name, one in drawn.items() if name in names} or dict(drawn)


def color_cycle(number: int) -> list[str]:
    return [COLORS[place % len(COLORS)] for place in range(number)]


def line_cycle(number: int) -> list[dict[str, str]]:
    """Colours and line styles that tell so many lines apart: the colours drawn through, then dashed, dotted, dash-dotted."""
    return [{"color": color, "ls": LINE_STYLES[at // len(COLORS) % 4]} for at, color in enumerate(color_cycle(number))]


def grid(num_rows: int, num_columns: int) -> tuple[Figure, np.ndarray]:
    """Panels [rows, columns]; those of one column share their x axis."""
    figure = Figure(figsize=(10, 0.6 + 2.4 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharex="col", squeeze=False)
    for panel in axes.flat:
        bare(panel)
    return figure, axes


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)


def line(axes: Axes, steps: Records, key: str, color: str, label: str | None = None) -> None:
    """A metric against step; the points of a short run are marked, for a single one draws no line."""
    marker = "." if len(steps) <= 30 else ""
    axes.plot(column(steps, "step"), column(steps, key), color=color, lw=1.3, marker=marker, label=label)


def legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> Path:
    """In the format of its suffix. Raises DiskError."""
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format=path.suffix[1:] or "png")
    write_file(path, image.getbuffer())
    return path
