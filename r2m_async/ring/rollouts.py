"""Keeps rollout actors busy: this is the way of a ticket to a group in the queue with its reward token embeddings.

    ticket -> load its policy version -> generate -> queue -> embed

An actor that dies is restarted. Its groups go back to the schedule, which issues them again. So does a group whose
responses all have the same reward, if `rollouts.max_refills` allows it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from r2m_async.errors import FunctionFailed, GenerationFailed, RewardFailed, StageLost, StepFailed
from r2m_async.ring.delivery import Delivery
from r2m_async.ring.evaluations import Evaluation, Evaluations
from r2m_async.ring.journal import Journal
from r2m_async.ring.stages import Payload, RolloutStage
from r2m_async.ring.state import RingState, now
from r2m_async.ring.tasks import errors_in, in_step
from r2m_async.schedule import Admission
from r2m_async.trajectories import Ticket

_Job: TypeAlias = tuple[int, Payload, Ticket | Evaluation | None]
"""The next job of a rollout actor: the policy version that it needs, the weights of that version, and what to generate.

The third part is a ticket, an evaluation, or None if the actor should only load the weights.
"""


REJOIN_EVERY = 10.0
"""Seconds between two attempts to start an actor that has left."""


class Rollouts:
    """The rollout actors of a ring, and what they are doing."""

    def __init__(
        self, state: RingState, evaluations: Evaluations, journal: Journal, make_ticket: Callable[[Admission], Ticket]
    ) -> None:
        """Begins with actors that have loaded no weights.

        Args:
            state: the state of the ring.
            evaluations: what the last actor must generate between its groups.
            journal: keeps the groups that arrive.
            make_ticket: turns an admission into a ticket, with the prompt and the seed of its group.
        """
        self._config, self._stages, self._schedule = state.config, state.stages, state.schedule
        self._metrics, self._waits, self._calls = state.metrics, state.waits, state.calls
        self._tasks, self._versions, self._present = state.tasks, state.versions, state.present
        self._queue = state.queue
        self._evaluations, self._journal, self._make_ticket = evaluations, journal, make_ticket
        self._delivery = Delivery(state.config, state.stages, state.waits, state.calls)
        self._embedding: dict[int, asyncio.Task[Any]] = {}
        """For each group that has arrived, the task that embeds it, until the group's step has waited for it."""
        self._voided_in_a_row = 0
        """The groups that were given up (`_give_up`), since the last whose embeddings came."""
        self._deaths: Counter[str] = Counter()
        """For each rollout actor, its deaths since it last finished a group."""

    async def wait_for_embeddings(self, group_ids: tuple[int, ...]) -> None:
        """Waits for the reward token embeddings of groups that have arrived. It is called once for each group."""
        await asyncio.gather(*(self._embedding[group_id] for group_id in group_ids))
        for group_id in group_ids:
            del self._embedding[group_id]

    def settled(self, step: int) -> bool:
        """Whether no group of a step that has arrived can still be given up or refilled for what its rewards are."""
        due_step = self._schedule.plan.due_step
        return not self._waits_for_rewards or all(
            task.done() for group_id, task in self._embedding.items() if due_step(group_id) == step
        )

    @property
    def _waits_for_rewards(self) -> bool:
        """Whether the rewards of a group that has arrived decide whether its step may begin with it."""
        return self._config.reward.may_void or self._config.rollouts.max_refills > 0

    def forget(self, group_ids: tuple[int, ...]) -> None:
        """Stops embedding groups that will be in no step.

        A `put` that was sent to the queue already is not taken back.
        """
        for group_id in group_ids:
            if embedding := self._embedding.pop(group_id, None):
                embedding.cancel()

    async def loop(self, actor: RolloutStage) -> None:
        """Consumes admissions of groups, and policy weights. Waits for a ticket. It is unblocked by the training loop,
        which makes new versions, and by whatever makes room in the queue. Produces groups in the queue. The loop of the
        last actor also generates the groups of evaluations."""
        while True:
            causes: list[Exception] = []
            try:
                await self._serve(actor)
            except ExceptionGroup as failed:
                causes = errors_in(failed)
            except StageLost as lost:  # its process died before it was asked for anything
                causes = [lost]
            # A lost payload names no stage. It counts as a loss of this actor, whose groups are then generated again.
            own = [error for error in causes if isinstance(error, StageLost) and error.stage in (actor.name, None)]
            if others := [error for error in causes if error not in own]:
                raise others[0]
            await self._bring_back(actor, own[0])

    async def _serve(self, actor: RolloutStage) -> None:
        """Keeps an actor busy. It ends only by raising an ExceptionGroup: the actor is lost, or something failed. StageLost
        alone means that the actor was lost at the start.

        All jobs of the actor have ended by then. Those that were still running were cancelled.
        """
        # A process for which there is no place yet is not there. The ring goes on without it meanwhile.
        with self._waits.named(actor.name, "its process"):
            await actor.carrier.pids()
        self._present[actor.name] = actor
        self._evaluations.wake()
        loaded: int | None = None
        running: set[asyncio.Task[Any]] = set()
        in_flight, at_once = self._config.rollouts.in_flight_updates, self._config.concurrent_groups

        def urgent() -> _Job | None:
            return self._urgent(actor, loaded, bool(running))

        def ended(task: asyncio.Task[None]) -> None:
            running.discard(task)
            self._waits.wake(actor.name)

        async with asyncio.TaskGroup() as jobs:
            while True:
                # An actor that can take no ticket must not stand in the line. Only the first in the line is woken, so
                # it would keep the others from their tickets.
                await self._waits.aside(
                    lambda: len(running) < at_once or urgent(), actor.name, "one of its groups to end"
                )
                # From here on the schedule counts the ticket as this actor's. If the actor is lost before it begins to
                # generate, `_bring_back` returns the ticket with all others.
                version, weights, job = await self._waits.in_line(
                    lambda: urgent() or self._ticket(actor), actor.name, "a ticket"
                )
                # Without in-flight updates, a group must not change its version halfway. And an evaluation may need an
                # older version, which must not get into any group.
                alone = isinstance(job, Evaluation) or (loaded != version and not in_flight)
                if alone:
                    await self._waits.aside(lambda: not running, actor.name, "its groups to end")
                if loaded != version:
                    # The process is new, so it has no channel to the learner yet.
                    if loaded is None:
                        await self._delivery.connect(actor)
                    report = await self._delivery.load(actor, version, weights)
                    self._metrics.standing["weights"] = report.metrics
                    loaded = version
                if isinstance(job, Evaluation):
                    await self._evaluations.evaluate(actor, job)
                elif job is not None:
                    task = jobs.create_task(self._generate(actor, job))
                    running.add(task)
                    task.add_done_callback(ended)

    async def _bring_back(self, actor: RolloutStage, error: StageLost) -> None:
        """Gives the tickets of a lost actor back to the schedule, and waits until the actor is restarted.

        If the new process dies while it starts, that counts as one more death. An actor that died more than
        `rollouts.max_restarts` times in a row has left: the ring goes on without it, and tries to start it from time to
        time. Raises StageLost if fewer than `rollouts.min_actors` are then there.
        """
        self._present.pop(actor.name, None)
        self._evaluations.wake()
        # `_serve` has ended all jobs of this actor, so no result of an old attempt can still arrive. The schedule
        # relies on that: it would accept such a result until the group is issued again.
        self._schedule.lost(actor.name, "actor_died" if error.stage else "payload_lost")
        self._waits.notify()
        while True:
            self._deaths[actor.name] += 1
            if self._deaths[actor.name] > self._config.rollouts.max_restarts:
                at_least = self._config.rollouts.min_actors or self._config.rollouts.num_actors
                if len(self._present) < at_least:
                    raise StageLost(
                        actor.name,
                        f"{actor.name} died {self._deaths[actor.name]} times in a row; rollouts.max_restarts is "
                        f"{self._config.rollouts.max_restarts}, and {len(self._present)} actors are left, where "
                        f"rollouts.min_actors is {at_least}. Last: {error}",
                    ) from error
                # Only named, and no work that ends: an actor that never comes must not look like a ring that moves.
                with self._waits.named(actor.name, "a place for its process"), contextlib.suppress(StageLost):
                    await asyncio.sleep(REJOIN_EVERY)
                    await actor.restart()
                    return
                continue
            try:
                await self._waits.work(actor.restart(), actor.name, "its restart")
                return
            except StageLost as again:
                error = again

    def _urgent(self, actor: RolloutStage, loaded: int | None, running: bool) -> _Job | None:
        """The job that an actor must do before it takes a ticket, or None if there is none.

        Args:
            actor: the rollout actor.
            loaded: the policy version that its engine has, or None if it has none yet.
            running: whether it is generating groups.
        """
        if evaluation := self._evaluations.next_for(actor):
            return evaluation.policy_version, evaluation.policy, evaluation
        newest = self._versions.newest_policy
        # Groups that are being generated go on with the new weights. An actor without groups need not hurry: its next
        # ticket names the version to load.
        if self._config.rollouts.in_flight_updates and running and loaded != newest:
            return newest, self._versions.policies[newest], None
        return None

    def _ticket(self, actor: RolloutStage) -> _Job | None:
        """The job of generating the next group that may be started, or None if none may be started at present.

        The answer None would be the same for every other actor.
        """
        admission = self._schedule.admit(actor.name, self._versions.newest_policy, now())
        if admission is None:
            return None
        # No group is late before all groups of its step have been admitted. This may have been the last of them, so the
        # overage loop must look again.
        if self._config.scheduling.overage != "wait":
            self._waits.notify()
        weights = self._versions.policies[admission.policy_version]
        return admission.policy_version, weights, self._make_ticket(admission)

    async def _generate(self, actor: RolloutStage, ticket: Ticket) -> None:
        """Generates the group of a ticket, puts it into the queue, and begins to embed it."""
        group_id, about = ticket.group_id, f"group {ticket.group_id}"
        try:
            call = self._calls.traced(actor.generate(ticket), step=ticket.due_step, about=about)
            report, group, feedback = await call
        except GenerationFailed as failed:
            retries = self._config.rollouts.retries
            if not self._schedule.failed(group_id, ticket.attempt, failed.reason, retries):
                await self._give_up(group_id, failed)
            self._waits.notify()
            return
        self._deaths[actor.name] = 0
        self._metrics.generated(report.num_tokens)
        # The group may have been given up while it was generated. Nobody would then free what is put into the queue.
        if not self._schedule.expects(group_id, ticket.attempt):
            return
        # `put` comes before `arrived`: once the schedule knows of the group, the training loop may get its payloads.
        async with in_step(ticket.due_step, (group_id,)):
            await self._queue.put(group_id, ("group", "feedback"), group, feedback, about=about)
        # While `put` was under way, the group may have been given up, for example by the end of the run (`kl_stop`).
        # Then `void` and `arrived` change nothing and return False.
        if report.num_responses < min(2, self._config.rollouts.group_size):
            self._schedule.void(group_id, "overage", ticket.attempt)
        if not self._schedule.arrived(group_id, ticket.attempt, report.oldest_version, report.num_bytes, now()):
            # If the schedule still holds the group, the queue has the payloads of another attempt, or will get them.
            # They have the same names and must stay.
            if not self._schedule.holds(group_id):
                await self._queue.free((group_id,), about)
        else:
            # No `await` since `arrived`: as soon as another task runs, `_score` may look for the embedding task.
            self._metrics.arrived(group_id, report)
            self._metrics.delivered(ticket.due_step, actor.name, now())
            self._embedding[group_id] = self._tasks.spawn(self._embed(ticket, group))
            self._tasks.spawn(self._journal.arrived(ticket, self._schedule.refills_of(group_id), report))
        self._waits.notify()

    async def take_up(self, directory: str) -> None:
        """Takes up the groups that the journals in a folder have kept, before any loop runs."""
        for ticket, report, group in await self._journal.recover(directory):
            self._metrics.arrived(ticket.group_id, report)
            self._embedding[ticket.group_id] = self._tasks.spawn(self._embed(ticket, group))

    async def restore_queue(self) -> None:
        """Gives a new process of the queue what the old one held.

        A group of which a part is lost as well, with its node, is generated again. Under `lag: exact` that takes the same
        version of the policy, so it becomes the same group.

        Raises StageLost if the step of such a group is being trained.
        """
        name = self._stages.queue.name
        for group_id, error in (await self._queue.put_again()).items():
            if not self._schedule.take_back(group_id, "payload_lost"):
                raise StageLost(name, f"{name} was lost, and group {group_id} with it: {error}") from error
            self._queue.forget(group_id)
            self._journal.forget(group_id)
            self._metrics.forget((group_id,))
            self.forget((group_id,))
            self._waits.notify()
        await self._journal.reopen()

    async def _embed(self, ticket: Ticket, group: Payload) -> None:
        """Computes the reward token embeddings of one group, and puts them into the queue.

        This depends on no version of policy or head. So it begins as soon as the group has arrived.
        """
        annotator = self._stages.annotators[ticket.group_id % len(self._stages.annotators)]
        step, about = ticket.due_step, f"group {ticket.group_id}"
        async with in_step(step, (ticket.group_id,)):
            try:
                report, embeddings = await self._calls.traced(annotator.embed(group), step=step, about=about)
            except RewardFailed as failed:
                await self._give_up(ticket.group_id, failed)
                return
            self._voided_in_a_row = 0
            if report.metrics.get("spread") == 0.0 and self._schedule.may_refill(ticket.group_id):
                await self._refill(ticket)
                return
            self._metrics.annotated(ticket.group_id, report.metrics.get("gold", float("nan")))
            await self._queue.put(ticket.group_id, ("embeddings",), embeddings, about=about)
        if self._waits_for_rewards:
            self._waits.notify()  # the step may have waited for this group alone (`settled`)

    async def _refill(self, ticket: Ticket) -> None:
        """Gives a group back to the schedule, because its responses all have the same reward."""
        group_id = ticket.group_id
        await self._queue.free((group_id,), f"group {group_id}")
        # Without any `await` from here on: an actor may begin with the group as soon as it is refilled.
        if self._schedule.refill(group_id, ticket.attempt, "no_spread"):
            self._metrics.forget((group_id,))
            self._journal.forget(group_id)
            self._embedding.pop(group_id, None)
            self._waits.notify()

    async def _give_up(self, group_id: int, failed: RewardFailed | GenerationFailed) -> None:
        """Gives up a group for which a reward function failed, or its generation. Its step trains without it.

        Raises StepFailed if more than `reward.max_voided` groups in a row were given up.
        """
        self._voided_in_a_row += 1
        if self._voided_in_a_row > self._config.reward.max_voided:
            kind = FunctionFailed if isinstance(failed, RewardFailed) else StepFailed
            raise kind(
                f"{failed}\n{self._voided_in_a_row} groups in a row were lost in this way, and reward.max_voided is "
                f"{self._config.reward.max_voided}."
            ) from None
        await self._queue.free((group_id,), f"group {group_id}")
        # Without any `await` from here on: the step may be assembled as soon as the group is voided.
        self._schedule.void(group_id, failed.reason)
        self._metrics.forget((group_id,))
        self._embedding.pop(group_id, None)
        self._waits.notify()
