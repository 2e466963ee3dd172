"""The results of a study's runs: results.json, table.md and comparison.png in OUT.

results.json also has the curves over steps: for each cell the mean over seeds at every step, with its 95 % interval.

A comparison at equal steps favours whatever learns slowest. So the table begins with the gold reward at matched KL, its
peak, and the area under gold against KL. All cells have the same seeds, so with `against` differences are taken seed by
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.runs.drawing import chosen
from r2m_async.runs.plots import compare_runs
from r2m_async.runs.records import column, read_metrics, samples_kl
from r2m_async.runs.results import write_results
from r2m_async.studies.intervals import differences, differences_tables, interval, seeds_row, seeds_table
from r2m_async.studies.jobs import failures

SMOOTHING = 5
"""Steps over which gold and KL are averaged before they are compared. A single step has few responses."""

COMPARED = ("gold_at_kl_", "gold_at_step_", "gold_peak", "gold_area", "gold_mean", "gold_end", "accuracy_end")
"""Beginnings of the names of the numbers that are compared seed by seed."""
CURVES = {"gold": "reward/gold", "proxy": "reward/mean", "kl": None}
"""The curves over steps that results.json has, and the metric of each. None: `samples_kl`."""

Steps = Sequence[dict[str, Any]]
"""The records of a run's metrics.jsonl, by rising step."""


def compare_cells(
    cells: Mapping[str, Mapping[int, Path]],
    kl_levels: Sequence[float],
    against: Sequence[str],
    out: Path,
    draw: Sequence[str] = (),
    at_steps: Sequence[int] = (),
) -> None:
    """Writes the files of OUT.

    cells: for each cell and seed, the directory of the run. A run that failed has no directory.
    kl_levels: KL in nats per response at which gold is compared.
    against: names to compare all other cells with, seed by seed. Those that are no cells are ignored.
    draw: cells that the figure shows, by `drawing.chosen`.
    at_steps: steps at which gold is compared.

    Raises DiskError.
    """
    there = {cell: {seed: path for seed, path in runs.items() if path.exists()} for cell, runs in cells.items()}
    steps = {path: read_metrics(path / "metrics.jsonl") for runs in there.values() for path in runs.values()}
    to_kl = area_to_kl(list(steps.values()), kl_levels)
    summaries = {
        cell: {seed: summary(steps[path], kl_levels, to_kl, at_steps) | accuracies(path) for seed, path in runs.items()}
        for cell, runs in there.items()
    }
    rows = {cell: seeds_row(list(ones.values()), len(cells[cell])) for cell, ones in summaries.items()}
    compared = {
        cell: {
            seed: {key: value for key, value in one.items() if key.startswith(COMPARED)} for seed, one in ones.items()
        }
        for cell, ones in summaries.items()
    }
    paired = differences(compared, {cell: len(runs) for cell, runs in cells.items()}, against)
    failed = failures(path for runs in cells.values() for path in runs.values() if path not in steps)
    curves = {cell: curves_over_steps([steps[path] for path in runs.values()]) for cell, runs in there.items() if runs}
    results = {"cells": rows, "against": paired, "area_to_kl": to_kl, "failed": failed, "curves": curves}
    write_results(out, results, _table(rows, paired, to_kl))
    if drawn := {cell: list(runs.values()) for cell, runs in there.items() if runs}:
        compare_runs(chosen(drawn, draw), out / "comparison.png", curves)


def _table(rows: Mapping[str, Any], paired: Mapping[str, Mapping[str, Any]], to_kl: float) -> str:
    """The results as Markdown: a row for each cell, then the differences."""
    area = (
        f"\n`gold_area`: the mean of gold over KL from 0 to {to_kl:.3g}, which is the highest level, or the highest KL "
        f"that every run passed if that is less.\n"
    )
    return seeds_table(rows) + area * bool(np.isfinite(to_kl)) + differences_tables(paired)


def area_to_kl(runs: Sequence[Steps], kl_levels: Sequence[float]) -> float:
    """The KL at which the area under gold ends: the highest level, or less if a run did not get so far.

    A run whose gold against KL is not known does not count. NaN if none is known.
    """
    passed = [levels[-1] for levels, _ in map(gold_against_kl, runs) if len(levels)]
    return float(min(max(kl_levels), *passed)) if passed else float("nan")


