"""Runs stages in Ray processes: brings calls and payloads across, and handles deaths and restarts.

Every process of a stage is a Ray actor of the class `_Process`. Arguments and results of a call are sent as buffers of
`codec`. A payload stays in Ray's object store, and the controller gets a reference to it. The driver owns this
reference, so the payload outlives the process that made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from r2m_async.child_process import NODE_ADDRESS
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, DataError, DiskError, StageLost, StepFailed, WeightMismatch
from r2m_async.launch.arguments import Shares, with_payloads, without_payloads
from r2m_async.launch.gpus import gpu_share, placed
from r2m_async.launch.placement import placed_on_ray
from r2m_async.launch.ray_connection import RayConnection
from r2m_async.launch.stacks import can_be_asked, stack_of
from r2m_async.launch.workload import Workload
from r2m_async.plugins import no_terminal
from r2m_async.ring.stages import Method

RESTART_TIMEOUT = 300.0
"""Seconds in which the new process of a lost stage must be ready, or `cluster.wait` if that is more."""
QUEUE_RESTART_TIMEOUT = 60.0
"""The same for the replay queue, which loads no model. If its node is gone, a ring that is built anew may find room."""
KILL_TIMEOUT = 10.0
"""Seconds that Ray has to accept the order to kill a process."""


Make: TypeAlias = Callable[[R2MConfig, Workload], Any]
"""A function that makes a stage. It is called in the process in which the stage is to run."""
MakeRank: TypeAlias = Callable[[int, str, int], Make]
"""Returns the `Make` of one rank. It takes the rank, and the host and port of the store at which the ranks meet."""


class RayProcesses:
    """The processes of all stages of a ring, and the connection to Ray.

    `gpus` is the number of GPUs of each process that computes with a model, which may be a part of one (`gpu_share`).
    `config` is the config of the run with the keys that depend on this number filled in (`placed`).
    """

    def __init__(self, config: R2MConfig, ray: RayConnection | None = None) -> None:
        """Starts or joins Ray. It starts no stages yet.

        Args:
            config: the config of the run.
            ray: a connection that outlives these processes. None: they have one of their own.

        Raises ConfigError if the config does not fit the GPUs of the cluster, if the cluster has no room for the processes
        within `cluster.wait`, or if nobody answers at RAY_ADDRESS, and StageLost if Ray does not start.
        """
        self._launched: list[RayStage | RayGang] = []
        self._reserved: list[Any] = []
        self.ray = ray or RayConnection(config)
        self._end = self.ray.end if ray else self.ray.close
        try:
            available = config.cluster.gpus or self.ray.num_gpus
            self.gpus = gpu_share(config, available)
            self.config = placed(config, self.gpus, available)
            self._strategies, self._reserved = placed_on_ray(self.config, self.gpus, self.ray.owns_cluster)
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
        restart_timeout: float = RESTART_TIMEOUT,
    ) -> RayStage:
        """Starts a stage in a process of its own, and does not wait for it.

        Args:
            name: the name of the stage.
            make: makes the stage in its process.
            workload: what `make` gets besides the config.
            num_gpus: the number of GPUs of the process, which may be a part of one.
            deadline, restart_timeout: as for `RayStage`.
        """
        # Ray must not restart a process by itself: the controller counts deaths, and gives a new process its weights.
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_restarts": 0, **self._place(name)}
        stage = RayStage(name, make, self.config, workload, deadline, options, restart_timeout)
        self._launched.append(stage)
        return stage

    def gang(self, name: str, make_rank: MakeRank, workload: Workload, num_gpus: float) -> RayGang:
        """Starts a stage that consists of `learner.num_ranks` processes, and does not wait for it.

        Args:
            name: the name of the stage. The processes are called NAME-0, NAME-1, and so on.
            make_rank: returns the function that makes one rank.
            workload: what that function gets besides the config.
            num_gpus: the number of GPUs of each process.
        """
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_restarts": 0}
        gang = RayGang(name, make_rank, self.config, workload, lambda rank: options | self._place(f"{name}-{rank}"))
        self._launched.append(gang)
        return gang

    def _place(self, name: str) -> dict[str, Any]:
        """Ray's option that puts a process where its room was reserved. Empty: Ray puts it anywhere."""
        strategy = self._strategies.get(name)
        return {"scheduling_strategy": strategy} if strategy else {}

    async def stacks(self, names: Sequence[str]) -> str:
        """Says what the processes of some stages are doing, one after the other. Each is read on its own node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        read = ray.remote(num_cpus=0, max_retries=0)(stack_of)
        told = []
        for name, pid, node in [place for one in self._launched if one.name in names for place in one.places()]:
            text = "its process was not made yet"
            if pid and node == ray.get_runtime_context().get_node_id():
                text = await asyncio.to_thread(stack_of, pid)
            elif pid:
                text = await read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, False)).remote(pid)
            told.append(f"--- {name}, process {pid or '?'}:\n{text}")
        return "\n".join(told)

    def close(self) -> None:
        """Ends all processes, and the connection to Ray if it is their own. Returns in time, whatever hangs."""
        self._end(lambda: [*(stage.kill() for stage in self._launched), *map(_free, self._reserved)])


def ray_bytes() -> dict[str, Callable[..., Any]]:
    """Returns the `to_bytes` and `from_bytes` of stages in Ray processes, where a payload is an object reference."""
    import numpy as np
    import ray
    from ray.exceptions import ObjectLostError

    async def to_bytes(reference: Any) -> memoryview:
        try:
            return memoryview(await reference)
        except ObjectLostError as error:
            raise StageLost(None, f"a payload was lost with its node: {error}") from error

    return {"to_bytes": to_bytes, "from_bytes": lambda data: ray.put(np.frombuffer(data, np.uint8))}


EMBEDS_AT_ONCE = 256
"""The most groups that one annotator embeds at once, or waits for their reward functions."""


def embeds_at_once(config: R2MConfig) -> int:
    """The number of groups that one annotator embeds at once.

    It is 1 in a synchronous or exact run without reward functions: the passes through the model go one by one. Else it is as
    many groups as may be under way: those that have arrived go through the model together, and no group's functions keep
    another from it.
    """
    if not (config.reward.functions or config.asynchronous):
        return 1
    steps_under_way = config.scheduling.max_policy_age + 2
    return min(EMBEDS_AT_ONCE, config.rollouts.prompts_per_step * steps_under_way)


_USERS = (ConfigError, DataError, StepFailed, DiskError)
"""Errors whose message tells the user all there is to know. They are raised in the driver as the stage raised them."""


class _Process:
    """A stage inside its own process. Ray makes an actor of this class."""

    def __init__(self, name: str, make: Make, config: R2MConfig, workload: Workload) -> None:
        """Makes the stage. `name` is the name of the stage. An error of the user is kept, and raised by `pid`."""
        import ray
        import torch
        from transformers.utils import logging

        # The processes of a ring would draw their progress bars of loading over each other.
        logging.disable_progress_bar()
        no_terminal()  # Ctrl-C reaches the driver, which ends this process
        self._name = name
        # Without GPUs all processes share the cores. And with one thread, sums are always rounded in the same way.
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        os.environ[NODE_ADDRESS] = ray.util.get_node_ip_address()
        can_be_asked()
        self._mistake: Exception | None = None
        try:
            self._stage = make(config, workload)
        except _USERS as error:
            # Ray would wrap an error that is raised here in an error of its own, with a long traceback.
            self._mistake = error
            return
        self._opaque = getattr(self._stage, "opaque", False)

    def __repr__(self) -> str:
        """The name of the stage. Ray puts it before the lines that the process prints."""
        return self._name

    def pid(self) -> tuple[int, str]:
        """Returns the number of the process, and Ray's name of its node.

        Raises the user's error because of which the stage could not be made.
        """
        import ray

        if self._mistake:
            raise self._mistake
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def call(self, method: str, packed: bytes, *payloads: Any) -> Any:
        """Calls a method of the stage.

        Args:
            method: the name of the method.
            packed: the arguments, encoded, with a mark at each place where a payload belongs (`arguments.PLACE`).
            payloads: the payloads, encoded. Ray has fetched them from its object store.

        Returns the report and the payloads, each encoded. It returns the report alone if there are no payloads.
        """
        import numpy as np

        from r2m_async.cpu_threads import share_threads

        share_threads()  # each of Ray's concurrency groups has threads of its own
        # The replay queue only stores payloads, so it gets and returns the buffers themselves.
        items = payloads if self._opaque else [decode(payload) for payload in payloads]
        report, *results = getattr(self._stage, method)(*with_payloads(decode(packed), items))
        if not self._opaque:
            # Ray stores an array outside of its pickle, and whoever gets it reads it without a copy.
            results = [np.frombuffer(encode(result), np.uint8) for result in results]
        report = bytes(encode(report))
        return (report, *results) if results else report


@dataclass(slots=True)
class _Life:
    """One process of a stage, from its start to its end."""

    actor: Any
    """Ray's handle of it."""
    started: bool = False
    """Whether the stage is known to be made in it."""
    ended_because: str = ""
    """Why we killed it, if we did."""


