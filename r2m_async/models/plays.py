"""Generates a group with the user's rollout function (`rollouts.function`), which is called once for each response.

    the engine's thread                              the functions' event loop
      play_group: starts the calls           --->      play(rollout), for each response
      samples the turns that are asked for   <---      await rollout.generate()
      makes trajectories of what there is    --->      ... goes on with the turn

The functions run on one event loop, in a thread of its own. So one that blocks or hangs keeps neither an abort nor new
weights nor the end of the process waiting. The engine's thread stops to wait for it, and leaves it behind.

The clock of `rollouts.function_timeout` stands still while the policy samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from r2m_async.codec import encoded_size
from r2m_async.config import R2MConfig
from r2m_async.data.seeds import ENVIRONMENT, turn_seed
from r2m_async.errors import ConfigError, FunctionFailed, GenerationFailed
from r2m_async.finite import response_name
from r2m_async.function_loops import OncePerProcess, turning_loop
from r2m_async.models.conversation import Conversation
from r2m_async.models.turns import Sample, Sampled, TurnRequest
from r2m_async.plugins import check_options, end_child, named_function, own_failure, shown
from r2m_async.rollouts import ResponseEnded, Rollout, Turn
from r2m_async.trajectories import Ticket, Trajectory, TrajectoryGroup

RolloutFunction: TypeAlias = Callable[..., Awaitable[Any]]
"""A user's rollout function, with its options. It takes a `Rollout`."""
KEY = "rollouts.function"
INFO_BYTES = 16384
"""The most bytes of `Rollout.info` of one response. A group in the queue carries it."""
TEXT_BYTES = 256
"""The most bytes of `Rollout.text` for each token that a response may have. A group in the queue carries it."""
_GLANCE = 0.05
"""Seconds between two looks of the engine's thread at whether the group was aborted."""
_LAST_WORDS = 1.0
"""Seconds that functions have to end, their `finally` blocks included, once their group has ended without them."""


