"""The replay queue keeps every part of every group until both learners have used it.

The queue only stores parts and hands them out. The schedule decides when a group may come in and when it is freed.
A part lives with the queue and not with the actor that made it. So the death of that actor loses nothing that the
queue has acknowledged.
"""

from __future__ import annotations

from typing import Any


class ReplayQueue:
    """A store of named parts of groups, such as `group`, `feedback` and `embeddings`."""

    opaque = True
    """The queue never looks into a payload. So the process around it hands payloads over without decoding them."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, str], Any] = {}

    def put(self, group_id: int, names: tuple[str, ...], *payloads: Any) -> tuple[int]:
        """Adds parts to a group. A part replaces an older one of the same name.

        The return acknowledges the parts: from then on the queue keeps them.

        Args:
            group_id: the group that the parts belong to.
            names: a name for each part.
            payloads: the parts, in the order of `names`.

        Returns the number of parts in the whole queue. Raises ValueError unless each payload has a name.
        """
        for name, payload in zip(names, payloads, strict=True):
            self._parts[group_id, name] = payload
        return (len(self._parts),)

    def get(self, group_id: int, name: str) -> tuple[None, Any]:
        """Returns one part of a group, which stays in the queue.

        Raises KeyError, naming the group and the part, if the queue does not have it.
        """
        if (group_id, name) not in self._parts:
            raise KeyError(f"group {group_id} has no {name!r} in the replay queue")
        return None, self._parts[group_id, name]

    def free(self, group_ids: tuple[int, ...]) -> tuple[int]:
        """Forgets all parts of these groups. Returns the number of parts that are left in the queue.

        Groups that the queue does not have are ignored.
        """
        freed = set(group_ids)
        self._parts = {key: payload for key, payload in self._parts.items() if key[0] not in freed}
        return (len(self._parts),)
