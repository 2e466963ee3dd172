"""Hidden states of whole texts by layer, and how similar those of one preference are: R2M App. G.1, Fig. 1 and 2.

The model is a reward model (`evaluation.reward_models`) or a policy (`policy_states`).

Shapes: B texts of a batch, S tokens (padded), N texts, D hidden size, L layers. Layer 0 is the embeddings, and the last
layer is taken after the final norm.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2m_async import reward_metrics
from r2m_async.data.records import Content
from r2m_async.models.batches import by_length, right_padded
from r2m_async.reward_models.preferences import ScoredPair

NUM_COMPARED = 100
"""Limit on the chosen texts, and on the rejected texts, that are compared by layer (R2M App. G.1)."""
NUM_POINTS = 300
"""Limit on the pairs of texts that the figure shows (R2M Fig. 2). The correlation is over all pairs."""
TOKENS_PER_PASS = 8192
"""Limit on the tokens of one forward pass, padding included."""

Text = tuple[Content, str, bool]
"""A prompt, a response, and whether the response ended by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """The hidden states of some of the texts, which have similar lengths."""

    indices: list[int]
    """[B], which of all texts these are."""
    ids: Tensor
    """[B, S] token ids, padded on the right."""
    mask: Tensor
    """[B, S] bool, false on padding."""
    by_layer: tuple[Tensor, ...]
    """L tensors [B, S, D]."""

    def token_means(self) -> Tensor:
        """[L, B, D], means over all tokens of a text, prompt included; float32 on the CPU."""
        weights_BS1 = (self.mask / self.mask.sum(1, keepdim=True)).unsqueeze(-1)
        return torch.stack([(states_BSD.float() * weights_BS1).sum(1) for states_BSD in self.by_layer]).cpu()


@torch.no_grad()
def state_batches(base_model: Any, sequences: Sequence[Sequence[int]], padding: int) -> Iterator[StateBatch]:
    """Runs a decoder without its head over texts, and yields batches of hidden states. Each text is in one batch.

    sequences: N texts as token ids.
    padding: the token id that fills up shorter texts.
    """
    device = base_model.device
    for indices in by_length([len(ids) for ids in sequences], TOKENS_PER_PASS):
        ids_BS, mask_BS = right_padded([sequences[index] for index in indices], padding, device)
        output = base_model(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False, output_hidden_states=True)
        yield StateBatch(indices=indices, ids=ids_BS, mask=mask_BS, by_layer=output.hidden_states)


def layer_means(base_model: Any, sequences: Sequence[Sequence[int]], padding: int) -> np.ndarray:
    """[L, N, D], the means over tokens of N texts, in the order of the texts.

    Arguments are those of `state_batches`.
    """
    indices, means = [], []
    for batch in state_batches(base_model, sequences, padding):
        indices += batch.indices
        means.append(batch.token_means())
    # Batches are made by length; the sorted indices bring back the order of the texts.
    return torch.cat(means, 1)[:, np.argsort(indices)].numpy()


def chosen_texts(pairs: Sequence[ScoredPair]) -> list[Text]:
    """The chosen response of each pair with its prompt."""
    return [(pair.prompt, pair.chosen, pair.chosen_finished) for pair in pairs]


def rejected_texts(pairs: Sequence[ScoredPair]) -> list[Text]:
    """The rejected response of each pair with its prompt."""
    return [(pair.prompt, pair.rejected, pair.rejected_finished) for pair in pairs]


def compared_texts(pairs: Sequence[ScoredPair], rng: random.Random) -> list[Text]:
    """Chosen texts, then equally many rejected texts, NUM_COMPARED of each at most.

    Each side is drawn by itself, so a chosen text need not belong to the same pair as a rejected one.
    """
    num = min(NUM_COMPARED, len(pairs))
    return [text for side in (chosen_texts(pairs), rejected_texts(pairs)) for text in rng.sample(side, num)]


def preference_comparison(
    means_LND: np.ndarray, rewards_N: np.ndarray | None, layer: int, rng: random.Random
) -> dict[str, Any]:
    """How similar texts of the same and of opposite preference are, and how similarity goes with rewards.

    means_LND: [L, N, D], hidden states of `compared_texts`: the first half is chosen texts, the second half rejected
        ones.
    rewards_N: [N], or None to leave rewards out.
    layer: the layer in which similarity is set against rewards.
    rng: draws the points of the figure.

    Returns results by name: `same` and `cross` have a number for each layer. `correlation` and `points` are None
    without rewards.
    """
    num = means_LND.shape[1] // 2
    same_L, cross_L = reward_metrics.preference_similarities(means_LND, [True] * num + [False] * num)
    results = {"num_chosen": num, "same": same_L.tolist(), "cross": cross_L.tolist(), "layer": layer}
    if rewards_N is None:
        return results | {"correlation": None, "points": None}
    similarities = reward_metrics.pair_similarities(means_LND[layer])
    differences = reward_metrics.reward_differences(rewards_N)
    drawn = rng.sample(range(len(similarities)), min(NUM_POINTS, len(similarities)))
    return results | {
        "correlation": reward_metrics.similarity_reward_correlation(means_LND[layer], rewards_N),
        "points": [[float(similarities[index]), float(differences[index])] for index in drawn],
    }


def similarity_rows(comparison: dict[str, Any]) -> list[list[Any]]:
    """Rows of a table: layer, similarity of the same preference, similarity of opposite preference."""
    both = zip(comparison["same"], comparison["cross"], strict=True)
    return [[layer, f"{same:.4f}", f"{cross:.4f}"] for layer, (same, cross) in enumerate(both)]
