"""Calls the reward functions of a run: at the same time, with a deadline each, and again if a call fails.

The functions run in threads of their own, never in the thread of the caller, who computes embeddings meanwhile.

    one group's calls ---> supervisor (an event loop): starts, deadlines, retries
                              |--- `def`:       a thread for each call
                              '--- `async def`: one further event loop for all of them

A quick `def` is called for one response after the other, in order, as all functions once were. A call that has not
returned after `_PATIENCE` is slow, and the next one begins beside it. So functions that wait for something wait
together, and functions that only compute need not be safe against themselves in other threads.

A thread cannot be stopped. If a `def` misses its deadline, its thread is left behind, and ends with the process. Once
`MOST_LEFT` of them still run, no more is begun, and the run ends: they would take all memory or all threads one day.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from r2m_async.config import R2MConfig, RewardFunction
from r2m_async.cpu_threads import share_threads
from r2m_async.errors import FunctionFailed, FunctionsHang, RewardFailed, all_at_once
from r2m_async.finite import response_name
from r2m_async.function_loops import OncePerProcess, turning_loop
from r2m_async.plugins import end_child, finite_number, nearest, own_failure
from r2m_async.rewards.arguments import Signature, find_function, known_arguments
from r2m_async.trajectories import TrajectoryGroup

T = TypeVar("T")

log = logging.getLogger(__name__)

_PATIENCE = 0.02
"""Seconds after which a call counts as slow."""
MOST_LEFT = 64
"""The most threads of calls that have missed their deadline and still run."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0
"""Seconds before the first retry, and the most before any. Each pause is twice the one before."""

Values = tuple[tuple[float, ...], ...]
"""For each response of a group, the greedy twin last, the number that each function returned, in the config's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """A reward function that was found, and how it is called."""

    key: str
    """Its key in the config, for messages."""
    name: str
    """Its name, which is that of its metric."""
    setting: RewardFunction
    call: Callable[..., Any]
    signature: Signature

    @property
    def is_async(self) -> bool:
        """Whether calling it returns an awaitable at once."""
        call = self.call
        while isinstance(call, functools.partial):
            call = call.func
        return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


def functions_of(config: R2MConfig) -> list[_Function]:
    """Finds the reward functions of a config.

    Raises ConfigError if functions cannot be found, or options do not fit, with a line for each function.
    """
    listed = isinstance(config.reward.functions, tuple)
    found = []

    def find(name: str, setting: RewardFunction) -> None:
        key = "reward.functions" if listed else f"reward.functions.{name}"
        call = find_function(key, setting)
        signature = Signature.of(call, setting.options, noted=config.rollouts.function is not None)
        found.append(_Function(key=key, name=name, setting=setting, call=call, signature=signature))

    all_at_once(*(functools.partial(find, *item) for item in config.reward.named_functions.items()))
    return found


def gold_of(config: R2MConfig) -> _Function | None:
    """Finds the gold function of a config, or returns None without one. Raises ConfigError if it cannot be found."""
    if config.evaluation.gold is None:
        return None
    setting = RewardFunction(function=config.evaluation.gold)
    call = find_function("evaluation.gold", setting)
    signature = Signature.of(call, places=("prompt", "response", "finished"))
    return _Function(key="evaluation.gold", name="gold", setting=setting, call=call, signature=signature)


def start_calls(group: TrajectoryGroup, config: R2MConfig, functions: list[_Function] | None = None) -> Future[Values]:
    """Starts the calls of functions for all responses of a group, and returns at once.

    functions: what is called. None takes the reward functions of the config.

    The greedy twin, if the group has one, is the last response.

    The result is the `Values`. It raises FunctionFailed for the first failure, in the order of responses and functions,
    if its function has no `retries`. If it has, it raises RewardFailed once the last try has failed. For a group of an
    evaluation, whose loss would leave a gap, the value is then NaN instead, and a line in the log says why.

    A call fails if the function raises anything, returns no number, or takes longer than its `timeout`. A number that
    is not finite is a failure unless `learner.on_nonfinite` is `skip` and the function has no retries.
    """
    functions = functions_of(config) if functions is None else functions
    strict = config.learner.on_nonfinite == "stop"
    return asyncio.run_coroutine_threadsafe(_values(functions, group, strict), _loops().supervisor)


async def _values(functions: list[_Function], group: TrajectoryGroup, strict: bool) -> Values:
    """Does what `start_calls` describes, on the supervisor's loop."""
    responses = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
    tasks = []
    for index, one in enumerate(responses):
        place = f"{group.ticket.place}, {response_name(index, len(group.trajectories))}"
        # Each function gets arguments of its own, because it may change them.
        calls = [
            _Call(function=function, known=known_arguments(group.ticket.prompt, one), place=place, strict=strict)
            for function in functions
        ]
        tasks.append([asyncio.create_task(_value(call, group.ticket.group_id)) for call in calls])
    for task in (task for row in tasks for task in row):
        # asyncio logs a complaint about an exception that nobody has looked at.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        # One after the other: the first failure in this order is told, whichever came first.
        return tuple([tuple([await task for task in row]) for row in tasks])
    finally:
        for task in (task for row in tasks for task in row):
            task.cancel()


