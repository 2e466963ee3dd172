"""The rollout engine on transformers' `generate`: slow, simple, exact where one group is one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.models.generation import sample_groups
from r2m_async.models.policy import group_feedback
from r2m_async.models.weights import load_weights
from r2m_async.trajectories import PolicyFeedback, Ticket, TrajectoryGroup, Weights


class TransformersEngine:
    def __init__(self, model: Any, tokenizer: Any, config: R2MConfig, greedy_twin: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._greedy_twin = greedy_twin
        self._version = 0
        self._aborted: tuple[int, int] | None = None
        """The group and attempt that `abort` named last; written by another thread than `generate` runs in."""

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        load_weights(self._model, weights)
        self._version = weights.version
        return {}

    def join(self, channel: dict[str, Any]) -> None:
        raise RuntimeError("the transformers engine takes weights with their tensors only")

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        return self.generate_batch([ticket])[0]

    def generate_batch(self, tickets: Sequence[Ticket]) -> list[tuple[TrajectoryGroup, PolicyFeedback | None]]:
        """What `generate` gives of each, sampled as one batch: much faster for small models."""
        groups = sample_groups(
            self._model,
            self._tokenizer,
            tickets,
            num_responses=self._config.rollouts.group_size,
            temperature=self._config.rollouts.temperature,
            max_new_tokens=self._config.rollouts.max_new_tokens,
            greedy_twin=self._greedy_twin,
            version=self._version,
            aborted=lambda ticket: self._aborted == (ticket.group_id, ticket.attempt),
        )
        return [(whole, self._feedback(whole.finished())) for whole in groups]

    def _feedback(self, group: TrajectoryGroup) -> PolicyFeedback | None:
        if not (self._config.wants_rollout_states and group.trajectories):
            return None
        return group_feedback(self._model, group, self._config, self._version)

    def abort(self, group_id: int, attempt: int) -> None:
        self._aborted = group_id, attempt
