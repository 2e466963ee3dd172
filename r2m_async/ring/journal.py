"""Keeps finished groups between two checkpoints, and takes them up again in a run that is resumed.

The queue writes the file and reads it. What is decided here is which groups are worth keeping, and which may be used
again. A checkpoint of step k brings the policy versions up to k back. So a group is kept if no token of it was sampled
with a later version: those versions are lost with the run. It is used again under its ticket and its versions if it
belongs to a step that is still to come, and if its age is within the bounds. All others are generated anew.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r2m_async.ring.stages import Payload
from r2m_async.ring.state import RingState, now
from r2m_async.ring.waiting import WORKING
from r2m_async.schedule import Admission
from r2m_async.trajectories import GroupReport, Ticket

PARTS = ("group", "feedback")
"""The parts of a group that are kept. The annotators make its embeddings anew."""


class Journal:
    """What the controller knows of the journal of a run."""

    def __init__(self, state: RingState, make_ticket: Callable[[Admission], Ticket]) -> None:
        """Begins without a journal. `make_ticket` turns an admission into a ticket."""
        self._state, self._make_ticket = state, make_ticket
        self._num_without_room = 0
        self._path: str | None = None
        """The file of the journal, once it has begun."""
        self._turn = asyncio.Lock()
        """Held during each call for the journal. If the queue is lost, calls are made again, and in any order."""
        self.recovered: dict[str, Any] = {}
        """What became of the groups that `recover` found: `taken`, how many are used again; `left`, how many are not, by
        reason; `damages`, what is wrong with the files."""
        self._newest_kept: int | None = None
        """The newest policy version that a kept group may have: that of the newest checkpoint."""
        self._step = 0
        """The policy step in which `_entries` was last looked through."""
        self._entries: dict[int, dict[str, Any]] = {}
        """What would be written of each group that has arrived, until its step is trained."""

    async def begin(self, directory: str) -> None:
        """Begins the journal of the checkpoint that was just saved. The older ones are removed.

        directory: the folder of the journals. Raises DiskError.
        """
        state, step = self._state, self._state.schedule.policy_version
        if not (size := state.config.queue.journal):
            return
        path = str(Path(directory) / f"step-{step:06d}.groups")
        async with self._turn:
            self._newest_kept = step
            self._forget()
            # In one call, so that the groups are at every moment in the old journal or in the new one.
            entries = [entry for _, entry in sorted(self._entries.items()) if self._is_kept(entry)]
            begun = await state.calls.ask(state.stages.queue.begin_journal(path, size, PARTS, entries))
            self._path = path
        self._num_without_room += begun["without_room"]
        self._measure(begun["bytes"])

    def forget(self, group_id: int) -> None:
        """Forgets a group that will be generated again: what is known of it is not true of the parts that will come."""
        self._entries.pop(group_id, None)

    def _forget(self) -> None:
        """Forgets the groups that are trained or given up."""
        holds = self._state.schedule.holds
        self._step = self._state.schedule.policy_version
        self._entries = {group_id: entry for group_id, entry in self._entries.items() if holds(group_id)}

    async def arrived(self, ticket: Ticket, refill: int, report: GroupReport) -> None:
        """Keeps a group that has arrived, if a resumed run could use it."""
        if self._step != self._state.schedule.policy_version:  # once a step, or they would grow with the run
            self._forget()
        self._entries[ticket.group_id] = {
            "group_id": ticket.group_id,
            "attempt": ticket.attempt,
            "refill": refill,
            "report": report,
        }
        if self._newest_kept is not None:
            await self._keep(ticket.group_id)

    def told(self) -> list[str]:
        """Says in lines what `recover` found."""
        if not self.recovered:
            return []
        left = "".join(f", {count} left out ({reason})" for reason, count in sorted(self.recovered["left"].items()))
        return [f"journal: {self.recovered['taken']} finished groups taken up again{left}", *self.recovered["damages"]]

    async def _keep(self, group_id: int) -> None:
        """Writes a group that has arrived, if no token of it is of a later version than the checkpoint's."""
        state = self._state
        async with self._turn:
            entry = self._entries.get(group_id)
            if entry is None or not self._is_kept(entry):
                return
            kept = await state.calls.ask(state.stages.queue.keep(group_id, PARTS, entry), about=f"group {group_id}")
        if not kept:
            self._num_without_room += 1
        self._measure(kept or state.config.queue.journal)

    async def reopen(self) -> None:
        """Lets a new process of the queue go on with the journal. Calls of the queue must wait meanwhile. Raises DiskError."""
        if self._path is not None:
            queue, size = self._state.stages.queue, self._state.config.queue.journal
            await self._state.waits.work(
                queue.reopen_journal(self._path, size), f"{queue.name} reopen_journal", WORKING
            )

    def _is_kept(self, entry: dict[str, Any]) -> bool:
        """Whether a group that has arrived is worth keeping: a resumed run has all versions of which it has tokens."""
        return self._newest_kept is not None and entry["report"].newest_version <= self._newest_kept

    def _measure(self, num_bytes: int) -> None:
        """Notes how many bytes the journal has."""
        self._state.metrics.standing["journal"] = {
            "journal/bytes": float(num_bytes),
            "journal/groups_without_room": float(self._num_without_room),
        }

    async def recover(self, directory: str) -> list[tuple[Ticket, GroupReport, Payload]]:
        """Takes up the groups of the journals in a folder, as if they had just arrived.

        It must be called before the first admission. Returns (ticket, report, group) for each. `recovered` says what
        became of all of them.
        """
        state, schedule = self._state, self._state.schedule
        found = await state.calls.ask(state.stages.queue.recover(directory))
        taken, left = [], Counter({"damaged": len(found["damages"])})
        for group_id, entry in sorted(found["entries"].items()):
            report, refill = entry["report"], entry["refill"]
            reason = "newer_version" if report.newest_version > schedule.policy_version else None
            reason = reason or schedule.readmit(
                group_id, report.attempt, refill, report.oldest_version, report.num_bytes, now()
            )
            if reason:
                left[reason] += 1
                await state.queue.free((group_id,))
                continue
            self._entries[group_id] = entry
            admission = Admission(
                group_id=group_id,
                due_step=schedule.plan.due_step(group_id),
                attempt=report.attempt,
                policy_version=report.oldest_version,
                refill=refill,
            )
            parts = [(await state.queue.get((group_id,), name))[0] for name in PARTS]
            # It has these parts already. From now on it could be given them again, like those of any other group.
            await state.queue.put(group_id, PARTS, *parts, about=f"group {group_id}")
            taken.append((self._make_ticket(admission), report, parts[0]))
        self.recovered = {"taken": len(taken), "left": dict(+left), "damages": found["damages"]}
        return taken
