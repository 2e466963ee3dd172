"""The launch: makes the stages of a ring, in processes of their own under Ray or in this one, and runs them.

The one file that imports Ray, the actors and the learners. A stage in a Ray process is called through `_Process.call`:
arguments and results cross as `codec` buffers, payloads as object references that the driver owns, so they survive
the process that made them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
from learners.weight_sender import NODE_ADDRESS
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.controller import Controller
from r2m_async.errors import ConfigError, DataError, StageLost, StalledRun, StepFailed, WeightMismatch
from r2m_async.stages import LocalBatches, LocalStage, Stage, Stages, local_bytes
from r2m_async.workload import TicketOffice, Workload, plan_of, resolve

RESTART_TIMEOUT = 300.0
"""Seconds in which Ray must bring a dead rollout actor back."""


class Ring:
    """A running ring: `step` until `finished`, `save` between steps, `stop` at the end. Also a context manager."""

    def __init__(self, config: R2MConfig, workload: Workload, in_process: bool = False, resume: Path | None = None):
        """Starts the stages. `resume` is a directory that `save` wrote; the run goes on at its step."""
        _check_packages()
        self.config = config
        self.workload = workload
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="r2m-controller", daemon=True)
        self._thread.start()
        self._close: Callable[[], None] = lambda: None
        try:
            self._start(in_process, resume)
        except BaseException:
            self.stop()
            raise

    @classmethod
    def of(cls, config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None, **how: Any) -> Ring:
        """Resolves the config's workload and starts its ring."""
        return cls(config, resolve(config, on_progress), **how)

    def _start(self, in_process: bool, resume: Path | None) -> None:
        config, plan = self.config, plan_of(self.config, self.workload)
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
            processes = _RayProcesses(config)
            self._close = processes.close
            stages = processes.launch_all(self.workload.without_prompts())
            config = processes.config
        saved = _read_checkpoint(resume, self.config) if resume else {}
        first_step = decode(saved["step"]) if saved else 0
        tickets = TicketOffice(self.config, self.workload)

        async def start() -> Controller:
            controller = Controller(config, plan, stages, tickets.ticket, tickets.evaluation, first_step)
            if saved:
                await stages.policy.call("restore", stages.from_bytes(saved["policy_learner"]), str(resume.absolute()))
                await stages.head.call("restore", stages.from_bytes(saved["head_learner"]))
                policies = {} if config.weights.direct else _versions(saved, "policy_weights_", stages)
                await controller.start(policies, _versions(saved, "head_weights_", stages))
            else:
                await controller.start()
            return controller

        async def start_in_time() -> Controller:
            try:
                return await asyncio.wait_for(start(), self.config.scheduling.stall_after)
            except TimeoutError:
                raise StalledRun(
                    f"the learners and the annotator did not start within {self.config.scheduling.stall_after} s "
                    f"(scheduling.stall_after): does the cluster have the GPUs and the memory they ask for?"
                ) from None

        self.controller = self._run(start_in_time())

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

    def save(self, directory: Path) -> None:
        """Writes a checkpoint, whole or not at all.

        A learner on DeepSpeed writes there from every rank: beyond one machine the directory must be shared.
        """
        building = directory.with_name(f".{directory.name}.partial").absolute()
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        parts = self._run(self.controller.checkpoint(str(building)))
        parts["step"] = encode(self.controller.schedule.policy_version)
        for name, part in parts.items():
            (building / f"{name}.msgpack").write_bytes(part)
        (building / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)

    def stop(self) -> None:
        """Ends the ring and its processes; a second call does nothing."""
        if self._loop.is_closed():
            return
        if hasattr(self, "controller"):
            self._run(self.controller.stop())
            del self.controller
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _read_checkpoint(directory: Path, config: R2MConfig) -> dict[str, bytes]:
    """Its parts by name.

    Raises ConfigError if the config would number or age groups otherwise than the saved run, or if its learner cannot
    take over what the saved run's has.
    """
    parts = {path.stem: path.read_bytes() for path in directory.glob("*.msgpack")}
    if "step" not in parts:
        raise ConfigError(f"{directory} is not a checkpoint: it has no step.msgpack; name a directory that a run saved")
    saved = R2MConfig.from_yaml(directory / "config.yaml")
    schedule = ("run.seed", "rollouts.prompts_per_step", "rollouts.group_size", "scheduling", "data", "head.variant")
    policy = ("model.policy", "model.reference", "model.lora", "model.dtype", "critic.model")
    for key in (*schedule, *policy, "learner.backend"):
        section, _, field = key.partition(".")
        was, now = (getattr(one, section) for one in (saved, config))
        if field:
            was, now = getattr(was, field), getattr(now, field)
        if was != now:
            raise ConfigError(
                f"{directory} was saved with {key} = {was}, and the config has {now}: resume with the same"
            )
    was, now = saved.learner.zero_stage, config.learner.zero_stage
    if was != now and {was, now} != {1, 2}:
        raise ConfigError(
            f"{directory} was saved with learner.zero_stage = {was}, and the config has {now}: DeepSpeed changes "
            f"between stages 1 and 2 alone (and the number of ranks in any); resume with {'1 or 2' if was in (1, 2) else was}"
        )
    sharing = ("num_ranks", "zero_stage", "zero_options", "offload")
    was, now = ({key: getattr(one.learner, key) for key in sharing} for one in (saved, config))
    if was != now and any(one["zero_options"].get("round_robin_gradients") for one in (was, now)):
        raise ConfigError(
            f"{directory} was saved with learner.zero_options = {was['zero_options']}, and the config has "
            f"{now['zero_options']}: DeepSpeed cannot share out anew what round_robin_gradients reorders; resume with "
            f"the same {', '.join(sharing)}"
        )
    return parts


