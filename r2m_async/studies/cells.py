"""What the runs of a study say: results.json, table.md and comparison.png in its OUT.

Comparing at equal steps flatters whatever learns slowest, so the table leads with the gold reward at matched KL, its peak,
and the area under gold against KL. Cells share their seeds: `against` takes differences seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.runs.drawing import chosen
from r2m_async.runs.plots import compare_runs
from r2m_async.runs.records import column, read_metrics, read_records, samples_kl
from r2m_async.runs.results import write_results
from r2m_async.studies.intervals import differences, differences_tables, seeds_row, seeds_table
from r2m_async.studies.jobs import failures

SMOOTHING = 5
"""Steps over which gold and KL are averaged before they are compared: a step is few responses."""

COMPARED = ("gold_at_kl_", "gold_peak", "gold_area", "gold_end", "accuracy_end")
"""Beginnings of what is compared seed by seed."""

Steps = Sequence[dict[str, Any]]


def compare_cells(
    cells: Mapping[str, Mapping[int, Path]],
    kl_levels: Sequence[float],
    against: Sequence[str],
    out: Path,
    draw: Sequence[str] = (),
) -> None:
    """Writes OUT's files.

    cells: by name, then by seed, a run's directory, which is there if the run was done to its end.
    against: those of them that are cells are compared with each of the others, seed by seed.
    draw: `drawing.chosen` of them.
    """
    there = {cell: {seed: path for seed, path in runs.items() if path.exists()} for cell, runs in cells.items()}
    steps = {path: read_metrics(path / "metrics.jsonl") for runs in there.values() for path in runs.values()}
    to_kl = area_to_kl(list(steps.values()), kl_levels)
    summaries = {
        cell: {seed: summary(steps[path], kl_levels, to_kl) | accuracies(path) for seed, path in runs.items()}
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
    results = {"cells": rows, "against": paired, "area_to_kl": to_kl, "failed": failed}
    write_results(out, results, _table(rows, paired, to_kl))
    if drawn := {cell: list(runs.values()) for cell, runs in there.items() if runs}:
        compare_runs(chosen(drawn, draw), out / "comparison.png")


def _table(rows: Mapping[str, Any], paired: Mapping[str, Mapping[str, Any]], to_kl: float) -> str:
    area = (
        f"\n`gold_area`: the mean of gold over KL from 0 to {to_kl:.3g}, which is the highest level, or the highest KL "
        f"that every run passed if that is less.\n"
    )
    return seeds_table(rows) + area * bool(np.isfinite(to_kl)) + differences_tables(paired)


def area_to_kl(runs: Sequence[Steps], kl_levels: Sequence[float]) -> float:
    """The lesser of the highest level and the highest KL that all runs passed whose gold against KL is known; NaN if none's is."""
    passed = [levels[-1] for levels, _ in map(gold_against_kl, runs) if len(levels)]
    return float(min(max(kl_levels), *passed)) if passed else float("nan")


def summary(steps: Steps, kl_levels: Sequence[float], to_kl: float) -> dict[str, float]:
    """Of one run: gold where its KL first reached each level (NaN if never), its peak, the area, how it ended, how unstable
    it was at its worst (effective sample size and gradient norm, as smoothed) and when it ended.

    The area is the mean of gold over KL from 0 to `to_kl`, by the trapezoid rule.
    """
    levels, gold_at = gold_against_kl(steps)
    gold = _smooth(column(steps, "reward/gold")[_known(steps)])

    def at(kl: Any) -> Any:
        return (
            np.interp(kl, levels, gold_at, left=np.nan, right=np.nan) if len(levels) else np.full(np.shape(kl), np.nan)
        )

    points = np.concatenate([[0.0], levels[(levels > 0) & (levels < to_kl)], [to_kl]])
    return {f"gold_at_kl_{level:g}": float(at(level)) for level in kl_levels} | {
        "gold_peak": float(gold.max()) if len(gold) else float("nan"),
        "gold_area": float(np.trapezoid(at(points), points) / to_kl) if to_kl > 0 else float("nan"),
        "gold_end": _last(gold),
        "kl_end": _last(_smooth(_finite(samples_kl(steps)))),
        "proxy_end": _last(_smooth(_finite(column(steps, "reward/mean")))),
        "ess_min": _extreme(np.min, steps, "policy/effective_sample_size"),
        "grad_norm_max": _extreme(np.max, steps, "policy/grad_norm"),
        "seconds": float(steps[-1]["time/since_start"]),
    }


def gold_against_kl(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """Rising KLs and the smoothed gold where the run's smoothed KL first reached each; steps without either are left out.

    The first step samples from the reference: the curve starts at KL 0 with that step's own gold.
    """
    known = _known(steps)
    kl, gold = (values[known] for values in (samples_kl(steps), column(steps, "reward/gold")))
    levels, gold_at = _smooth(kl), _smooth(gold)
    if len(known) and known[0]:
        levels, gold_at = np.append(0.0, levels), np.append(gold[0], gold_at)
    first = np.flatnonzero(np.diff(np.maximum.accumulate(levels), prepend=-np.inf) > 0)
    return levels[first], gold_at[first]


def accuracies(run: Path) -> dict[str, float]:
    """Of the run's last evaluation, of pairs of responses by the policy as it is then, the share ranked as gold does: by
    the run's head, and by the frozen reward model. Nothing without evaluations."""
    if not (evaluations := read_records(run / "evaluation.jsonl")):
        return {}
    names = {"accuracy_end": "proxy_accuracy", "accuracy_frozen": "frozen_accuracy"}
    return {name: evaluations[-1].get(key, float("nan")) for name, key in names.items()}


def _known(steps: Steps) -> np.ndarray:
    """[steps] whether both KL and gold are numbers."""
    return np.isfinite(samples_kl(steps)) & np.isfinite(column(steps, "reward/gold"))


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _extreme(of: Callable[[np.ndarray], Any], steps: Steps, key: str) -> float:
    values = _smooth(_finite(column(steps, key)))
    return float(of(values)) if len(values) else float("nan")


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else float("nan")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over SMOOTHING values, or over all there are."""
    width = min(SMOOTHING, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if width else values
