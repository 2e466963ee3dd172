"""Evaluates versions of the policy during a run: how well it answers held-out prompts.

The policy version that is evaluated is one that rollout actors can load. The last rollout actor that is there generates its
responses before it takes another ticket, and a reward annotator scores them with the head version that scored the step
which made the policy version. Version 0 is scored with the first head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from r2m_async.errors import GenerationFailed
from r2m_async.ring.stages import Payload, RolloutStage
from r2m_async.ring.state import RingState
from r2m_async.ring.tasks import together
from r2m_async.trajectories import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation that was asked for.

    It keeps the weights of its two versions alive, also after the ring has dropped these versions.
    """

    policy_version: int
    head_version: int
    policy: Payload
    """The weights of the policy version."""
    head: Payload
    """The weights of the head version."""


class Evaluations:
    """The evaluations of one run: those that were asked for, and the results of those that are done."""

    def __init__(self, state: RingState, tickets: tuple[Ticket, ...], newest: Mapping[str, float] | None) -> None:
        """Begins without evaluations that are under way.

        Args:
            state: the state of the ring.
            tickets: the tickets of the held-out prompts. Without tickets there are no evaluations.
            newest: the newest evaluation before the run was resumed, if there is one.
        """
        self.results: list[dict[str, float]] = [] if newest is None else [dict(newest)]
        """The metrics of each finished evaluation, in the order in which they finished. A resumed run begins with the
        newest one from before."""
        self.samples: list[dict[str, Any]] = []
        """The responses to read of each evaluation of this start, in the same order: the fields of `Sample`, and `step`."""
        self._state, self._tickets = state, tickets
        self.answered = 0
        """How many held-out prompts of the evaluation that is under way are answered."""
        self._evaluator_now: str | None = None
        self._asked: deque[Evaluation] = deque()
        """Evaluations that are not finished. The first of them may be under way."""

    def due(self, version: int, last: bool) -> bool:
        """Whether the policy version that a step has made is one to evaluate.

        Args:
            version: the number of the version, which is 1 after the first step.
            last: whether it is the last version of the run.
        """
        every = self._state.config.evaluation.every
        return last or (every is not None and version % every == 0)

    def ask(self, policy_version: int, head_version: int, head: Payload) -> None:
        """Asks for an evaluation of a published policy version, by a head version with the weights `head`.

        It does nothing if there are no held-out prompts.
        """
        if not self._tickets:
            return
        self._asked.append(
            Evaluation(
                policy_version=policy_version,
                head_version=head_version,
                policy=self._state.versions.policies[policy_version],
                head=head,
            )
        )
        self.wake()

    def wake(self) -> None:
        """Wakes the actor that must do the next evaluation. Call it when an actor has come or gone, too."""
        # `notify` wakes only the first actor in the line.
        if self._asked and (actor := self._evaluator()):
            self._state.waits.wake(actor)

    def under_way(self) -> tuple[int, int, int] | None:
        """(the policy version that is evaluated now, prompts answered, prompts in all), or None if none is."""
        return (self._asked[0].policy_version, self.answered, len(self._tickets)) if self._asked else None

    @property
    def all_finished(self) -> bool:
        """Whether every evaluation that was asked for is in `results`."""
        return not self._asked

    def next_for(self, actor: RolloutStage) -> Evaluation | None:
        """The evaluation that an actor must do next, or None if there is none for it."""
        return self._asked[0] if self._asked and actor.name == self._evaluator() else None

    def _evaluator(self) -> str | None:
        """The name of the actor that does the next evaluation: the last one that is there. None if none is.

        It keeps that duty until the evaluation is done or the actor is lost.
        """
        present = self._state.present
        if self._evaluator_now not in present:
            names = [stage.name for stage in self._state.stages.rollouts if stage.name in present]
            self._evaluator_now = names[-1] if names else None
        return self._evaluator_now

    def in_reach(self) -> bool:
        """Whether the policy may take a step without losing a version that an evaluation still waits for.

        A learner that sends weights to engines itself keeps only its newest versions. So it waits for an evaluation of
        an older version.
        """
        if not (self._state.config.weights.direct and self._asked):
            return True
        age = self._state.schedule.policy_version - self._asked[0].policy_version
        return age <= self._state.config.scheduling.max_policy_age

    async def evaluate(self, actor: RolloutStage, evaluation: Evaluation) -> None:
        """Generates and scores responses to all held-out prompts, and adds the metrics to `results`.

        The actor must have loaded the policy version, and must not be generating anything else. It generates up to
        `rollouts.concurrent_groups` prompts at once.
        """
        calls, annotator, results = self._state.calls, self._state.stages.annotators[0], []

        async def result(ticket: Ticket, retries: int) -> tuple[Payload, Payload, Payload]:
            about = f"evaluation prompt {-1 - ticket.group_id}"
            try:
                _, group, feedback = await calls.traced(actor.generate(ticket), step=-1, about=about)
            except GenerationFailed:
                if not retries:
                    raise
                return await result(ticket, retries - 1)
            embeddings = (await calls.traced(annotator.embed(group), step=-1, about=about))[1]
            self.answered += 1
            return group, feedback, embeddings

        self.answered = 0  # an actor that was lost on the way may have answered some
        at_once = self._state.config.concurrent_groups
        for first in range(0, len(self._tickets), at_once):
            async with together() as batch:
                tickets = self._tickets[first : first + at_once]
                tasks = [batch.create_task(result(ticket, self._state.config.rollouts.retries)) for ticket in tickets]
            results += [task.result() for task in tasks]
        groups, feedback, embeddings = (list(column) for column in zip(*results, strict=True))
        step = evaluation.policy_version
        report = await calls.traced(annotator.evaluate(step, evaluation.head, groups, embeddings, feedback), step=-1)
        ages = {"step": float(step), "head_version": float(evaluation.head_version)}
        self.results.append(ages | report.metrics)
        self.samples += [{"step": float(step), **asdict(sample)} for sample in report.samples]
        # Only now does it leave the queue: if the actor is lost on the way, its next process does it again.
        self._asked.popleft()
        self.answered = 0
        self._evaluator_now = None
        self._state.waits.notify()
