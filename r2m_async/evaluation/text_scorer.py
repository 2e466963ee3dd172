"""Rewards and hidden states of texts, by a reward model or by an ensemble of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from r2m_async.errors import ConfigError
from r2m_async.evaluation.text_states import (
    Text,
    state_batches,
)
from r2m_async.export import is_export
from r2m_async.from_scratch.embedded import embedded_models
from r2m_async.from_scratch.languages import refuse_other_languages
from r2m_async.from_scratch.pretraining import score
from r2m_async.from_scratch.word_models import EmbeddedModels
from r2m_async.models.loading import settled
from r2m_async.models.reward import scored_positions
from r2m_async.reward_models.ensemble import RewardEnsemble


class TextScorer:
    """Scores texts with an ensemble, and reads the hidden states of its first model.

    `num_cut` counts the texts that were too long and lost their beginning. A text that is read again counts once.
    """

    def __init__(self, ensemble: RewardEnsemble) -> None:
        """Moves the models to their device."""
        self._ensemble = ensemble
        self._ids: dict[Text, list[int]] = {}
        self._limit = ensemble.max_tokens
        self.num_cut = 0
        for model in ensemble.models:
            settled(model, ensemble.config.run.device)

    def rewards(self, texts: Sequence[Text]) -> np.ndarray:
        """Rewards [N] of N texts, all finite. Raises ConfigError naming the first text whose reward is not finite."""
        rewards = self.scores(texts)
        if (broken := np.flatnonzero(~np.isfinite(rewards))).size:
            prompt, response, _ = texts[broken[0]]
            raise ConfigError(
                f"{self._ensemble.source}: its reward for the response {response[:60]!r} to {str(prompt)[:60]!r} is "
                f"{rewards[broken[0]]}, and so are {broken.size} of {len(texts)}: its weights are damaged, or its training "
                f"diverged; evaluate another model"
            )
        return rewards

    def scores(self, texts: Sequence[Text]) -> np.ndarray:
        """Rewards [N] of N texts, as the ensemble gives them: they need not be finite."""
        return self._ensemble.score_ids([self._read(text) for text in texts]).numpy().astype(float)

    def rewards_of_first(self, texts: Sequence[Text]) -> np.ndarray:
        """Rewards [N] of N texts by the ensemble's first model alone, whose hidden states `states` returns."""
        return score(self._ensemble.models[0], [self._read(text) for text in texts]).numpy().astype(float)

    def states(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states of N texts in the ensemble's first model, float32.

        Returns [N, D], the states that the head reads, and [L, N, D], for each layer the mean over all tokens of a
        text, prompt included. Layer 0 is the embeddings. The last layer is taken after the final norm.
        """
        model = self._ensemble.models[0]
        padding = model.config.get_text_config().pad_token_id
        indices, scored, means = [], [], []
        for batch in state_batches(model.base_model, [self._read(text) for text in texts], padding):
            rows = torch.arange(len(batch.indices), device=model.device)
            indices += batch.indices
            scored.append(batch.by_layer[-1][rows, scored_positions(model, batch.ids)].float().cpu())
            means.append(batch.token_means())
        # Batches are made by length; this puts the texts back into the order in which they were given.
        order = np.argsort(indices)
        return torch.cat(scored)[order].numpy(), torch.cat(means, 1)[:, order].numpy()

    def _read(self, text: Text) -> list[int]:
        """Token ids of a text, cut to the ensemble's `max_tokens`."""
        if text not in self._ids:
            limit = self._limit
            whole = self._ensemble.ids(*text)
            self.num_cut += len(whole) > limit
            self._ids[text] = self._ensemble.ids(*text, limit)
        return self._ids[text]


def load_ensemble(
    model: str,
    max_tokens: int | None = None,
    embedded: EmbeddedModels | None = None,
    trust_remote_code: bool = False,
) -> RewardEnsemble:
    """Loads the reward model or models that `model` names.

    model: a run directory of `r2m reward-model train`, a sequence classifier (Hugging Face name or directory), an OUT
        of `r2m export`, or `embedded`.
    max_tokens: longest text that is read, in tokens; None means what the model's config says.
    embedded: the models that the name `embedded` stands for; None means the default ones.
    trust_remote_code: whether Python code that comes with the model's files may be run.

    Raises ConfigError as `RewardEnsemble` does.
    """
    refuse_other_languages("the reward model", model)
    if model == "embedded":
        ensemble = RewardEnsemble((embedded or embedded_models()).reward_model)
    else:
        ensemble = RewardEnsemble(Path(model, "reward_model") if is_export(model) else model, trust_remote_code)
    if max_tokens is not None:
        ensemble.config = ensemble.config.data(max_tokens=max_tokens)
    return ensemble
