"""A running ring: its stages are made, its controller runs on a loop of its own, and it is ended in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StalledRun
from r2m_async.launch.loop_thread import LoopThread
from r2m_async.launch.makers import check_packages, stages_in_process, stages_on_ray
from r2m_async.launch.ray_stages import RayProcesses
from r2m_async.launch.workload import TicketOffice, Workload, plan_of, resolve
from r2m_async.ring.controller import STOP_TIMEOUT, Controller
from r2m_async.ring.stages import Call
from r2m_async.runs.checkpoints import kept_versions, read_checkpoint, write_parts
from r2m_async.trajectories import Weights
from r2m_async.whole import whole_at, whole_directory

T = TypeVar("T")


class Ring:
    """A running ring: `step` until `finished`, `save` between steps, `stop` at the end. Also a context manager."""

    def __init__(
        self, config: R2MConfig, workload: Workload, in_process: bool = False, resume: str | Path | None = None
    ):
        """Starts the stages. `resume` is a directory that `save` wrote; the run goes on at its step.

        Raises ConfigError for a checkpoint that is not whole, and for keys that may not change (docs/checkpoints.md).
        """
        check_packages()
        self.config = config
        self.workload = workload
        self._loop_thread = LoopThread("r2m-controller")
        self._stopped = False
        self._close: Callable[[], None] = lambda: None
        try:
            self._start(in_process, None if resume is None else whole_at(resume))
        except BaseException:
            self.stop()
            raise

    @classmethod
    def of(cls, config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None, **how: Any) -> Ring:
        """Resolves the config's workload and starts its ring."""
        return cls(config, resolve(config, on_progress), **how)

    def _start(self, in_process: bool, resume: Path | None) -> None:
        config, plan = self.config, plan_of(self.config, self.workload)
        saved = read_checkpoint(resume, self.config) if resume else {}  # refused before any process starts
        if in_process:
            if config.weights.direct:
                raise ConfigError(
                    f"weights.transport is {config.weights.transport!r}, which needs processes: in one use object_store"
                )
            if config.learner.backend == "deepspeed":
                raise ConfigError("learner.backend is 'deepspeed', which needs processes: in one use torch")
            stages = stages_in_process(config, self.workload.without_prompts())
        elif config.rollouts.engine != "vllm" and config.rollouts.concurrent_groups > 1:
            raise ConfigError(
                f"rollouts.concurrent_groups is {config.rollouts.concurrent_groups} and rollouts.engine is "
                f"{config.rollouts.engine!r}: on Ray that engine takes one group at a time; use 1, engine 'vllm', or one "
                f"process (Ring's in_process, r2m study)"
            )
        else:
            processes = RayProcesses(config)
            self._close = processes.close
            stages = stages_on_ray(processes, self.workload.without_prompts())
            config = processes.config
        first_step = decode(saved["step"]) if saved else 0
        tickets = TicketOffice(self.config, self.workload)

        async def controller() -> Controller:
            return Controller(config, plan, stages, tickets.ticket, tickets.evaluation, first_step)

        async def start() -> None:
            if resume:
                policy, head = (stages.from_bytes(saved[f"{name}_learner"]) for name in ("policy", "head"))
                policies = {} if config.weights.direct else kept_versions(saved, "policy_weights_", stages)
                heads = kept_versions(saved, "head_weights_", stages)
                await self.controller.start(policies, heads, (policy, str(resume.absolute()), head))
            else:
                await self.controller.start()

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
        self._run(start_in_time())

    @property
    def finished(self) -> bool:
        return self.controller.finished

    def step(self) -> dict[str, float]:
        """One policy step; its metrics. Raises what the first failing loop raised."""
        return self._run(self.controller.step())

    def drain(self) -> list[dict[str, float]]:
        """Waits for head updates and evaluations under way; returns all evaluations so far."""
        self._run(self.controller.drain())
        return self.controller.evaluations

    def policy_weights(self) -> Weights:
        """The policy as the learner has it now, under the base model's names; adapters are merged."""
        return cast(Weights, self._fetched(self.controller.stages.policy.weights(True)))

    def head_weights(self) -> Weights:
        """The head that scores: what it has learnt, averaged where `head.hold` is `average`."""
        return cast(Weights, self._fetched(self.controller.stages.head.state())["scoring"])

    def learner_states(self) -> dict[str, Any]:
        """What a checkpoint would hold of each learner now, by `policy` and `head`; a DeepSpeed learner cannot give it."""
        stages = self.controller.stages
        return {"policy": self._fetched(stages.policy.state()), "head": self._fetched(stages.head.state())}

    def process_ids(self) -> dict[str, list[int]]:
        """The numbers of each stage's processes, by the stage's name: for a debugger or a profiler."""
        stages = self.controller.stages

        async def pids() -> dict[str, list[int]]:
            each = (*stages.rollouts, stages.queue, *stages.annotators, stages.policy, stages.head)
            return {stage.name: await stage.carrier.pids() for stage in each}

        return self._run(pids())

    def _fetched(self, call: Call[Any]) -> Any:
        return decode(self._run(self.controller.fetched(call)))

    def save(self, directory: str | Path) -> None:
        """Writes a checkpoint, whole or not at all; an old one there stays until the new one takes its place at once.

        Raises DiskError.

        A learner on DeepSpeed writes there from every rank: beyond one machine the directory must be shared.
        """
        with whole_directory(directory, replace=True) as building:
            parts = self._run(self.controller.checkpoint(str(building)))
            parts["step"] = encode(self.controller.schedule.policy_version)
            write_parts(building, parts, self.config)

    def stop(self) -> None:
        """Ends the ring and its processes, in time whatever hangs; a second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        try:
            if hasattr(self, "controller"):
                with contextlib.suppress(StalledRun):  # told already, or of no more interest
                    self._loop_thread.run(self.controller.stop(), 2 * STOP_TIMEOUT)
                del self.controller
        finally:
            self._loop_thread.stop()
            self._close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop_thread.run(coroutine, self.config.scheduling.stall_after)
