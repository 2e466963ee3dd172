"""The reward models of a study, each evaluated as it is trained, and what they say together.

OUT/reward_models/table.md          means over seeds with 95 % intervals, and differences seed by seed
OUT/reward_models/results.json      the same, with best-of-n, and what failed with its reason
OUT/reward_models/best_of_n.png     where the study asks for it
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from r2m_async.runs.results import write_results
from r2m_async.studies.intervals import differences, differences_tables, interval, seeds_row, seeds_table
from r2m_async.studies.jobs import failures
from r2m_async.whole import disk_errors, write_file

Parts: TypeAlias = Mapping[str, str]
"""What is measured of each reward model, `evaluation` and `best_of_n` or one of them, and the folder for it in the model's
directory, which is named by its settings."""


def train_and_measure(config: str, directory: Path, parts: Parts, pool: Path, max_n: int) -> float:
    """Trains, or goes on; then measures `parts`, best of n from the pool. Seconds."""
    from r2m_async.evaluation.best_of_n import load_pool, measure_best_of_n, write_best_of_n
    from r2m_async.evaluation.reward_models import evaluate, write_evaluation
    from r2m_async.reward_models.training import resume

    began = time.monotonic()
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "config.yaml", config)
    resume(directory)
    missing = {part: folder for part, folder in parts.items() if not is_measured(directory, {part: folder})}
    if "evaluation" in missing:
        write_evaluation(evaluate(str(directory)), directory / parts["evaluation"])
    if "best_of_n" in missing:
        results = measure_best_of_n([str(directory)], load_pool(pool), max_n=max_n)
        write_best_of_n(results, directory / parts["best_of_n"])
    return time.monotonic() - began


def is_measured(directory: Path, parts: Parts) -> bool:
    """Whether each part's results are there and whole: half a file is what a killed writer of an older version left."""
    for folder in parts.values():
        try:
            _results(directory / folder)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
    return True


def compare_reward_models(
    models: Mapping[str, Mapping[int, Path]],
    parts: Parts,
    against: Sequence[str],
    out: Path,
    draw: Sequence[str] = (),
) -> None:
    """Writes OUT's files: a row for every name, of those of its directories, by seed, that are measured; and the
    differences from `against`, of which names that are no reward model's are left out. draw: `drawing.chosen` of them."""
    there = {
        name: {seed: one for seed, one in ones.items() if is_measured(one, parts)} for name, ones in models.items()
    }
    summaries = {name: {seed: summary(one, parts) for seed, one in ones.items()} for name, ones in there.items()}
    planned = {name: len(ones) for name, ones in models.items()}
    rows = {name: seeds_row(list(ones.values()), planned[name]) for name, ones in summaries.items()}
    paired = differences(summaries, planned, against)
    results: dict[str, Any] = {"models": rows, "against": paired}
    if "best_of_n" in parts and any(there.values()):
        from r2m_async.evaluation.plots import plot_best_of_n
        from r2m_async.runs.drawing import chosen

        measured = {name: [_results(one / parts["best_of_n"]) for one in ones.values()] for name, ones in there.items()}
        first = next(one for ones in measured.values() for one in ones)
        curves = {name: _curves(list(map(_gains, ones))) for name, ones in measured.items() if ones}
        results["best_of_n"] = {"ns": first["ns"], "kl": first["kl"], "models": curves}
        drawn = results["best_of_n"] | {"models": chosen(curves, draw)}
        plot_best_of_n(drawn, out / "best_of_n.png", band="half_width")
    results["failed"] = failures(
        one for name, ones in models.items() for seed, one in ones.items() if seed not in there[name]
    )
    write_results(out, results, seeds_table(rows, digits=3) + differences_tables(paired, digits=3))


def summary(directory: Path, parts: Parts) -> dict[str, float]:
    """Of one reward model: accuracy on held-out pairs, Kendall's tau by split, how its states lie, the best of n.

    `norm_dispersion` is std / mean of the states' norms in domain (BSR Fig. 3), `erank_gain` the effective rank on responses
    of other generators less that in domain, `erank_over_training` that on prompts and generators which training has not
    seen less that on training pairs (BSR Table 1). Best-of-n in gains over one sample; `bon_gold_lost` from the n with the
    most gold to the largest.
    """
    told: dict[str, float] = {}
    if "evaluation" in parts:
        results = _results(directory / parts["evaluation"])
        told["accuracy"] = results["pairs"]["accuracy"] if results["pairs"] else float("nan")
        if splits := results["splits"]:
            states = results["states"]
            told["accuracy_in_domain"] = splits["in_domain"]["accuracy"]
            told |= {f"tau_{name}": one["tau"] for name, one in splits.items()}
            told["norm_dispersion"] = states["in_domain"]["norm_dispersion"]
            rank = {name: one["effective_rank"] for name, one in states.items()}
            told["erank_gain"] = rank["response_disjoint"] - rank["in_domain"]
            told["erank_over_training"] = rank["mutual_disjoint"] - rank["training pairs"]
    if "best_of_n" in parts:
        curves = _gains(_results(directory / parts["best_of_n"]))
        last, peak = curves["gold"][-1], max(curves["gold"])
        told |= {
            "bon_proxy": curves["proxy"][-1],
            "bon_gold": last,
            "bon_gold_peak": peak,
            "bon_gold_lost": peak - last,
        }
    return told


def _curves(ones: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Means over reward models of the gains over one sample, and as `_half_width` half their 95 % intervals.

    The intervals are over reward models on one pool of prompts: other prompts would move all of them together.
    """
    told: dict[str, list[float]] = {}
    for key in ("proxy", "gold"):
        intervals = [interval(values) for values in zip(*(one[key] for one in ones), strict=True)]
        told[key] = [float(one["mean"]) for one in intervals]  # type: ignore[arg-type]
        told[f"{key}_half_width"] = [np.nan if one["half_width"] is None else one["half_width"] for one in intervals]
    return told


def _gains(best_of_n: Mapping[str, Any]) -> Mapping[str, list[float]]:
    (curves,) = best_of_n["models"].values()
    return curves


def _results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
