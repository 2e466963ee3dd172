"""What `r2m reward-model eval` measures of a reward model, and the files that it writes.

    OUT/table.md          the table that is also printed
    OUT/results.json      all results, with the points of the last panel
    OUT/evaluation.png

It measures the accuracy on held-out pairs; accuracy and Kendall's tau on the four splits of the embedded language;
RM-Bench's grid of styles; norms and effective rank of the hidden states that the head reads; and, layer by layer, how
similar the hidden states of texts of the same preference are. R2M's Figures 1 and 2 read a policy's hidden states, as
`policy_states` does. Here they are those of the reward model's own backbone.

The rewards of an ensemble are combined, while hidden states are those of its first model. A backbone's final norm
(RMSNorm, LayerNorm) leaves the norms of hidden states little room. Their spread is small, and should be compared only
between models of one architecture.

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
from r2m_async.cpu_threads import one_thread
from r2m_async.data.records import Content
from r2m_async.errors import ConfigError
from r2m_async.evaluation.ranked_prompts import (
    NUM_STYLES,
    RankedPrompt,
    StyledPrompt,
    embedded_splits,
    load_ranked,
    load_rm_bench,
)
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
from r2m_async.from_scratch.embedded import embedded_models
from r2m_async.from_scratch.language import check_held_out
from r2m_async.from_scratch.word_models import EmbeddedModels
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.preferences import PairReader, ScoredPair, given_pairs, load_preference_data
from r2m_async.runs.results import markdown_table, write_results

NUM_STATES = 256
"""Limit on the texts of a set whose hidden states are measured. All sets give as many texts as the smallest one has,
because effective ranks can be compared only for equal numbers of texts."""


_RESULTS = ("model", "seed", "num_models", "pairs", "feedback", "splits", "rm_bench", "states", "similarity")
"""The results of an evaluation, in the order of results.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSources:
    """What to evaluate a reward model on. For a run the defaults suffice."""

    pairs: str | None = None
    """Pairs, given as in `data.preferences`. None takes what a run held out, and then also measures the hidden states
    of its training pairs."""
    split: str | None = None
    """Split of `pairs` and `ranked`, if they are Hugging Face data sets. None means the run's `data.split` or its
    default."""
    ranked: str | None = None
    """Prompts with ranked responses, as BSR publishes its validation sets; several with commas between them."""
    rm_bench: Path | None = None
    """RM-Bench's file, or several with commas between them. None leaves RM-Bench out."""
    embedded: bool | None = None
    """Whether to take the four splits of the embedded language. None takes them for a run on the embedded preferences,
    and for the embedded reward model."""
    num_prompts: int = 200
    """Prompts per split, 1 to 200."""
    initial_policy: str | None = None
    """For an export: the policy that its run started from, as a Hugging Face name, a directory, or `embedded`. None
    takes the policy that the export names."""
    max_tokens: int | None = None
    """Longest text that is read, in tokens; longer ones lose their beginning. None means the run's `data.max_tokens`,
    or the default of that key."""
    seed: int = 0
    """Seed of the splits' responses, and of all drawing of texts."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the files of these models may be run."""


