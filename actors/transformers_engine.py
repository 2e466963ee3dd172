"""The rollout engine on transformers' `generate`. It is slow and simple. It is exact if a batch is a single group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.models.generation import play_with_model, sample_groups
from r2m_async.models.plays import rollout_function
from r2m_async.models.policy import group_feedback
from r2m_async.models.weights import load_weights
from r2m_async.trajectories import PolicyFeedback, Ticket, TrajectoryGroup, Weights


class TransformersEngine:
    """A `RolloutEngine` that samples with a transformers model in this process."""

    def __init__(self, model: Any, tokenizer: Any, config: R2MConfig, greedy_twin: bool) -> None:
        """Keeps the model as policy version 0.

        Args:
            model: the policy, a causal language model. `load` overwrites its weights.
            tokenizer: the policy's tokenizer.
            config: the run's config.
            greedy_twin: whether every group gets one more response, which is decoded greedily.

        Raises ConfigError if `rollouts.function` names no function that can be called.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._greedy_twin = greedy_twin
        self._function = rollout_function(config)
        self._version = 0
        self._aborted: tuple[int, int] | None = None
        """The group and attempt that `abort` named last. `abort` runs in another thread than `generate`."""

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        """Copies the weights into the model. `sent` is not used.

        Returns no measurements. Raises ValueError if the weights do not fit the model.
        """
        load_weights(self._model, weights)
        self._version = weights.version
        return {}

    def join(self, channel: dict[str, Any]) -> None:
        """Raises RuntimeError: the learner cannot send weights to this engine itself."""
        raise RuntimeError("the transformers engine takes weights with their tensors only")

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        """Generates one group and its feedback (`RolloutEngine.generate`).

        Raises NonFiniteStep if the policy gives no finite probability for a token, and FunctionFailed if the user's
        rollout function fails.
        """
        return self.generate_batch([ticket])[0]

    def generate_batch(self, tickets: Sequence[Ticket]) -> list[tuple[TrajectoryGroup, PolicyFeedback | None]]:
        """Generates the groups of several tickets as one batch, which is much faster for small models.

        Returns what `generate` returns, per ticket. The size of the batch may change how log-probabilities are rounded.
        With a rollout function of the user's there is no batch: each response is alone. Raises what `generate` raises.
        """
        how: dict[str, Any] = {
            "greedy_twin": self._greedy_twin,
            "version": self._version,
            "aborted": self._is_aborted,
        }
        if self._function is None:
            return sample_groups(self._model, self._tokenizer, tickets, self._config, **how)
        groups = [
            play_with_model(self._function, self._model, self._tokenizer, ticket, self._config, **how)
            for ticket in tickets
        ]
        return [(whole, self._feedback(whole.finished())) for whole in groups]

    def _is_aborted(self, ticket: Ticket) -> bool:
        return self._aborted == (ticket.group_id, ticket.attempt)

    def _feedback(self, group: TrajectoryGroup) -> PolicyFeedback | None:
        """The policy's hidden states on a finished group, from another forward pass; None if nobody reads them."""
        if not (self._config.wants_rollout_states and group.trajectories):
            return None
        return group_feedback(self._model, group, self._config, self._version)

    def abort(self, group_id: int, attempt: int) -> None:
        """Ends the unfinished responses of this attempt after the token that is being drawn.

        Only the last call is remembered.
        """
        # A single assignment needs no lock: the other thread reads either the old pair or the new one.
        self._aborted = group_id, attempt
