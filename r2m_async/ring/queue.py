"""The replay queue as the loops use it: it calls the stage, and remembers what the stage holds.

Every part of a group is a payload that this process owns. So if the stage's process is lost, a new one gets the same
parts again, and nothing has to be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from r2m_async.errors import StageLost
from r2m_async.ring.calls import Calls
from r2m_async.ring.stages import Payload, QueueStage
from r2m_async.ring.tasks import together
from r2m_async.ring.waiting import WORKING, Waits


class Queue:
    """The parts of all groups under way. Its methods are those of `QueueStage`."""

    def __init__(self, stage: QueueStage, calls: Calls, waits: Waits) -> None:
        """Begins empty, as the stage does."""
        self._stage, self._calls, self._waits = stage, calls, waits
        self._held: dict[int, dict[str, Payload]] = {}
        """What the stage holds once it has done all calls: the parts of each group by name.

        The dict of a group is never changed, because `put_again` reads it meanwhile: another takes its place.
        """

    async def put(self, group_id: int, names: tuple[str, ...], *payloads: Payload, about: str) -> None:
        """Adds parts to a group: one payload for each name. `about` says what for, in the list of waits."""
        # Before the call: if the stage is lost, nobody knows whether the parts have reached it.
        self._held[group_id] = self._held.get(group_id, {}) | dict(zip(names, payloads, strict=True))
        await self._calls.ask(self._stage.put(group_id, names, *payloads), about=about)

    async def get(self, group_ids: tuple[int, ...], name: str) -> list[Payload]:
        """Returns one part of each group, in their order. The parts stay in the queue."""
        _, *payloads = await self._calls.ask(self._stage.get(group_ids, name), about=f"{name} {list(group_ids)}")
        return payloads

    async def free(self, group_ids: Sequence[int], about: str = "") -> None:
        """Forgets all parts of some groups. `about` says which, in the list of waits."""
        for group_id in group_ids:
            self._held.pop(group_id, None)
        await self._calls.ask(self._stage.free(tuple(group_ids)), about=about)

    async def put_again(self) -> dict[int, StageLost]:
        """Gives a new process of the stage all parts that the old one held. Calls of the stage must wait meanwhile.

        Returns the groups of which a part is lost, with the reason. The new process holds nothing of them, and they must be
        given to `forget` once nobody needs their parts any more. Raises StageLost, naming the stage, if the new process dies.
        """
        lost: dict[int, tuple[dict[str, Payload], StageLost]] = {}

        async def put(group_id: int, parts: dict[str, Payload]) -> None:
            call = self._stage.put(group_id, tuple(parts), *parts.values())
            try:
                await self._waits.work(call, f"{self._stage.name} put", f"{WORKING}: group {group_id} again")
            except StageLost as error:
                if error.stage is not None:
                    raise
                lost[group_id] = parts, error

        async with together() as all_groups:
            for group_id, parts in self._held.items():
                all_groups.create_task(put(group_id, parts))

        def still_held(group_id: int, parts: dict[str, Payload]) -> bool:
            # If others have taken their place meanwhile, the `put` of those waits for the stage to be back.
            held = self._held.get(group_id, {})
            return all(held.get(name, lost) is part for name, part in parts.items())

        return {group_id: error for group_id, (parts, error) in lost.items() if still_held(group_id, parts)}

    def forget(self, group_id: int) -> None:
        """Forgets a group that the stage does not hold."""
        self._held.pop(group_id, None)
