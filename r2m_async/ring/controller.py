"""The controller: the one place where the whole ring can be seen.

    tickets -> rollout loops -> replay queue -> embed (RTE, as groups arrive)
                   ^                               |
      policy weights                        training loop: proximal pass | score -> train
                   |                               |                         ^
                   +-------------------------------+-> head loop: update ----+ head weights

Data moves to the right. A *ticket* becomes a *group*, which is all responses to one prompt. Groups get rewards, and the
rewards train the policy. Versions move to the left: new weights of the policy go back to the rollouts, and new weights
of the reward head go back to the scoring. An *RTE* is a reward token embedding, which the frozen backbone of the reward
model computes from a response.

Every loop is a coroutine. It calls stages (`stages.Stage`) and reports to the `Schedule` what happened. It passes
payloads on without reading them. The same controller runs over Ray (launch/ray_stages.py), in one process (tests) and
on a virtual clock (simulator.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from r2m_async.config import R2MConfig
from r2m_async.errors import StageLost, StalledRun, StepFailed
from r2m_async.ring.calls import Calls
from r2m_async.ring.delivery import Delivery
from r2m_async.ring.stages import Call, Payload, RolloutStage, Stages
from r2m_async.ring.step_metrics import Interval, StepMetrics
from r2m_async.ring.waiting import Waits
from r2m_async.schedule import Admission, Assembly, Plan, Schedule
from r2m_async.trajectories import StepReport, Ticket

T = TypeVar("T")

STOP_TIMEOUT = 5.0
"""Seconds that cancelled loops have to end. A loop that takes longer is left behind."""
_DRIVER = "driver"
"""The name, in the list of waits, of whoever calls `start`, `step`, `drain` and `checkpoint`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """An evaluation that was asked for.

    It keeps the weights of its two versions alive, also after the controller has dropped these versions.
    """

    policy_version: int
    head_version: int
    policy: Payload
    """The weights of the policy version."""
    head: Payload
    """The weights of the head version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadWork:
    """A step that the policy has trained and the head has not: the payloads for one head update."""

    step: int
    group_ids: tuple[int, ...]
    embeddings: list[Payload]
    """The reward token embeddings of each group, in the order of `group_ids`."""
    refreshed: Payload
    """The refreshed feedback: the policy's hidden states on these groups, from the last epoch of the step."""
    rewards: Payload
    """The rewards of these groups that the policy was trained on."""


_Job: TypeAlias = tuple[int, Payload, Ticket | _Evaluation | None]
"""The next job of a rollout actor: the policy version that it needs, the weights of that version, and what to generate.

The third part is a ticket, an evaluation, or None if the actor should only load the weights.
"""


