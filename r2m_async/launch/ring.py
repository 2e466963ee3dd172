"""The launch: makes the stages of a ring, in processes of their own under Ray or in this one, and runs them.

The one file that knows the actors and the learners.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import actors
import learners
import r2m_async
from actors.replay_queue import ReplayQueue
from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor, RolloutEngine
from learners.critic import Critic
from learners.head_learner import HeadLearner
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StalledRun
from r2m_async.launch.loop_thread import LoopThread
from r2m_async.launch.ray_stages import Make, RayProcesses, ray_bytes
from r2m_async.launch.workload import TicketOffice, Workload, plan_of, resolve
from r2m_async.ring.controller import STOP_TIMEOUT, Controller
from r2m_async.ring.stages import LocalBatches, LocalStage, Stage, Stages, local_bytes
from r2m_async.runs.checkpoints import kept_versions, read_checkpoint, write_parts
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
        _check_packages()
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
            stages = _local_stages(config, self.workload.without_prompts())
        elif config.rollouts.engine != "vllm" and config.rollouts.concurrent_groups > 1:
            raise ConfigError(
                f"rollouts.concurrent_groups is {config.rollouts.concurrent_groups} and rollouts.engine is "
                f"{config.rollouts.engine!r}: on Ray that engine takes one group at a time; use 1, engine 'vllm', or one "
                f"process (Ring's in_process, r2m study)"
            )
        else:
            processes = RayProcesses(config)
            self._close = processes.close
            stages = _ray_stages(processes, self.workload.without_prompts())
            config = processes.config
        first_step = decode(saved["step"]) if saved else 0
        tickets = TicketOffice(self.config, self.workload)

        async def controller() -> Controller:
            return Controller(config, plan, stages, tickets.ticket, tickets.evaluation, first_step)

        async def start() -> None:
            if saved:
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


def _check_packages() -> None:
    """`actors` and `learners` are generic names: raises ConfigError naming an intruder of the same name."""
    home = Path(r2m_async.__file__).parents[1]
    for package in (actors, learners):
        found = Path(package.__file__ or "").parent
        if found.parent != home:
            raise ConfigError(
                f"import {package.__name__} found {found}, not the one beside {home / 'r2m_async'}: remove it"
            )


# Stages, in whatever process

Launch: TypeAlias = Callable[[str, type, Make], Stage]


def _stages(config: R2MConfig, launch: Launch, others: dict[str, Callable]) -> Stages:
    """`others`: what else `Stages` has."""
    rollouts, replicas = range(config.rollouts.num_actors), range(config.reward.replicas)
    return Stages(
        rollouts=tuple(launch(f"rollout-{index}", RolloutActor, _rollout_actor) for index in rollouts),
        queue=launch("queue", ReplayQueue, lambda config, workload: ReplayQueue()),
        annotators=tuple(launch(f"annotator-{index}", RewardAnnotator, _reward_annotator) for index in replicas),
        policy=launch("policy-learner", PolicyLearner, _policy_learner),
        head=launch("head-learner", HeadLearner, _head_learner),
        **others,
    )


def _rollout_actor(config: R2MConfig, workload: Workload) -> RolloutActor:
    import torch
    from transformers import AutoTokenizer

    tokenizer, twin = AutoTokenizer.from_pretrained(workload.policy), workload.estimator.needs_greedy
    if config.rollouts.engine == "vllm":
        from actors.vllm_engine import VLLMEngine

        engine: RolloutEngine = VLLMEngine(workload.policy, tokenizer, workload.policy_hidden_size, config, twin)
    else:
        from actors.transformers_engine import TransformersEngine
        from r2m_async.models.loading import load_policy

        engine = TransformersEngine(load_policy(workload.policy, config), tokenizer, config, twin)
    itemsize = getattr(torch, config.feedback_dtype).itemsize
    return RolloutActor(engine, workload.policy_hidden_size * itemsize * config.reads_feedback)


def _reward_annotator(config: R2MConfig, workload: Workload) -> RewardAnnotator:
    from transformers import AutoTokenizer

    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import load_reward_model, scoring_head

    model = load_reward_model(workload.reward_model, config)
    head = build_head(scoring_head(model), workload.reward_hidden_size, workload.policy_hidden_size, config)
    return RewardAnnotator(model, AutoTokenizer.from_pretrained(workload.reward_model), head, config)


def _policy_learner(config: R2MConfig, workload: Workload) -> PolicyLearner:
    from r2m_async.models.critic import load_critic
    from r2m_async.models.loading import load_policy

    model = load_policy(workload.policy, config)
    reference = None if config.model.lora else load_policy(workload.reference, config)
    critic = (
        Critic(TorchBackend(load_critic(workload.critic, config), None, config), config) if workload.critic else None
    )
    return PolicyLearner(TorchBackend(model, reference, config), workload.estimator, config, critic)


def _policy_rank(rank: int, host: str, port: int) -> Make:
    """Of a policy learner on DeepSpeed whose ranks meet at a store at host and port."""

    def make(config: R2MConfig, workload: Workload) -> PolicyLearner:
        from learners.deepspeed_backend import DeepSpeedBackend, join_ranks
        from r2m_async.models.critic import load_critic
        from r2m_async.models.loading import load_policy

        model = load_policy(workload.policy, config)
        reference = None if config.model.lora else load_policy(workload.reference, config)
        valued = load_critic(workload.critic, config) if workload.critic else None
        join_ranks(rank, host, port, config)
        critic = Critic(DeepSpeedBackend(valued, None, config), config) if valued else None
        return PolicyLearner(DeepSpeedBackend(model, reference, config), workload.estimator, config, critic)

    return make


def _head_learner(config: R2MConfig, workload: Workload) -> HeadLearner:
    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import classifier_skeleton, scoring_head

    phi = scoring_head(classifier_skeleton(workload.reward_model)).to_empty(
        device="cpu"
    )  # its weights come with `start`
    head = build_head(phi, workload.reward_hidden_size, workload.policy_hidden_size, config)
    return HeadLearner(head, config)  # on the CPU: one small update per step, and no GPU memory beside a learner's


def _local_stages(config: R2MConfig, workload: Workload) -> Stages:
    def launch(name: str, stage_class: type, make: Make) -> Stage:
        batches = stage_class is RolloutActor and config.rollouts.concurrent_groups > 1
        return (LocalBatches if batches else LocalStage)(name, make(config, workload))

    return _stages(config, launch, local_bytes())


def _ray_stages(processes: RayProcesses, workload: Workload) -> Stages:
    config, gpus = processes.config, processes.gpus

    def launch(name: str, stage_class: type, make: Make) -> Stage:
        if stage_class is PolicyLearner and config.learner.backend == "deepspeed":
            return processes.gang(name, PolicyLearner, _policy_rank, workload, gpus)
        if stage_class is RolloutActor:
            num_gpus, deadline = gpus * config.rollouts.tensor_parallel, config.rollouts.hang_after
            return processes.stage(name, stage_class, make, workload, num_gpus, deadline)
        on_cpu = stage_class in (ReplayQueue, HeadLearner)
        return processes.stage(name, stage_class, make, workload, 0.0 if on_cpu else gpus)

    return _stages(config, launch, {**ray_bytes(), "carrier": processes.ray.watch})