def summary(steps: Steps, kl_levels: Sequence[float], to_kl: float, at_steps: Sequence[int] = ()) -> dict[str, float]:
    """The numbers of one run by name.

    They are gold where the KL first reached each level (NaN if it never did), gold at steps (NaN if the run did not get
    there), the peak of gold, the area under gold, the mean of gold over all steps, the last values of gold, KL and proxy
    reward, the lowest effective sample size and the highest gradient norm, the number of labels if there were any, and
    the seconds that the run took. All but the mean, the labels and the seconds are of smoothed curves.

    steps: the run's records.
    kl_levels: levels of KL.
    to_kl: where the area ends. The area is the mean of gold over KL from 0 to there, by the trapezoid rule.
    at_steps: steps at which gold is told, as the mean over the SMOOTHING steps that end there.
    """
    levels, gold_at = gold_against_kl(steps)
    known = _known(steps)
    single = column(steps, "reward/gold")[known]
    gold, number = _smooth(single), column(steps, "step")[known]

    def at(kl: Any) -> Any:
        return (
            np.interp(kl, levels, gold_at, left=np.nan, right=np.nan) if len(levels) else np.full(np.shape(kl), np.nan)
        )

    # With the curve's own points in between, the trapezoid rule is exact on the curve.
    points = np.concatenate([[0.0], levels[(levels > 0) & (levels < to_kl)], [to_kl]])
    told = {f"gold_at_kl_{level:g}": float(at(level)) for level in kl_levels}
    for step in at_steps:
        told[f"gold_at_step_{step}"] = _last(_smooth(single[number <= step])) if step in number else float("nan")
    if any("labels/used" in one for one in steps):
        told["labels"] = _last(column(steps, "labels/used"))
    return told | {
        "gold_peak": float(gold.max()) if len(gold) else float("nan"),
        "gold_area": float(np.trapezoid(at(points), points) / to_kl) if to_kl > 0 else float("nan"),
        "gold_mean": float(single.mean()) if len(single) else float("nan"),
        "gold_end": _last(gold),
        "kl_end": _last(_smooth(_finite(samples_kl(steps)))),
        "proxy_end": _last(_smooth(_finite(column(steps, "reward/mean")))),
        "ess_min": _extreme(np.min, steps, "policy/effective_sample_size"),
        "grad_norm_max": _extreme(np.max, steps, "policy/grad_norm"),
        "seconds": float(steps[-1]["time/since_start"]),
    }


def gold_against_kl(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """The curve of gold over KL of one run: rising values of KL, and the gold where the smoothed KL first reached each.

    Steps in which either is not known are left out. If both are known in the first step, the curve begins at KL 0 with
    that step's gold, because the first step samples from the reference.
    """
    known = _known(steps)
    kl, gold = (values[known] for values in (samples_kl(steps), column(steps, "reward/gold")))
    levels, gold_at = _smooth(kl), _smooth(gold)
    if len(known) and known[0]:
        levels, gold_at = np.append(0.0, levels), np.append(gold[0], gold_at)
    # KL may fall again. Only new maxima count, so the values of KL rise strictly, as np.interp needs.
    first = np.flatnonzero(np.diff(np.maximum.accumulate(levels), prepend=-np.inf) > 0)
    return levels[first], gold_at[first]


def curves_over_steps(runs: Sequence[Steps]) -> dict[str, list[Any]]:
    """The mean over seeds at each step that every run has, and half the width of its 95 % interval.

    runs: the records of one cell, a run for each seed.

    Returns `step`, and for each of CURVES its means and, under `NAME_half_width`, the half widths. A value is None where
    it is not known.
    """
    shared = sorted(set.intersection(*(set(column(run, "step").tolist()) for run in runs)))
    curves: dict[str, list[Any]] = {"step": [int(step) for step in shared]}
    for name, metric in CURVES.items():
        values = [samples_kl(run) if metric is None else column(run, metric) for run in runs]
        at_steps = [one[np.isin(column(run, "step"), shared)] for one, run in zip(values, runs, strict=True)]
        told = [interval(of_step) for of_step in np.transpose(at_steps).tolist()]
        curves |= {name: [one["mean"] for one in told], f"{name}_half_width": [one["half_width"] for one in told]}
    return curves


def accuracies(run: Path) -> dict[str, float]:
    """How well a run's rewards order pairs of responses by the final policy, from its last evaluation.

    `accuracy_end` is the share of pairs that the run's head orders as gold does, and `accuracy_frozen` the same for the
    frozen reward model. Empty without evaluations.
    """
    if not (evaluations := read_metrics(run / "evaluation.jsonl")):
        return {}
    names = {"accuracy_end": "proxy_accuracy", "accuracy_frozen": "frozen_accuracy"}
    return {name: evaluations[-1].get(key, float("nan")) for name, key in names.items()}


def _known(steps: Steps) -> np.ndarray:
    """[steps] bool, whether both KL and gold are finite."""
    return np.isfinite(samples_kl(steps)) & np.isfinite(column(steps, "reward/gold"))


def _finite(values: np.ndarray) -> np.ndarray:
    """The values that are finite, in their order."""
    return values[np.isfinite(values)]


def _extreme(of: Callable[[np.ndarray], Any], steps: Steps, key: str) -> float:
    """The least or the greatest (`of`) value of a smoothed metric; NaN if the metric is not there."""
    values = _smooth(_finite(column(steps, key)))
    return float(of(values)) if len(values) else float("nan")


def _last(values: np.ndarray) -> float:
    """The last value; NaN if there is none."""
    return float(values[-1]) if len(values) else float("nan")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving averages over SMOOTHING values, or over all of them if there are fewer."""
    width = min(SMOOTHING, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if width else values