def evaluate(
    model: str,
    sources: EvaluationSources | None = None,
    embedded: EmbeddedModels | None = None,
    on_part: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measures a reward model on all sources, and returns the results by name.

    model: a run directory of `r2m reward-model train`, a sequence classifier (Hugging Face name or directory),
        `embedded`, or an OUT of `r2m export`. Of an export this is the classifier; on pairs its head with a policy's
        feedback is measured, too (`_feedback_results`).
    embedded: the embedded models, whose policy writes for the splits; None means the default ones.
    on_part: is told what is done next, and how much of it there is.

    A result without a source is None. Raises ConfigError for a model that cannot be loaded and if there is nothing to
    evaluate on, and DataError for files that cannot be read.
    """
    sources = sources or EvaluationSources()
    on_part(f"loading {model}")
    ensemble = load_ensemble(model, sources.max_tokens, embedded, sources.trust_remote_code)
    is_run = (Path(model) / "config.yaml").is_file()
    of_language = model == "embedded" or (is_run and ensemble.config.data.preferences.startswith("embedded"))
    on_part("reading the pairs")
    training, pairs = _pairs(ensemble, sources, is_run)
    splits: Mapping[str, Sequence[RankedPrompt]] = {}
    if of_language if sources.embedded is None else sources.embedded:
        check_held_out("--prompts", sources.num_prompts)
        on_part(f"writing the four splits of the embedded language: {sources.num_prompts} prompts each")
        splits = embedded_splits(embedded or embedded_models(), sources.seed, sources.num_prompts)
    if sources.ranked is not None:
        splits = {**splits, **load_ranked(sources.ranked, sources.split or ensemble.config.data.split)}
    styled = () if sources.rm_bench is None else load_rm_bench(sources.rm_bench)
    if not (pairs or splits or styled):
        raise ConfigError(f"{model}: nothing to evaluate on; give --pairs, --ranked, --rm-bench or --embedded")
    with one_thread():
        scorer = TextScorer(ensemble)
        results: dict[str, Any] = {"model": model, "seed": sources.seed, "num_models": len(ensemble.models)}
        measured: dict[str, Callable[[], Any]] = {}
        if pairs:
            chosen, rejected = chosen_texts(pairs), rejected_texts(pairs)
            measured["pairs"] = lambda: _pair_results(scorer.rewards(chosen), scorer.rewards(rejected))
        if pairs and is_export(model):
            measured["feedback"] = lambda: _feedback_results(model, pairs, sources, embedded)
        if splits:
            measured["splits"] = lambda: {name: _split_results(scorer, split) for name, split in splits.items()}
        if styled:
            measured["rm_bench"] = lambda: _rm_bench_results(scorer, styled)
        sets = _texts_by_set(training, pairs, splits, styled)
        measured["states"] = lambda: _state_results(scorer, sets, sources.seed)
        if len(pairs) > 1:
            measured["similarity"] = lambda: _similarity_results(scorer, pairs, sources.seed)
        for number, (name, measure) in enumerate(measured.items(), 1):
            on_part(f"measuring {name}: {number} of {len(measured)}")
            results[name] = measure()
    results = {name: results.get(name) for name in _RESULTS}
    return results | {"num_texts_cut": scorer.num_cut, "max_tokens": ensemble.max_tokens}


def write_evaluation(results: Mapping[str, Any], out: Path) -> str:
    """Writes the files of OUT, and returns the table."""
    from r2m_async.evaluation.plots import plot_reward_evaluation

    told = table(results)
    write_results(out, results, told)
    plot_reward_evaluation(results, out / "evaluation.png")
    return told


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown. SE is a standard error, over pairs or over prompts."""
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
    """Accuracy on pairs with its standard error, from the rewards [B] of their chosen and rejected responses."""
    accuracy = reward_metrics.pairwise_accuracy(chosen, rejected)
    error = math.sqrt(accuracy * (1 - accuracy) / len(chosen))
    return {"accuracy": accuracy, "accuracy_se": error, "num": len(chosen)}


def _feedback_results(
    export: str, pairs: Sequence[ScoredPair], sources: EvaluationSources, embedded: EmbeddedModels | None
) -> dict[str, Any] | None:
    """Accuracy of an export's head with a policy's feedback, before and after the run (R2M App. G.6, Table 3).

    `before` is the head as it was drawn, with the hidden states of the policy that the run started from; None if that
    policy is not known. `after` is the exported head with the exported policy's hidden states. Rewards are those at
    t = T, with clipping and bonuses. The vanilla reward model of Table 3 is the export's classifier, which stands under
    `pairs` in the results.

    Returns None if the head reads no feedback.
    """
    trust = sources.trust_remote_code
    after = RewardScorer(export, at_horizon=True, trust_remote_code=trust)
    if not after.reads_feedback:
        return None
    name, before = sources.initial_policy or initial_policy_of(export), None
    if name is not None:
        directory = str((embedded or embedded_models()).policy) if name == "embedded" else name
        initial = RewardScorer(export, at_horizon=True, initial_policy=directory, trust_remote_code=trust)
        before = _accuracy_of(initial, pairs)
    return {"initial_policy": name, "before": before, "after": _accuracy_of(after, pairs)}


def _accuracy_of(scorer: RewardScorer, pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The `_pair_results` of an exported reward model.

    Each text is scored by itself, since a pair's responses may end differently.
    """

    def rewards(texts: Sequence[Text]) -> np.ndarray:
        return np.array([scorer.score(_turns(prompt), [text], finished).item() for prompt, text, finished in texts])

    return _pair_results(rewards(chosen_texts(pairs)), rewards(rejected_texts(pairs)))


def _split_results(scorer: TextScorer, split: Sequence[RankedPrompt]) -> dict[str, Any]:
    """Kendall's tau and accuracy on one split, with the standard error of tau over prompts.

    Prompts whose gold rewards are all equal have no order. They are left out of tau and counted by themselves.
    """
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
    """RM-Bench's accuracies for each domain, for the two halves of `safety`, and for `all`, the mean of the domains.

    `safety` pools the prompts of its halves, as RM-Bench's own script does (scripts/utils.py,
    `split_dataset_by_domain`). There are more prompts to refuse than prompts to answer.
    """
    rewards = scorer.rewards(_styled_texts(styled)).reshape(len(styled), 2, NUM_STYLES)

    def grid_of(name: str, part: Callable[[str], str]) -> tuple[np.ndarray, int]:
        rows = [index for index, one in enumerate(styled) if part(one.domain) == name]
        return reward_metrics.style_grid(rewards[rows, 0], rewards[rows, 1]), len(rows)

    halves = dict.fromkeys(one.domain for one in styled)
    domains = dict.fromkeys(_domain(half) for half in halves)
    whole = {name: grid_of(name, _domain) for name in domains}
    shown = {name: grid_of(name, str) for name in halves} | whole
    # A mean over domains, not over prompts: large domains do not count more.
    shown["all"] = np.mean([grid for grid, _ in whole.values()], axis=0), len(styled)
    return {
        name: asdict(reward_metrics.style_averages(grid)) | {"grid": grid.tolist(), "num": num}
        for name, (grid, num) in shown.items()
    }


def _domain(half: str) -> str:
    """The domain of a half: `safety` for `safety-refuse`. Other domains have no halves."""
    return half.split("-")[0]


def _state_results(scorer: TextScorer, sets: Mapping[str, Sequence[Text]], seed: int) -> dict[str, Any]:
    """Norms and effective rank of the hidden states that the head reads, for each set of texts."""
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
    """How similar texts of the same and of opposite preference are, by layer, and how similarity goes with rewards."""
    rng = random.Random(f"{seed}/similarity")
    texts = compared_texts(pairs, rng)
    _, means_LND = scorer.states(texts)
    # Rewards and hidden states of one and the same model: an ensemble's rewards do not come from these states.
    return preference_comparison(means_LND, scorer.rewards_of_first(texts), len(means_LND) - 1, rng)


# What it is measured on


def _pairs(
    ensemble: RewardEnsemble, sources: EvaluationSources, is_run: bool
) -> tuple[Sequence[ScoredPair], Sequence[ScoredPair]]:
    """(training pairs, held-out pairs). There are training pairs only for a run that is measured on its own data."""
    reader = PairReader(ensemble.tokenizer, ensemble.models[0].config)
    if sources.pairs is not None:
        return (), given_pairs(sources.pairs, ensemble.config, sources.split, reader)
    if not is_run:
        return (), ()
    data = load_preference_data(ensemble.config.loss(preference="bt"), reader)  # `bt` needs no margins
    return data.training, data.held_out


def _texts_by_set(
    training: Sequence[ScoredPair],
    pairs: Sequence[ScoredPair],
    splits: Mapping[str, Sequence[RankedPrompt]],
    styled: Sequence[StyledPrompt],
) -> dict[str, list[Text]]:
    """Texts to measure hidden states of, by the name of their set. Sets without texts are left out."""
    sets = {
        "training pairs": chosen_texts(training) + rejected_texts(training),
        "held-out pairs": chosen_texts(pairs) + rejected_texts(pairs),
    }
    sets |= {name: _ranked_texts(split) for name, split in splits.items()}
    sets["RM-Bench"] = _styled_texts(styled)
    return {name: texts for name, texts in sets.items() if texts}


def _turns(prompt: Content) -> str | list[dict[str, str]]:
    """A prompt as `RewardScorer.score` takes it: a text, or a list of {"role", "content"}."""
    return prompt if isinstance(prompt, str) else [{"role": role, "content": content} for role, content in prompt]


def _ranked_texts(split: Sequence[RankedPrompt]) -> list[Text]:
    """All responses of a split with their prompts, in the order of the prompts."""
    return [(one.prompt, response.text, response.finished) for one in split for response in one.responses]


def _styled_texts(styled: Sequence[StyledPrompt]) -> list[Text]:
    """Six texts for each prompt: the chosen response in its three styles, then the rejected one."""
    return [(one.prompt, text, True) for one in styled for text in (*one.chosen, *one.rejected)]


# What is written


def _with_error(values: Mapping[str, float], key: str) -> str:
    """A number ± its standard error, for a table."""
    return f"{values[key]:.3f} ± {values[f'{key}_se']:.3f}"
