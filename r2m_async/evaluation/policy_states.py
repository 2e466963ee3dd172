"""What a policy's hidden states have to do with preferences, and how they drift in training: `r2m policy-states`.

    OUT/table.md          the table that is also printed
    OUT/results.json      all results, with the points of the second panel
    OUT/states.png

Three things are measured. Layer by layer, how similar texts of the same and of opposite preference are (R2M App. G.1,
Fig. 1). In a deep layer, whether similar texts have similar rewards (Fig. 2). And in policies that POLICY became later,
how far the hidden states of the same texts are from POLICY's (Fig. 9b).

The hidden state of a text is the mean over its tokens, prompt included. The paper does not say which hidden states Fig.
9b compares. Here they are these means, too, in the last layer after the final norm.

The same arguments give the same numbers on the same machine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from r2m_async import reward_metrics
from r2m_async.cpu_threads import one_thread
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.prompts import policy_reads
from r2m_async.data.raw_text import without_start
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble
from r2m_async.evaluation.text_states import Text, compared_texts, layer_means, preference_comparison, similarity_rows
from r2m_async.export import is_export
from r2m_async.finite import check_weights
from r2m_async.from_scratch.languages import refuse_other_languages
from r2m_async.models.loading import settled
from r2m_async.models.pretrained import pretrained_model, pretrained_tokenizer
from r2m_async.models.tokens import check_known, check_tokens, longest_text, response_ids
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import ScoredPair, given_pairs, load_preference_data
from r2m_async.runs.results import markdown_table, write_results

if TYPE_CHECKING:
    from r2m_async.from_scratch.word_models import EmbeddedModels

DEEP = 30 / 32
"""Depth of the layer in which Fig. 2 is measured, as a share of the model's depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySources:
    """What to measure. A policy is a Hugging Face name, a directory, an OUT of `r2m export`, or `embedded`."""

    policy: str
    """The policy whose hidden states are measured."""
    later: tuple[str, ...] = ()
    """Policies that it became. Their hidden states of the same texts are compared with its own."""
    pairs: str | None = None
    """Pairs, given as in `data.preferences`. None means the held-out pairs of the embedded language, for `embedded`
    alone."""
    split: str | None = None
    """Split of `pairs`, if they are a Hugging Face data set. None means the default of `data.split`."""
    reward_model: str | None = None
    """A reward model, named as for `r2m reward-model eval`. None takes an export's own or the embedded one; with any
    other policy Fig. 2 is left out."""
    max_tokens: int | None = None
    """Longest text that is read, in tokens; longer ones lose their beginning. None means the default of
    `data.max_tokens`."""
    seed: int = 0
    """Seed of all drawing of texts."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the files of these models may be run."""


def policy_states(sources: PolicySources, embedded: EmbeddedModels | None = None) -> dict[str, Any]:
    """Measures a policy, and returns the results by name.

    embedded: the models that `embedded` stands for; None means the default ones.

    A result without a source is None. Raises ConfigError for what cannot be loaded or compared, and DataError for pairs
    that cannot be read.
    """
    config = RewardModelConfig()
    if sources.max_tokens is not None:
        config = config.data(max_tokens=sources.max_tokens)
    pairs = _pairs(sources, config)
    rng = random.Random(f"{sources.seed}/similarity")
    texts = compared_texts(pairs, rng)
    reward_model = sources.reward_model
    if reward_model is None and (sources.policy == "embedded" or is_export(sources.policy)):
        reward_model = sources.policy
    with one_thread():
        read = _read(sources.policy, texts, config.data.max_tokens, embedded, sources.trust_remote_code)
        means_LND = read.means
        rewards_N = None
        if reward_model is not None:
            ensemble = load_ensemble(reward_model, sources.max_tokens, embedded, sources.trust_remote_code)
            rewards_N = TextScorer(ensemble).rewards(texts)
        # Layer 0 of the means is the embeddings.
        deep = round(DEEP * (len(means_LND) - 1))
        last = {sources.policy: means_LND[-1]}
        for name in sources.later:
            own = _read(name, texts, config.data.max_tokens, embedded, sources.trust_remote_code)
            # Means over tokens can be compared only if both policies read the same tokens.
            _check_comparable(sources.policy, name, read.ids == own.ids, means_LND[-1].shape == own.means[-1].shape)
            last[name] = own.means[-1]
    return {
        "policy": sources.policy,
        "reward_model": reward_model,
        "seed": sources.seed,
        "num_pairs": len(pairs),
        "max_tokens": read.max_tokens,
        "num_texts_cut": read.num_cut,
        "similarity": preference_comparison(means_LND, rewards_N, deep, rng),
        "drift": _drift_results(last) if sources.later else None,
    }


