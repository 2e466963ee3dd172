"""What `r2m reward-model eval` finds out about a reward model, and the files it leaves.

    OUT/table.md          what it also prints
    OUT/results.json      the same in full, with the points of the last panel
    OUT/evaluation.png

Accuracy on held-out pairs; accuracy and Kendall's tau on the four splits of the embedded language; RM-Bench's grid;
norms and effective rank of the states that the head reads; and how alike the texts of one preference are, layer by
layer. R2M's Figures 1 and 2 read a policy's states (`policy_states`); these are of the reward model's own backbone. An
ensemble's rewards are combined; the states are those of its first model. The final norm (RMSNorm, LayerNorm) leaves the
norms of states little room: their spread is small, and compares models of one architecture alone.

The same arguments give the same numbers on the same machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async import reward_metrics
from r2m_async.data.records import Content
from r2m_async.errors import ConfigError
from r2m_async.evaluation.ranked_prompts import NUM_STYLES, RankedPrompt, StyledPrompt, embedded_splits, load_rm_bench
from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble
from r2m_async.evaluation.text_states import (
    Text,
    chosen_texts,
    compared_texts,
    preference_comparison,
    rejected_texts,
    similarity_rows,
)
from r2m_async.export import RewardScorer, initial_policy_of, is_export
from r2m_async.from_scratch.embedded import EmbeddedModels, embedded_models
from r2m_async.from_scratch.language import check_held_out
from r2m_async.models.loading import one_thread
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.preferences import ScoredPair, given_pairs, load_preference_data
from r2m_async.runs.results import markdown_table, write_results

NUM_STATES = 256
"""Texts at most whose norms and effective rank are taken; as many of every set as the smallest has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSources:
    """What to evaluate on; at least one of them."""

    pairs: str | None = None
    """As `data.preferences`. None: for a run the pairs that it held out, and its training pairs for their states."""
    split: str | None = None
    """Of `pairs` that are an HF data set. None: the run's `data.split`, or that section's default."""
    rm_bench: Path | None = None
    embedded: bool | None = None
    """The four splits. None: for a run on the embedded preferences, and for the embedded reward model."""
    num_prompts: int = 200
    """Per split, 1 to 200."""
    initial_policy: str | None = None
    """Of an export: the policy that its run started from, HF name, directory or `embedded`. None: as the export names it."""
    max_tokens: int | None = None
    """None: the run's `data.max_tokens`, or that section's default."""
    seed: int = 0
    """Of the splits' responses and of all drawing."""


def evaluate(
    model: str, sources: EvaluationSources | None = None, embedded: EmbeddedModels | None = None
) -> dict[str, Any]:
    """All results by name, of numbers, lists and texts; what has no source is None.

    model: a run directory of `reward-model train`, the HF name or directory of a sequence classifier, `embedded`; or what
        `r2m export` wrote: its classifier, and on the pairs also its head with a policy's feedback, `_feedback_results`.
    embedded: whose policy writes for the splits; None means the default ones.
    Raises ConfigError for a model that cannot be loaded and where there is nothing to evaluate on, DataError for files.
    """
    sources = sources or EvaluationSources()
    ensemble = load_ensemble(model, sources.max_tokens, embedded)
    is_run = (Path(model) / "config.yaml").is_file()
    of_language = model == "embedded" or (is_run and ensemble.config.data.preferences.startswith("embedded"))
    training, pairs = _pairs(ensemble, sources, is_run)
    splits: Mapping[str, Sequence[RankedPrompt]] = {}
    if of_language if sources.embedded is None else sources.embedded:
        check_held_out("--prompts", sources.num_prompts)
        splits = embedded_splits(embedded or embedded_models(), sources.seed, sources.num_prompts)
    styled = () if sources.rm_bench is None else load_rm_bench(sources.rm_bench)
    if not (pairs or splits or styled):
        raise ConfigError(f"{model}: nothing to evaluate on; give --pairs, --rm-bench or --embedded")
    with one_thread():
        scorer = TextScorer(ensemble)
        results = {
            "model": model,
            "seed": sources.seed,
            "num_models": len(ensemble.models),
            "pairs": _pair_results(scorer.rewards(chosen_texts(pairs)), scorer.rewards(rejected_texts(pairs)))
            if pairs
            else None,
            "feedback": _feedback_results(model, pairs, sources, embedded) if pairs and is_export(model) else None,
            "splits": {name: _split_results(scorer, split) for name, split in splits.items()} or None,
            "rm_bench": _rm_bench_results(scorer, styled) if styled else None,
            "states": _state_results(scorer, _texts_by_set(training, pairs, splits, styled), sources.seed),
            "similarity": _similarity_results(scorer, pairs, sources.seed) if len(pairs) > 1 else None,
        }
    return results | {"num_texts_cut": scorer.num_cut, "max_tokens": ensemble.config.data.max_tokens}


