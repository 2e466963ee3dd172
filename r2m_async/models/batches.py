"""Texts as batches of one forward pass: which texts go together, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def by_length(lengths: Sequence[int], max_tokens: int, indices: Iterable[int] | None = None) -> list[list[int]]:
    """Splits texts into batches of similar length, which takes the least padding.

    Args:
        lengths: the tokens of every item. An item of two texts counts the longer one twice.
        max_tokens: limit on the tokens of a batch, padding included. A longer item gets a batch of its own.
        indices: which items to split. None: all.

    Returns the indices of each batch. Each index is in one batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)) if indices is None else indices, key=lengths.__getitem__):
        # Lengths rise, so the whole batch is padded to the length of this item.
        if batches and lengths[index] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def right_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Returns the token ids [B, S] int64, padded on the right with `padding`, and a mask [B, S], True on real tokens."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths).to(device)