def _versions(saved: dict[str, bytes], prefix: str, stages: Stages) -> dict[int, Any]:
    """The kept weights of a checkpoint by version."""
    names = [name for name in saved if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): stages.from_bytes(saved[name]) for name in names}


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

Make: TypeAlias = Callable[[R2MConfig, Workload], Any]
Launch: TypeAlias = Callable[[str, type, Make], Stage]


def _stages(config: R2MConfig, launch: Launch, to_and_from_bytes: dict[str, Callable]) -> Stages:
    rollouts, replicas = range(config.rollouts.num_actors), range(config.reward.replicas)
    return Stages(
        rollouts=tuple(launch(f"rollout-{index}", RolloutActor, _rollout_actor) for index in rollouts),
        queue=launch("queue", ReplayQueue, lambda config, workload: ReplayQueue()),
        annotators=tuple(launch(f"annotator-{index}", RewardAnnotator, _reward_annotator) for index in replicas),
        policy=launch("policy-learner", PolicyLearner, _policy_learner),
        head=launch("head-learner", HeadLearner, _head_learner),
        **to_and_from_bytes,
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
        from r2m_async.policy_model import load_policy

        engine = TransformersEngine(load_policy(workload.policy, config), tokenizer, config, twin)
    itemsize = getattr(torch, config.feedback_dtype).itemsize
    return RolloutActor(engine, workload.policy_hidden_size * itemsize * config.reads_feedback)


def _reward_annotator(config: R2MConfig, workload: Workload) -> RewardAnnotator:
    from transformers import AutoTokenizer

    from r2m_async.head_model import build_head
    from r2m_async.reward_model import load_reward_model, scoring_head

    model = load_reward_model(workload.reward_model, config)
    head = build_head(scoring_head(model), workload.reward_hidden_size, workload.policy_hidden_size, config)
    return RewardAnnotator(model, AutoTokenizer.from_pretrained(workload.reward_model), head, config)


def _policy_learner(config: R2MConfig, workload: Workload) -> PolicyLearner:
    from r2m_async.critic_model import load_critic
    from r2m_async.policy_model import load_policy

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
        from r2m_async.critic_model import load_critic
        from r2m_async.policy_model import load_policy

        model = load_policy(workload.policy, config)
        reference = None if config.model.lora else load_policy(workload.reference, config)
        valued = load_critic(workload.critic, config) if workload.critic else None
        join_ranks(rank, host, port, config)
        critic = Critic(DeepSpeedBackend(valued, None, config), config) if valued else None
        return PolicyLearner(DeepSpeedBackend(model, reference, config), workload.estimator, config, critic)

    return make


def _head_learner(config: R2MConfig, workload: Workload) -> HeadLearner:
    from r2m_async.head_model import build_head
    from r2m_async.reward_model import classifier_skeleton, scoring_head

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


# Ray


class _RayProcesses:
    """The stages' processes, and Ray itself if it was started here."""

    def __init__(self, config: R2MConfig) -> None:
        import ray

        self._launched: list[_RayStage | _RayGang] = []
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        available = ray.cluster_resources().get("GPU", 0.0)
        self._gpus = gpu_share(config, available)
        self.config = placed(config, self._gpus, available)

    def launch_all(self, workload: Workload) -> Stages:
        import numpy as np
        import ray

        config, gpus = self.config, self._gpus

        def launch(name: str, stage_class: type, make: Make) -> Stage:
            options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0}
            deadline = None
            if stage_class is PolicyLearner and config.learner.backend == "deepspeed":
                self._launched.append(_RayGang(name, config, workload, **options))
                return self._launched[-1]
            if stage_class in (ReplayQueue, HeadLearner):
                options["num_gpus"] = 0.0
            elif stage_class is RolloutActor:
                options |= {"num_gpus": gpus * config.rollouts.tensor_parallel, "max_restarts": -1}
                deadline = config.rollouts.hang_after
            self._launched.append(_RayStage(name, stage_class, make, config, workload, deadline, **options))
            return self._launched[-1]

        to_and_from_bytes = {
            "to_bytes": lambda reference: bytes(ray.get(reference)),
            "from_bytes": lambda data: ray.put(np.frombuffer(data, np.uint8)),
        }
        return _stages(config, launch, to_and_from_bytes)

    def close(self) -> None:
        import ray

        for stage in self._launched:
            stage.kill()
        if self._started_ray:
            ray.shutdown()


