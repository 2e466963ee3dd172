"""The head learner: one AdamW update of the reward head per policy step (R2M, Algorithm 1, lines 15-20)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from learners.optimizer_state import moments, restore_moments
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import all_finite
from r2m_async.models.heads import HeldHead, improve_head
from r2m_async.models.weights import load_weights, named_weights
from r2m_async.ring.stages import produces
from r2m_async.trajectories import GroupRewards, HeadGroup, PolicyFeedback, RewardEmbeddings, StepReport, Weights


class HeadLearner:
    """Every step ticks its version; a frozen variant's weights stay what they were. `start` gives it its weights."""

    def __init__(self, head: nn.Module, config: R2MConfig) -> None:
        self._head = head
        self._config = config
        self._version = 0
        self._held = HeldHead(head, config)
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=config.head.lr, weight_decay=0.0)

    @produces(0)
    def start(self, weights: Weights) -> tuple[int]:
        """Takes the reward model's own head, which only the annotator has loaded."""
        load_weights(self._head, weights)
        self._held.start()
        return (weights.version,)

    @produces(1)
    def update(
        self,
        step: int,
        embeddings: list[RewardEmbeddings],
        refreshed: Sequence[PolicyFeedback] | None,
        annotated: Sequence[GroupRewards],
    ) -> tuple[StepReport, Weights]:
        """One update on a step's groups; an empty step, or a frozen head, only ticks.

        So does a step that the policy left out (`refreshed` is then empty), and an update that `improve_head` undid.
        Raises NonFiniteStep.
        """
        metrics: dict[str, float] = {}
        if self._config.trains_head and embeddings and refreshed is not None and not refreshed:
            metrics = {"head/skipped_updates": 1.0}
        elif self._config.trains_head and embeddings:
            feedback = refreshed or [None] * len(embeddings)
            groups = [
                HeadGroup(embeddings=one, feedback=states, annotated=rewards)
                for one, states, rewards in zip(embeddings, feedback, annotated, strict=True)
            ]
            metrics = self._update(step, groups)
        self._version += 1
        return StepReport(version=self._version, metrics=metrics), named_weights(self._held.scoring, self._version)

    def _update(self, step: int, groups: list[HeadGroup]) -> dict[str, float]:
        terms, counts = improve_head(self._head, self._optimizer, self._held, groups, step, self._config)
        if not counts:
            return {"head/skipped_updates": 1.0}
        return {
            "head/loss": statistics.fmean(float(term.loss.detach()) for term in terms),
            "head/bradley_terry": statistics.fmean(float(term.grebt.bradley_terry) for term in terms),
            "head/group_reward_entropy": statistics.fmean(float(term.grebt.group_reward_entropy) for term in terms),
            "head/gap": statistics.fmean(float(term.grebt.gap) for term in terms),
            "head/hold": statistics.fmean(float(term.hold) for term in terms),
            "head/agreement": statistics.fmean(float(term.agrees) for term in terms),
            "head/skipped_updates": 0.0,
        }

    @produces(1)
    def state(self) -> tuple[StepReport, dict[str, Any]]:
        """What `restore` continues from, bit for bit."""
        state = {
            "weights": named_weights(self._head, self._version),
            "scoring": named_weights(self._held.scoring, self._version),
            "optimizer": moments(self._optimizer),
        }
        return StepReport(version=self._version, metrics={}), state

    @produces(0)
    def restore(self, state: dict[str, Any]) -> tuple[int]:
        """Raises ConfigError for a head that is not finite."""
        load_weights(self._head, state["weights"])
        self._held.resume(state["scoring"])
        for weights in (state["weights"], state["scoring"]):
            if not all_finite(weights.tensors.values()):
                raise ConfigError(
                    f"the checkpoint's head (version {weights.version}) has weights that are NaN or infinite: its training "
                    f"had diverged; resume from an older checkpoint"
                )
        self._version = state["weights"].version
        restore_moments(self._optimizer, state["optimizer"])
        return (self._version,)