def write_policy_states(results: Mapping[str, Any], out: Path) -> str:
    """Writes the files of OUT, and returns the table."""
    from r2m_async.evaluation.plots import plot_policy_states

    told = table(results)
    write_results(out, results, told)
    plot_policy_states(results, out / "states.png")
    return told


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    similarity = results["similarity"]
    parts = [f"# {results['policy']}\n"]
    parts.append(f"{similarity['num_chosen']} chosen and as many rejected texts of {results['num_pairs']} pairs\n")
    if results["num_texts_cut"]:
        cut, limit = results["num_texts_cut"], results["max_tokens"]
        parts.append(f"{cut} texts were longer than {limit} tokens and lost their beginning.\n")
    parts.append(markdown_table(["layer", "same preference", "cross preference"], similarity_rows(similarity)))
    if similarity["correlation"] is not None:
        rewards, layer = f"rewards by {results['reward_model']}", similarity["layer"]
        parts.append(f"similarity and difference of {rewards}, layer {layer}: r = {similarity['correlation']:.3f}\n")
    if drift := results["drift"]:
        both = zip(drift["policies"], drift["cosine"][0], drift["distance"], strict=True)
        rows = [[name, f"{cosine:.4f}", f"{distance:.4f}"] for name, cosine, distance in both]
        parts.append(markdown_table(["policy", "cosine", "distance / norm"], rows))
    return "\n".join(parts)


def _pairs(sources: PolicySources, config: RewardModelConfig) -> Sequence[ScoredPair]:
    """The pairs to measure on, at least two. Raises ConfigError if no source is given."""
    if sources.pairs is not None:
        pairs = given_pairs(sources.pairs, config, sources.split)
    elif sources.policy == "embedded":
        pairs = load_preference_data(config).held_out
    else:
        raise ConfigError(f"{sources.policy}: no pairs to read; give --pairs")
    if len(pairs) < 2:
        raise ConfigError(f"--pairs {sources.pairs}: has {len(pairs)} pair; similarity needs at least 2")
    return pairs


class _Read(NamedTuple):
    """What a policy has read, and its hidden states."""

    ids: list[list[int]]
    """The token ids of the texts, at most `max_tokens` of each."""
    means: np.ndarray
    """[L, N, D], the `layer_means` of the texts."""
    max_tokens: int
    """The most tokens of a text: as asked for, or the policy's positions if they are fewer."""
    num_cut: int
    """How many texts were longer, and lost their beginning."""


def _read(name: str, texts: Sequence[Text], max_tokens: int, embedded: EmbeddedModels | None, trust: bool) -> _Read:
    """Loads a policy and reads the texts with it. Raises ConfigError for a policy that cannot be loaded."""
    refuse_other_languages("the policy", name)
    directory = str(Path(name, "policy")) if is_export(name) else name
    if name == "embedded":
        from r2m_async.from_scratch.embedded import embedded_models

        directory = str((embedded or embedded_models()).policy)
    model = pretrained_model("policy", directory, trust=trust)
    tokenizer = pretrained_tokenizer("policy", directory, trust)
    check_weights(model, "the policy", name)
    settled(model)
    check_tokens("policy", name, tokenizer, model.config)

    def ids(text: Text) -> list[int]:
        prompt, response, finished = text
        try:
            prompt_text, prompt_ids = policy_reads(prompt, tokenizer)
        except TemplateRefusal as error:
            raise DataError(
                f"{name}: its chat template refuses the prompt {str(prompt)[:80]!r} ({error.reason}); leave that pair out"
            ) from None
        read = [*prompt_ids, *response_ids(tokenizer, prompt_text, prompt_ids, response, finished)]
        check_known(name, tokenizer, read, model.config)
        return read

    whole = [ids(text) for text in texts]
    limit = longest_text(max_tokens, model.config)
    cut = [without_start(one, limit, tokenizer.bos_token_id) for one in whole]
    return _Read(
        ids=cut,
        means=layer_means(model.base_model, cut, padding=0),  # padding is masked, so any token id will do for it
        max_tokens=limit,
        num_cut=sum(len(one) > limit for one in whole),
    )


def _check_comparable(policy: str, later: str, same_tokens: bool, same_shape: bool) -> None:
    """Raises ConfigError unless a later policy reads the same tokens and has hidden states of the same size."""
    if not (same_tokens and same_shape):
        what = "states of another size" if same_tokens else "other tokens of the same texts"
        raise ConfigError(f"--later {later}: has {what} than {policy}; name a policy that {policy} became")


def _drift_results(last: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The drift between policies, as means over texts.

    last: for each policy its hidden states [N, D] in the last layer. Returns cosines of all policies with all others,
        as Fig. 9b draws them, and distances from the first policy in units of its norm.
    """
    states = list(last.values())
    drifts = [[reward_metrics.state_drift(one, other) for other in states] for one in states]
    return {
        "policies": list(last),
        "cosine": [[float(drift.cosines.mean()) for drift in row] for row in drifts],
        "distance": [float(drift.distances.mean()) for drift in drifts[0]],
    }
