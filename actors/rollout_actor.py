"""The rollout actor turns tickets into groups of responses. Its engine holds one policy version at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from r2m_async.codec import encoded_size
from r2m_async.finite import first_bad, no_probability
from r2m_async.trajectories import GroupReport, PolicyFeedback, StepReport, Ticket, TrajectoryGroup, Weights


class RolloutEngine(Protocol):
    """What generates responses. An engine holds one policy version at a time.

    It knows nothing of staleness bounds and never retries: the controller and its schedule do both.
    """

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        """Replaces the policy's weights. Every token from here on is generated with the new ones.

        Args:
            weights: the version to load. It has a layout instead of tensors if the learner sends the tensors itself.
            sent: what the engine must know to receive tensors that the learner sends itself. It is empty or None if
                `weights` has its tensors.

        Returns measurements of the update by name. They may be empty.
        """

    def join(self, channel: dict[str, Any]) -> None:
        """Joins the channel over which the learner will send weights itself.

        Args:
            channel: what the learner's `open_channel` returned.
        """

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        """Generates all responses of the ticket's group.

        Returns the group and the feedback. If the group was aborted, its unfinished responses have the finish_reason
        `abort`. The feedback is the sampling policy's hidden states on the finished responses. It is None if the run
        does not need them, or if no response finished.
        """

    def abort(self, group_id: int, attempt: int) -> None:
        """Makes `generate` of this attempt return soon, whether it is running or about to start.

        It is called from another thread than `generate`.
        """


class RolloutActor:
    """Turns tickets into groups, with the policy's hidden states where scoring needs them.

    `generate` may run in several threads at once if the engine allows it.
    """

    def __init__(self, engine: RolloutEngine, state_bytes: int) -> None:
        """Keeps the engine.

        Args:
            engine: what generates the responses.
            state_bytes: size in bytes of the policy's hidden state on one token, or 0 if the reward head reads none.
        """
        self.engine = engine
        self._state_bytes = state_bytes

    def load_weights(self, weights: Weights, sent: dict[str, Any]) -> tuple[StepReport]:
        """Loads a policy version into the engine (`RolloutEngine.load`).

        Returns a report with the version and the engine's measurements.
        """
        return (StepReport(version=weights.version, metrics=self.engine.load(weights, sent)),)

    def join(self, channel: dict[str, Any]) -> tuple[None]:
        """Lets the engine join the learner's channel (`RolloutEngine.join`)."""
        self.engine.join(channel)
        return (None,)

    def generate(self, ticket: Ticket) -> tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]:
        """Generates the ticket's group.

        Returns a report, the group and its feedback. The group lacks the responses that the schedule cut short
        (`scheduling.overage: mask`). The feedback is None unless scoring reads the sampling policy's hidden states.

        Raises NonFiniteStep, naming the response and the policy version, if a log-probability is not finite.
        """
        return self._reported(ticket, *self.engine.generate(ticket))

    def generate_batch(
        self, tickets: Sequence[Ticket]
    ) -> list[tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]]:
        """Does what `generate` does for several tickets, in one batch. The engine must have a `generate_batch`.

        Returns one (report, group, feedback) per ticket, in the same order.
        """
        generated = self.engine.generate_batch(tickets)  # type: ignore[attr-defined]
        return [self._reported(ticket, *one) for ticket, one in zip(tickets, generated, strict=True)]

    def _reported(
        self, ticket: Ticket, whole: TrajectoryGroup, feedback: PolicyFeedback | None
    ) -> tuple[GroupReport, TrajectoryGroup, PolicyFeedback | None]:
        """Checks a generated group, leaves its unfinished responses out, and adds the report."""
        # Responses that were cut short are checked, too: a broken policy shows in them just as well.
        for index, one in enumerate((*whole.trajectories, *(() if whole.greedy is None else (whole.greedy,)))):
            if bad := first_bad(one.behaviour_logprobs):
                version, token = int(one.policy_versions[bad[0]]), bad[0] - one.prompt_len
                raise no_probability(ticket, index, len(whole.trajectories), token, version)
        group = whole.finished()
        both = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
        # The last token of a trajectory is never an input, so it has no state. Each state counts twice, because the
        # ring holds it as sampled and later as the learner refreshed it.
        num_states = sum(len(trajectory.token_ids) - 1 for trajectory in both)
        report = GroupReport(
            group_id=ticket.group_id,
            attempt=ticket.attempt,
            oldest_version=group.oldest_version,
            newest_version=group.newest_version,
            num_responses=len(group.trajectories),
            num_tokens=sum(trajectory.num_policy_tokens for trajectory in whole.trajectories),
            num_bytes=encoded_size(group) + 2 * self._state_bytes * num_states,
        )
        return report, group, feedback

    def abort(self, group_id: int, attempt: int) -> tuple[None]:
        """Ends this attempt at a group early (`RolloutEngine.abort`)."""
        self.engine.abort(group_id, attempt)
        return (None,)
