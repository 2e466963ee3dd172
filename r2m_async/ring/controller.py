"""The controller: the one place where the whole ring can be seen.

    tickets -> rollout loops -> replay queue -> embed (RTE, as groups arrive)
                   ^                               |
      policy weights                        training loop: proximal pass | score -> train
                   |                               |                         ^
                   +-------------------------------+-> head loop: update ----+ head weights
                                                              ^
                       pairs of a scored step -> labeller ----+ labels (labels.py), if there is a `labels.source`

Data moves to the right. A *ticket* becomes a *group*, which is all responses to one prompt. Groups get rewards, and the
rewards train the policy. Versions move to the left: new weights of the policy go back to the rollouts, and new weights
of the reward head go back to the scoring. An *RTE* is a reward token embedding, which the frozen backbone of the reward
model computes from a response.

Every loop is a coroutine. It calls stages (`stages.Stage`) and reports to the `Schedule` what happened. It passes
payloads on without reading them. The training loop and the head loop are in this file. The left part of the picture, up
to `embed`, is in rollouts.py: a loop for each rollout actor. A loop of its own ends groups that are late (overage.py).
Between its groups the last rollout actor answers held-out prompts (evaluations.py).

The same controller runs over Ray (launch/ray_stages.py), in one process (`r2m train --in-process`) and
on a virtual clock (simulator.py).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from r2m_async.config import R2MConfig
from r2m_async.errors import StalledRun
from r2m_async.ring.evaluations import Evaluations
from r2m_async.ring.journal import Journal
from r2m_async.ring.labels import Labels
from r2m_async.ring.overage import overage_loop
from r2m_async.ring.progress import Progress
from r2m_async.ring.rollouts import Rollouts
from r2m_async.ring.stages import Call, Payload, Stages
from r2m_async.ring.state import RingState, now
from r2m_async.ring.status import RingStatus, status_of
from r2m_async.ring.step_metrics import Interval
from r2m_async.ring.tasks import DRIVER, in_step, together
from r2m_async.schedule import Admission, Assembly, Plan
from r2m_async.trajectories import StepReport, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """The labels of a head update. All are None without a `labels.source`."""

    labels: Payload | None = None
    reread: Payload | None = None
    """What the policy makes of pairs among them, if it reads any."""
    embedded: Payload | None = None
    """The reward token embeddings of pairs of a data set, if the policy reads any."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The counts and ages of all labels so far."""


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
    asked: asyncio.Task[None] | None
    """The task that lets pairs of these groups be asked about. None without a `labels.source`."""
    due: _Due | None = None
    """The labels of this update, if the policy has read them once more. None: they are still to be got."""