class RayStage:
    """Carries a stage that runs in one Ray process. It is the controller's side of a `_Process`."""

    def __init__(
        self,
        name: str,
        make: Make,
        config: R2MConfig,
        workload: Workload,
        deadline: float | None,
        options: dict[str, Any],
        restart_timeout: float = RESTART_TIMEOUT,
    ) -> None:
        """Starts the process, and does not wait for it.

        Args:
            name: the name of the stage.
            make: makes the stage in the process.
            config: the config of the run, as `placed` returned it.
            workload: what `make` gets besides the config.
            deadline: the most seconds that a call may take. A process that takes longer counts as hung: it is killed,
                and the stage is lost. None: no limit.
            options: Ray's options for the process.
            restart_timeout: seconds in which a new process must be ready, or `cluster.wait` if that is more.
        """
        import ray

        self.name = name
        self._deadline = deadline
        self._restart_timeout = max(restart_timeout, config.cluster.wait)
        # Each group has threads of its own. So a call of one group need not wait for a call of another.
        groups = {
            "control": 1,
            "weights": 1,
            "generate": config.concurrent_groups,
            "embed": embeds_at_once(config),
        }
        remote = ray.remote(concurrency_groups=groups)(_Process)
        self._new: Callable[[], _Life] = lambda: _Life(remote.options(**options).remote(name, make, config, workload))
        self._life = self._new()
        self._place: tuple[int, str] = (0, "")

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Calls a method of the stage in its process, and returns (report, *payloads). Payloads are references.

        Raises what the stage raised if its message says all (`_USERS`), and WeightMismatch with the name of the stage.
        Raises StageLost if the process died, if it took longer than the deadline, if it lost a process of its own, or
        if a payload was lost with the process that held it. Any other error of the stage is raised as Ray's
        RayTaskError.
        """
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

        payloads: list[Any] = []
        results: list[Any] = []
        packed = bytes(encode(without_payloads(list(args), payloads, ray.ObjectRef)))
        num_payloads = method.payloads_of(args)
        options: dict[str, Any] = {"num_returns": 1 + num_payloads}
        if method.beside:
            options["concurrency_group"] = method.beside
        # The process of this moment: a restart may put another in its place while this call waits. And a timeout that
        # never expires: the question below is asked also if the call fails before its own timeout begins.
        within, life = asyncio.timeout(None), self._life
        try:
            # The deadline is for calls. To load a model may take longer.
            if not life.started:
                await self.pid()
                life.started = True
            references = life.actor.call.options(**options).remote(method.name, packed, *payloads)
            report, *results = references if num_payloads else [references]
            async with asyncio.timeout(self._deadline) as within:
                return decode(await report), *results
        except (ActorDiedError, ActorUnavailableError) as error:
            # Another call may have had the process killed, and only that call knows why.
            why = life.ended_because or f"{self.name} was lost during {method.name}: {error}"
            raise StageLost(self.name, why) from error
        # This comes before TimeoutError: Ray derives its error from the stage's own, so it may be of both classes.
        except RayTaskError as error:
            # The payloads hold the same error. Ray prints errors that nobody has looked at, with all its own frames.
            for payload in results:
                with contextlib.suppress(RayTaskError):
                    await payload
            if isinstance(error.cause, _USERS):
                raise error.cause from None
            if isinstance(error.cause, WeightMismatch):
                raise WeightMismatch(f"{self.name}: {error.cause}") from None
            # The stage has lost a process of its own, such as vLLM's engine. It is of no use without it.
            if isinstance(error.cause, StageLost):
                raise StageLost(self.name, await self._end(life, f"{self.name}: {error.cause}")) from None
            raise
        except TimeoutError:
            # Only the end of our own deadline means that the process hangs.
            if not within.expired():
                raise
            why = f"{self.name} did not finish {method.name} within {self._deadline} s (rollouts.hang_after)"
            raise StageLost(self.name, await self._end(life, why)) from None
        except ObjectLostError as error:
            raise StageLost(
                None, f"a payload for {self.name}.{method.name} was lost with its process: {error}"
            ) from error

    async def restart(self) -> None:
        """Starts a new process in the place of the lost one, and waits until it is ready.

        Raises StageLost if the new process dies, or is not ready in time. Raises the user's
        error because of which the stage cannot be made.
        """
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        # The old process may still live, for example if only a payload was lost. It would keep its GPU.
        await self._end(self._life, f"{self.name} was restarted")
        self._life = self._new()
        try:
            async with asyncio.timeout(self._restart_timeout):
                await self.pid()
        except TimeoutError:
            why = f"no new process was there within {self._restart_timeout:g} s"
            raise StageLost(self.name, f"{self.name} did not come back: {why}") from None
        except (ActorDiedError, ActorUnavailableError) as error:
            raise StageLost(self.name, f"{self.name} did not come back: {error}") from error

    async def pid(self) -> int:
        """Returns the number of the process that runs the stage now. It waits until the process has made the stage.

        Raises the user's error because of which the stage could not be made.
        """
        from ray.exceptions import RayTaskError

        try:
            self._place = await self._life.actor.pid.remote()
            return self._place[0]
        except RayTaskError as error:
            if isinstance(error.cause, _USERS):
                raise error.cause from None
            raise

    def places(self) -> list[tuple[str, int, str]]:
        """Returns (name, number, node) of the process that runs the stage, as it was when it was last asked, in a list."""
        return [(self.name, *self._place)]

    async def pids(self) -> list[int]:
        """Returns the number of the process that runs the stage now, in a list. Raises StageLost if it has died."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        try:
            return [await self.pid()]
        except (ActorDiedError, ActorUnavailableError) as error:
            raise StageLost(self.name, f"{self.name} was lost: {error}") from error

    async def _end(self, life: _Life, why: str) -> str:
        """Kills a process, and waits at most `KILL_TIMEOUT` seconds for Ray to accept that.

        The process is given as an argument, so that this cannot hit a new one that has taken its place meanwhile.

        Returns the first reason for which it was killed. All its calls are told that, and not only that it is dead.
        """
        life.ended_because = life.ended_because or why
        ended: Future[None] = Future()

        def end() -> None:
            try:
                _kill(life.actor)
            finally:
                ended.set_result(None)

        # The call of Ray may hang. In a daemon thread it keeps neither the event loop nor the end of Python waiting.
        threading.Thread(target=end, name=f"{self.name}-end", daemon=True).start()
        # Shielded, because the timeout would otherwise cancel the future, and the thread could not set its result then.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(ended)), KILL_TIMEOUT)
        return life.ended_because

    def kill(self) -> None:
        """Kills the process that runs the stage now. This is a call of Ray and may hang."""
        _kill(self._life.actor)


