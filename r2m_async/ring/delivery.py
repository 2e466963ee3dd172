"""Weights into engines: by their tensors, or over a channel between the learner and each engine.

    learner  open_channel ------> join            engine     once for each process of an engine
             connect      <-----> (both meet)
             send         ------> load_weights               for each version

Where either side misses the other, the engine is lost and not the learner: the run goes on with a new engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar, cast

from r2m_async.config import R2MConfig
from r2m_async.errors import StageLost
from r2m_async.ring.calls import Calls
from r2m_async.ring.stages import Payload, RolloutStage, Stages
from r2m_async.ring.waiting import Waits
from r2m_async.trajectories import StepReport

T = TypeVar("T")


class Delivery:
    """Gives rollout actors versions of the policy, as `weights.transport` says."""

    def __init__(self, config: R2MConfig, stages: Stages, waits: Waits, calls: Calls) -> None:
        self._config, self._stages = config, stages
        self._waits, self._calls = waits, calls
        self._sending = asyncio.Lock()

    async def connect(self, actor: RolloutStage) -> None:
        """Opens a channel from the learner to the actor's new process, where the learner sends weights itself."""
        if not self._config.weights.direct:
            return
        index, policy = self._stages.rollouts.index(actor), self._stages.policy
        async with self._exchange(actor):
            channel = await self._calls.ask(policy.open_channel(index), about=actor.name)
            joining = self._calls.ask(actor.join(channel))
            await self._meet(actor, joining, self._calls.ask(policy.connect(index), about=actor.name))

    async def load(self, actor: RolloutStage, version: int, weights: Payload) -> StepReport:
        """Gives the actor a version. Raises StageLost naming the actor if it missed the learner."""
        index, policy = self._stages.rollouts.index(actor), self._stages.policy
        if not self._config.weights.direct:
            return await self._calls.traced(actor.load_weights(weights, {}), step=version)
        async with self._exchange(actor):
            sent: dict[str, Any] = {}
            if self._config.weights.transport == "ipc":  # handles to fetch by: the engine needs them before it loads
                sent = await self._calls.ask(policy.send(index, version), about=actor.name)
                sending: Awaitable[dict[str, Any]] = _already(sent)
            else:  # the engine receives while the learner sends
                sending = self._calls.ask(policy.send(index, version), about=actor.name)
            loading = self._calls.traced(actor.load_weights(weights, sent), step=version)
            return await self._meet(actor, loading, sending)

    @contextlib.asynccontextmanager
    async def _exchange(self, actor: RolloutStage) -> AsyncIterator[None]:
        """One at a time, because the learner serves one at a time: no engine's deadline runs while it serves another.

        Raises StageLost naming the actor if the learner's end gets stuck, which NCCL's may.
        """
        await self._waits.work(self._sending.acquire(), actor.name, "the learner to send it weights")
        timeout = self._config.weights.timeout
        try:
            try:
                async with asyncio.timeout(3 * timeout) as within:
                    yield
            except TimeoutError:
                if not within.expired():
                    raise
                raise StageLost(
                    actor.name,
                    f"{actor.name} and the learner did not meet within 3 x {timeout} s (weights.timeout)",
                ) from None
        finally:
            self._sending.release()

    async def _meet(self, actor: RolloutStage, receiving: Awaitable[T], sending: Awaitable[dict[str, Any]]) -> T:
        """What the receiver returns. Raises StageLost naming the actor if either side missed the other."""
        received, sent = await asyncio.gather(receiving, sending, return_exceptions=True)
        if isinstance(sent, BaseException):  # first: what the receiver met is then what this did to it
            raise sent
        if "failed" in sent:
            raise StageLost(actor.name, f"the learner could not send {actor.name} its weights: {sent['failed']}")
        if isinstance(received, BaseException):
            raise received
        return cast(T, received)


async def _already(value: T) -> T:
    return value
