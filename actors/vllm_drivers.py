"""Two ways to run vLLM behind one interface, `Driver`.

`SteppedDriver` runs the engine in this process, step by step. What happens depends on the order of calls alone, so
synchronous and exact runs use it. `AsyncDriver` runs the engine in a process of its own, which keeps generating while
this process encodes and sends. Both drivers are called from several threads at once, one thread per group.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# These are set before vLLM is imported, because some of them are read during the import.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # our worker is written for the V1 model runner
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # on a CPU vLLM would compile one helper, for 20 s
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or all engines of a machine would share its first core

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.llm_engine import LLMEngine

from actors.aborts import Aborted
from actors.vllm_worker import CHILD
from r2m_async.errors import GenerationFailed, StageLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request to vLLM: a prompt, and how to sample one response or several."""

    request_id: str
    """A name that no other running request has. `abort` takes it."""
    token_ids: tuple[int, ...]
    """The tokens of the prompt."""
    params: SamplingParams
    cache_salt: str
    """Two requests share entries of the prefix cache only if they have the same salt."""
    ends: Callable[[Sequence[int]], bool] | None = None
    """Is given the tokens of the one response so far, and says whether it ends there. vLLM may then have sampled more.
    None: vLLM alone ends it."""

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt in the form that vLLM takes."""
        return {"prompt_token_ids": list(self.token_ids), "cache_salt": self.cache_salt}


@dataclass(slots=True)
class Completed:
    """What a request generated.

    A response that an abort cut short may be missing. If it is there, its finish_reason is None or `abort`.
    """

    outputs: dict[int, CompletionOutput] = field(default_factory=dict)
    """The responses by their index, which counts from 0."""
    prompt_logprobs: Any = None
    """vLLM's log-probabilities of the prompt's tokens; None if the request asked for none."""


def _failure(request: Request, completed: Completed) -> GenerationFailed | None:
    """What is wrong with a request that nobody has aborted, if vLLM has not finished it."""
    # Where `Request.ends` has ended it, vLLM gives no reason.
    whole = ("stop", "length", None) if request.ends else ("stop", "length")
    reasons = [one.finish_reason for one in completed.outputs.values()]
    if len(reasons) < request.params.n or any(reason not in whole for reason in reasons):
        return GenerationFailed(
            f"vLLM ended request {request.request_id} by itself: {len(reasons)} of {request.params.n} responses came, with "
            f"the finish_reasons {reasons}"
        )
    return None


class Driver(ABC):
    """A vLLM engine that is running."""

    def update(self, info: dict[str, Any], version: int, keep_cache: bool) -> float:
        """Replaces the weights between two steps. Running requests stay and go on with the new weights.

        Args:
            info: what the workers' transfer engine needs to receive the weights.
            version: the policy version of the new weights.
            keep_cache: whether running requests go on with the keys and values that the old weights computed. If not,
                all cached keys and values are dropped, and running requests compute theirs anew.

        Returns the seconds from pause to resume. Raises RuntimeError if vLLM did not drop its caches.
        """
        began = time.perf_counter()
        # A step in the middle would compute with a mixture of weights, or label its states with the wrong version.
        with self._paused():
            self.rpc("r2m_update", info=info, version=version)
            self.set_weight_version(str(version))
            if not keep_cache and not self._reset_cache():
                raise RuntimeError(
                    f"vLLM did not drop its caches at policy version {version}: stale states would remain"
                )
        return time.perf_counter() - began

    @abstractmethod
    def generate(self, requests: list[Request]) -> list[Completed]:
        """Runs requests until all of them have ended. Returns what each generated, in the same order.

        Raises GenerationFailed if vLLM did not finish one that nobody has aborted.
        """
        ...

    @abstractmethod
    def start(self, request: Request, done: Callable[[Completed | BaseException], None]) -> None:
        """Begins with a request. Calls `done` once, from any thread, with what it generated or with what went wrong."""
        ...

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """Ends the requests of these names. One that has not come yet ends as soon as it comes."""

    @abstractmethod
    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        """Calls a method of every worker of the engine. Returns their answers."""
        ...

    @abstractmethod
    def close(self) -> None:
        """Shuts the engine down."""
        ...

    @abstractmethod
    def _paused(self) -> AbstractContextManager[None]:
        """A block during which the engine takes no step."""
        ...

    @abstractmethod
    def set_weight_version(self, version: str) -> None:
        """Tells vLLM with which version to label the tokens that it samples from here on."""
        ...

    @abstractmethod
    def _reset_cache(self) -> bool:
        """Drops all cached keys and values, those of running requests too. Returns whether vLLM did so."""
        ...


class SteppedDriver(Driver):
    """Runs the engine in this process. Each thread that waits for a group takes steps, and a step serves all groups."""

    def __init__(self, args: AsyncEngineArgs, timeout: float) -> None:
        """Starts the engine.

        Args:
            args: vLLM's arguments.
            timeout: the seconds that a call to the workers (`rpc`) may take.
        """
        # Processes that vLLM starts from here on end with this process (`vllm_worker.register`).
        os.environ[CHILD] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._timeout = timeout
        if args.enforce_eager:
            leave_transformers_alone()
        self._engine = LLMEngine.from_engine_args(args)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._running: dict[str, Completed] = {}
        self._ends: dict[str, Callable[[Sequence[int]], bool]] = {}
        """What else ends a running request, by its name."""
        self._finished: set[str] = set()
        self._aborted = Aborted()

    def generate(self, requests: list[Request]) -> list[Completed]:
        """Takes steps until these requests have ended (`Driver.generate`)."""
        ids = {request.request_id for request in requests}
        with self._alone():
            for request in requests:
                self._running[request.request_id] = Completed()
                if request.ends:
                    self._ends[request.request_id] = request.ends
                if request.request_id in self._aborted:
                    self._finished.add(request.request_id)
                else:
                    self._engine.add_request(request.request_id, request.prompt, request.params)
        while True:
            # The engine is given back after every step, so that other threads can add and abort groups in between.
            with self._alone():
                if ids <= self._finished:
                    self._finished -= ids
                    for name in ids:
                        self._ends.pop(name, None)
                    completed = [self._running.pop(request.request_id) for request in requests]
                    aborted = [request.request_id in self._aborted for request in requests]
                    self._aborted.forget(ids)
                    break
                self._step()
        for request, one, cut in zip(requests, completed, aborted, strict=True):
            if not cut and (failure := _failure(request, one)):
                raise failure
        return completed

    def start(self, request: Request, done: Callable[[Completed | BaseException], None]) -> None:
        """Takes steps until the request has ended (`Driver.start`)."""
        try:
            (completed,) = self.generate([request])
        except Exception as error:
            done(error)
        else:
            done(completed)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Gives the engine to the calling thread alone. A thread that has it already may enter again.

        The turn makes this fair. A thread that waits for the lock holds the turn. So a thread that steps in a loop
        cannot take the lock again before the waiting thread has had it.
        """
        # No lock is needed to read the owner: only this thread ever writes its own id there.
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
        """Takes one step of the engine and sorts what came out of it by request."""
        for output in self._engine.step():
            completed = self._running[output.request_id]
            # An output has all tokens of its response so far, so it takes the place of the older one.
            completed.outputs |= {one.index: one for one in output.outputs}
            completed.prompt_logprobs = output.prompt_logprobs or completed.prompt_logprobs
            ends = self._ends.get(output.request_id)
            if not output.finished and ends and ends(completed.outputs[0].token_ids):
                self._engine.abort_request([output.request_id])
                self._finished.add(output.request_id)
            if output.finished:
                self._finished.add(output.request_id)

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests between two steps (`Driver.abort`)."""
        with self._alone():
            self._aborted.add(request_ids)
            running = [one for one in request_ids if one in self._running and one not in self._finished]
            self._engine.abort_request(running)
            self._finished.update(running)

    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        """Calls a method of every worker between two steps (`Driver.rpc`)."""
        with self._alone():
            return self._engine.collective_rpc(method, self._timeout, kwargs=arguments)

    def close(self) -> None:
        """Shuts the engine down."""
        self._engine.engine_core.shutdown()

    def _paused(self) -> AbstractContextManager[None]:
        return self._alone()

    def set_weight_version(self, version: str) -> None:
        """Tells vLLM with which version to label the tokens that it samples from here on."""
        self._engine.set_weight_version(version)

    def _reset_cache(self) -> bool:
        return self._engine.reset_prefix_cache(reset_running_requests=True)


def leave_transformers_alone() -> None:
    """Keeps vLLM from marking transformers' own model classes for compilation.

    vLLM runs some architectures, GPTNeoX for one, with transformers' code. It then marks transformers' class for
    compilation, even in eager mode. Other models of that class in this process could no longer be called.
    """
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_cls_for_torch_compile = lambda self, **_: None


class AsyncDriver(Driver):
    """Runs `AsyncLLM` on an event loop in a thread of its own. Its engine core is a process that dies with this one.

    Every call raises StageLost if the engine core is dead. `abort`, `rpc`, `update` and `set_weight_version` also raise
    it if the engine core does not answer within `timeout` seconds.
    """

    def __init__(self, args: AsyncEngineArgs, timeout: float) -> None:
        """Starts the engine.

        Args:
            args: vLLM's arguments.
            timeout: the seconds that the engine core has for an answer, except for `generate` and `close`.
        """
        self._timeout = timeout
        # Only the event loop's thread touches the names of running and of aborted requests. So they need no lock.
        self._running: set[str] = set()
        self._aborted = Aborted()
        os.environ[CHILD] = "1"  # processes that vLLM starts from here on end with this process
        # With "1", vLLM on a CPU would put even a single worker into one more process, below the engine core's.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if args.tensor_parallel_size == 1 else "1"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()

        # A coroutine, because AsyncLLM begins to handle outputs at once only if it is made inside a running event loop.
        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(args)

        self._engine = self._run(start())

    def generate(self, requests: list[Request]) -> list[Completed]:
        """Waits until these requests have ended (`Driver.generate`)."""

        async def all_of_them() -> list[Completed]:
            return await asyncio.gather(*(self._generate(request) for request in requests))

        return self._run(all_of_them())

    def start(self, request: Request, done: Callable[[Completed | BaseException], None]) -> None:
        """Begins with a request (`Driver.start`)."""

        def ended(future: Future[Completed]) -> None:
            error = future.exception()
            if isinstance(error, EngineDeadError):
                error = _engine_died(error)
            done(future.result() if error is None else error)

        asyncio.run_coroutine_threadsafe(self._generate(request), self._loop).add_done_callback(ended)

    async def _generate(self, request: Request) -> Completed:
        """Runs one request to its end."""
        completed, name, cut = Completed(), request.request_id, False
        try:
            # Nothing is awaited between this look and the name's entry among the running requests. So an abort is seen
            # either here or, because it repeats itself while the request runs, by vLLM.
            if name in self._aborted:
                return completed
            params = request.params.clone()
            params.output_kind = RequestOutputKind.CUMULATIVE if request.ends else RequestOutputKind.FINAL_ONLY
            self._running.add(name)
            async for output in self._engine.generate(request.prompt, params, name):
                completed.outputs = {one.index: one for one in output.outputs if one is not None}
                completed.prompt_logprobs = output.prompt_logprobs
                if request.ends and not (cut or output.finished) and request.ends(completed.outputs[0].token_ids):
                    # vLLM has taken the request in, so it hears this abort, and the outputs end.
                    cut = True
                    await self._engine.abort([name])
            ended_here = cut or name in self._aborted
            failure = None if ended_here else _failure(request, completed)
            if ended_here or failure:
                # The step that the request was in may still be writing states into the group's block of the slab.
                await self._engine.collective_rpc("r2m_settle", self._timeout)
            if failure:
                raise failure
        except EngineGenerateError as error:
            raise GenerationFailed(f"vLLM failed to generate request {name}: {error.__cause__!r}") from error
        finally:
            self._running.discard(name)
            self._aborted.forget([name])
        return completed

    def abort(self, request_ids: list[str]) -> None:
        """Waits until the running requests of these names have ended (`Driver.abort`)."""

        async def until_ended() -> None:
            self._aborted.add(request_ids)
            # Once is not enough: vLLM forgets an abort that comes before it has taken the request in.
            while not self._running.isdisjoint(request_ids):
                await self._engine.abort(request_ids)
                await asyncio.sleep(0.01)

        self._run(until_ended(), self._timeout)

    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        """Calls a method of every worker (`Driver.rpc`)."""
        return self._run(self._engine.collective_rpc(method, self._timeout, kwargs=arguments), self._timeout)

    def close(self) -> None:
        """Shuts the engine core and the event loop down."""

        async def stop() -> None:
            if self._engine.output_handler is not None:
                self._engine.output_handler.cancel()
            self._engine.shutdown(timeout=1)
            # A loop that stops with tasks left would have asyncio complain of them.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._run(stop())
        del self._engine
        self._loop.call_soon_threadsafe(self._loop.stop)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        # What `pause_generation` does, without its sleep of 20 ms at the end.
        core = self._engine.engine_core
        self._run(core.pause_scheduler_async(mode="keep", clear_cache=False), self._timeout)
        # There is no `finally`: after an error the engine stays paused, because half-loaded weights must not run.
        yield
        self._run(self._engine.resume_generation(), self._timeout)

    def set_weight_version(self, version: str) -> None:
        """Tells vLLM with which version to label the tokens that it samples from here on."""
        self._run(self._engine.update_weight_version(version), self._timeout)

    def _reset_cache(self) -> bool:
        return self._run(self._engine.reset_prefix_cache(reset_running_requests=True), self._timeout)

    def _run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Runs a coroutine on the event loop and waits for what it returns.

        Raises StageLost if the engine core is dead, or takes longer than `timeout` seconds.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except EngineDeadError as error:
            raise _engine_died(error) from error
        except TimeoutError:
            future.cancel()
            # Without a deadline of its own, a call has one in what it asks of the workers.
            within = self._timeout if timeout is None else timeout
            raise StageLost(None, f"vLLM's engine process did not answer within {within} s") from None


def _engine_died(error: EngineDeadError) -> StageLost:
    return StageLost(None, f"vLLM's engine process died: {error}")