STATUS_EVERY = 1.0
"""Seconds from one status to the next, for whoever listens (`Controller.tell`)."""
STACKS_TIMEOUT = 20.0
"""Seconds in which the stacks of stages that do not answer must be read. A frozen cluster does not read them at all."""


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
        progress: Progress | None = None,
    ) -> None:
        """Begins with all clocks at the step of `progress`. Nothing runs before `start`.

        Args:
            config: the config of the run.
            plan: the settings of the schedule.
            stages: the stages of the ring. Whoever made them also ends them.
            make_ticket: turns an admission into a ticket, with the prompt and the seed of its group.
            evaluation_tickets: the tickets of the held-out prompts. The last rollout actor generates them whenever
                `config.evaluation` asks for an evaluation. Without tickets there are no evaluations.
            progress: how far a resumed run has come. None: it is a new run.

        Raises ValueError if the counts of `progress` do not add up.
        """
        progress = progress or Progress()
        self._state = RingState.of(config, plan, stages, progress)
        self.config, self.stages = config, stages
        self.schedule, self.metrics = self._state.schedule, self._state.metrics
        self._waits, self._calls, self._tasks = self._state.waits, self._state.calls, self._state.tasks
        self._queue, self._versions = self._state.queue, self._state.versions
        self._evaluations = Evaluations(self._state, evaluation_tickets, progress.evaluation)
        self.journal = Journal(self._state, make_ticket)
        self._rollouts = Rollouts(self._state, self._evaluations, self.journal, make_ticket)
        self.labels = Labels(self._state, progress.labels) if stages.labels else None
        """The labels of the run. None without a `labels.source`."""
        self._head_queue: deque[_HeadWork] = deque()
        self._publication: asyncio.Task[Any] | None = None
        """The task that publishes the newest policy version, until the training loop has waited for it."""
        # One dict under two names: what `_publish` writes into it becomes a metric of the next step.
        self._publish_times = self.metrics.standing["publication"] = {"time/publish": 0.0, "time/publish_stall": 0.0}
        self._stopped_at_kl = progress.stopped_at_kl
        if progress.is_stopped_by(config.objective.kl_stop):
            self.schedule.end()
        self._results: deque[dict[str, float]] = deque()
        """The metrics of finished steps that `step` has not returned yet."""
        self._steps_wanted = 0
        """The number of steps that `step` has asked for and that are not finished."""

    # Life

    async def start(
        self,
        policies: dict[int, Payload] | None = None,
        heads: dict[int, Payload] | None = None,
        learners: tuple[Payload, str, Payload] | None = None,
        journals: str | None = None,
        labels: Payload | None = None,
    ) -> None:
        """Gets the first versions of policy and head, and starts the loops.

        Args:
            policies: the policy versions that a checkpoint kept, as weights by version. None or empty: the policy
                learner publishes its present weights.
            heads: the head versions that a checkpoint kept, as weights by version. None: the head begins as the reward
                annotator made it, at version 0.
            learners: what the policy learner restores, the directory of the checkpoint, and what the head learner
                restores. None: nothing is restored.
            journals: the folder of the journals whose groups are taken up. None: there is none.
            labels: what the label stage restores. None: nothing, or there is no such stage.

        Raises StageLost if the cluster on which the stages run is gone. Raises what a stage raises.
        """
        self._tasks.spawn(self.stages.watch())
        await self._tasks.finish(self._first_versions(policies, heads, learners), "the stages to start")
        if self.stages.labels and labels is not None:
            await self._tasks.finish(self._calls.ask(self.stages.labels.restore(labels)), "the labels")
        if journals is not None:
            await self._tasks.finish(self._rollouts.take_up(journals), "the journal")
        # Not before: while a journal is taken up, the queue holds groups that nobody could give it again.
        self._calls.restartable(self.stages.queue, "queue", self._rollouts.restore_queue)
        loops = [self._training_loop(), self._head_loop(), overage_loop(self._state), self._watchdog()]
        loops += [self._rollouts.loop(actor) for actor in self.stages.rollouts]
        for loop in loops:
            self._tasks.spawn(loop)

    async def _first_versions(
        self,
        policies: dict[int, Payload] | None,
        heads: dict[int, Payload] | None,
        learners: tuple[Payload, str, Payload] | None,
    ) -> None:
        """Fills `_versions`. Arguments are those of `start`."""
        if learners is not None:
            policy, directory, head = learners
            await self._calls.ask(self.stages.policy.restore(policy, directory))
            await self._calls.ask(self.stages.head.restore(head))
        self._versions.policies = policies or {}
        if not policies:
            await self._publish(self.schedule.policy_version)
        if heads is None:
            heads = {0: (await self._calls.ask(self.stages.annotators[0].initial_head()))[1]}
            await self._calls.ask(self.stages.head.start(heads[0]))
        self._versions.heads = heads
        head_version = self.schedule.head_version
        # The run that saved the checkpoint has evaluated its version, if that was due.
        if learners is None:
            self._evaluations.ask(self._versions.newest_policy, head_version, heads[head_version])

    async def step(self) -> dict[str, float]:
        """Lets the policy take one step, and returns the metrics of the step by name.

        If a loop has failed, steps that were finished before are returned first. Then it raises the error of the first
        loop that failed. Raises RuntimeError if the run has ended.
        """
        if self.finished:
            raise RuntimeError(f"the run has ended at step {self.schedule.policy_version}; there is no further step")
        self._steps_wanted += 1
        self._waits.notify()
        await self._tasks.until(lambda: self._results, "a step's result")
        if not self._results:
            self._tasks.raise_failure()
        return self._results.popleft()

    async def drain(self) -> None:
        """Waits until nothing is under way any more, and then checks the books of the schedule.

        The head has then made its update on every step of the policy. The newest policy version is published, and every
        evaluation that was asked for is in `evaluations`.

        Raises the error of the first loop that failed, and RuntimeError if the books do not balance.
        """

        def caught_up() -> bool:
            version = self.schedule.policy_version
            published = self._versions.newest_policy
            return self.schedule.head_version == version == published and self._evaluations.all_finished

        await self._tasks.until(caught_up, "head updates, weights and evaluations")
        self._tasks.raise_failure()
        self.schedule.audit()

    async def stop(self) -> None:
        """Cancels all loops and tasks. It does not end the stages: whoever made them does that.

        Returns within `tasks.STOP_TIMEOUT` seconds, even if a task does not end.
        """
        await self._tasks.stop()

    @property
    def finished(self) -> bool:
        """Whether the policy has taken its last step. The head may still be behind it: `drain` waits for that."""
        return self.schedule.policy_version >= self.schedule.num_steps

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The metrics of each finished evaluation, in the order in which they finished."""
        return self._evaluations.results

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The responses to read of each finished evaluation, see `Evaluations.samples`."""
        return self._evaluations.samples

    def progress(self) -> Progress:
        """How far the run has come. Call it when `drain` has returned, and before the next `step`."""
        newest = self.evaluations[-1] if self.evaluations else None
        labels = self.labels.book.saved() if self.labels else {}
        return self.metrics.progress(
            self.schedule, now(), stopped_at_kl=self._stopped_at_kl, evaluation=newest, labels=labels
        )

    def take_trace(self) -> list[Interval]:
        """Returns the intervals of the trace since the last call. The one that ended first comes first."""
        taken, self.metrics.trace = self.metrics.trace, []
        return taken

    def take_labels(self) -> list[dict[str, Any]]:
        """Returns the records of the labels that have come since the last call."""
        if self.labels is None:
            return []
        taken, self.labels.records = self.labels.records, []
        return taken

    def status(self) -> RingStatus:
        """What the ring does at this moment."""
        status, evaluation = status_of(self._state), self._evaluations.under_way()
        if evaluation is None:
            return status
        version, answered, num_prompts = evaluation
        return replace(status, evaluating=version, answered=answered, to_answer=num_prompts)

    async def tell(self, listener: Callable[[RingStatus], None]) -> None:
        """Calls `listener` every second with the status of the ring, until `stop`. It is called on the event loop."""

        async def tell() -> None:
            while True:
                listener(self.status())
                await asyncio.sleep(STATUS_EVERY)

        self._tasks.spawn(tell())

    def waits(self) -> str:
        """Says who waits for what and since when, one wait per line, and which groups are in flight.

        This is the text of a StalledRun.
        """
        schedule, lines = self.schedule, self._waits.lines()
        lines.append(f"policy version {schedule.policy_version}, head version {schedule.head_version}")
        in_flight = ", ".join(f"{group_id} ({worker})" for group_id, worker in sorted(schedule.in_flight().items()))
        return "\n".join([*lines, f"groups in flight: {in_flight or 'none'}"])

    async def fetched(self, call: Call[tuple[StepReport, Payload]]) -> memoryview:
        """Makes a call of a stage, and returns its payload as bytes, which `codec.decode` reads."""
        _, payload = await self._calls.ask(call)
        return await self._bytes_of(call.method.name, payload)

    async def checkpoint(self, directory: str) -> tuple[dict[str, memoryview], dict[str, dict[str, Any]]]:
        """Writes everything from which a run can resume into a directory. It calls `drain` first.

        These are the states of both learners, and the weights of all versions that are still needed. The queue writes
        them, one after the other, so they do not pass through this process.

        Args:
            directory: the directory, in which a policy learner of several ranks also writes its own files. `start` must
                later get the directory in which all these files then are.

        Returns (parts, entries). Entries are those of the manifest, of the files that are written. Parts are bytes by
        name that the caller must write: those of a queue on a machine that does not have the directory.

        Raises OSError if the disk refuses to write.

        Raises the error of the first loop that fails in the meantime. So a learner that hangs here ends the run after
        `scheduling.stall_after` seconds, as it would in a step.
        """
        await self.drain()
        return await self._tasks.finish(self._checkpoint(directory), "a checkpoint")

    async def _checkpoint(self, directory: str) -> tuple[dict[str, memoryview], dict[str, dict[str, Any]]]:
        """Does what `checkpoint` does, once the ring is drained."""
        async with together() as both:
            policy = both.create_task(self._calls.ask(self.stages.policy.state(directory)))
            head = both.create_task(self._calls.ask(self.stages.head.state()))
        payloads = {"policy_learner": policy.result()[1], "head_learner": head.result()[1]}
        if self.stages.labels:
            payloads["labeller"] = (await self._calls.ask(self.stages.labels.state()))[1]
        kept = self._versions.needed_policies()
        # The learner sends weights to the engines itself, so these payloads hold no tensors. An export needs them.
        if self.config.weights.direct:
            kept = {self._versions.newest_policy: (await self._calls.ask(self.stages.policy.weights(True)))[1]}
        payloads |= {f"policy_weights_{version}": payload for version, payload in kept.items()}
        payloads |= {f"head_weights_{version}": payload for version, payload in self._versions.heads.items()}
        parts, entries = {}, {}
        for name, payload in payloads.items():
            path = f"{directory}/{name}.msgpack"
            entry = await self._calls.ask(self.stages.queue.write(path, payload), about=name)
            if entry is None:
                parts[name] = await self._bytes_of(name, payload)
            elif "errno" in entry:
                raise OSError(entry["errno"], os.strerror(entry["errno"]), path)
            else:
                entries[f"{name}.msgpack"] = entry
        return parts, entries

    async def _bytes_of(self, name: str, payload: Payload) -> memoryview:
        """The bytes of a payload. `name` names the payload in the list of waits."""
        return await self._waits.work(self.stages.to_bytes(payload), name, "its bytes")

    # Loops

    async def _training_loop(self) -> None:
        """Consumes the groups of one step after the other. Waits until the driver wants a step, until each group of the
        step has arrived or was given up, and for a head version that is young enough. With `labels.wait` it also waits
        for labels, if the policy reads their pairs once more. It is unblocked by the driver, the rollout loops, the head
        loop and whoever gives labels. Produces policy versions, and work for the head loop."""
        while not self.finished:
            learner = "policy learner"
            await self._waits.until(lambda: self._steps_wanted > 0, learner, "the driver to want a step")
            await self._waits.until(self._evaluations.in_reach, learner, "an evaluation that needs an old version")
            began = now()
            assembly = await self._waits.until(self._next_step, learner, "its next step")
            self.metrics.step_begins(assembly.step, began, now())
            async with in_step(assembly.step, assembly.group_ids):
                metrics = await self._train(assembly)
            self.schedule.audit()
            self._steps_wanted -= 1
            self._results.append(metrics)
            self._waits.notify()

    def _next_step(self) -> Assembly | None:
        """Leases the next step, or returns None if it cannot be trained yet.

        It waits for groups that may still be given up. Once the step is assembled, none can be.
        """
        return self.schedule.assemble() if self._rollouts.settled(self.schedule.policy_version) else None

    async def _train(self, assembly: Assembly) -> dict[str, float]:
        """Trains one step, and returns its metrics by name."""
        step, group_ids, stages = assembly.step, assembly.group_ids, self.stages
        # This comes before the first `await`: the head loop drops old versions while it goes on.
        head = self._versions.heads[assembly.head_version]
        groups = await self._queue.get(group_ids, "group")
        # If one of the two fails, the other is cancelled, so that a pass which hangs cannot hide the error.
        async with together() as passes:
            proximal = passes.create_task(self._calls.traced(stages.policy.proximal(step, groups), step=step))
            scoring = passes.create_task(self._score(assembly, head, proximal))
        scored, embeddings, rewards = scoring.result()
        asked = None
        if self.labels:  # beside the training of the policy: whoever answers takes time
            asked = self._tasks.spawn(self.labels.ask(step, groups, embeddings, rewards))
        await self._stalls_for_publication()
        trained, refreshed = await self._calls.traced(stages.policy.train(step, rewards), step=step)
        self.schedule.policy_trained(step, now())
        work = _HeadWork(
            step=step,
            group_ids=group_ids,
            embeddings=embeddings,
            refreshed=refreshed,
            rewards=rewards,
            asked=asked,
        )
        if not self.config.labels.rereads:
            self._head_queue.append(work)
        measured = scored.metrics | trained.metrics
        metrics = self.metrics.of_step(assembly, self.schedule, measured, now())
        metrics["rollouts/actors"] = float(len(self._state.present))
        limit = self.config.objective.kl_stop
        # This comes before `evaluated`: it makes this step the last one, and the last step is evaluated.
        if limit is not None and metrics.get("kl/sequence", 0.0) > limit:
            metrics["kl/stopped"], self._stopped_at_kl = 1.0, metrics["kl/sequence"]
            await self._end()
        evaluated = self._evaluations.due(step + 1, last=self.finished)
        # The head that scored the step: which one is the newest at this moment is a race, also under `lag: exact`.
        evaluated_by = (assembly.head_version, head) if evaluated else None
        self._publication = self._tasks.spawn(self._publish(step + 1, evaluated_by))
        if not self.config.publishes_beside_passes:
            await self._stalls_for_publication()
        if self.config.labels.rereads:
            # Here, because in its next step the policy moves on.
            self._head_queue.append(replace(work, due=await self._read(step, await self._due(work))))
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
        began = now()
        await self._rollouts.wait_for_embeddings(group_ids)
        self.metrics.waited["wait/annotators"] = now() - began
        embeddings = await self._queue.get(group_ids, "embeddings")
        feedback: Sequence[Payload | None] | Payload
        if not self.config.reads_feedback:
            feedback = [None] * len(group_ids)
        elif self.config.feedback.source == "learner":
            feedback = (await proximal)[1]
        else:
            feedback = await self._queue.get(group_ids, "feedback")
        scorer = self.stages.annotators[0]
        report, rewards = await self._calls.traced(scorer.score(step, head, embeddings, feedback), step=step)
        return report, embeddings, rewards

    async def _end(self) -> None:
        """Makes the present step the last one, and forgets the groups that were admitted for later steps."""
        ahead = self.schedule.end()
        # This does not take back a `put` that was sent already. It reaches the queue before the `free` below, so nothing
        # stays behind.
        self._rollouts.forget(ahead)
        self.metrics.forget(ahead)
        if ahead:
            await self._queue.free(ahead)

    async def _publish(self, version: int, head: tuple[int, Payload] | None = None) -> None:
        """Makes the policy learner's present version one that rollout actors can load.

        Args:
            version: the number of that version.
            head: a head version and its weights. If given, the policy version is evaluated with this head.
        """
        began = now()
        beside = self.config.publishes_beside_passes
        _, weights = await self._calls.traced(self.stages.policy.weights(), step=version, beside=beside)
        self._publish_times["time/publish"] = now() - began
        self._versions.add_policy(version, weights)
        if head:
            self._evaluations.ask(version, *head)
        # `notify` wakes only the first actor in the line. Under in-flight updates every actor that generates must load
        # the version.
        if self.config.rollouts.in_flight_updates:
            self._waits.notify_all()
        else:
            self._waits.notify()

    async def _stalls_for_publication(self) -> None:
        """Waits until the publication that is under way, if any, has ended.

        Call it before `train`, which changes the very weights that are being copied.
        """
        if self._publication:
            began = now()
            await self._publication
            self._publication, self._publish_times["time/publish_stall"] = None, now() - began

    async def _head_loop(self) -> None:
        """Consumes the refreshed feedback, embeddings and rewards of one step after the other. Waits for the next step
        that the policy has trained, and under `labels.wait` for its labels. It is unblocked by the training loop, and by
        whoever gives labels. Produces head versions, and frees the groups of the step in the queue."""
        while True:
            await self._waits.until(lambda: self._head_queue, "head learner", "refreshed feedback")
            work = self._head_queue.popleft()
            async with in_step(work.step, work.group_ids):
                due = work.due or await self._due(work)
                parts = work.embeddings, work.refreshed, work.rewards, due.labels, due.reread, due.embedded
                report, weights = await self._calls.traced(self.stages.head.update(work.step, *parts), step=work.step)
            self.metrics.standing["head"] = {"head/step": float(work.step + 1), **report.metrics, **due.metrics}
            # The weights are there before the schedule knows of the version: from then on a step may be scored with it.
            self._versions.heads[work.step + 1] = weights
            freed = self.schedule.head_trained(work.step)
            self._versions.drop_heads()
            await self._queue.free(freed)
            self._waits.notify()

    async def _due(self, work: _HeadWork) -> _Due:
        """Gets the labels of a head update. Under `labels.wait` it waits for them."""
        if self.labels is None or work.asked is None:
            return _Due()
        await self._waits.work(work.asked, "head learner", "its pairs to be asked about")
        labels, metrics = await self.labels.due(work.step, work.refreshed)
        return _Due(labels=labels, metrics=metrics)

    async def _read(self, step: int, due: _Due) -> _Due:
        """Lets the policy read pairs of a head update, and an annotator embed those of a data set."""
        labels, stages = cast(Payload, due.labels), self.stages
        async with together() as both:
            read = both.create_task(self._calls.traced(stages.policy.reread(step, labels), step=step))
            embed = both.create_task(self._calls.traced(stages.annotators[0].embed_pairs(step, labels), step=step))
        return replace(due, reread=read.result()[1], embedded=embed.result()[1])

    async def _watchdog(self) -> None:
        """Ends the run, by raising StalledRun, if nothing has moved for `scheduling.stall_after` seconds.

        Nothing moves if the driver waits and no call of a stage ends.
        """
        await self._waits.nothing_for(self.config.scheduling.stall_after, DRIVER)
        told = f"nothing finished for {self.config.scheduling.stall_after} s (scheduling.stall_after).\n{self.waits()}"
        names = sorted(+self._calls.open)
        if self.stages.stacks and names:
            try:
                async with asyncio.timeout(STACKS_TIMEOUT):
                    told += f"\n{await self.stages.stacks(names)}"
            except TimeoutError:
                told += f"\nthe stacks of {', '.join(names)} could not be read within {STACKS_TIMEOUT:g} s"
        raise StalledRun(told)
