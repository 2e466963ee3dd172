"""Holds `Ring`, a running ring: it makes the stages, runs the controller on a loop of its own, and ends all in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch

from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.data.prompts import prompts_digest
from r2m_async.errors import ConfigError, StalledRun
from r2m_async.launch.loop_thread import LoopThread
from r2m_async.launch.makers import check_packages, stages_in_process, stages_on_ray
from r2m_async.launch.ray_connection import RayConnection
from r2m_async.launch.ray_stages import RayProcesses
from r2m_async.launch.workload import TicketOffice, Workload, plan_of, resolve
from r2m_async.models.weight_files import weights_digest
from r2m_async.ring.controller import Controller
from r2m_async.ring.progress import Progress
from r2m_async.ring.stages import Call, LocalCarrier
from r2m_async.ring.status import RingStatus
from r2m_async.ring.tasks import STOP_TIMEOUT
from r2m_async.runs.checkpoints import kept_versions, read_checkpoint, saved_counts, write_parts
from r2m_async.trajectories import Weights
from r2m_async.whole import whole_at, whole_directory

T = TypeVar("T")


class Ring:
    """A running ring. Call `step` until `finished`, and `stop` at the end. Between steps, `save` writes checkpoints.

    It is also a context manager, which calls `stop`. Its methods are called from one thread. They wait, and may raise:

    - StalledRun if nothing moves for `scheduling.stall_after` seconds,
    - StageLost if a stage is lost that cannot be replaced,
    - whatever else a stage raises.
    """

    def __init__(
        self,
        config: R2MConfig,
        workload: Workload,
        in_process: bool = False,
        resume: str | Path | None = None,
        journals: str | Path | None = None,
        ray: RayConnection | None = None,
        take_up: str | Path | None = None,
        on_status: Callable[[RingStatus], None] | None = None,
    ):
        """Starts the stages and the controller, and waits until the ring can take a step.

        Args:
            config: the config of the run.
            workload: the resolved workload of this config (`workload.resolve`).
            in_process: True runs all stages in this process, one call after the other. False runs them on Ray. Without a GPU
                torch then computes with one CPU thread until the ring has ended, as each process on Ray does.
            resume: a directory that `save` wrote. The run goes on at the step of that checkpoint.
            journals: a folder in which finished groups are kept from one checkpoint to the next (`queue.journal`). None: no
                group is kept.
            ray: a connection to Ray that outlives the ring. None: the ring makes one, and ends it.
            take_up: the folder with the groups that a resumed run need not generate again. None: that of `journals`.
            on_status: is called every second with what the ring does, also while the ring starts. It is called in a
                thread of the ring, which must not be kept waiting.

        Raises ConfigError for a checkpoint that is not whole, for a key that a resumed run may not change
        (docs/checkpoints.md), and for a config that cannot run on Ray or in one process.
        """
        check_packages()
        self.config = config
        self.workload = workload
        self._threads = contextlib.ExitStack()
        if in_process and not torch.cuda.is_available():
            self._threads.enter_context(one_thread())
        self._loop_thread = LoopThread("r2m-controller")  # after that, because it takes the number that is set now
        self._stopped = False
        self._on_status = on_status
        self._journals = None if journals is None or not config.queue.journal else str(Path(journals).absolute())
        self._take_up = self._journals and (self._journals if take_up is None else str(take_up))
        self.records: dict[str, int] = {}
        """What `save` was told under the name `records` when the checkpoint was written from which this ring goes on."""
        self._close: Callable[[], None] = lambda: None
        # If the start fails, the processes that were started already must end, too.
        try:
            self._start(in_process, None if resume is None else whole_at(resume), ray)
        except BaseException:
            self.stop()
            raise

    @classmethod
    def of(cls, config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None, **how: Any) -> Ring:
        """Resolves the workload of a config, and starts a ring with it.

        Args:
            config: the config of the run.
            on_progress: is told of work that takes a while, as in `workload.resolve`.
            how: the further arguments of `Ring`: `in_process`, `resume`, `journals`, `ray`, `take_up` and `on_status`.

        Raises ConfigError or DataError, as `workload.resolve` and `Ring` do.
        """
        return cls(config, resolve(config, on_progress), **how)

    def _start(self, in_process: bool, resume: Path | None, ray: RayConnection | None) -> None:
        """Does what the constructor does, once there is a loop to run on."""
        config, plan = self.config, plan_of(self.config, self.workload)
        # A bad checkpoint must be refused before any process is started.
        saved = read_checkpoint(resume, self.config) if resume else {}
        progress = self._saved_progress(resume) if resume else None
        if in_process:
            if config.weights.direct:
                raise ConfigError(
                    f"weights.transport is {config.weights.transport!r} and all stages run in one process: this transport "
                    f"sends weights from one process to another; use 'object_store', or run the stages on Ray"
                )
            if config.learner.backend == "deepspeed":
                raise ConfigError(
                    "learner.backend is 'deepspeed' and all stages run in one process: DeepSpeed needs a process for each "
                    "rank; use backend 'torch', or run the stages on Ray"
                )
            stages = stages_in_process(config, self.workload.without_prompts())
            if stages.labels:
                self._close = cast(LocalCarrier, stages.labels.carrier).stage.close
        else:
            processes = RayProcesses(config, ray)
            # At once, so that `stop` ends Ray even if one of the next lines raises.
            self._close = processes.close
            stages = stages_on_ray(processes, self.workload.without_prompts())
            config = processes.config
        tickets = TicketOffice(self.config, self.workload)

        # A coroutine, because a controller must be made on the loop whose clock it reads.
        async def controller() -> Controller:
            return Controller(config, plan, stages, tickets.ticket, tickets.evaluation, progress)

        async def start() -> None:
            if resume:
                policy, head = (stages.from_bytes(saved[f"{name}_learner"]) for name in ("policy", "head"))
                # With a direct transport the learner keeps the versions itself. It publishes its present one anew.
                policies = {} if config.weights.direct else kept_versions(saved, "policy_weights_", stages)
                heads = kept_versions(saved, "head_weights_", stages)
                learners = (policy, str(resume.absolute()), head)
                labels = stages.from_bytes(saved["labeller"]) if stages.labels else None
                await self.controller.start(policies, heads, learners, self._take_up, labels)
                if self._journals:
                    await self.controller.journal.begin(self._journals)
            else:
                await self.controller.start()

        # Before the loops run, no watchdog looks. So the start has a deadline of its own.
        async def start_in_time() -> None:
            within = asyncio.timeout(config.scheduling.stall_after)
            try:
                async with within:
                    await start()
            except TimeoutError:
                if not within.expired():
                    raise
                raise StalledRun(
                    f"the learners and the annotator did not start within {config.scheduling.stall_after} s "
                    f"(scheduling.stall_after): does the cluster have the GPUs and the memory they ask for?\n"
                    f"{self.controller.waits()}"
                ) from None

        self.controller = self._run(controller())
        if self._on_status is not None:
            self._run(self.controller.tell(self._on_status))
        self._run(start_in_time())

    def _saved_progress(self, resume: Path) -> Progress:
        """Returns how far the run had come when a checkpoint was saved, and fills `records`.

        Raises ConfigError if the prompts or the frozen models are not those of the run that saved it, or if a version without
        counts did.
        """
        told = saved_counts(resume)
        now = self._prompts
        if told["prompts"] != now:
            change = f"there were {told['prompts']['number']} of them then and there are {now['number']} now"
            if told["prompts"]["number"] == now["number"]:
                change = f"as many as then, {now['number']}, but others or in another order"
            raise ConfigError(
                f"{resume} was saved with other prompts than those of data.prompts {self.config.data.prompts!r}: {change}; "
                f"the rest of the epoch would repeat some and leave out others. Bring the former file back, or start a new "
                f"run with model.policy set to an export of this one (`r2m export`)"
            )
        for key, digest in told.get("models", {}).items():
            if key in self._models and self._models[key] != digest:
                raise ConfigError(
                    f"{resume} was saved with other weights of {key} {self._names[key]!r}: the files have been changed since, "
                    f"and no checkpoint holds them; bring the former files back, or start a new run"
                )
        self.records = told["records"]
        return Progress(**told["progress"])

    @property
    def finished(self) -> bool:
        """Whether the policy has taken its last step."""
        return self.controller.finished

    def step(self) -> dict[str, float]:
        """Waits for the next policy step, and returns its metrics by name.

        Raises the error of the first loop that failed, and RuntimeError if the run has ended.
        """
        return self._run(self.controller.step())

    def drain(self) -> list[dict[str, float]]:
        """Waits for head updates and evaluations that are under way. Returns the metrics of all evaluations so far."""
        self._run(self.controller.drain())
        return self.controller.evaluations

    def policy_weights(self) -> Weights:
        """Returns the weights of the policy as the learner has it now.

        They have the base model's names. Adapters are merged into them.
        """
        return cast(Weights, self._fetched(self.controller.stages.policy.weights(True)))

    def head_weights(self) -> Weights:
        """Returns the weights of the head that scores. Under `head.hold: average` these are the averaged weights."""
        return cast(Weights, self._fetched(self.controller.stages.head.state())["scoring"])

    def learner_state(self, learner: Literal["policy", "head"]) -> dict[str, Any]:
        """What a checkpoint would hold of a learner now. A policy learner on DeepSpeed can only write it (`save`)."""
        return cast(dict[str, Any], self._fetched(getattr(self.controller.stages, learner).state()))

    def process_ids(self) -> dict[str, list[int]]:
        """Returns the process numbers of each stage by the stage's name, for a debugger or a profiler."""
        stages = self.controller.stages

        async def pids() -> dict[str, list[int]]:
            each = (*stages.rollouts, stages.queue, *stages.annotators, stages.policy, stages.head)
            each = each if stages.labels is None else (*each, stages.labels)
            return {stage.name: await stage.carrier.pids() for stage in each}

        return self._run(pids())

    def _fetched(self, call: Call[Any]) -> Any:
        """Makes a call of a stage, and returns its payload as an object of this process."""
        return decode(self._run(self.controller.fetched(call)))

    def save(self, directory: str | Path, records: Mapping[str, int] | None = None) -> None:
        """Waits for what is under way, and writes a checkpoint. It is written whole or not at all.

        An old checkpoint in the same place stays until the new one replaces it in one step.

        Args:
            directory: the directory to make or to replace. With `learner.backend: deepspeed` every rank writes into it,
                so all machines of the run must share it.
            records: numbers to keep in the checkpoint, by name. A ring that resumes from it has them as `records`. A
                run keeps the lengths of its files there (`runs.directory`).

        Raises DiskError if the disk refuses to write.
        """
        with whole_directory(directory, replace=True) as building:
            parts, entries = self._run(self.controller.checkpoint(str(building)))
            progress = self._run(self._progress())
            told: dict[str, Any] = {"progress": asdict(progress), "prompts": self._prompts, "models": self._models}
            told |= {"records": dict(records or {}), "journals": self._journals}
            parts |= {"step": encode(progress.step), "progress": encode(told)}
            write_parts(building, parts, self.config, entries)
        if self._journals and not self.finished:
            self._run(self.controller.journal.begin(self._journals))

    @property
    def _names(self) -> dict[str, str]:
        """The models whose weights a run reads and no checkpoint holds, by the key of the config."""
        names = {"reward.model": self.workload.reward_model, "model.reference": self.workload.reference}
        if self.config.model.lora is not None:  # a checkpoint has the adapters alone
            names["model.policy"] = self.workload.policy
        return {key: name for key, name in names.items() if name is not None}

    @cached_property
    def _models(self) -> dict[str, str]:
        """Digests of these weights, by which a resumed run recognises them. Models that are not here have none."""
        digests = {key: weights_digest(key, name) for key, name in self._names.items()}
        return {key: digest for key, digest in digests.items() if digest is not None}

    @cached_property
    def _prompts(self) -> dict[str, Any]:
        """What a checkpoint says of the prompts, by which a resumed run recognises them."""
        return {"number": len(self.workload.prompts), "digest": prompts_digest(self.workload.prompts)}

    async def _progress(self) -> Progress:
        # It reads the clock of the controller's loop.
        return self.controller.progress()

    def stop(self) -> None:
        """Ends the ring and its processes. It returns in time, whatever hangs. A second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        try:
            # There is no controller yet if the start failed early.
            if hasattr(self, "controller"):
                # That the thread stands still was reported before, or matters no more. The processes must end anyway.
                with contextlib.suppress(StalledRun):
                    self._loop_thread.run(self.controller.stop(), 2 * STOP_TIMEOUT)
                del self.controller
        finally:
            self._loop_thread.stop()
            self._threads.close()
            self._close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the controller's loop, and returns or raises what it does."""
        return self._loop_thread.run(coroutine, self.config.scheduling.stall_after)
