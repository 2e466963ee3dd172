"""The rollout engine on transformers. It is slow and simple. It is exact if a batch is a single group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.aborts import Aborted, attempt_name
from actors.gathering import Gathered
from r2m_async.config import R2MConfig
from r2m_async.models.generation import play_with_model, sample_groups
from r2m_async.models.plays import rollout_function
from r2m_async.models.policy import group_feedback
from r2m_async.models.weights import load_weights
from r2m_async.trajectories import PolicyFeedback, Ticket, TrajectoryGroup, Weights

PATIENCE = 0.01
"""Seconds that a batch waits for a further group: the controller sends off all groups that it may, one after the other."""


class TransformersEngine:
    """A `RolloutEngine` that samples with a transformers model in this process.

    Groups that threads ask for at the same time become one batch, of at most `rollouts.concurrent_groups`. Those that come
    later wait for its end.
    """

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
        self._aborted = Aborted()
        """The attempts that `abort` has named."""
        at_once = config.concurrent_groups
        self._gathered = Gathered(self.generate_batch, at_once, PATIENCE, self._nothing_of)

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
        return self._gathered(ticket)

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
        return attempt_name(ticket.group_id, ticket.attempt) in self._aborted

    def _nothing_of(self, ticket: Ticket) -> tuple[TrajectoryGroup, None] | None:
        """A group without responses, if the attempt was aborted before it began. None: it was not."""
        return (
            (TrajectoryGroup(ticket=ticket, trajectories=(), greedy=None), None) if self._is_aborted(ticket) else None
        )

    def _feedback(self, group: TrajectoryGroup) -> PolicyFeedback | None:
        """The policy's hidden states on a finished group, from another forward pass; None if nobody reads them."""
        if not (self._config.wants_rollout_states and group.trajectories):
            return None
        return group_feedback(self._model, group, self._config, self._version)

    def abort(self, group_id: int, attempt: int) -> None:
        """Ends the unfinished responses of this attempt after the token that is being drawn.

        An attempt that has not begun gets no responses.
        """
        self._aborted.add([attempt_name(group_id, attempt)])
        self._gathered.look()