def write_evaluation(results: Mapping[str, Any], out: Path) -> str:
    """Writes OUT's files; returns the table."""
    from r2m_async.evaluation.plots import plot_reward_evaluation

    told = table(results)
    write_results(out, results, told)
    plot_reward_evaluation(results, out / "evaluation.png")
    return told


def table(results: Mapping[str, Any]) -> str:
    """Markdown; SE is a standard error, over pairs or over prompts."""
    parts = [f"# {results['model']}\n"]
    if results["num_texts_cut"]:
        cut, limit = results["num_texts_cut"], results["max_tokens"]
        parts.append(f"{cut} texts were longer than {limit} tokens and lost their beginning.\n")
    if pairs := results["pairs"]:
        rows = [["held-out pairs", _with_error(pairs, "accuracy"), pairs["num"]]]
        if feedback := results["feedback"]:
            rows[0][0] = "vanilla reward model"
            for when in ("before", "after"):
                if one := feedback[when]:
                    rows.append([f"with feedback, {when} training", _with_error(one, "accuracy"), one["num"]])
                else:
                    rows.append([f"with feedback, {when} training", "not known: give --initial-policy", ""])
        parts.append(markdown_table(["", "accuracy ± SE", "pairs"], rows))
    if splits := results["splits"]:
        rows = [
            [name, _with_error(one, "tau"), f"{one['accuracy']:.3f}", one["num_prompts"]]
            for name, one in splits.items()
        ]
        parts.append(markdown_table(["split", "Kendall's tau ± SE", "accuracy", "prompts"], rows))
    if rm_bench := results["rm_bench"]:
        rows = [
            [name, *(f"{one[level]:.3f}" for level in ("easy", "normal", "hard")), one["num"]]
            for name, one in rm_bench.items()
        ]
        parts.append(markdown_table(["RM-Bench", "easy", "normal", "hard", "prompts"], rows))
    keys = ("norm_mean", "norm_std", "norm_dispersion", "effective_rank")
    rows = [[name, *(f"{one[key]:.4f}" for key in keys), one["num"]] for name, one in results["states"].items()]
    parts.append(markdown_table(["states", "mean norm", "std", "std / mean", "effective rank", "texts"], rows))
    if similarity := results["similarity"]:
        parts.append(markdown_table(["layer", "same preference", "cross preference"], similarity_rows(similarity)))
        parts.append(f"similarity and difference of rewards, last layer: r = {similarity['correlation']:.3f}\n")
    return "\n".join(parts)


# What is measured


