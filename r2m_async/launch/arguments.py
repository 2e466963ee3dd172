"""The arguments of a call on their way to a Ray process: payloads are taken out, sent by themselves, and put back there.

Ray fetches an object only if its reference is an argument by itself, and not inside a list or a buffer. So a call is
sent as one buffer with marks where the payloads belong, and the references beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shares:
    """One payload in parts, one from each rank of a gang (`Method.shares`)."""

    references: tuple[Any, ...]
    """References to the parts, in the order of ranks."""


PLACE = "payload of this call"
"""The key of a mark that stands in the arguments of a call where a payload belongs.

The mark is a dict with this key alone. Its value is an index into the payloads, or a list of indices for a `Shares`.
"""


def without_payloads(value: Any, payloads: list[Any], reference: type) -> Any:
    """Copies arguments, with a mark in the place of each payload. The references are appended to `payloads`.

    Args:
        value: the arguments: lists, tuples and dicts of any depth.
        payloads: gets the references, in the order of their marks.
        reference: the class of a reference to a payload.
    """
    if isinstance(value, reference):
        payloads.append(value)
        return {PLACE: len(payloads) - 1}
    if isinstance(value, Shares):
        payloads.extend(value.references)
        return {PLACE: list(range(len(payloads) - len(value.references), len(payloads)))}
    if isinstance(value, list | tuple):
        return type(value)(without_payloads(item, payloads, reference) for item in value)
    if isinstance(value, dict):
        return {key: without_payloads(item, payloads, reference) for key, item in value.items()}
    return value


def with_payloads(value: Any, payloads: Any) -> Any:
    """Copies arguments that `without_payloads` returned, with the payloads in the place of the marks."""
    if isinstance(value, dict) and value.keys() == {PLACE}:
        place = value[PLACE]
        return _merged([payloads[one] for one in place]) if isinstance(place, list) else payloads[place]
    if isinstance(value, list | tuple):
        return type(value)(with_payloads(item, payloads) for item in value)
    if isinstance(value, dict):
        return {key: with_payloads(item, payloads) for key, item in value.items()}
    return value


def _merged(parts: list[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """Puts the parts of a payload that the ranks returned together, in the order of groups. None if no rank has any."""
    there = [part for part in parts if part is not None]
    return tuple(sorted(itertools.chain(*there), key=lambda one: one.group_id)) if there else None