async def _value(call: _Call, group_id: int) -> float:
    """The number that one function returns for one response, tried as often as its setting says."""
    retries, pause = call.function.setting.retries, _FIRST_PAUSE
    for tries in range(1, retries + 2):
        try:
            return await call.made()
        except FunctionsHang:
            raise
        except FunctionFailed as failure:
            if not retries:
                raise
            if tries <= retries:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            message = f"{failure}\nIt was tried {tries} times."
            if group_id >= 0:
                raise RewardFailed(f"reward.{call.function.name}", message) from None
            log.warning("%s", message)
    return math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call of a function for one response. It may be made several times."""

    function: _Function
    known: dict[str, Any]
    """All that the function can be given."""
    place: str
    """The name of the response, for messages."""
    strict: bool
    """Whether NaN and infinity are failures of every function, and not only of those with retries."""

    async def made(self) -> float:
        """Makes the call, and returns its number. Raises FunctionFailed, also if it takes longer than its timeout."""
        setting, thread = self.function.setting, None
        if self.function.is_async:
            began = time.monotonic()
            running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._in_loop(), _loops().coroutines))
        else:
            async with _loops().turn:
                self._check_room()
                began = time.monotonic()
                ended, thread = _in_thread(self._in_thread, setting.function)
                running = asyncio.wrap_future(ended)
                await asyncio.wait([running], timeout=min(_PATIENCE, setting.timeout))
        try:
            await asyncio.wait([running], timeout=max(0.0, began + setting.timeout - time.monotonic()))
            if running.done() and not running.cancelled():
                result = running.result()
                if isinstance(result, FunctionFailed):
                    raise result
                return result
            # The function's own code may cancel its task. Nobody else does before the deadline.
            early = running.done() and time.monotonic() < began + setting.timeout
        finally:
            if thread is not None and not running.done():
                _loops().left.append(thread)
            running.cancel()
        why = "was cancelled by itself" if early else f"did not return within {setting.timeout:g} s, its timeout"
        raise FunctionFailed(f"{self.place}: {self.function.key} {setting.function!r} {why}")

    def _check_room(self) -> None:
        """Raises FunctionsHang if too many threads were left behind and still run."""
        loops = _loops()
        loops.left = [thread for thread in loops.left if thread.is_alive()]
        if len(loops.left) >= MOST_LEFT:
            raise FunctionsHang(
                f"{self.place}: {self.function.key} {self.function.setting.function!r} was not called: {len(loops.left)} calls "
                f"of reward functions were given up, most for their timeout, and still run in threads that nobody can stop; "
                f"give what the functions wait for a deadline of its own, or make them `async def`"
            )

    # Errors are results here. Raised, SystemExit would end a thread or a loop without a word.

    async def _in_loop(self) -> float | FunctionFailed:
        """Makes the call of an `async def`, on the loop of all coroutines."""
        try:
            awaitable = self._begun()
        except BaseException as error:  # of arguments that do not fit
            return self._failure(error)
        return await self._outcome(awaitable)

    def _in_thread(self) -> float | FunctionFailed:
        """Makes the call of a `def`, in a thread of its own."""
        pid = os.getpid()
        # A model that a function runs would else keep its graph, as if it were trained.
        torch.set_grad_enabled(False)
        try:
            value = self._begun()
            # A function may fork. Its child must not go on as a second run.
            if os.getpid() != pid:
                raise SystemExit
        except BaseException as error:
            if os.getpid() != pid:
                end_child(error)
            return self._failure(error)
        if inspect.isawaitable(value):  # a `def` that returns what an `async def` returned
            try:
                return asyncio.run_coroutine_threadsafe(self._outcome(value), _loops().coroutines).result()
            except CancelledError as error:  # by the function itself: nobody else has this future
                return self._failure(error)
        return self._number(value)

    def _begun(self) -> Any:
        """What the function returns."""
        arguments, keywords = self.function.signature.arguments(self.known)
        # The function may change its options, too.
        return self.function.call(*arguments, **keywords, **copy.deepcopy(self.function.setting.options))

    async def _outcome(self, awaitable: Awaitable[Any]) -> float | FunctionFailed:
        try:
            value = await awaitable
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return self._failure(error)
        return self._number(value)

    def _number(self, value: Any) -> float | FunctionFailed:
        """The number that a function returned, or why it is none."""
        setting = self.function.setting
        try:
            finite = self.strict or setting.retries > 0
            return finite_number(value, self.function.key, setting.function, self.place, finite)
        except FunctionFailed as failure:
            return failure

    def _failure(self, error: BaseException) -> FunctionFailed:
        """What is told of an error that the function raised. Its traceback leaves out the frame that caught it."""
        what, frames = own_failure(error)
        # The next frame is that of `_begun`, where the function was called and not awaited.
        if error.__traceback__ and (inner := error.__traceback__.tb_next) and inner.tb_frame.f_code is _BEGUN:
            what, frames = own_failure(error.with_traceback(inner))
        given, name = "", error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(name, str) and self.function.signature.takes_all and name not in self.known:
            given = (
                f"\n(if {name!r} is to be a column of the data: this record has none of the name{nearest(name, self.known) or '.'} "
                f"The function is given {', '.join(map(repr, self.known))}, and its options. Correct the name, or make it a "
                f"parameter: `r2m check` then looks for it in every record)"
            )
        return FunctionFailed(
            f"{self.place}: {self.function.key} {self.function.setting.function!r} raised {what}{frames}{given}"
        )


_BEGUN = _Call._begun.__code__


def _in_thread(work: Callable[[], T], name: str) -> tuple[Future[T], threading.Thread]:
    """Runs something in a new thread, which does not keep the process from ending. Returns its result, and the thread."""
    ended: Future[T] = Future()

    def run() -> None:
        share_threads()
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as failed:  # who waits must hear of it, and not wait for the deadline
            error = failed
        if not ended.set_running_or_notify_cancel():  # its deadline has passed, and nobody waits for it
            return
        if error is None:
            ended.set_result(cast(T, result))
        else:
            ended.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return ended, thread


class _Loops:
    """The two event loops of a process."""

    def __init__(self) -> None:
        """Starts both."""
        self.supervisor = turning_loop("reward-supervisor")
        self.coroutines = turning_loop("reward-coroutines")
        """Where the `async def` functions run. One that blocks holds up the others, but not their deadlines."""
        self.left: list[threading.Thread] = []
        """The threads whose calls were given up. Some may have ended since. The supervisor's loop alone changes it."""
        self.turn = asyncio.Lock()
        """Whoever holds it may start a call of a `def`. It is given in the order in which it is asked for."""


_loops = OncePerProcess(_Loops)