def gpu_share(config: R2MConfig, available: float) -> float:
    """GPUs of each annotator and each rank of the policy learner and of a rollout actor: one, or equal parts of what there is.

    Raises ConfigError if a stage of several ranks would get parts of GPUs.
    """
    rollouts = config.rollouts
    users = rollouts.num_actors * rollouts.tensor_parallel + config.reward.replicas + config.learner.num_ranks
    if config.run.device == "cpu" or available == 0:
        return 0.0
    if available >= users:
        return 1.0
    for key, num_ranks in (
        ("rollouts.tensor_parallel", rollouts.tensor_parallel),
        ("learner.num_ranks", config.learner.num_ranks),
    ):
        if num_ranks > 1:
            raise ConfigError(
                f"{key} is {num_ranks}, which needs whole GPUs: {users} for the run, and the cluster has {available:g}; "
                f"lower rollouts.num_actors or {key.partition('.')[2]}"
            )
    return int(100 / math.ceil(users / available)) / 100  # so that the parts fill whole GPUs


def placed(config: R2MConfig, gpus: float, available: float) -> R2MConfig:
    """The config with what depends on each stage's share of the cluster's GPUs: `weights.transport: auto`, vLLM's memory.

    Raises ConfigError for a transport that these GPUs do not have, and if what lies in the CPU's memory already were to move there.
    """
    shares_one = 0 < gpus < 1 and available == 1
    possible = {"nccl": gpus >= 1, "ipc": shares_one}
    if not possible.get(config.weights.transport, True):
        raise ConfigError(
            f"weights.transport is {config.weights.transport!r}, and each stage has {gpus:g} of the cluster's {available:g} "
            f"GPUs: nccl needs a GPU for each, ipc one GPU for all; use auto"
        )
    if not gpus and config.learner.offload != "none":
        raise ConfigError(
            f"learner.offload is {config.learner.offload!r} and the run has no GPU to take a load off: use offload 'none'"
        )
    vllm = config.rollouts.engine == "vllm"
    if config.weights.transport == "auto":
        direct = [name for name, there in possible.items() if there and vllm and config.scheduling.lag == "bounded"]
        config = config.weights(transport=direct[0] if direct else "object_store")
    if vllm and 0 < gpus < 1:
        memory = {"gpu_memory_utilization": round(0.9 * gpus, 3)}
        config = config.rollouts(engine_options=memory | config.rollouts.engine_options)
    return config


