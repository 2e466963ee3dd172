"""The rollout actor: one engine, one policy version at a time, groups out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from r2m_async.codec import encoded_size
from r2m_async.finite import first_bad, no_probability
from r2m_async.ring.stages import produces
from r2m_async.trajectories import GroupReport, PolicyFeedback, StepReport, Ticket, TrajectoryGroup, Weights


class RolloutEngine(Protocol):
    """What generates. An engine holds one policy version; it neither knows bounds nor retries."""

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        """From here on everything is generated with these weights; measurements of the change, if any.

        `sent`: what the learner says of weights that it sends itself; empty for weights that have their tensors.
        """

    def join(self, channel: dict[str, Any]) -> None:
        """Joins the channel over which the learner will send weights itself."""

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        """All responses of the ticket's group, the unfinished ones of an aborted group with reason `abort`; and the
        sampling policy's states on those that finished, if the run wants them."""

    def abort(self, group_id: int, attempt: int) -> None:
        """Makes `generate` of that attempt return soon, running or about to; called from another thread."""


class RolloutActor:
    """Turns tickets into groups with their feedback. `generate` may run in several threads if its engine allows it."""

    def __init__(self, engine: RolloutEngine, state_bytes: int) -> None:
        """`state_bytes`: of the policy's state on one token, 0 where the variant reads none."""
        self._engine = engine
        self._state_bytes = state_bytes

    @produces(0)
    def load_weights(self, weights: Weights, sent: dict[str, Any]) -> tuple[StepReport]:
        return (StepReport(version=weights.version, metrics=self._engine.load(weights, sent)),)

    @produces(0)
    def join(self, channel: dict[str, Any]) -> tuple[None]:
        self._engine.join(channel)
        return (None,)

    @produces(2)
    def generate(self, ticket: Ticket) -> tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]:
        """A group without its unfinished responses (`overage: mask`), and its feedback if scoring needs the actor's.

        Raises NonFiniteStep naming the response and the policy's version where a log-probability is not finite.
        """
        return self._reported(ticket, *self._engine.generate(ticket))

    def generate_batch(
        self, tickets: Sequence[Ticket]
    ) -> list[tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]]:
        """`generate` of several at once, for an engine that has `generate_batch`."""
        generated = self._engine.generate_batch(tickets)  # type: ignore[attr-defined]
        return [self._reported(ticket, *one) for ticket, one in zip(tickets, generated, strict=True)]

    def _reported(
        self, ticket: Ticket, whole: TrajectoryGroup, feedback: PolicyFeedback | None
    ) -> tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]:
        for index, one in enumerate((*whole.trajectories, *(() if whole.greedy is None else (whole.greedy,)))):
            if bad := first_bad(one.behaviour_logprobs):
                version, token = int(one.policy_versions[bad[0]]), bad[0] - one.prompt_len
                raise no_probability(ticket, index, len(whole.trajectories), token, version)
        group = whole.finished()
        both = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
        num_states = sum(len(trajectory.token_ids) - 1 for trajectory in both)
        report = GroupReport(
            group_id=ticket.group_id,
            attempt=ticket.attempt,
            oldest_version=group.oldest_version,
            num_responses=len(group.trajectories),
            num_tokens=sum(trajectory.num_response_tokens for trajectory in whole.trajectories),
            num_bytes=encoded_size(group) + 2 * self._state_bytes * num_states,
        )
        return report, group, feedback

    @produces(0)
    def abort(self, group_id: int, attempt: int) -> tuple[None]:
        self._engine.abort(group_id, attempt)
        return (None,)
