"""Means over seeds with 95 % confidence intervals, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COUNTS = ("num_seeds", "num_planned")
"""Two more keys of a row: the number of seeds with a result, and the number of seeds that the study has."""


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of the finite values, and half the width of its 95 % confidence interval by Student's t.

    Returns `mean` (None without values), `half_width` (None for fewer than two values) and `count`, the number of
    finite values.
    """
    from scipy.stats import t

    known = [value for value in values if np.isfinite(value)]
    half = None
    if len(known) > 1:
        half = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
    return {"mean": statistics.fmean(known) if known else None, "half_width": half, "count": len(known)}


def seeds_row(ones: Sequence[Mapping[str, float]], num_planned: int) -> dict[str, Any]:
    """A row of a table: the `interval` of each key, and COUNTS.

    ones: the values by key of each seed. A key need not be in all of them.
    num_planned: seeds that the study has.
    """
    keys = dict.fromkeys(key for one in ones for key in one)
    row = {key: interval([one.get(key, float("nan")) for one in ones]) for key in keys}
    return row | {"num_seeds": len(ones), "num_planned": num_planned}


def paired_row(
    ones: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]], num_planned: int
) -> dict[str, Any]:
    """The `seeds_row` of differences `ones` - `others`, seed by seed.

    ones, others: values by seed and key. Only seeds and keys of both count.
    num_planned: seeds that the study has.
    """
    differences = [
        {key: value - others[seed][key] for key, value in one.items() if key in others[seed]}
        for seed, one in ones.items()
        if seed in others
    ]
    return seeds_row(differences, num_planned)


def differences(
    values: Mapping[str, Mapping[int, Mapping[str, float]]], num_planned: Mapping[str, int], against: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The `paired_row` of each label against each baseline, by baseline and then by label.

    values: values by label, seed and key.
    num_planned: seeds that the study has, by label.
    against: baselines. Those that are no labels are ignored.
    """
    return {
        baseline: {
            # The labels share their seeds. A difference within a seed is free of what that seed does to both.
            label: paired_row(ones, values[baseline], num_planned[label])
            for label, ones in values.items()
            if label != baseline
        }
        for baseline in against
        if baseline in values
    }


def differences_tables(paired: Mapping[str, Mapping[str, Any]], digits: int = 2) -> str:
    """The result of `differences` as Markdown, with a section for each baseline."""
    return "".join(
        f"\n## Less {baseline}\n\nDifferences seed by seed: their mean and its 95 % interval.\n\n{seeds_table(rows, digits)}"
        for baseline, rows in paired.items()
    )


def seeds_table(results: Mapping[str, Mapping[str, Any]], digits: int = 2) -> str:
    """Rows of `seeds_row` as Markdown.

    results: rows by label. There is a column for each key that any row has; it is blank in rows that lack the key.
    digits: decimal places.

    A number in brackets says how many seeds have the value, if not all seeds with a result have it.
    """
    keys = list(dict.fromkeys(key for row in results.values() for key in row if key not in COUNTS))
    lines = ["| | " + " | ".join([*keys, "seeds"]) + " |", "|---" * (len(keys) + 2) + "|"]
    for label, row in results.items():
        num, planned = (row[count] for count in COUNTS)
        entries = [_entry(row[key], num, digits) if key in row else "" for key in keys]
        lines.append("| " + " | ".join([label, *entries, f"{num} of {planned}" if num < planned else str(num)]) + " |")
    return "\n".join(lines) + "\n"


def _entry(value: dict[str, Any], num_seeds: int, digits: int) -> str:
    """A cell of the table: mean ± half the width of its interval; `-` without a mean."""
    if value["mean"] is None:
        return "-"
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}" + ("" if value["count"] == num_seeds else f" [{value['count']}]")
