"""Remembers what was aborted before it came."""

from __future__ import annotations

import itertools
from collections.abc import Iterable


class Aborted:
    """The names of aborted requests, until these requests have come and gone. Only one thread at a time may change it.

    An abort may come before its request. The name is then kept, so that the request ends as soon as it comes. Some
    requests never come: they had ended before the abort, or their attempt was lost on its way. So only the newest
    `LIMIT` names are kept. The names that still matter are among them, because an actor has only some requests for each
    group that it generates at once.
    """

    LIMIT = 4096
    """How many names are kept at most."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}  # a dict keeps the order in which names came, a set does not

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Remembers names, and forgets the oldest beyond `LIMIT`."""
        self._names |= dict.fromkeys(names)
        for name in list(itertools.islice(self._names, max(0, len(self) - self.LIMIT))):
            del self._names[name]

    def forget(self, names: Iterable[str]) -> None:
        """Forgets the names of requests that have ended."""
        for name in names:
            self._names.pop(name, None)


def attempt_name(group_id: int, attempt: int) -> str:
    """The name of an attempt at a group, from which the names of its requests are made. It has no underscore."""
    return f"{group_id}.{attempt}"
