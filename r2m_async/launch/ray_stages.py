"""Stages in Ray processes: GPUs for each, calls and payloads across, deaths and restarts.

A stage in a Ray process is called through `_Process.call`: arguments and results cross as `codec` buffers, payloads as
object references that the driver owns, so they survive the process that made them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from r2m_async.child_process import NODE_ADDRESS
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.config_tree import Options
from r2m_async.errors import ConfigError, DataError, DiskError, StageLost, StepFailed, WeightMismatch
from r2m_async.launch.ray_connection import RayConnection
from r2m_async.launch.workload import Workload
from r2m_async.ring.stages import Method

RESTART_TIMEOUT = 300.0
"""Seconds in which a new process must be there for a dead rollout actor."""
KILL_TIMEOUT = 10.0
"""Seconds for Ray to take note that a process is to be killed."""


Make: TypeAlias = Callable[[R2MConfig, Workload], Any]
MakeRank: TypeAlias = Callable[[int, str, int], Make]
"""Of a rank, and of the host and port of the store at which the ranks meet."""


class RayProcesses:
    """The stages' processes, and Ray itself if it was started here.

    `gpus` is the share of each stage that has one (`gpu_share`); `config` has what depends on it (`placed`).
    """

    def __init__(self, config: R2MConfig) -> None:
        self._launched: list[RayStage | RayGang] = []
        self.ray = RayConnection(config)
        try:
            self.gpus = gpu_share(config, self.ray.num_gpus)
            self.config = placed(config, self.gpus, self.ray.num_gpus)
        except BaseException:
            self.close()
            raise

    def stage(
        self,
        name: str,
        make: Make,
        workload: Workload,
        num_gpus: float,
        deadline: float | None = None,
    ) -> RayStage:
        """A stage in a process of its own; `deadline` as of `RayStage`."""
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_restarts": 0}
        stage = RayStage(name, make, self.config, workload, deadline, options)
        self._launched.append(stage)
        return stage

    def gang(self, name: str, make_rank: MakeRank, workload: Workload, num_gpus: float) -> RayGang:
        """A stage of `learner.num_ranks` processes, each with so many GPUs."""
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_restarts": 0}
        gang = RayGang(name, make_rank, self.config, workload, options)
        self._launched.append(gang)
        return gang

    def close(self) -> None:
        """Ends the processes, and Ray if it was started here. Returns in time, whatever hangs."""
        self.ray.close(lambda: [stage.kill() for stage in self._launched])


def ray_bytes() -> dict[str, Callable[..., Any]]:
    """The `to_bytes` and `from_bytes` of stages in Ray processes."""
    import numpy as np
    import ray

    async def to_bytes(reference: Any) -> memoryview:
        return memoryview(await reference)

    return {"to_bytes": to_bytes, "from_bytes": lambda data: ray.put(np.frombuffer(data, np.uint8))}


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
        transport: Literal["nccl", "ipc", "object_store"] = "object_store"
        if vllm and config.scheduling.lag == "bounded":
            transport = "nccl" if possible["nccl"] else "ipc" if possible["ipc"] else "object_store"
        config = config.weights(transport=transport)
    if vllm and 0 < gpus < 1:
        memory: Options = {"gpu_memory_utilization": round(0.9 * gpus, 3)}
        config = config.rollouts(engine_options=memory | config.rollouts.engine_options)
    return config


_USERS = (ConfigError, DataError, StepFailed, DiskError)
"""Errors whose message says all: they reach the user as they were raised in a stage's process."""


class _Process:
    """A stage inside its Ray actor."""

    def __init__(self, name: str, make: Make, config: R2MConfig, workload: Workload) -> None:
        import ray
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading: a ring's processes would draw all of theirs over each other
        self._name = name
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        os.environ[NODE_ADDRESS] = ray.util.get_node_ip_address()
        self._mistake: Exception | None = None
        try:
            self._stage = make(config, workload)
        except _USERS as error:  # told when asked: one that is raised here is Ray's to report, with a traceback
            self._mistake = error
            return
        self._opaque = getattr(self._stage, "opaque", False)

    def __repr__(self) -> str:
        """What Ray puts before the lines that the process prints."""
        return self._name

    def pid(self) -> int:
        """Raises what a user must mend before the stage can be made."""
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