class _Process:
    """A stage inside its Ray actor."""

    def __init__(self, make: Make, config: R2MConfig, workload: Workload) -> None:
        import ray
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        os.environ[NODE_ADDRESS] = ray.util.get_node_ip_address()
        self._mistake: ConfigError | None = None
        try:
            self._stage = make(config, workload)
        except ConfigError as error:  # told when asked: one that is raised here is Ray's to report, with a traceback
            self._mistake = error
            return
        self._opaque = getattr(self._stage, "opaque", False)

    def pid(self) -> int:
        """Raises ConfigError if the stage could not be made."""
        if self._mistake:
            raise self._mistake
        return os.getpid()

    def call(self, method: str, packed: bytes, *payloads: Any) -> Any:
        """`packed` are the arguments with places where payloads go; returns (report, *payloads) as buffers."""
        import numpy as np

        items = payloads if self._opaque else [decode(payload) for payload in payloads]
        report, *results = getattr(self._stage, method)(*_filled(decode(packed), items))
        if not self._opaque:
            results = [np.frombuffer(encode(result), np.uint8) for result in results]
        report = bytes(encode(report))
        return (report, *results) if results else report


_CHANNELS = ("open_channel", "connect", "send")
"""Methods of the policy learner by which it sends weights itself."""
_CONCURRENT = {"generate": "generate", "weights": "weights"} | dict.fromkeys(("abort", *_CHANNELS), "control")
"""Methods that run beside a stage's other work, and the group of threads each runs in."""


class _RayStage:
    """The controller's side of a `_Process`."""

    def __init__(
        self,
        name: str,
        stage_class: type,
        make: Make,
        config: R2MConfig,
        workload: Workload,
        deadline: float | None,
        **options: Any,
    ) -> None:
        """`deadline`: seconds for a call, after which the process counts as hung, is killed and lost."""
        import ray

        self.name = name
        self._deadline = deadline
        groups = {"control": 1, "weights": 1, "generate": config.rollouts.concurrent_groups}
        remote = ray.remote(concurrency_groups=groups)(_Process)
        self._actor = remote.options(**options).remote(make, config, workload)
        self._stage_class = stage_class
        self._started = False

    async def call(self, method: str, *args: Any) -> tuple[Any, ...]:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

        payloads: list[Any] = []
        packed = bytes(encode(_emptied(list(args), payloads)))
        num_payloads = getattr(self._stage_class, method).num_payloads
        options = {"num_returns": 1 + num_payloads}
        if method in _CONCURRENT:
            options["concurrency_group"] = _CONCURRENT[method]
        try:
            if not self._started:  # the deadline is for calls, not for starting
                await self.pid()
                self._started = True
            references = self._actor.call.options(**options).remote(method, packed, *payloads)
            report, *results = references if num_payloads else [references]
            async with asyncio.timeout(self._deadline):
                return decode(await report), *results
        except (ActorDiedError, ActorUnavailableError) as error:
            raise StageLost(self.name, f"{self.name} was lost during {method}: {error}") from error
        except TimeoutError:
            self.kill(restart=True)
            raise StageLost(
                self.name, f"{self.name} did not finish {method} within {self._deadline} s (rollouts.hang_after)"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError | DataError | StepFailed):
                raise error.cause from None  # the user's: its message says it all
            if isinstance(error.cause, WeightMismatch):
                raise WeightMismatch(f"{self.name}: {error.cause}") from None
            if isinstance(error.cause, StageLost):  # a process of its own, which it cannot do without
                self.kill(restart=True)
                raise StageLost(self.name, f"{self.name}: {error.cause}") from None
            raise
        except ObjectLostError as error:
            raise StageLost(None, f"a payload for {self.name}.{method} was lost with its process: {error}") from error

    async def restart(self) -> None:
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        try:
            async with asyncio.timeout(RESTART_TIMEOUT):
                while True:
                    try:
                        await self.pid()
                        return
                    except ActorUnavailableError:
                        await asyncio.sleep(0.2)
        except (ActorDiedError, TimeoutError) as error:
            raise StageLost(self.name, f"{self.name} will not come back: {error or RESTART_TIMEOUT}") from error

    async def pid(self) -> int:
        """Of the process that runs the stage now."""
        return await self._actor.pid.remote()

    def kill(self, restart: bool = False) -> None:
        import ray

        ray.kill(self._actor, no_restart=not restart)


