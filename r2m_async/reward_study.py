"""The reward models of a study, each evaluated as it is trained, and what they say together.

OUT/reward_models/table.md          means over seeds with 95 % intervals
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

from r2m_async.intervals import interval, seeds_row, seeds_table
from r2m_async.jobs import failures
from r2m_async.run_directory import write_results, write_whole

Parts: TypeAlias = Mapping[str, str]
"""What is measured of each reward model, `evaluation` and `best_of_n` or one of them, and the folder for it in the model's
directory, which is named by its settings."""


def train_and_measure(config: str, directory: Path, parts: Parts, pool: Path, max_n: int) -> float:
    """Trains, or goes on; then measures `parts`, best of n from the pool. Seconds."""
    from r2m_async.best_of_n import load_pool, measure_best_of_n, write_best_of_n
    from r2m_async.reward_evaluation import evaluate, write_evaluation
    from r2m_async.reward_training import resume

    began = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.yaml", config)
    resume(directory)
    if "evaluation" in parts:
        write_evaluation(evaluate(str(directory)), directory / parts["evaluation"])
    if "best_of_n" in parts:
        results = measure_best_of_n([str(directory)], load_pool(pool), max_n=max_n)
        write_best_of_n(results, directory / parts["best_of_n"])
    return time.monotonic() - began


def is_measured(directory: Path, parts: Parts) -> bool:
    return all((directory / folder / "results.json").is_file() for folder in parts.values())


def compare_reward_models(models: Mapping[str, Sequence[Path]], parts: Parts, out: Path) -> None:
    """Writes OUT's files: a row for every name, of those of its directories, one per seed, that are measured."""
    there = {name: [one for one in paths if is_measured(one, parts)] for name, paths in models.items()}
    rows = {name: seeds_row([summary(one, parts) for one in paths], len(models[name])) for name, paths in there.items()}
    results: dict[str, Any] = {"models": rows}
    if "best_of_n" in parts and any(there.values()):
        from r2m_async.plots import plot_best_of_n

        measured = {name: [_results(one / parts["best_of_n"]) for one in paths] for name, paths in there.items()}
        first = next(one for ones in measured.values() for one in ones)
        curves = {name: _curves(list(map(_gains, ones))) for name, ones in measured.items() if ones}
        results["best_of_n"] = {"ns": first["ns"], "kl": first["kl"], "models": curves}
        plot_best_of_n(results["best_of_n"], out / "best_of_n.png", band="half_width")
    results["failed"] = failures(one for name, paths in models.items() for one in paths if one not in there[name])
    write_results(out, results, seeds_table(results["models"], digits=3))


def summary(directory: Path, parts: Parts) -> dict[str, float]:
    """Of one reward model: accuracy on held-out pairs, Kendall's tau by split, how its states lie, the best of n.

    `norm_dispersion` is std / mean of the states' norms in domain (BSR Fig. 3), `erank_gain` the effective rank on responses
    of other generators less that in domain, `erank_over_training` that on prompts and generators which training has not
    seen less that on training pairs (BSR Table 1). Best-of-n in gains over one sample.
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
        told |= {"bon_proxy": curves["proxy"][-1], "bon_gold": curves["gold"][-1], "bon_gold_peak": max(curves["gold"])}
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