class RayStage:
    """The controller's side of a `_Process`."""

    def __init__(
        self,
        name: str,
        make: Make,
        config: R2MConfig,
        workload: Workload,
        deadline: float | None,
        options: dict[str, Any],
    ) -> None:
        """`deadline`: seconds for a call, after which the process counts as hung, is killed and lost."""
        import ray

        self.name = name
        self._deadline = deadline
        groups = {"control": 1, "weights": 1, "generate": config.rollouts.concurrent_groups}
        remote = ray.remote(concurrency_groups=groups)(_Process)
        self._new: Callable[[], Any] = lambda: remote.options(**options).remote(name, make, config, workload)
        self._actor = self._new()
        self._started = False

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

        payloads: list[Any] = []
        packed = bytes(encode(_emptied(list(args), payloads)))
        options: dict[str, Any] = {"num_returns": 1 + method.num_payloads}
        if method.beside:
            options["concurrency_group"] = method.beside
        within, actor = asyncio.timeout(None), self._actor
        try:
            if not self._started:  # the deadline is for calls, not for starting
                await self.pid()
                self._started = True
            references = actor.call.options(**options).remote(method.name, packed, *payloads)
            report, *results = references if method.num_payloads else [references]
            async with asyncio.timeout(self._deadline) as within:
                return decode(await report), *results
        except (ActorDiedError, ActorUnavailableError) as error:
            raise StageLost(self.name, f"{self.name} was lost during {method.name}: {error}") from error
        except RayTaskError as error:  # before TimeoutError: what a stage raised may be one of both classes
            if isinstance(error.cause, _USERS):
                raise error.cause from None
            if isinstance(error.cause, WeightMismatch):
                raise WeightMismatch(f"{self.name}: {error.cause}") from None
            if isinstance(error.cause, StageLost):  # a process of its own, which it cannot do without
                await self._end(actor)
                raise StageLost(self.name, f"{self.name}: {error.cause}") from None
            raise
        except TimeoutError:
            if not within.expired():
                raise
            await self._end(actor)
            raise StageLost(
                self.name, f"{self.name} did not finish {method.name} within {self._deadline} s (rollouts.hang_after)"
            ) from None
        except ObjectLostError as error:
            raise StageLost(
                None, f"a payload for {self.name}.{method.name} was lost with its process: {error}"
            ) from error

    async def restart(self) -> None:
        """A new process in the place of the lost one. Raises StageLost if that dies too, or takes too long."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        await self._end(self._actor)
        self._actor, self._started = self._new(), False
        try:
            async with asyncio.timeout(RESTART_TIMEOUT):
                await self.pid()
        except TimeoutError:
            why = f"no new process was there within {RESTART_TIMEOUT:g} s"
            raise StageLost(self.name, f"{self.name} did not come back: {why}") from None
        except (ActorDiedError, ActorUnavailableError) as error:
            raise StageLost(self.name, f"{self.name} did not come back: {error}") from error

    async def pid(self) -> int:
        """Of the process that runs the stage now. Raises what a user must mend before the stage can be made."""
        from ray.exceptions import RayTaskError

        try:
            return int(await self._actor.pid.remote())
        except RayTaskError as error:
            if isinstance(error.cause, _USERS):
                raise error.cause from None
            raise

    async def pids(self) -> list[int]:
        return [await self.pid()]

    async def _end(self, actor: Any) -> None:
        """Kills a process: that one, and none that has taken its place meanwhile. It is given up in any case.

        In a daemon thread, because a call that hangs in Ray must keep neither the loop nor Python's end waiting.
        """
        ended: Future[None] = Future()

        def end() -> None:
            try:
                _kill(actor)
            finally:
                ended.set_result(None)

        threading.Thread(target=end, name=f"{self.name}-end", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(ended)), KILL_TIMEOUT)

    def kill(self) -> None:
        _kill(self._actor)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)


@dataclass(frozen=True, slots=True)
class _Shares:
    """One payload in parts, as the ranks of a gang made it (`Method.shares`)."""

    references: tuple[Any, ...]


class RayGang:
    """The controller's side of a policy learner of several ranks: one stage, of a process for each.

    Every call goes to all ranks with the same arguments, because each meets the others in it; what rank 0 returns is
    the stage's answer. One lost rank is a lost stage: the others cannot go on, nor begin anew in the same process.
    """

    def __init__(
        self,
        name: str,
        make_rank: MakeRank,
        config: R2MConfig,
        workload: Workload,
        options: dict[str, Any],
    ) -> None:
        import ray
        import torch

        self.name = name
        self._rank_0_is_whole = config.learner.zero_stage < 3  # it has whole weights
        host = ray.util.get_node_ip_address()
        self._store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.ranks = tuple(
            RayStage(f"{name}-{rank}", make_rank(rank, host, self._store.port), config, workload, None, options)
            for rank in range(config.learner.num_ranks)
        )

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        if method.ranks == "first" or (method.ranks == "whole" and self._rank_0_is_whole):
            return await self.ranks[0].call(method, *args)
        calls = [asyncio.create_task(rank.call(method, *args)) for rank in self.ranks]
        try:
            await _ended(calls)
        finally:
            for call in calls:
                call.cancel()
        (report, *payloads), *others = (call.result() for call in calls)
        for place in method.shares:
            payloads[place] = _Shares((payloads[place], *(other[1 + place] for other in others)))
        return report, *payloads

    async def restart(self) -> None:
        raise StageLost(self.name, f"{self.name} will not come back: its ranks are not started again one by one")

    async def pids(self) -> list[int]:
        return [await rank.pid() for rank in self.ranks]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


_LAST_WORDS = 10.0
"""Seconds that other ranks have, once one failed, to fail too: what made it fail may be the loss of one of them."""


async def _ended(calls: list[asyncio.Task[Any]]) -> None:
    """Waits for all ranks' calls, or raises why not: the loss of a rank before what its death did to the others."""
    pending, failures = set(calls), list[BaseException]()
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
    """The value with every object reference in it moved to `payloads`, a place left where it was."""
    import ray

    if isinstance(value, ray.ObjectRef):
        payloads.append(value)
        return {_PLACE: len(payloads) - 1}
    if isinstance(value, _Shares):
        payloads.extend(value.references)
        return {_PLACE: list(range(len(payloads) - len(value.references), len(payloads)))}
    if isinstance(value, list | tuple):
        return type(value)(_emptied(item, payloads) for item in value)
    if isinstance(value, dict):
        return {key: _emptied(item, payloads) for key, item in value.items()}
    return value


def _filled(value: Any, payloads: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_PLACE}:
        place = value[_PLACE]
        return _merged([payloads[one] for one in place]) if isinstance(place, list) else payloads[place]
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, payloads) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, payloads) for key, item in value.items()}
    return value


def _merged(parts: list[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """What the ranks returned of one payload, in the order of groups."""
    there = [part for part in parts if part is not None]
    return tuple(sorted(itertools.chain(*there), key=lambda one: one.group_id)) if there else None