@dataclass(frozen=True, slots=True)
class _Shares:
    """One payload in parts, as the ranks of a gang made it (`stages.produces`)."""

    references: tuple[Any, ...]


class _RayGang:
    """The controller's side of a policy learner of several ranks: one stage, of a process for each.

    Every call goes to all ranks with the same arguments, because each meets the others in it; what rank 0 returns is
    the stage's answer. One lost rank is a lost stage: the others cannot go on, nor begin anew in the same process.
    """

    def __init__(self, name: str, config: R2MConfig, workload: Workload, **options: Any) -> None:
        import ray
        import torch

        self.name = name
        self._rank_0_publishes = config.learner.zero_stage < 3  # it has whole weights
        host = ray.util.get_node_ip_address()
        self._store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.ranks = tuple(
            _RayStage(
                f"{name}-{rank}",
                PolicyLearner,
                _policy_rank(rank, host, self._store.port),
                config,
                workload,
                None,
                **options,
            )
            for rank in range(config.learner.num_ranks)
        )

    async def call(self, method: str, *args: Any) -> tuple[Any, ...]:
        if method in _CHANNELS or (method == "weights" and self._rank_0_publishes):
            return await self.ranks[0].call(method, *args)
        calls = [asyncio.create_task(rank.call(method, *args)) for rank in self.ranks]
        try:
            await _ended(calls)
        finally:
            for call in calls:
                call.cancel()
        (report, *payloads), *others = (call.result() for call in calls)
        for place in getattr(PolicyLearner, method).shares:
            payloads[place] = _Shares((payloads[place], *(other[1 + place] for other in others)))
        return report, *payloads

    async def restart(self) -> None:
        raise StageLost(self.name, f"{self.name} will not come back: its ranks are not started again one by one")

    async def pid(self) -> int:
        """Of the process of rank 0."""
        return await self.ranks[0].pid()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


_LAST_WORDS = 10.0
"""Seconds that other ranks have, once one failed, to fail too: what made it fail may be the loss of one of them."""


async def _ended(calls: list[asyncio.Task]) -> None:
    """Waits for all ranks' calls, or raises why not: the loss of a rank before what its death did to the others."""
    pending, failures = set(calls), []
    while pending and not any(isinstance(failure, StageLost) for failure in failures):
        done, pending = await asyncio.wait(
            pending, timeout=_LAST_WORDS if failures else None, return_when=asyncio.FIRST_EXCEPTION
        )
        if not done:
            break
        failures += [failure for call in done if (failure := call.exception())]
    if failures:
        raise min(failures, key=lambda failure: not isinstance(failure, StageLost))


_PLACE = "payload of this call"


def _emptied(value: Any, payloads: list[Any]) -> Any:
    """The value with every object reference moved to `payloads`, a place left where it was."""
    import ray

    if isinstance(value, ray.ObjectRef):
        payloads.append(value)
        return {_PLACE: len(payloads) - 1}
    if isinstance(value, _Shares):
        payloads.extend(value.references)
        return {_PLACE: list(range(len(payloads) - len(value.references), len(payloads)))}
    if isinstance(value, list):
        return [_emptied(item, payloads) for item in value]
    return value


def _filled(value: Any, payloads: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_PLACE}:
        place = value[_PLACE]
        return _merged([payloads[one] for one in place]) if isinstance(place, list) else payloads[place]
    if isinstance(value, list):
        return [_filled(item, payloads) for item in value]
    return value


def _merged(parts: list[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """What the ranks returned of one payload, in the order of groups."""
    there = [part for part in parts if part is not None]
    return tuple(sorted(itertools.chain(*there), key=lambda one: one.group_id)) if there else None
