"""The file in which the replay queue keeps finished groups between two checkpoints.

    magic "R2MJ" | format u32 | records
    record: length u64 | XXH3-128 digest of the content | content (`codec.encode`)

The content of a record is `{"entry": ..., "parts": {name: bytes, ...}}`. Records are only appended. A writer that is
killed may leave a part of its last record, which is no damage. Bytes that were changed are: such a record is left out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from r2m_async.codec import decode, encode
from r2m_async.errors import CodecError
from r2m_async.whole import append, disk_errors, whole_file

_HEADER = struct.pack("<4sI", b"R2MJ", 1)
_RECORD = struct.Struct("<Q16s")
ENDING = ".groups"
"""How the name of a journal ends."""


class GroupJournal:
    """Appends groups to one file, up to a number of bytes."""

    def __init__(
        self, path: Path, max_bytes: int, groups: Iterable[tuple[dict[str, Any], Mapping[str, bytes]]] = ()
    ) -> None:
        """Makes the file, in a folder that is made too. An old file stays until the new one has all groups. Raises DiskError.

        Args:
            path: the file.
            max_bytes: the most bytes that it may have.
            groups: the (entry, parts) that it has from the start, as far as there is room.
        """
        self._path, self._max_bytes = path, max_bytes
        self.num_bytes = len(_HEADER)
        """The bytes of the file."""
        self.num_without_room = 0
        """How many of `groups` had no room."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(_HEADER)
            for group in groups:
                if (record := self._record(*group)) is None:
                    self.num_without_room += 1
                    continue
                file.write(record)
                self.num_bytes += len(record)

    @classmethod
    def reopened(cls, path: Path, max_bytes: int) -> GroupJournal:
        """Goes on with a file, of which a killed writer may have left a part of the last record. Makes it if it is gone.

        Raises DiskError.
        """
        with disk_errors(path):
            if not path.is_file():
                return cls(path, max_bytes)
            journal = cls.__new__(cls)
            journal._path, journal._max_bytes, journal.num_without_room = path, max_bytes, 0
            journal.num_bytes = _end_of_records(path)
            # Nothing behind a part of a record could be found.
            os.truncate(path, journal.num_bytes)
        return journal

    def append(self, entry: dict[str, Any], parts: Mapping[str, bytes]) -> bool:
        """Appends a group. Returns False, and appends nothing, if the file would become too large.

        entry: what the controller must know of the group. parts: its encoded parts by name.

        Raises DiskError, and has then appended nothing.
        """
        if (record := self._record(entry, parts)) is None:
            return False
        append(self._path, record)
        self.num_bytes += len(record)
        return True

    def _record(self, entry: dict[str, Any], parts: Mapping[str, bytes]) -> bytes | None:
        """The record of a group, or None if the file would become too large."""
        content = encode({"entry": entry, "parts": dict(parts)})
        if self.num_bytes + _RECORD.size + len(content) > self._max_bytes:
            return None
        return _RECORD.pack(len(content), xxhash.xxh3_128_digest(content)) + bytes(content)


def _end_of_records(path: Path) -> int:
    """The number of bytes of a journal up to the end of its last whole record."""
    size, end = path.stat().st_size, len(_HEADER)
    with path.open("rb") as file:
        while file.seek(end) is not None and len(head := file.read(_RECORD.size)) == _RECORD.size:
            behind = end + _RECORD.size + _RECORD.unpack(head)[0]
            if behind > size:
                break
            end = behind
    return end


def read_journal(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]] | str]:
    """Yields the (entry, parts) of each record of a journal, and for each that is damaged what is wrong with it.

    Raises DiskError if the file cannot be read.
    """
    with disk_errors(path, doing="read"), path.open("rb") as file:
        if file.read(len(_HEADER)) != _HEADER:
            yield f"{path}: is no journal of groups, or one of another version of r2m-async"
            return
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            at = file.tell()
            length, digest = _RECORD.unpack(head)
            left = path.stat().st_size - at
            if length > left:
                # Either the writer was killed here, or the length is damaged. Nothing behind it can be found.
                yield f"{path}: ends within the record at byte {at}, which has {left} of {length} bytes"
                return
            content = file.read(length)
            if xxhash.xxh3_128_digest(content) != digest:
                yield f"{path}: the record at byte {at} is damaged: it does not have its digest"
                continue
            try:
                record = decode(content)
                yield record["entry"], record["parts"]
            except (CodecError, KeyError, TypeError) as error:
                yield f"{path}: the record at byte {at} cannot be read: {error}"
