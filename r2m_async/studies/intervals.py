"""Means over seeds with their 95 % intervals, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COUNTS = ("num_seeds", "num_planned")
"""Of a row: seeds that there is a result of, and those that the study has."""


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and half the width of its 95 % interval by Student's t over the values that are numbers; None without enough."""
    from scipy.stats import t

    known = [value for value in values if np.isfinite(value)]
    half = None
    if len(known) > 1:
        half = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
    return {"mean": statistics.fmean(known) if known else None, "half_width": half, "count": len(known)}


def seeds_row(ones: Sequence[Mapping[str, float]], num_planned: int) -> dict[str, Any]:
    """The `interval` of every key that any of `ones`, a seed's values each, has; and COUNTS."""
    keys = dict.fromkeys(key for one in ones for key in one)
    row = {key: interval([one.get(key, float("nan")) for one in ones]) for key in keys}
    return row | {"num_seeds": len(ones), "num_planned": num_planned}


def paired_row(
    ones: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]], num_planned: int
) -> dict[str, Any]:
    """The `seeds_row` of the differences `ones` - `others`, both by seed, at the seeds and keys that both have."""
    differences = [
        {key: value - others[seed][key] for key, value in one.items() if key in others[seed]}
        for seed, one in ones.items()
        if seed in others
    ]
    return seeds_row(differences, num_planned)


def differences(
    values: Mapping[str, Mapping[int, Mapping[str, float]]], num_planned: Mapping[str, int], against: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By baseline, those of `against` that are labels of `values`, then by any other label: their `paired_row`.

    values: by label, seed and key; num_planned: by label.
    """
    return {
        baseline: {
            label: paired_row(ones, values[baseline], num_planned[label])
            for label, ones in values.items()
            if label != baseline
        }
        for baseline in against
        if baseline in values
    }


def differences_tables(paired: Mapping[str, Mapping[str, Any]], digits: int = 2) -> str:
    """A section of markdown for every baseline of `differences`."""
    return "".join(
        f"\n## Less {baseline}\n\nDifferences seed by seed: their mean and its 95 % interval.\n\n{seeds_table(rows, digits)}"
        for baseline, rows in paired.items()
    )


def seeds_table(results: Mapping[str, Mapping[str, Any]], digits: int = 2) -> str:
    """Markdown of `seeds_row`s by label: a column per key of any, blank where a row lacks it; a number of seeds in brackets
    where not all that there is a result of have the value."""
    keys = list(dict.fromkeys(key for row in results.values() for key in row if key not in COUNTS))
    lines = ["| | " + " | ".join([*keys, "seeds"]) + " |", "|---" * (len(keys) + 2) + "|"]
    for label, row in results.items():
        num, planned = (row[count] for count in COUNTS)
        entries = [_entry(row[key], num, digits) if key in row else "" for key in keys]
        lines.append("| " + " | ".join([label, *entries, f"{num} of {planned}" if num < planned else str(num)]) + " |")
    return "\n".join(lines) + "\n"


def _entry(value: dict[str, Any], num_seeds: int, digits: int) -> str:
    if value["mean"] is None:
        return "-"
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}" + ("" if value["count"] == num_seeds else f" [{value['count']}]")
