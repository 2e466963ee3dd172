"""Two ways to drive vLLM behind one seam: stepped here, call by call, or by `AsyncLLM` in processes of its own.

`SteppedDriver` has the engine in this process: what happens is a function of the order of calls, so synchronous and
exact runs use it. `AsyncDriver` lets vLLM run ahead while this process encodes and sends. Both are called from several
threads at once, one per group.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles one helper there, for 20 s
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all engines of a machine share its first core

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from actors.vllm_worker import CHILD
from r2m_async.errors import StageLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str
    """Requests share prefix-cache entries only under the same salt."""

    @property
    def prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.token_ids), "cache_salt": self.cache_salt}


@dataclass(slots=True)
class Completed:
    """A request's responses by index; those that an abort cut short have no finish_reason or `abort`."""

    outputs: dict[int, CompletionOutput] = field(default_factory=dict)
    prompt_logprobs: Any = None


class _Aborted:
    """Names that were aborted, until their requests have come and gone. Not to be used by several threads at once.

    A request that has gone before its abort comes will not come again, nor will that of a lost attempt; so only the
    newest `LIMIT` names are kept. Those whose requests are on their way are among them: at most two per group that an
    actor generates at once.
    """

    LIMIT = 4096

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        self._names |= dict.fromkeys(names)
        for name in list(itertools.islice(self._names, max(0, len(self) - self.LIMIT))):
            del self._names[name]

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._names.pop(name, None)


