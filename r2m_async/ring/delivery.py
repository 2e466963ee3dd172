"""Brings versions of the policy into the engines of rollout actors.

Under `weights.transport: object_store` a payload holds the tensors themselves. All other transports are direct: the
policy learner sends the tensors to each engine over a channel.

    learner  open_channel ------> join            engine     once for each process of an engine
             connect      <-----> (both meet)
             send         ------> load_weights               for each version

If one side waits for the other in vain, the engine counts as lost, and not the learner. So the run can go on with a new
engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from r2m_async.config import R2MConfig
from r2m_async.errors import StageLost
from r2m_async.ring.calls import Calls
from r2m_async.ring.stages import Payload, RolloutStage, Stages
from r2m_async.ring.waiting import Waits
from r2m_async.trajectories import StepReport

T = TypeVar("T")


class Delivery:
    """Gives versions of the policy to rollout actors, by the transport that `weights.transport` names."""

    def __init__(self, config: R2MConfig, stages: Stages, waits: Waits, calls: Calls) -> None:
        """Begins without channels.

        Args:
            config: the config of the run.
            stages: the stages of the ring.
            waits: the waits of the controller's event loop.
            calls: makes the calls of stages.
        """
        self._config, self._stages = config, stages
        self._waits, self._calls = waits, calls
        self._sending = asyncio.Lock()
        """Whoever holds this lock has the learner's sending side to itself."""

    async def connect(self, actor: RolloutStage) -> None:
        """Opens a channel from the policy learner to the new process of an actor.

        It does nothing if the transport is not direct. Raises StageLost, naming the actor, if the two do not meet.
        """
        if not self._config.weights.direct:
            return
        index, policy = self._stages.rollouts.index(actor), self._stages.policy
        async with self._exchange(actor):
            channel = await self._calls.ask(policy.open_channel(index), about=actor.name)
            joining = self._calls.ask(actor.join(channel))
            await self._meet(actor, joining, self._calls.ask(policy.connect(index), about=actor.name))

    async def load(self, actor: RolloutStage, version: int, weights: Payload) -> StepReport:
        """Loads a version of the policy into the engine of an actor.

        Args:
            actor: the rollout actor. `connect` must have been called for its present process.
            version: the number of the version.
            weights: the payload that the policy learner published for this version.

        Returns the report of the actor. Raises StageLost, naming the actor, if the transfer fails.
        """
        if not self._config.weights.direct:
            return await self._calls.traced(actor.load_weights(weights, {}), step=version)
        index, policy = self._stages.rollouts.index(actor), self._stages.policy
        async with self._exchange(actor):
            sent: dict[str, Any] = {}
            if self._config.weights.transport == "ipc":
                # `send` returns handles of GPU memory. The engine cannot begin to load before it has them.
                sent = await self._calls.ask(policy.send(index, version), about=actor.name)
                sending: Awaitable[dict[str, Any]] = _already(sent)
            else:
                # A broadcast needs both sides at once: the engine receives while the learner sends.
                sending = self._calls.ask(policy.send(index, version), about=actor.name)
            loading = self._calls.traced(actor.load_weights(weights, sent), step=version)
            return await self._meet(actor, loading, sending)

    @contextlib.asynccontextmanager
    async def _exchange(self, actor: RolloutStage) -> AsyncIterator[None]:
        """Lets one actor at a time exchange something with the learner, and limits how long that may take.

        The learner serves one engine at a time. Without this queue, the deadline of one engine would run while the
        learner serves another.

        Raises StageLost, naming the actor, if the exchange takes longer than 3 x `weights.timeout` seconds.
        """
        await self._waits.work(self._sending.acquire(), actor.name, "the learner to send it weights")
        timeout = self._config.weights.timeout
        try:
            try:
                # Both sides have deadlines of their own, `weights.timeout` for each part. This one is for NCCL, which
                # has none: a broadcast whose other side is gone may hang for ever.
                async with asyncio.timeout(3 * timeout) as within:
                    yield
            except TimeoutError:
                # A TimeoutError of a stage is no end of this deadline.
                if not within.expired():
                    raise
                raise StageLost(
                    actor.name,
                    f"{actor.name} and the learner did not meet within 3 x {timeout} s (weights.timeout)",
                ) from None
        finally:
            self._sending.release()

    async def _meet(self, actor: RolloutStage, receiving: Awaitable[T], sending: Awaitable[dict[str, Any]]) -> T:
        """Waits for both sides of an exchange. If the learner's side fails, it does not wait for the other, which may hang.

        Args:
            actor: the rollout actor that receives.
            receiving: the actor's side.
            sending: the learner's side. Its answer has the key `failed` if it could not send.

        Returns the answer of the receiving side. Raises what either side raised, and StageLost, naming the actor, if
        the learner could not send.
        """
        both = receives, sends = asyncio.ensure_future(receiving), asyncio.ensure_future(sending)
        # asyncio complains of an error that nobody has looked at.
        receives.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            # The learner's error comes first: if both sides failed, the actor's error is only a consequence. And if the actor
            # has failed, the learner is still busy with it, and can serve nobody else.
            sent = await sends
            if "failed" in sent:
                raise StageLost(actor.name, f"the learner could not send {actor.name} its weights: {sent['failed']}")
            return await receives
        finally:
            for side in both:
                side.cancel()


async def _already(value: T) -> T:
    """An awaitable of a value that is there already."""
    return value