def _kill(actor: Any) -> None:
    """Orders Ray to kill the process of an actor."""
    import ray

    ray.kill(actor)


def _free(reserved: Any) -> None:
    """Gives the room of a placement group back."""
    from ray.util import remove_placement_group

    remove_placement_group(reserved)


class RayGang:
    """Carries a policy learner of several ranks. To the controller the ranks are one stage.

    A call goes to all ranks with the same arguments, because they meet inside it to exchange data. What rank 0 returns
    is the answer of the stage. Some methods go to rank 0 alone (`Method.ranks`).

    If one rank is lost, the whole stage is lost. The other ranks cannot go on without it.
    """

    def __init__(
        self,
        name: str,
        make_rank: MakeRank,
        config: R2MConfig,
        workload: Workload,
        options: Callable[[int], dict[str, Any]],
    ) -> None:
        """Starts one process for each of `learner.num_ranks` ranks, and does not wait for them.

        Args:
            name: the name of the stage. The processes are called NAME-0, NAME-1, and so on.
            make_rank: returns the function that makes one rank.
            config: the config of the run, as `placed` returned it.
            workload: what that function gets besides the config.
            options: returns Ray's options for the process of a rank.
        """
        import ray
        import torch

        self.name = name
        # In ZeRO stage 3 every rank holds only a part of each weight. Below that, every rank holds whole weights.
        self._rank_0_is_whole = config.learner.zero_stage < 3
        # The driver holds the store at which the ranks meet. It does not wait for them here.
        host = ray.util.get_node_ip_address()
        self._store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.ranks = tuple(
            RayStage(f"{name}-{rank}", make_rank(rank, host, self._store.port), config, workload, None, options(rank))
            for rank in range(config.learner.num_ranks)
        )

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Calls a method of the ranks that it goes to, and returns (report, *payloads) of rank 0.

        A payload of which each rank has a part becomes a `Shares`. Raises what a rank raises, as `RayStage.call` does.
        """
        if method.ranks == "first" or (method.ranks == "whole" and self._rank_0_is_whole):
            return await self.ranks[0].call(method, *args)
        calls = [asyncio.create_task(rank.call(method, *args)) for rank in self.ranks]
        try:
            await _ended(calls)
        finally:
            # After an error nobody waits for the other ranks any more.
            for call in calls:
                call.cancel()
        (report, *payloads), *others = (call.result() for call in calls)
        for place in method.shares:
            payloads[place] = Shares((payloads[place], *(other[1 + place] for other in others)))
        return report, *payloads

    async def restart(self) -> None:
        """Raises StageLost: a policy learner that is lost cannot be restarted."""
        raise StageLost(self.name, f"{self.name} will not come back: its ranks are not started again one by one")

    def places(self) -> list[tuple[str, int, str]]:
        """Returns (name, number, node) of the process of each rank."""
        return [place for rank in self.ranks for place in rank.places()]

    async def pids(self) -> list[int]:
        """Returns the numbers of the processes, in the order of ranks."""
        return [await rank.pid() for rank in self.ranks]

    def kill(self) -> None:
        """Kills the processes of all ranks. This is a call of Ray and may hang."""
        for rank in self.ranks:
            rank.kill()


_LAST_WORDS = 10.0
"""Seconds that the other ranks have to fail, too, after one has failed.

The error of the first may only be a consequence of the loss of another, and Ray may report that loss later.
"""


async def _ended(calls: list[asyncio.Task[Any]]) -> None:
    """Waits until the calls of all ranks have ended. Raises an error if one of them failed.

    If several failed, the loss of a rank is raised rather than what this loss did to the other ranks.
    """
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