def rollout_function(config: R2MConfig) -> RolloutFunction | None:
    """Finds `rollouts.function` of a config, and returns it with its options. None if the key is not set.

    A function may have an attribute `check_options`: a function that is called with the options alone, and raises
    ConfigError or ValueError if they are wrong.

    Raises ConfigError if there is no such function, if it is no `async def`, or if it does not take the options.
    """
    name, options = config.rollouts.function, dict(config.rollouts.function_options)
    if name is None:
        return None
    function = named_function(name, KEY)
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not any(map(inspect.iscoroutinefunction, (plain, getattr(plain, "__call__", None)))):  # noqa: B004
        raise ConfigError(
            f"{KEY} = {name!r} is no coroutine function: the engine must go on while it waits; define it with `async def`"
        )
    check_options(function, options, f"{KEY}_options", name, inputs=1)
    if check := getattr(function, "check_options", None):
        try:
            check(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{KEY}_options of {name!r}: {error}") from None

    def drive(rollout: Rollout) -> Any:
        return function(rollout, **copy.deepcopy(options))  # it may change them

    return drive


def play_group(
    function: RolloutFunction,
    ticket: Ticket,
    sample: Sample,
    *,
    tokenizer: Any,
    ends: Sequence[int],
    twin: bool,
    config: R2MConfig,
    at_once: int = 1,
    aborted: Callable[[], bool] = lambda: False,
) -> TrajectoryGroup:
    """Generates the group of a ticket with the user's function.

    Args:
        function: what `rollout_function` returned.
        sample: samples a turn.
        tokenizer: the policy's tokenizer.
        ends: the ids of the end-of-text tokens.
        twin: whether the group has a greedy twin.
        at_once: how many responses are generated at the same time. With 1 the group is a function of the weights and the
            ticket, if the user's function is one of what it is given.
        aborted: whether the schedule has aborted the group.

    Raises FunctionFailed if a call of the function raises, returns something, or takes too long, GenerationFailed if a turn
    is cut off while the group is not aborted, and what `sample` tells.
    """
    size = config.rollouts.group_size
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    waiting = [
        _Play(function, ticket, index, Conversation(ticket.prompt, tokenizer, ends), config, events.put)
        for index in range(size + twin)
    ]
    plays, running = tuple(waiting), list[_Play]()
    waiting.reverse()
    try:
        while running or waiting:
            while waiting and len(running) < at_once:
                running.append(waiting.pop())
                running[-1].begin()
            if aborted():
                _settle(running, events)
                break
            for play in running:
                play.check_time()
            # A glance now and then, instead of a way for every abort to wake this thread.
            with contextlib.suppress(queue.Empty):
                play, what = events.get(timeout=_GLANCE)
                if isinstance(what, TurnRequest):
                    sample(what, functools.partial(play.sampled, what))
                elif isinstance(what, _Outcome):
                    play.end(what)
                    running.remove(play)
                elif not (isinstance(what, GenerationFailed) and aborted()):
                    raise what
    finally:
        begun = plays[: len(plays) - len(waiting)]
        for play in begun:
            play.close()
        # Those that had not ended run their `finally` blocks now. One that blocks the loop is left behind.
        deadline = time.monotonic() + _LAST_WORDS
        for play in begun:
            play.gone.wait(max(0.0, deadline - time.monotonic()))
    made = tuple(play.trajectory() for play in plays)
    return TrajectoryGroup(ticket=ticket, trajectories=made[:size], greedy=made[size] if twin else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """How a call of the function ended."""

    returned: Any = None
    in_turn: bool = False
    """Whether it returned while a turn was being generated."""
    raised: BaseException | None = None


class _Play:
    """One call of the user's function: the writer of its `Rollout`.

    The methods of `Writer` run where the user's function runs. All others but `sampled` run in the engine's thread.
    """

    def __init__(
        self,
        function: RolloutFunction,
        ticket: Ticket,
        index: int,
        conversation: Conversation,
        config: R2MConfig,
        tell: Callable[[_Event], None],
    ) -> None:
        self._function, self._conversation, self._rollouts, self._tell = function, conversation, config.rollouts, tell
        self._greedy = index >= config.rollouts.group_size
        self._group_seed, self._index = ticket.seed, index
        seed, shared = (turn_seed(ticket.seed, place, ENVIRONMENT) for place in (index, ENVIRONMENT))
        own = replace(ticket.prompt, columns=copy.deepcopy(dict(ticket.prompt.columns)))
        self.rollout = Rollout(own, index, seed, shared, self)
        self.place = f"{ticket.place}, {response_name(index, config.rollouts.group_size)}"
        self._loop = _loop()
        self._task: asyncio.Task[None] | None = None
        """The call, once the loop has begun it. The loop's thread alone changes it."""
        self.gone = threading.Event()
        """Set once the function does not run any more, or never will."""
        self.settled = threading.Event()
        """Set while no turn is being sampled."""
        self.settled.set()
        self._lock = threading.Lock()
        """Guards all that follows: a function that was left behind may still run while its trajectory is made."""
        self._closed = False
        """Whether nothing more may be written."""
        self._full = False
        """Whether the response has ended for its length."""
        self._last: str | None = None
        """The finish_reason of the last turn."""
        self._turns = 0
        self._asked: Future[Turn] | None = None
        """The turn that is being sampled."""
        self._in_turn = False
        """Whether the function has asked for a turn, and has not taken it yet."""
        self._since: float | None = None
        """Since when the function has been running on its own account. None while the policy samples."""
        self._taken = 0.0
        """Seconds that it ran so before."""
        self._finish_reason = "abort"

    # The writer of a `Rollout`

    async def generate(self, max_new_tokens: int | None, stop: Sequence[str]) -> Turn:
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}: give a whole number, 1 or more, or None")
        if not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"stop is {stop!r}: give a text, or several, none of them empty")
        with self._lock:
            self._check_open("generate")
            left = self._num_left
            if left == 0:
                self._full = True
                raise ResponseEnded(f"the response has rollouts.max_new_tokens {self._rollouts.max_new_tokens} tokens")
            start = len(self._conversation.token_ids)

            def stop_in(token_ids: Sequence[int]) -> str | None:
                return self._conversation.stop_in(token_ids, start, stop)

            request = TurnRequest(
                response=self._index,
                turn=self._turns,
                token_ids=tuple(self._conversation.token_ids),
                num_before=self._conversation.num_response_tokens,
                max_new_tokens=left if max_new_tokens is None else min(left, max_new_tokens),
                seed=None if self._greedy else turn_seed(self._group_seed, self._index, self._turns),
                stop_in=stop_in if stop else None,
            )
            asked: Future[Turn] = Future()
            self._asked, self._in_turn = asked, True
            self.settled.clear()
            self._clock(False)
        self._tell((self, request))
        turn = await asyncio.wrap_future(asked)
        # Not after an error: whoever cancels this wait leaves a turn behind.
        self._in_turn = False
        return turn

    def append(self, text: str, special_tokens: bool) -> None:
        if not isinstance(text, str):
            raise ValueError(f"append was given {shown(text)}: give a text")
        with self._lock:
            self._check_open("append")
            self._conversation.add_written(self._fitting(self._conversation.ids_of(text, special_tokens)))

    def append_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        with self._lock:
            self._check_open("append_messages")
            self._conversation.add_messages(self._fitting(self._conversation.ids_of_messages(messages)), messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        with self._lock:
            return self._conversation.messages

    @property
    def response(self) -> str:
        with self._lock:
            return self._conversation.response

    @property
    def num_tokens_left(self) -> int:
        with self._lock:
            return self._num_left

    @property
    def _num_left(self) -> int:
        return self._rollouts.max_new_tokens - self._conversation.num_response_tokens

    def _fitting(self, token_ids: list[int]) -> list[int]:
        """These tokens of the environment. Raises ResponseEnded, and ends the response, if they do not fit."""
        if len(token_ids) > self._num_left:
            self._full = True
            raise ResponseEnded(
                f"{len(token_ids)} tokens were to be appended, and the response has {self._num_left} left of "
                f"rollouts.max_new_tokens {self._rollouts.max_new_tokens}"
            )
        return token_ids

    def _check_open(self, what: str) -> None:
        """Raises ResponseEnded if nothing may be written any more, and RuntimeError while a turn is being generated."""
        if self._closed or self._full:
            raise ResponseEnded("the response has ended")
        if self._in_turn:
            raise RuntimeError(f"{what} was called while a turn is being generated: await that turn first")

    def _clock(self, runs: bool) -> None:
        """Lets the clock of the function's own time run, or stops it."""
        now = time.monotonic()
        if self._since is not None:
            self._taken += now - self._since
        self._since = now if runs else None

    # The engine's thread

    def begin(self) -> None:
        """Calls the function, on the event loop."""
        with self._lock:
            self._clock(True)
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        """Begins the call, on the loop, unless the response has ended before the loop came to it."""
        if self._closed:
            self.gone.set()
            return
        self._task = self._loop.create_task(self._call())
        self._task.add_done_callback(lambda _: self.gone.set())

    async def _call(self) -> None:
        """Runs the function, and tells how it ended."""
        pid = os.getpid()
        try:
            returned = await self._function(self.rollout)
            outcome = _Outcome(returned=returned, in_turn=self._in_turn)
            # A function may fork. Its child must not go on as a second run.
            if os.getpid() != pid:
                raise SystemExit
        except BaseException as error:  # as a result: raised, SystemExit would end the loop without a word
            if os.getpid() != pid:
                end_child(error)
            outcome = _Outcome(raised=error)
        self._tell((self, outcome))

    def sampled(self, request: TurnRequest, turn: Sampled) -> None:
        """Writes down what the policy sampled, and lets the function go on. It may be called from any thread."""
        if isinstance(turn, BaseException):
            self.settled.set()
            self._tell((self, turn))
            return
        with self._lock:
            # The turn of a function that was left behind may come after the trajectory was made.
            if self._closed or self._asked is None:
                return
            self._conversation.add_sampled(turn.token_ids, turn.logprobs, turn.versions)
            self.settled.set()
            # An aborted turn is not handed out: the group ends, and the function with it. If nobody has aborted the group,
            # the function would wait for ever.
            if turn.finish_reason == "abort":
                self._tell((self, GenerationFailed(f"{self.place}: the engine ended a turn that nobody had aborted")))
                return
            self._turns += 1
            self._last = turn.finish_reason
            asked, self._asked = self._asked, None
            text = self._conversation.text_of(turn.token_ids, len(request.token_ids))
            self._clock(True)
        done = Turn(text=text, token_ids=tuple(turn.token_ids), finish_reason=turn.finish_reason, stop=turn.stop)
        # If the function has stopped to wait for it, its future is cancelled.
        if asked.set_running_or_notify_cancel():
            asked.set_result(done)

    def check_time(self) -> None:
        """Raises FunctionFailed if the function has taken longer than its timeout."""
        with self._lock:
            taken = self._taken + (0.0 if self._since is None else time.monotonic() - self._since)
        if taken > self._rollouts.function_timeout:
            raise FunctionFailed(
                f"{self.place}: {KEY} {self._rollouts.function!r} took longer than rollouts.function_timeout "
                f"{self._rollouts.function_timeout:g} s, what the policy sampled not counted{self._standing()}; raise it, or "
                f"see whether the function blocks: all responses of an actor share one event loop"
            )

    def _standing(self) -> str:
        """Says where the function waits, or which response's function holds the event loop, as a part of a message."""
        loop = next((one.ident for one in threading.enumerate() if one.name == _LOOP), None)
        below, frame = None, sys._current_frames().get(loop or 0)
        while frame is not None and frame.f_code is not _CALL:
            below, frame = frame, frame.f_back
        if frame is not None and below is not None:
            holder = frame.f_locals["self"]
            return f"; {holder.place} holds the event loop at {below.f_code.co_filename}:{below.f_lineno}"
        waits = getattr(self._task and self._task.get_coro(), "cr_await", None)
        place = getattr(waits, "cr_frame", None)
        return f"; it waits at {place.f_code.co_filename}:{place.f_lineno}" if place else ""

    def end(self, outcome: _Outcome) -> None:
        """Ends the response as the function has ended. Raises FunctionFailed if that failed."""
        named = f"{self.place}: {KEY} {self._rollouts.function!r}"
        with self._lock:
            full, last = self._full, self._last
        error = outcome.raised
        if error is not None and not (full and _is_end(error)):
            if isinstance(error, asyncio.CancelledError):
                raise FunctionFailed(f"{named} was cancelled by itself")
            # The first frame is that of `_call`.
            what, frames = own_failure(error)
            raise FunctionFailed(f"{named} raised {what}{frames}")
        if outcome.returned is not None:
            raise FunctionFailed(
                f"{named} returned {shown(outcome.returned)}: it must return nothing; note what you have found in "
                f"rollout.info"
            )
        if outcome.in_turn:
            raise FunctionFailed(f"{named} returned while a turn was being generated: await rollout.generate")
        try:
            self._check_notes(named)
        except FunctionFailed:
            raise
        except Exception as failed:  # of a dict that holds itself, or a value of the user's own class
            what, _ = own_failure(failed)
            raise FunctionFailed(f"{named} left something in rollout.info that cannot be kept: {what}") from None
        self._finish_reason = "length" if full or last == "length" else "stop"

    def _check_notes(self, named: str) -> None:
        """Raises FunctionFailed if `Rollout.info` or `Rollout.text` cannot be kept."""
        text, limit = self.rollout.text, TEXT_BYTES * self._rollouts.max_new_tokens
        if text is not None and not isinstance(text, str):
            raise FunctionFailed(f"{named} set rollout.text to {shown(text)}: give a text, or None")
        if text is not None and len(text.encode(errors="surrogatepass")) > limit:
            raise FunctionFailed(
                f"{named} set a rollout.text of {len(text)} characters: it may have {limit} bytes, {TEXT_BYTES} for each of "
                f"rollouts.max_new_tokens {self._rollouts.max_new_tokens}; shorten it"
            )
        if not isinstance(self.rollout.info, dict):
            raise FunctionFailed(f"{named} set rollout.info to {shown(self.rollout.info)}: give a dict")
        self.rollout.info = _plain(self.rollout.info, "rollout.info", named)
        if (size := encoded_size(self.rollout.info)) > INFO_BYTES:
            raise FunctionFailed(f"{named} left {size} bytes in rollout.info: it may have {INFO_BYTES}; keep less")

    def close(self) -> None:
        """Ends the response for good. A function that still runs is cancelled."""
        with self._lock:
            self._closed = True
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        """Cancels the call, on the loop."""
        if self._task is not None:
            self._task.cancel()

    def trajectory(self) -> Trajectory:
        """The response as it was when it was closed. One whose function had not ended counts as aborted."""
        ended = self._finish_reason != "abort"
        rollout = self.rollout
        return self._conversation.trajectory(
            self._finish_reason, rollout.text if ended else None, rollout.info if ended else {}
        )


_Event: TypeAlias = "tuple[_Play, TurnRequest | _Outcome | BaseException]"


def _settle(plays: Sequence[_Play], events: queue.SimpleQueue[_Event]) -> None:
    """Waits a little for the tokens of turns that were being sampled when their group was aborted."""
    with contextlib.suppress(queue.Empty):
        while True:
            play, what = events.get_nowait()
            if isinstance(what, TurnRequest):
                play.settled.set()  # nobody has begun to sample this turn
    deadline = time.monotonic() + _LAST_WORDS
    for play in plays:
        play.settled.wait(max(0.0, deadline - time.monotonic()))


def _is_end(error: BaseException) -> bool:
    """Whether an error is ResponseEnded, or a group of nothing else, as `asyncio.TaskGroup` makes them."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_end, error.exceptions))
    return isinstance(error, ResponseEnded)


def _plain(value: Any, name: str, named: str) -> Any:
    """Returns a copy of a JSON value in Python's own types. Raises FunctionFailed, naming the value, for any other."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(one, f"{name}[{key!r}]", named) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{name}[{index}]", named) for index, one in enumerate(value)]
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    raise FunctionFailed(
        f"{named} left {shown(value)} in {name}: it may have None, bools, integers of 64 bits, floats, texts, lists, and "
        f"dicts with texts as keys"
    )


_CALL = _Play._call.__code__
_LOOP = "rollout-functions"
"""The name of the event loop's thread."""
_loop = OncePerProcess(lambda: turning_loop(_LOOP))
"""The event loop of the functions of this process."""
