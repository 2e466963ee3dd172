"""Hidden states of whole texts, layer by layer, and how alike those of one preference are: R2M App. G.1, Fig. 1 and 2.

Of reward models (`reward_evaluation`) and of policies (`policy_states`).

Shapes: B texts of a batch, S tokens (padded), N texts, D hidden size, L layers: 0 is the embeddings, and the last one has
the final norm behind it.
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
from r2m_async.reward_models.preferences import ScoredPair

NUM_COMPARED = 100
"""Chosen texts, and rejected ones, that are compared by layer (R2M App. G.1)."""
NUM_POINTS = 300
"""Pairs of texts that are drawn (R2M Fig. 2); the correlation is over all."""
TOKENS_PER_PASS = 8192

Text = tuple[Content, str, bool]
"""Prompt, response, and whether the response ended by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """Some of the texts, of like length."""

    indices: list[int]
    """Which of them, [B]."""
    ids: Tensor
    """[B, S], padded on the right."""
    mask: Tensor
    """[B, S] bool, false on padding."""
    by_layer: tuple[Tensor, ...]
    """L of [B, S, D]."""

    def token_means(self) -> Tensor:
        """[L, B, D] over all tokens of a text, prompt included; float32 on the CPU."""
        weights_BS1 = (self.mask / self.mask.sum(1, keepdim=True)).unsqueeze(-1)
        return torch.stack([(states_BSD.float() * weights_BS1).sum(1) for states_BSD in self.by_layer]).cpu()


@torch.no_grad()
def state_batches(base_model: Any, sequences: Sequence[Sequence[int]], padding: int) -> Iterator[StateBatch]:
    """Forward passes of a decoder without its head over texts as token ids, each text in one batch."""
    device = base_model.device
    for indices in _batches([len(ids) for ids in sequences]):
        rows = [torch.tensor(sequences[index]) for index in indices]
        ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        mask_BS = torch.arange(ids_BS.shape[1], device=device) < lengths_B1
        output = base_model(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False, output_hidden_states=True)
        yield StateBatch(indices=indices, ids=ids_BS, mask=mask_BS, by_layer=output.hidden_states)


def layer_means(base_model: Any, sequences: Sequence[Sequence[int]], padding: int) -> np.ndarray:
    """[L, N, D] `token_means` of all texts in their order."""
    indices, means = [], []
    for batch in state_batches(base_model, sequences, padding):
        indices += batch.indices
        means.append(batch.token_means())
    return torch.cat(means, 1)[:, np.argsort(indices)].numpy()


def chosen_texts(pairs: Sequence[ScoredPair]) -> list[Text]:
    return [(pair.prompt, pair.chosen, pair.chosen_finished) for pair in pairs]


def rejected_texts(pairs: Sequence[ScoredPair]) -> list[Text]:
    return [(pair.prompt, pair.rejected, pair.rejected_finished) for pair in pairs]


def compared_texts(pairs: Sequence[ScoredPair], rng: random.Random) -> list[Text]:
    """Chosen texts, then as many rejected ones, each drawn by itself: at most NUM_COMPARED."""
    num = min(NUM_COMPARED, len(pairs))
    return [text for side in (chosen_texts(pairs), rejected_texts(pairs)) for text in rng.sample(side, num)]


def preference_comparison(
    means_LND: np.ndarray, rewards_N: np.ndarray | None, layer: int, rng: random.Random
) -> dict[str, Any]:
    """Of `compared_texts`: similarity by layer of the same and of opposite preference, and at `layer` against rewards.

    Without rewards there is no `correlation` and there are no `points`: None.
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
    """Of a table: layer, same preference, cross preference."""
    both = zip(comparison["same"], comparison["cross"], strict=True)
    return [[layer, f"{same:.4f}", f"{cross:.4f}"] for layer, (same, cross) in enumerate(both)]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by similar length, at most TOKENS_PER_PASS tokens with padding; one text always fits."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= TOKENS_PER_PASS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
