"""Which sequences go through a model in one pass, so that little of the pass is padding."""

from __future__ import annotations

from collections.abc import Sequence

MOST_PADDING = 128
"""The most padding of a pass, in tokens. A further pass costs a small policy as much as some tens of tokens more in the passes
that there are (`pass_in_tokens` of `benchmarks/stage_costs.py`), and a large one next to nothing."""


def similar_lengths(lengths: Sequence[int], max_tokens: int, packed: bool = False) -> list[list[int]]:
    """Splits sequences into passes, so that the lengths within a pass are similar.

    Args:
        lengths: the tokens of each sequence.
        max_tokens: the most tokens of a pass, padding included.
        packed: whether a pass has no padding. If not, each sequence is padded to the longest of its pass, and a pass has at
            most `MOST_PADDING` tokens of padding.

    Returns the indices of the sequences of each pass. They depend on the lengths alone. A sequence longer than `max_tokens`
    gets a pass of its own.
    """
    passes: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        total += lengths[index]
        # Lengths rise, so the whole pass is padded to the length of this sequence.
        size = total if packed or not passes else lengths[index] * (len(passes[-1]) + 1)
        if not passes or size > max_tokens or size - total > MOST_PADDING:
            passes.append([])
            total = lengths[index]
        passes[-1].append(index)
    return passes
