"""The replay queue: holds every payload of every group until both learners have passed it.

It stores and hands out; when a group may come in and when it is freed is the schedule's decision. A payload put here
lives with the queue, so the death of the actor that made it loses nothing that was acknowledged.
"""

from __future__ import annotations

from typing import Any

from r2m_async.ring.stages import produces


class ReplayQueue:
    opaque = True
    """Payloads pass through as they came: the queue reads none of them."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, str], Any] = {}

    @produces(0)
    def put(self, group_id: int, names: tuple[str, ...], *payloads: Any) -> tuple[int]:
        """Adds parts to a group, replacing those of the same name; the return acknowledges."""
        for name, payload in zip(names, payloads, strict=True):
            self._parts[group_id, name] = payload
        return (len(self._parts),)

    @produces(1)
    def get(self, group_id: int, name: str) -> tuple[None, Any]:
        """One part of a group. Raises `KeyError` naming both if it is not there."""
        if (group_id, name) not in self._parts:
            raise KeyError(f"group {group_id} has no {name!r} in the replay queue")
        return None, self._parts[group_id, name]

    @produces(0)
    def free(self, group_ids: tuple[int, ...]) -> tuple[int]:
        """Forgets groups, whole; returns how many parts are left."""
        freed = set(group_ids)
        self._parts = {key: payload for key, payload in self._parts.items() if key[0] not in freed}
        return (len(self._parts),)
