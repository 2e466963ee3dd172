"""The reward models of a study: each is measured when it has been trained, and then all are compared.

OUT/reward_models/table.md          means over seeds with 95 % confidence intervals, and differences seed by seed
OUT/reward_models/results.json      the same, with best-of-n, and what failed with its reason
OUT/reward_models/best_of_n.png     if the study asks for best-of-n
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
"""What is measured of each reward model: `evaluation`, `best_of_n`, or both. The value is the folder for it in the
model's run directory. The name of best-of-n's folder has its settings in it, so that other settings do not find old
results."""


def train_and_measure(config: str, directory: Path, parts: Parts, pool: Path, max_n: int) -> float:
    """Trains a reward model, and then measures what has not been measured. Returns the seconds that it took.

    A training that was interrupted is resumed.

    config: the config as YAML.
    directory: the run directory.
    parts: what to measure.
    pool: the file of samples for best-of-n.
    max_n: the largest n.
    """
    from r2m_async.evaluation.best_of_n import load_pool, measure_best_of_n, write_best_of_n
    from r2m_async.evaluation.reward_models import EvaluationSources, evaluate, write_evaluation
    from r2m_async.reward_models.config import RewardModelConfig
    from r2m_async.reward_models.training import resume

    began = time.monotonic()
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "config.yaml", config)
    resume(directory)
    trust = RewardModelConfig.from_yaml(directory / "config.yaml").model.trust_remote_code
    missing = {part: folder for part, folder in parts.items() if not is_measured(directory, {part: folder})}
    if "evaluation" in missing:
        write_evaluation(
            evaluate(str(directory), EvaluationSources(trust_remote_code=trust)), directory / parts["evaluation"]
        )
    if "best_of_n" in missing:
        results = measure_best_of_n([str(directory)], load_pool(pool), max_n=max_n, trust_remote_code=trust)
        write_best_of_n(results, directory / parts["best_of_n"])
    return time.monotonic() - began


def is_measured(directory: Path, parts: Parts) -> bool:
    """Whether the results of every part are there and can be read.

    A file that cannot be read counts as missing: older versions of this package could leave half a file when killed.
    """
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
    """Writes the files of OUT: a row for each name, and the differences from the names in `against`.

    models: for each name and seed, the run directory. Those that were not measured are left out, and are reported as
        failed if they left a reason.
    parts: what was measured.
    against: names to compare all others with, seed by seed. Those that are no reward models are ignored.
    out: the folder OUT/reward_models.
    draw: names that the figure shows, by `drawing.chosen`.
    """
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
        # All were measured from one pool with the same settings, so n and KL are the same in all of them.
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
    """The numbers of one reward model by name: accuracy on held-out pairs, Kendall's tau by split, and so on.

    `norm_dispersion` is std / mean of the norms of hidden states in domain (BSR Fig. 3). `erank_gain` is the effective
    rank on responses of other writers minus that in domain. `erank_over_training` is the effective rank on unseen
    prompts with unseen writers minus that on training pairs (BSR Table 1). Numbers that begin with `bon_` are gains of
    best-of-n over one sample, at the largest n; `bon_gold_peak` is the highest gain in gold at any n, and
    `bon_gold_lost` is what is lost from there to the largest n.
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
    """Means of the gains over the reward models of one name, with their 95 % confidence intervals.

    `..._half_width` is half the width of an interval.

    The intervals are over reward models on one pool of prompts. Other prompts would move all of them together.
    """
    told: dict[str, list[float]] = {}
    for key in ("proxy", "gold"):
        intervals = [interval(values) for values in zip(*(one[key] for one in ones), strict=True)]
        told[key] = [float(one["mean"]) for one in intervals]  # type: ignore[arg-type]
        told[f"{key}_half_width"] = [np.nan if one["half_width"] is None else one["half_width"] for one in intervals]
    return told


def _gains(best_of_n: Mapping[str, Any]) -> Mapping[str, list[float]]:
    """The `curves` of a result of best-of-n, which is about a single model."""
    (curves,) = best_of_n["models"].values()
    return curves


def _results(folder: Path) -> Any:
    """The contents of results.json in a folder.

    Raises FileNotFoundError, NotADirectoryError, or ValueError if it is no JSON.
    """
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