class Controller:
    """Runs the ring.

    Call `start`, then `step` until `finished`, then `stop`. Make the controller and call its methods on one and the
    same event loop, whose clock it reads.
    """

    def __init__(
        self,
        config: R2MConfig,
        plan: Plan,
        stages: Stages,
        make_ticket: Callable[[Admission], Ticket],
        evaluation_tickets: tuple[Ticket, ...] = (),
        first_step: int = 0,
    ) -> None:
        """Begins with all clocks at `first_step`. Nothing runs before `start`.

        Args:
            config: the config of the run.
            plan: the settings of the schedule.
            stages: the stages of the ring. Whoever made them also ends them.
            make_ticket: turns an admission into a ticket, with the prompt and the seed of its group.
            evaluation_tickets: the tickets of the held-out prompts. The last rollout actor generates them whenever
                `config.evaluation` asks for an evaluation. Without tickets there are no evaluations.
            first_step: the number of policy steps that a resumed run has taken, else 0.
        """
        self.config = config
        self.stages = stages
        self.schedule = Schedule(plan, first_step)
        self.metrics = StepMetrics(stages, self._now())
        self.evaluations: list[dict[str, float]] = []
        """The metrics of each finished evaluation, in the order in which they finished."""
        self._make_ticket = make_ticket
        self._evaluation_tickets = evaluation_tickets
        self._policies: dict[int, Payload] = {}
        """The weights of the policy versions that rollout actors may still load, by version."""
        self._heads: dict[int, Payload] = {}
        """The weights of the head versions that may still score a step, by version."""
        self._evaluation_queue: deque[_Evaluation] = deque()
        self._head_queue: deque[_HeadWork] = deque()
        self._embedding: dict[int, asyncio.Task[Any]] = {}
        """For each group that has arrived, the task that embeds it, until the group's step has waited for it."""
        self._publication: asyncio.Task[Any] | None = None
        """The task that publishes the newest policy version, until the training loop has waited for it."""
        # One dict under two names: what `_publish` writes into it becomes a metric of the next step.
        self._publish_times = self.metrics.standing["publication"] = {"time/publish": 0.0, "time/publish_stall": 0.0}
        self._results: deque[dict[str, float]] = deque()
        """The metrics of finished steps that `step` has not returned yet."""
        self._steps_wanted = 0
        """The number of steps that `step` has asked for and that are not finished."""
        self._deaths: Counter[str] = Counter()
        """For each rollout actor, its deaths since it last finished a group."""
        self._waits = Waits()
        self._calls = Calls(self._waits, self.metrics)
        self._delivery = Delivery(config, stages, self._waits, self._calls)
        self._tasks: list[asyncio.Task[Any]] = []
        self._first_error: BaseException | None = None

    # Life

    async def start(
        self,
        policies: dict[int, Payload] | None = None,
        heads: dict[int, Payload] | None = None,
        learners: tuple[Payload, str, Payload] | None = None,
    ) -> None:
        """Gets the first versions of policy and head, and starts the loops.

        Args:
            policies: the policy versions that a checkpoint kept, as weights by version. None or empty: the policy
                learner publishes its present weights.
            heads: the head versions that a checkpoint kept, as weights by version. None: the head begins as the reward
                annotator made it, at version 0.
            learners: what the policy learner restores, the directory of the checkpoint, and what the head learner
                restores. None: nothing is restored.

        Raises StageLost if the cluster on which the stages run is gone. Raises what a stage raises.
        """
        self._tasks = [self._spawn(self.stages.watch())]
        # A stage that never answers would hide that the cluster is gone. So the driver waits for whichever of the two
        # comes first: the end of this task, or the error of `watch`.
        starting = self._told_of(self._first_versions(policies, heads, learners))
        try:
            await self._waits.until(lambda: starting.done() or self._first_error, _DRIVER, "the stages to start")
            if not starting.done():
                self._raise_failure()
            await starting
        finally:
            starting.cancel()
        loops = [self._training_loop(), self._head_loop(), self._overage_loop(), self._watchdog()]
        loops += [self._rollout_loop(stage) for stage in self.stages.rollouts]
        self._tasks += [self._spawn(loop) for loop in loops]

    async def _first_versions(
        self,
        policies: dict[int, Payload] | None,
        heads: dict[int, Payload] | None,
        learners: tuple[Payload, str, Payload] | None,
    ) -> None:
        """Fills `_policies` and `_heads`. Arguments are those of `start`."""
        if learners is not None:
            policy, directory, head = learners
            await self._calls.ask(self.stages.policy.restore(policy, directory))
            await self._calls.ask(self.stages.head.restore(head))
        self._policies = policies or {}
        if not self._policies:
            await self._publish(self.schedule.policy_version)
        if heads is None:
            heads = {0: (await self._calls.ask(self.stages.annotators[0].initial_head()))[1]}
            await self._calls.ask(self.stages.head.start(heads[0]))
        self._heads = heads
        if self._evaluation_tickets:
            head_version = self.schedule.head_version
            self._ask_evaluation(self._newest_policy, head_version, heads[head_version])

    async def step(self) -> dict[str, float]:
        """Lets the policy take one step, and returns the metrics of the step by name.

        If a loop has failed, steps that were finished before are returned first. Then it raises the error of the first
        loop that failed. Raises RuntimeError if the run has ended.
        """
        if self.finished:
            raise RuntimeError(f"the run has ended at step {self.schedule.policy_version}; there is no further step")
        self._steps_wanted += 1
        self._waits.notify()
        await self._waits.until(lambda: self._results or self._first_error, _DRIVER, "a step's result")
        if not self._results:
            self._raise_failure()
        return self._results.popleft()

    async def drain(self) -> None:
        """Waits until nothing is under way any more, and then checks the books of the schedule.

        The head has then made its update on every step of the policy. The newest policy version is published, and every
        evaluation that was asked for is in `evaluations`.

        Raises the error of the first loop that failed, and RuntimeError if the books do not balance.
        """

        def caught_up() -> bool:
            version = self.schedule.policy_version
            return self.schedule.head_version == version == self._newest_policy and not self._evaluation_queue

        what = "head updates, weights and evaluations"
        await self._waits.until(lambda: self._first_error or caught_up(), _DRIVER, what)
        self._raise_failure()
        self.schedule.audit()

    async def stop(self) -> None:
        """Cancels all loops and tasks. It does not end the stages: whoever made them does that.

        Returns within `STOP_TIMEOUT` seconds, even if a task does not end.
        """
        if tasks := self._all_tasks():
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.wait(tasks, timeout=STOP_TIMEOUT)
            for task in ended:
                # asyncio logs a complaint about an exception that nobody has looked at.
                if not task.cancelled():
                    task.exception()

    @property
    def finished(self) -> bool:
        """Whether the policy has taken its last step. The head may still be behind it: `drain` waits for that."""
        return self.schedule.policy_version >= self.schedule.num_steps

    def take_trace(self) -> list[Interval]:
        """Returns the intervals of the trace since the last call. The one that ended first comes first."""
        taken, self.metrics.trace = self.metrics.trace, []
        return taken

    async def fetched(self, call: Call[tuple[StepReport, Payload]]) -> memoryview:
        """Makes a call of a stage, and returns its payload as bytes, which `codec.decode` reads."""
        _, payload = await self._calls.ask(call)
        return await self._bytes_of(call.method.name, payload)

    async def checkpoint(self, directory: str) -> dict[str, Any]:
        """Returns everything from which a run can resume, as bytes by name.

        These are the states of both learners, and the weights of all versions that are still needed. It calls `drain`
        first.

        Args:
            directory: where a policy learner of several ranks writes its own files. `start` must later get the
                directory in which these files then are.

        Raises the error of the first loop that fails in the meantime. So a learner that hangs here ends the run after
        `scheduling.stall_after` seconds, as it would in a step.
        """
        await self.drain()
        saving = self._told_of(self._checkpoint(directory))
        try:
            await self._waits.until(lambda: saving.done() or self._first_error, _DRIVER, "a checkpoint")
            if not saving.done():
                self._raise_failure()
            return await saving
        finally:
            saving.cancel()

    async def _checkpoint(self, directory: str) -> dict[str, Any]:
        """Does what `checkpoint` does, once the ring is drained."""
        async with _together() as both:
            policy = both.create_task(self._calls.ask(self.stages.policy.state(directory)))
            head = both.create_task(self._calls.ask(self.stages.head.state()))
        payloads = {"policy_learner": policy.result()[1], "head_learner": head.result()[1]}
        kept = self._kept_policies()
        # The learner sends weights to the engines itself, so these payloads hold no tensors. An export needs them.
        if self.config.weights.direct:
            kept = {self._newest_policy: (await self._calls.ask(self.stages.policy.weights(True)))[1]}
        payloads |= {f"policy_weights_{version}": payload for version, payload in kept.items()}
        payloads |= {f"head_weights_{version}": payload for version, payload in self._heads.items()}
        return {name: await self._bytes_of(name, payload) for name, payload in payloads.items()}

    async def _bytes_of(self, name: str, payload: Payload) -> memoryview:
        """The bytes of a payload. `name` names the payload in the list of waits."""
        return await self._waits.work(self.stages.to_bytes(payload), name, "its bytes")

    # Loops

    async def _rollout_loop(self, actor: RolloutStage) -> None:
        """Consumes admissions of groups, and policy weights. Waits for a ticket. It is unblocked by the training loop,
        which makes new versions, and by whatever makes room in the queue. Produces groups in the queue. The loop of the
        last actor also generates the groups of evaluations."""
        while True:
            causes: list[Exception] = []
            try:
                await self._serve(actor)
            except ExceptionGroup as failed:
                causes = _leaves(failed)
            # A lost payload names no stage. It counts as a loss of this actor, whose groups are then generated again.
            own = [error for error in causes if isinstance(error, StageLost) and error.stage in (actor.name, None)]
            if others := [error for error in causes if error not in own]:
                raise others[0]
            await self._bring_back(actor, own[0])

    async def _serve(self, actor: RolloutStage) -> None:
        """Keeps an actor busy. It ends only by raising an ExceptionGroup: the actor is lost, or something failed.

        All jobs of the actor have ended by then. Those that were still running were cancelled.
        """
        loaded: int | None = None
        running: set[asyncio.Task[Any]] = set()
        in_flight, at_once = self.config.rollouts.in_flight_updates, self.config.rollouts.concurrent_groups

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
                alone = isinstance(job, _Evaluation) or (loaded != version and not in_flight)
                if alone:
                    await self._waits.aside(lambda: not running, actor.name, "its groups to end")
                if loaded != version:
                    # The process is new, so it has no channel to the learner yet.
                    if loaded is None:
                        await self._delivery.connect(actor)
                    report = await self._delivery.load(actor, version, weights)
                    self.metrics.standing["weights"] = report.metrics
                    loaded = version
                if isinstance(job, _Evaluation):
                    await self._evaluate(actor, job)
                elif job is not None:
                    task = jobs.create_task(self._generate(actor, job))
                    running.add(task)
                    task.add_done_callback(ended)

    async def _bring_back(self, actor: RolloutStage, error: StageLost) -> None:
        """Gives the tickets of a lost actor back to the schedule, and waits until the actor is restarted.

        If the new process dies while it starts, that counts as one more death. Raises StageLost if the actor died more
        than `rollouts.max_restarts` times in a row.
        """
        # `_serve` has ended all jobs of this actor, so no result of an old attempt can still arrive. The schedule
        # relies on that: it would accept such a result until the group is issued again.
        self.schedule.lost(actor.name, "actor_died" if error.stage else "payload_lost")
        self._waits.notify()
        while True:
            self._deaths[actor.name] += 1
            if self._deaths[actor.name] > self.config.rollouts.max_restarts:
                raise StageLost(
                    actor.name,
                    f"{actor.name} died {self._deaths[actor.name]} times in a row; rollouts.max_restarts is "
                    f"{self.config.rollouts.max_restarts}. Last: {error}",
                ) from error
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
        if self._evaluation_queue and actor is self.stages.rollouts[-1]:
            evaluation = self._evaluation_queue[0]
            return evaluation.policy_version, evaluation.policy, evaluation
        newest = self._newest_policy
        # Groups that are being generated go on with the new weights. An actor without groups need not hurry: its next
        # ticket names the version to load.
        if self.config.rollouts.in_flight_updates and running and loaded != newest:
            return newest, self._policies[newest], None
        return None

    def _ticket(self, actor: RolloutStage) -> _Job | None:
        """The job of generating the next group that may be started, or None if none may be started at present.

        The answer None would be the same for every other actor.
        """
        admission = self.schedule.admit(actor.name, self._newest_policy, self._now())
        if admission is None:
            return None
        # No group is late before all groups of its step have been admitted. This may have been the last of them, so the
        # overage loop must look again.
        if self.config.scheduling.overage != "wait":
            self._waits.notify()
        weights = self._policies[admission.policy_version]
        return admission.policy_version, weights, self._make_ticket(admission)

    async def _generate(self, actor: RolloutStage, ticket: Ticket) -> None:
        """Generates the group of a ticket, puts it into the queue, and begins to embed it."""
        group_id, about = ticket.group_id, f"group {ticket.group_id}"
        report, group, feedback = await self._calls.traced(actor.generate(ticket), step=ticket.due_step, about=about)
        self._deaths[actor.name] = 0
        self.metrics.generated(report.num_tokens)
        # The group may have been given up while it was generated. Nobody would then free what is put into the queue.
        if not self.schedule.expects(group_id, ticket.attempt):
            return
        # `put` comes before `arrived`: once the schedule knows of the group, the training loop may get its payloads.
        async with self._in_step(ticket.due_step, (group_id,)):
            await self._calls.ask(self.stages.queue.put(group_id, ("group", "feedback"), group, feedback), about=about)
        # While `put` was under way, the group may have been given up, for example by the end of the run (`kl_stop`).
        # Then `void` and `arrived` change nothing and return False.
        if report.num_responses < min(2, self.config.rollouts.group_size):
            self.schedule.void(group_id, "overage", ticket.attempt)
        if not self.schedule.arrived(group_id, ticket.attempt, report.oldest_version, report.num_bytes, self._now()):
            # If the schedule still holds the group, the queue has the payloads of another attempt, or will get them.
            # They have the same names and must stay.
            if not self.schedule.holds(group_id):
                await self._calls.ask(self.stages.queue.free((group_id,)), about=about)
        else:
            # No `await` since `arrived`: as soon as another task runs, `_score` may look for the embedding task.
            self.metrics.arrived(group_id, report)
            self._embedding[group_id] = self._spawn(self._embed(ticket, group))
        self._waits.notify()

    async def _embed(self, ticket: Ticket, group: Payload) -> None:
        """Computes the reward token embeddings of one group, and puts them into the queue.

        This depends on no version of policy or head. So it begins as soon as the group has arrived.
        """
        annotator = self.stages.annotators[ticket.group_id % len(self.stages.annotators)]
        step, about = ticket.due_step, f"group {ticket.group_id}"
        async with self._in_step(step, (ticket.group_id,)):
            report, embeddings = await self._calls.traced(annotator.embed(group), step=step, about=about)
            self.metrics.annotated(ticket.group_id, report.metrics.get("gold", float("nan")))
            await self._calls.ask(self.stages.queue.put(ticket.group_id, ("embeddings",), embeddings), about=about)

    async def _training_loop(self) -> None:
        """Consumes the groups of one step after the other. Waits until the driver wants a step, until each group of the
        step has arrived or was given up, and for a head version that is young enough. It is unblocked by the driver,
        the rollout loops and the head loop. Produces policy versions, and work for the head loop."""
        while not self.finished:
            learner = "policy learner"
            await self._waits.until(lambda: self._steps_wanted > 0, learner, "the driver to want a step")
            await self._waits.until(self._evaluations_in_reach, learner, "an evaluation that needs an old version")
            assembly = await self._waits.until(self.schedule.assemble, learner, "its next step")
            async with self._in_step(assembly.step, assembly.group_ids):
                metrics = await self._train(assembly)
            self.schedule.audit()
            self._steps_wanted -= 1
            self._results.append(metrics)
            self._waits.notify()

    def _evaluations_in_reach(self) -> bool:
        """Whether the policy may take a step without losing a version that an evaluation still waits for.

        A learner that sends weights to engines itself keeps only its newest versions. So it waits for an evaluation of
        an older version.
        """
        if not (self.config.weights.direct and self._evaluation_queue):
            return True
        age = self.schedule.policy_version - self._evaluation_queue[0].policy_version
        return age <= self.config.scheduling.max_policy_age

    @contextlib.asynccontextmanager
    async def _in_step(self, step: int, group_ids: tuple[int, ...]) -> AsyncIterator[None]:
        """Adds step and groups to an error that is raised in the block, unless the error names its step already."""
        where = f"step {step} (groups {list(group_ids)})"
        try:
            yield
        except StageLost as lost:
            if str(lost).startswith("step "):
                raise
            raise StageLost(lost.stage, f"{where}: {lost}") from lost
        # The message of a StepFailed names the step already.
        except StepFailed:
            raise
        except Exception as error:
            if not any(note.startswith("In step ") for note in getattr(error, "__notes__", ())):
                error.add_note(f"In {where}.")
            raise

    async def _train(self, assembly: Assembly) -> dict[str, float]:
        """Trains one step, and returns its metrics by name."""
        step, group_ids, stages = assembly.step, assembly.group_ids, self.stages
        # This comes before the first `await`: the head loop drops old versions while it goes on.
        head = self._heads[assembly.head_version]
        groups = await self._parts(group_ids, "group")
        # If one of the two fails, the other is cancelled, so that a pass which hangs cannot hide the error.
        async with _together() as passes:
            proximal = passes.create_task(self._calls.traced(stages.policy.proximal(step, groups), step=step))
            scoring = passes.create_task(self._score(assembly, head, proximal))
        scored, embeddings, rewards = scoring.result()
        await self._stalls_for_publication()
        trained, refreshed = await self._calls.traced(stages.policy.train(step, rewards), step=step)
        self.schedule.policy_trained(step, self._now())
        self._head_queue.append(
            _HeadWork(step=step, group_ids=group_ids, embeddings=embeddings, refreshed=refreshed, rewards=rewards)
        )
        measured = scored.metrics | trained.metrics
        metrics = self.metrics.of_step(assembly, self.schedule, measured, self._now())
        limit = self.config.objective.kl_stop
        # This comes before `evaluated`: it makes this step the last one, and the last step is evaluated.
        if limit is not None and metrics.get("kl/sequence", 0.0) > limit:
            metrics["kl/stopped"] = 1.0
            await self._end()
        every = self.config.evaluation.every
        evaluated = self._evaluation_tickets and (self.finished or (every and (step + 1) % every == 0))
        # The evaluation takes the newest head version of this moment. The head's update on this step is still to come.
        evaluated_by = (self.schedule.head_version, self._heads[self.schedule.head_version]) if evaluated else None
        self._publication = self._spawn(self._publish(step + 1, evaluated_by))
        if not self.config.publishes_beside_passes:
            await self._stalls_for_publication()
        self._waits.notify()
        return metrics

    async def _score(
        self, assembly: Assembly, head: Payload, proximal: asyncio.Task[tuple[StepReport, Payload]]
    ) -> tuple[StepReport, list[Payload], Payload]:
        """Scores the groups of a step, and returns (report, embeddings, rewards).

        It runs beside the proximal pass of the step. It waits for that pass only under `feedback.source: learner`,
        where the pass yields the feedback.
        """
        step, group_ids = assembly.step, assembly.group_ids
        await asyncio.gather(*(self._embedding[group_id] for group_id in group_ids))
        for group_id in group_ids:
            del self._embedding[group_id]
        embeddings = await self._parts(group_ids, "embeddings")
        feedback: Sequence[Payload | None] | Payload
        if not self.config.reads_feedback:
            feedback = [None] * len(group_ids)
        elif self.config.feedback.source == "learner":
            feedback = (await proximal)[1]
        else:
            feedback = await self._parts(group_ids, "feedback")
        scorer = self.stages.annotators[0]
        report, rewards = await self._calls.traced(scorer.score(step, head, embeddings, feedback), step=step)
        return report, embeddings, rewards

    async def _end(self) -> None:
        """Makes the present step the last one, and forgets the groups that were admitted for later steps."""
        ahead = self.schedule.end()
        for group_id in ahead:
            # Cancelling does not take back a `put` that was sent already. It reaches the queue before the `free` below,
            # so nothing stays behind.
            if embedding := self._embedding.pop(group_id, None):
                embedding.cancel()
        self.metrics.forget(ahead)
        if ahead:
            await self._calls.ask(self.stages.queue.free(ahead))

    async def _publish(self, version: int, head: tuple[int, Payload] | None = None) -> None:
        """Makes the policy learner's present version one that rollout actors can load.

        Args:
            version: the number of that version.
            head: a head version and its weights. If given, the policy version is evaluated with this head.
        """
        began = self._now()
        beside = self.config.publishes_beside_passes
        _, self._policies[version] = await self._calls.traced(self.stages.policy.weights(), step=version, beside=beside)
        self._publish_times["time/publish"] = self._now() - began
        self._policies = self._kept_policies()
        # `notify` wakes only the first actor in the line. An evaluation is for the last actor, and under in-flight
        # updates every actor that generates must load the version.
        if head:
            self._ask_evaluation(version, *head)
            self._waits.wake(self.stages.rollouts[-1].name)
        if self.config.rollouts.in_flight_updates:
            self._waits.notify_all()
        else:
            self._waits.notify()

    async def _stalls_for_publication(self) -> None:
        """Waits until the publication that is under way, if any, has ended.

        Call it before `train`, which changes the very weights that are being copied.
        """
        if self._publication:
            began = self._now()
            await self._publication
            self._publication, self._publish_times["time/publish_stall"] = None, self._now() - began

    async def _head_loop(self) -> None:
        """Consumes the refreshed feedback, embeddings and rewards of one step after the other. Waits for the next step
        that the policy has trained. It is unblocked by the training loop. Produces head versions, and frees the groups
        of the step in the queue."""
        while True:
            await self._waits.until(lambda: self._head_queue, "head learner", "refreshed feedback")
            work = self._head_queue.popleft()
            async with self._in_step(work.step, work.group_ids):
                report, weights = await self._calls.traced(
                    self.stages.head.update(work.step, work.embeddings, work.refreshed, work.rewards), step=work.step
                )
            self.metrics.standing["head"] = {"head/step": float(work.step + 1), **report.metrics}
            # The weights are there before the schedule knows of the version: from then on a step may be scored with it.
            self._heads[work.step + 1] = weights
            freed = self.schedule.head_trained(work.step)
            oldest = self.schedule.oldest_head_version_needed
            self._heads = {version: payload for version, payload in self._heads.items() if version >= oldest}
            await self._calls.ask(self.stages.queue.free(freed))
            self._waits.notify()

    async def _overage_loop(self) -> None:
        """Consumes the deadlines of groups under `overage: mask` and `drop`. Waits for the next deadline, or for a
        change if there is none. It is unblocked by the clock, or by any change in the ring. Produces aborts of late
        groups, and under `drop` it also gives these groups up."""
        by_name = {actor.name: actor for actor in self.stages.rollouts}
        # A group stays late until it has arrived. This set keeps it from being aborted a second time.
        aborted: set[tuple[int, int, str]] = set()
        if self.schedule.plan.overage == "wait":
            return
        # Every abort is a task of its own, so that an actor which does not answer cannot delay the other aborts.
        async with _together() as aborts:
            while True:
                deadline = self.schedule.next_deadline(after=aborted)
                if deadline is None:
                    await self._waits.change("overage", "a group that others wait for")
                    continue
                if (wait := deadline - self._now()) > 0:
                    # Whatever happens during this sleep can only bring later deadlines, never an earlier one.
                    await asyncio.sleep(wait)
                    continue
                # A timer may go off too early, by up to the resolution of its clock. The group must count as late then.
                now = max(deadline, self._now())
                late = [group for group in self.schedule.late(now) if group not in aborted]
                aborted = {group for group in aborted if self.schedule.holds(group[0])} | set(late)
                if self.schedule.plan.overage == "drop":
                    for group_id, _, _ in late:
                        self.schedule.void(group_id, "overage")
                    self._waits.notify()
                for group_id, attempt, worker in late:
                    aborts.create_task(self._abort(by_name[worker], group_id, attempt))

    async def _abort(self, actor: RolloutStage, group_id: int, attempt: int) -> None:
        """Ends an attempt at a group early. An actor that is lost needs no abort, and its own loop notices the loss."""
        with contextlib.suppress(StageLost):
            await self._calls.ask(actor.abort(group_id, attempt), about=f"group {group_id}")

    async def _watchdog(self) -> None:
        """Ends the run, by raising StalledRun, if nothing has moved for `scheduling.stall_after` seconds.

        Nothing moves if the driver waits and no call of a stage ends.
        """
        await self._waits.nothing_for(self.config.scheduling.stall_after, _DRIVER)
        raise StalledRun(
            f"nothing finished for {self.config.scheduling.stall_after} s (scheduling.stall_after).\n{self.waits()}"
        )

    # Evaluation

    def _ask_evaluation(self, policy_version: int, head_version: int, head: Payload) -> None:
        """Queues an evaluation of a published policy version, by a head version with the weights `head`."""
        self._evaluation_queue.append(
            _Evaluation(
                policy_version=policy_version,
                head_version=head_version,
                policy=self._policies[policy_version],
                head=head,
            )
        )

    async def _evaluate(self, actor: RolloutStage, evaluation: _Evaluation) -> None:
        """Generates and judges all held-out prompts, and adds the metrics to `evaluations`.

        The actor must have loaded the policy version, and must not be generating anything else. It generates up to
        `rollouts.concurrent_groups` prompts at once.
        """
        annotator, results = self.stages.annotators[0], []

        async def result(ticket: Ticket) -> tuple[Payload, Payload, Payload]:
            about = f"evaluation prompt {-1 - ticket.group_id}"
            _, group, feedback = await self._calls.traced(actor.generate(ticket), step=-1, about=about)
            return group, feedback, (await self._calls.traced(annotator.embed(group), step=-1, about=about))[1]

        at_once = self.config.rollouts.concurrent_groups
        for first in range(0, len(self._evaluation_tickets), at_once):
            async with _together() as batch:
                tickets = self._evaluation_tickets[first : first + at_once]
                tasks = [batch.create_task(result(ticket)) for ticket in tickets]
            results += [task.result() for task in tasks]
        groups, feedback, embeddings = (list(column) for column in zip(*results, strict=True))
        step = evaluation.policy_version
        report = await self._calls.traced(
            annotator.evaluate(step, evaluation.head, groups, embeddings, feedback), step=-1
        )
        ages = {"step": float(step), "head_version": float(evaluation.head_version)}
        self.evaluations.append(ages | report.metrics)
        # Only now does it leave the queue: if the actor is lost on the way, its next process does it again.
        self._evaluation_queue.popleft()
        self._waits.notify()

    # Waiting and telling

    def _spawn(self, loop: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task whose failure ends the run: the driver raises the first error of all such tasks."""

        def ended(task: asyncio.Task[T]) -> None:
            if not task.cancelled() and (error := task.exception()):
                self._first_error = self._first_error or error
                self._waits.notify()

        task = asyncio.create_task(loop)
        task.add_done_callback(ended)
        return task

    def _told_of(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task that the driver itself waits for. Its end wakes the driver, whether it succeeded or not."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._waits.notify())
        return task

    def _now(self) -> float:
        """The time of the event loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    async def _parts(self, group_ids: tuple[int, ...], part: str) -> list[Payload]:
        """Gets one part of each group from the queue, for example `embeddings`, in the order of `group_ids`."""
        queue = self.stages.queue
        asked = (self._calls.ask(queue.get(group_id, part), about=f"group {group_id}") for group_id in group_ids)
        return [payload for _, payload in await asyncio.gather(*asked)]

    @property
    def _newest_policy(self) -> int:
        """The newest policy version that rollout actors can load.

        The policy learner may be one step ahead of it, until it has published its present version.
        """
        return max(self._policies)

    def _kept_policies(self) -> dict[int, Payload]:
        """The policy versions with which some group may still be generated, as weights by version.

        A run that resumes from a checkpoint of the present step counts, too.
        """
        plan, schedule = self.schedule.plan, self.schedule
        oldest = schedule.oldest_policy_version_needed
        # A checkpoint holds no groups. A resumed run generates those of the present step anew, with the same version.
        if plan.lag == "exact":
            oldest = min(oldest, plan.policy_version_for(schedule.policy_version))
        oldest = min(oldest, self._newest_policy)
        return {version: payload for version, payload in self._policies.items() if version >= oldest}

    def _all_tasks(self) -> list[asyncio.Task[Any]]:
        """All tasks that `stop` must cancel. Cancelling a loop also cancels the tasks within it."""
        publication = [self._publication] if self._publication else []
        return [*self._tasks, *self._embedding.values(), *publication]

    def _raise_failure(self) -> None:
        """Raises the error of the first task that failed, if one has failed."""
        if self._first_error:
            raise self._first_error

    def waits(self) -> str:
        """Says who waits for what and since when, one wait per line, and which groups are in flight.

        This is the text of a StalledRun.
        """
        schedule, lines = self.schedule, self._waits.lines()
        lines.append(f"policy version {schedule.policy_version}, head version {schedule.head_version}")
        in_flight = ", ".join(f"{group_id} ({worker})" for group_id, worker in sorted(schedule.in_flight().items()))
        return "\n".join([*lines, f"groups in flight: {in_flight or 'none'}"])


@contextlib.asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself, and not an ExceptionGroup.

    The first error ends the block. Other errors are dropped: they come from what this end did to the other tasks.
    """
    first: Exception | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as failed:
        first = _leaves(failed)[0]
    # Raised inside `except`, the error would get the ExceptionGroup as its context, in the place of its own.
    if first:
        raise first


def _leaves(group: ExceptionGroup) -> list[Exception]:
    """All errors in an ExceptionGroup and in the groups that it contains, in the order in which they arose."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, ExceptionGroup) else [error])
    ]
