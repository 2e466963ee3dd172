"""The replay queue keeps every part of every group until both learners have used it.

The queue only stores parts and hands them out. The schedule decides when a group may come in and when it is freed.
A part lives with the queue and not with the actor that made it. So the death of that actor loses nothing that the
queue has acknowledged.

If the queue itself is lost, the controller gives a new one the same parts (`r2m_async/ring/queue.py`). With a journal
(`queue.journal`), finished groups survive the death of the whole run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from actors.group_journal import ENDING, GroupJournal, read_journal
from r2m_async.codec import decode, encode
from r2m_async.errors import DiskError
from r2m_async.whole import disk_errors


class ReplayQueue:
    """A store of named parts of groups, such as `group`, `feedback` and `embeddings`."""

    opaque = True
    """The queue never looks into a payload. So the process around it hands payloads over without decoding them."""

    def __init__(self, buffers: bool = False) -> None:
        """Begins empty. buffers: whether payloads are encoded bytes. They are objects if the ring is in one process."""
        self._groups: dict[int, dict[str, Any]] = {}
        """The parts of each group by name."""
        self._num_parts = 0
        self._buffers = buffers
        self._journal: GroupJournal | None = None

    def put(self, group_id: int, names: tuple[str, ...], *payloads: Any) -> tuple[int]:
        """Adds parts to a group. A part replaces an older one of the same name.

        The return acknowledges the parts: from then on the queue keeps them.

        Args:
            group_id: the group that the parts belong to.
            names: a name for each part.
            payloads: the parts, in the order of `names`.

        Returns the number of parts in the whole queue. Raises ValueError unless each payload has a name.
        """
        self._keep(group_id, dict(zip(names, payloads, strict=True)))
        return (self._num_parts,)

    def _keep(self, group_id: int, parts: dict[str, Any]) -> None:
        """Adds parts to a group, and counts them."""
        kept = self._groups.setdefault(group_id, {})
        before = len(kept)
        kept |= parts
        self._num_parts += len(kept) - before

    def get(self, group_ids: tuple[int, ...], name: str) -> tuple[None, *tuple[Any, ...]]:
        """Returns the part of this name of each group, in their order. They stay in the queue.

        Raises KeyError, naming the group and the part, if the queue does not have one.
        """
        for group_id in group_ids:
            if name not in self._groups.get(group_id, {}):
                raise KeyError(f"group {group_id} has no {name!r} in the replay queue")
        return None, *(self._groups[group_id][name] for group_id in group_ids)

    def free(self, group_ids: tuple[int, ...]) -> tuple[int]:
        """Forgets all parts of these groups. Returns the number of parts that are left in the queue.

        Groups that the queue does not have are ignored.
        """
        for group_id in group_ids:
            self._num_parts -= len(self._groups.pop(group_id, ()))
        return (self._num_parts,)

    # The journal

    def begin_journal(
        self, path: str, max_bytes: int, names: tuple[str, ...], entries: list[dict[str, Any]]
    ) -> tuple[dict[str, int]]:
        """Begins a new journal with the groups of some entries, and then removes all others in the folder.

        Killed at any moment, it leaves the groups in the old journals or in the new one. Raises DiskError.

        Args:
            path: the file.
            max_bytes: the most bytes that it may have.
            names: the parts of each group that are kept.
            entries: what `recover` will return for each group. A group that was freed meanwhile is left out.

        Returns the journal's `bytes`, and how many groups are `without_room`.
        """
        there = [entry for entry in entries if self._has(entry["group_id"], names)]
        groups = ((entry, self._encoded_parts(entry["group_id"], names)) for entry in there)
        self._journal = GroupJournal(Path(path), max_bytes, groups)
        with disk_errors(Path(path).parent, doing="cleared"):
            for other in Path(path).parent.glob(f"*{ENDING}"):
                if other != Path(path):
                    other.unlink(missing_ok=True)
        return ({"bytes": self._journal.num_bytes, "without_room": self._journal.num_without_room},)

    def reopen_journal(self, path: str, max_bytes: int) -> tuple[int]:
        """Goes on with the journal of a queue that was lost. Raises DiskError.

        path, max_bytes: as for `begin_journal`.

        Returns the bytes of the journal.
        """
        self._journal = GroupJournal.reopened(Path(path), max_bytes)
        return (self._journal.num_bytes,)

    def _has(self, group_id: int, names: tuple[str, ...]) -> bool:
        """Whether the queue has all these parts of a group."""
        return all(name in self._groups.get(group_id, {}) for name in names)

    def _encoded_parts(self, group_id: int, names: tuple[str, ...]) -> dict[str, bytes]:
        return {name: bytes(self._encoded(self._groups[group_id][name])) for name in names}

    def keep(self, group_id: int, names: tuple[str, ...], entry: dict[str, Any]) -> tuple[int]:
        """Appends a group to the journal, with these of its parts.

        entry: what `recover` will return for the group.

        Returns the bytes of the journal, or 0 if it has no room for the group. A group that was freed meanwhile is not
        appended. Raises DiskError.
        """
        assert self._journal is not None
        if not self._has(group_id, names):
            return (self._journal.num_bytes,)
        return (self._journal.num_bytes if self._journal.append(entry, self._encoded_parts(group_id, names)) else 0,)

    def recover(self, directory: str) -> tuple[dict[str, Any]]:
        """Takes up the groups of all journals in a folder.

        Returns the entries by group under `entries`, and what is wrong with the journals under `damages`. If a group
        occurs more than once, the newest record counts.
        """
        entries: dict[int, Any] = {}
        damages: list[str] = []
        # By name, the longer one later: that of step 1000000 is newer than that of step 999999.
        for path in sorted(Path(directory).glob(f"*{ENDING}"), key=lambda path: (len(path.name), path.name)):
            try:
                for record in read_journal(path):
                    if isinstance(record, str):
                        damages.append(record)
                        continue
                    entry, parts = record
                    entries[entry["group_id"]] = entry
                    self._keep(entry["group_id"], {name: self._payload(part) for name, part in parts.items()})
            except DiskError as error:
                damages.append(str(error))
        return ({"entries": entries, "damages": damages},)

    # Checkpoints

    def write(self, path: str, payload: Any) -> tuple[dict[str, Any] | None]:
        """Writes a payload to a file of a checkpoint, so that its bytes need not pass through the driver.

        Returns the file's entry in the manifest, or None if this machine does not have the folder. If the disk refuses, the
        result has the number of the system's error under `errno`: who asked knows what the checkpoint is called.
        """
        if not Path(path).parent.is_dir():
            return (None,)
        data = memoryview(self._encoded(payload)).cast("B")
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            return ({"errno": error.errno},)
        # The digest is of the bytes in memory. So a reader notices what went wrong on their way to the disk.
        return ({"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)},)

    def _encoded(self, payload: Any) -> Any:
        return payload if self._buffers else encode(payload)

    def _payload(self, data: bytes) -> Any:
        if not self._buffers:
            return decode(data)
        import numpy as np

        return np.frombuffer(data, np.uint8)