class Driver(ABC):
    """An engine that is running."""

    def update(self, info: dict[str, Any], version: int, keep_cache: bool) -> float:
        """Swaps the weights between two steps, requests kept; returns the seconds from pause to resume.

        Caches of the old weights are dropped, running requests recompute theirs, unless `keep_cache`.
        """
        began = time.perf_counter()
        with self._paused():
            for call, arguments in (
                ("start_weight_update", {}),
                ("update_weights", {"update_info": info}),
                ("finish_weight_update", {}),
                ("r2m_set_version", {"version": version}),
            ):
                self.rpc(call, **arguments)
            self.set_weight_version(str(version))
            if not keep_cache and not self._reset_cache():
                raise RuntimeError(
                    f"vLLM did not drop its caches at policy version {version}: stale states would remain"
                )
        return time.perf_counter() - began

    @abstractmethod
    def generate(self, requests: list[Request]) -> list[Completed]: ...

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """Ends requests that run, and those of these names that come later at once."""

    @abstractmethod
    def rpc(self, method: str, **arguments: Any) -> list[Any]: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _paused(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def set_weight_version(self, version: str) -> None: ...

    @abstractmethod
    def _reset_cache(self) -> bool: ...


class SteppedDriver(Driver):
    """Whoever waits for a group takes the next step for all of them."""

    def __init__(self, args: AsyncEngineArgs, timeout: float) -> None:
        os.environ[CHILD] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._timeout = timeout
        if args.enforce_eager:
            leave_transformers_alone()
        self._engine = LLMEngine.from_engine_args(args)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._running: dict[str, Completed] = {}
        self._finished: set[str] = set()
        self._aborted = _Aborted()

    def generate(self, requests: list[Request]) -> list[Completed]:
        ids = {request.request_id for request in requests}
        with self._alone():
            for request in requests:
                self._running[request.request_id] = Completed()
                if request.request_id in self._aborted:
                    self._finished.add(request.request_id)
                else:
                    self._engine.add_request(request.request_id, request.prompt, request.params)
        while True:
            with self._alone():
                if ids <= self._finished:
                    self._finished -= ids
                    self._aborted.forget(ids)
                    return [self._running.pop(request.request_id) for request in requests]
                self._step()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Whoever waits holds the turn, so that the one who steps again and again cannot overtake it."""
        if self._owner == threading.get_ident():
            yield
            return
        with self._turn:
            self._lock.acquire()
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def _step(self) -> None:
        for output in self._engine.step():
            completed = self._running[output.request_id]
            completed.outputs |= {one.index: one for one in output.outputs}
            completed.prompt_logprobs = output.prompt_logprobs or completed.prompt_logprobs
            if output.finished:
                self._finished.add(output.request_id)

    def abort(self, request_ids: list[str]) -> None:
        with self._alone():
            self._aborted.add(request_ids)
            running = [one for one in request_ids if one in self._running and one not in self._finished]
            self._engine.abort_request(running)
            self._finished.update(running)

    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        with self._alone():
            return self._engine.collective_rpc(method, self._timeout, kwargs=arguments)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _paused(self) -> AbstractContextManager[None]:
        return self._alone()

    def set_weight_version(self, version: str) -> None:
        self._engine.set_weight_version(version)

    def _reset_cache(self) -> bool:
        return self._engine.reset_prefix_cache(reset_running_requests=True)


def leave_transformers_alone() -> None:
    """Where vLLM runs an architecture by transformers' code (GPTNeoX), it marks transformers' own class for compilation,
    in eager mode too, and models of this process that are not vLLM's can no longer be called."""
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_cls_for_torch_compile = lambda self, **_: None


class AsyncDriver(Driver):
    """`AsyncLLM` on an event loop in a thread of its own, its engine core in a process that dies with this one.

    A dead engine core raises StageLost from whatever is called, and so does one that takes longer than `timeout` seconds
    for anything but generating.
    """

    def __init__(self, args: AsyncEngineArgs, timeout: float) -> None:
        self._timeout = timeout
        self._running: set[str] = set()
        self._aborted = _Aborted()
        os.environ[CHILD] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if args.tensor_parallel_size == 1 else "1"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(args)

        self._engine = self._run(start())

    def generate(self, requests: list[Request]) -> list[Completed]:
        async def all_of_them() -> list[Completed]:
            return await asyncio.gather(*(self._generate(request) for request in requests))

        return self._run(all_of_them())

    async def _generate(self, request: Request) -> Completed:
        completed, name = Completed(), request.request_id
        try:
            if name in self._aborted:
                return completed
            params = request.params.clone()
            params.output_kind = RequestOutputKind.FINAL_ONLY
            self._running.add(name)
            async for output in self._engine.generate(request.prompt, params, name):
                completed.outputs = {one.index: one for one in output.outputs if one is not None}
                completed.prompt_logprobs = output.prompt_logprobs
            if name in self._aborted:  # the step that it was in may still be writing its states
                await self._engine.collective_rpc("r2m_settle", self._timeout)
        finally:
            self._running.discard(name)
            self._aborted.forget([name])
        return completed

    def abort(self, request_ids: list[str]) -> None:
        async def until_ended() -> None:
            self._aborted.add(request_ids)
            while not self._running.isdisjoint(request_ids):  # vLLM forgets an abort that comes before its request
                await self._engine.abort(request_ids)
                await asyncio.sleep(0.01)

        self._run(until_ended(), self._timeout)

    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        return self._run(self._engine.collective_rpc(method, self._timeout, kwargs=arguments), self._timeout)

    def close(self) -> None:
        async def stop() -> None:
            if self._engine.output_handler is not None:
                self._engine.output_handler.cancel()
            self._engine.shutdown(timeout=1)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._run(stop())
        del self._engine
        self._loop.call_soon_threadsafe(self._loop.stop)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._run(self._engine.pause_generation(mode="keep", clear_cache=False), self._timeout)
        yield
        self._run(
            self._engine.resume_generation(), self._timeout
        )  # not after an error: half-loaded weights must not run

    def set_weight_version(self, version: str) -> None:
        self._run(self._engine.update_weight_version(version), self._timeout)

    def _reset_cache(self) -> bool:
        return self._run(self._engine.reset_prefix_cache(reset_running_requests=True), self._timeout)

    def _run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except EngineDeadError as error:
            raise StageLost(None, f"vLLM's engine process died: {error}") from error
        except TimeoutError:
            future.cancel()
            raise StageLost(None, f"vLLM's engine process did not answer within {timeout} s") from None