def _pair_results(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    accuracy = reward_metrics.pairwise_accuracy(chosen, rejected)
    error = math.sqrt(accuracy * (1 - accuracy) / len(chosen))
    return {"accuracy": accuracy, "accuracy_se": error, "num": len(chosen)}


def _feedback_results(
    export: str, pairs: Sequence[ScoredPair], sources: EvaluationSources, embedded: EmbeddedModels | None
) -> dict[str, Any] | None:
    """R2M App. G.6 and Table 3, rewards at t = T with clipping and bonuses; None for a head that reads no feedback.

    before: the head as it was drawn, with the states of the policy that the run started from; None where it is not known.
    after: the exported head with the exported policy's states.
    Table 3's vanilla reward model is the classifier of an export, which is frozen: `pairs` in the results.
    """
    after = RewardScorer(export, at_horizon=True)
    if not after.reads_feedback:
        return None
    name, before = sources.initial_policy or initial_policy_of(export), None
    if name is not None:
        directory = str((embedded or embedded_models()).policy) if name == "embedded" else name
        before = _accuracy_of(RewardScorer(export, at_horizon=True, initial_policy=directory), pairs)
    return {"initial_policy": name, "before": before, "after": _accuracy_of(after, pairs)}


def _accuracy_of(scorer: RewardScorer, pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    def rewards(texts: Sequence[Text]) -> np.ndarray:
        return np.array([scorer.score(_turns(prompt), [text], finished).item() for prompt, text, finished in texts])

    return _pair_results(rewards(chosen_texts(pairs)), rewards(rejected_texts(pairs)))


def _split_results(scorer: TextScorer, split: Sequence[RankedPrompt]) -> dict[str, Any]:
    golds = [one.golds for one in split]
    rewards = scorer.rewards(_ranked_texts(split)).reshape(len(split), -1)
    taus = reward_metrics.kendall_taus(rewards, golds)
    return {
        "tau": float(taus.mean()) if len(taus) else math.nan,
        "tau_se": float(taus.std(ddof=1) / math.sqrt(len(taus))) if len(taus) > 1 else math.nan,
        "accuracy": reward_metrics.ranking_accuracy(rewards, golds),
        "num_prompts": len(taus),
        "num_prompts_without_order": len(split) - len(taus),
    }


def _rm_bench_results(scorer: TextScorer, styled: Sequence[StyledPrompt]) -> dict[str, Any]:
    """By domain, by the halves of `safety`, and `all`, the mean of the domains.

    `safety` pools the prompts of its halves, as RM-Bench's own script does (scripts/utils.py, `split_dataset_by_domain`):
    there are more to refuse than to answer.
    """
    rewards = scorer.rewards(_styled_texts(styled)).reshape(len(styled), 2, NUM_STYLES)

    def grid_of(name: str, part: Callable[[str], str]) -> tuple[np.ndarray, int]:
        rows = [index for index, one in enumerate(styled) if part(one.domain) == name]
        return reward_metrics.style_grid(rewards[rows, 0], rewards[rows, 1]), len(rows)

    halves = dict.fromkeys(one.domain for one in styled)
    domains = dict.fromkeys(_domain(half) for half in halves)
    whole = {name: grid_of(name, _domain) for name in domains}
    shown = {name: grid_of(name, str) for name in halves} | whole
    shown["all"] = np.mean([grid for grid, _ in whole.values()], axis=0), len(styled)
    return {
        name: asdict(reward_metrics.style_averages(grid)) | {"grid": grid.tolist(), "num": num}
        for name, (grid, num) in shown.items()
    }


def _domain(half: str) -> str:
    """`safety` of `safety-refuse`; other domains are whole."""
    return half.split("-")[0]


def _state_results(scorer: TextScorer, sets: Mapping[str, Sequence[Text]], seed: int) -> dict[str, Any]:
    num = min([NUM_STATES, *map(len, sets.values())])
    results = {}
    for name, texts in sets.items():
        states_ND, _ = scorer.states(random.Random(f"{seed}/states/{name}").sample(texts, num))
        spread = reward_metrics.norm_spread(states_ND)
        results[name] = {
            "norm_mean": spread.mean,
            "norm_std": spread.std,
            "norm_dispersion": spread.dispersion,
            "effective_rank": reward_metrics.effective_rank(states_ND),
            "num": num,
        }
    return results


def _similarity_results(scorer: TextScorer, pairs: Sequence[ScoredPair], seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/similarity")
    texts = compared_texts(pairs, rng)
    _, means_LND = scorer.states(texts)
    return preference_comparison(means_LND, scorer.rewards_of_first(texts), len(means_LND) - 1, rng)


# What it is measured on


def _pairs(
    ensemble: RewardEnsemble, sources: EvaluationSources, is_run: bool
) -> tuple[Sequence[ScoredPair], Sequence[ScoredPair]]:
    """Training pairs, where they are known, and held-out ones."""
    if sources.pairs is not None:
        return (), given_pairs(sources.pairs, ensemble.config, sources.split)
    if not is_run:
        return (), ()
    data = load_preference_data(ensemble.config.loss(preference="bt"))  # margins are not read
    return data.training, data.held_out


def _texts_by_set(
    training: Sequence[ScoredPair],
    pairs: Sequence[ScoredPair],
    splits: Mapping[str, Sequence[RankedPrompt]],
    styled: Sequence[StyledPrompt],
) -> dict[str, list[Text]]:
    sets = {
        "training pairs": chosen_texts(training) + rejected_texts(training),
        "held-out pairs": chosen_texts(pairs) + rejected_texts(pairs),
    }
    sets |= {name: _ranked_texts(split) for name, split in splits.items()}
    sets["RM-Bench"] = _styled_texts(styled)
    return {name: texts for name, texts in sets.items() if texts}


def _turns(prompt: Content) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [{"role": role, "content": content} for role, content in prompt]


def _ranked_texts(split: Sequence[RankedPrompt]) -> list[Text]:
    return [(one.prompt, response.text, response.finished) for one in split for response in one.responses]


def _styled_texts(styled: Sequence[StyledPrompt]) -> list[Text]:
    """Six of a prompt: the chosen styles, then the rejected ones."""
    return [(one.prompt, text, True) for one in styled for text in (*one.chosen, *one.rejected)]


# What is written


def _with_error(values: Mapping[str, float], key: str) -> str:
    return f"{values[key]:.3f} ± {values[f'{key}_se']:.3f}"
