"""Ends groups that are late, under `scheduling.overage: mask` and `drop`."""

from __future__ import annotations

import asyncio
import contextlib

from r2m_async.errors import StageLost
from r2m_async.ring.stages import RolloutStage
from r2m_async.ring.state import RingState, now
from r2m_async.ring.tasks import together


async def overage_loop(state: RingState) -> None:
    """Consumes the deadlines of groups under `overage: mask` and `drop`. Waits for the next deadline, or for a change
    if there is none. It is unblocked by the clock, or by any change in the ring. Produces aborts of late groups, and
    under `drop` it also gives these groups up."""
    schedule, waits = state.schedule, state.waits
    by_name = {actor.name: actor for actor in state.stages.rollouts}
    # A group stays late until it has arrived. This set keeps it from being aborted a second time.
    aborted: set[tuple[int, int, str]] = set()
    if schedule.plan.overage == "wait":
        return
    # Every abort is a task of its own, so that an actor which does not answer cannot delay the other aborts.
    async with together() as aborts:
        while True:
            deadline = schedule.next_deadline(after=aborted)
            if deadline is None:
                await waits.change("overage", "a group that others wait for")
                continue
            if (wait := deadline - now()) > 0:
                # Whatever happens during this sleep can only bring later deadlines, never an earlier one.
                await asyncio.sleep(wait)
                continue
            # A timer may go off too early, by up to the resolution of its clock. The group must count as late then.
            late = [group for group in schedule.late(max(deadline, now())) if group not in aborted]
            aborted = {group for group in aborted if schedule.holds(group[0])} | set(late)
            if schedule.plan.overage == "drop":
                for group_id, _, _ in late:
                    schedule.void(group_id, "overage")
                waits.notify()
            for group_id, attempt, worker in late:
                aborts.create_task(_abort(state, by_name[worker], group_id, attempt))


async def _abort(state: RingState, actor: RolloutStage, group_id: int, attempt: int) -> None:
    """Ends an attempt at a group early. An actor that is lost needs no abort, and its own loop notices the loss."""
    with contextlib.suppress(StageLost):
        await state.calls.ask(actor.abort(group_id, attempt), about=f"group {group_id}")
