"""`state_attention` on a GPU: each direction is one kernel that reads the states once, in the dtype that they have.

A response is cut into chunks, which are computed side by side: one response is too little work for a GPU. A chunk keeps
its maximum, the sum of its exponentials and its weighted sum of states (the online softmax), and what the chunks of a
response have is then put together. Nothing depends on the order in which chunks are done, so equal inputs give equal bits.

Shapes: B responses, C chunks of the longest response, N states of all responses, P hidden size of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16_384
"""The most numbers of states that a program holds at once."""
_PROGRAMS_PER_PROCESSOR = 4
"""How many chunks there are for each multiprocessor of the GPU, about."""
_WARPS = 8
"""Warps of a program."""


@triton.jit
def _forward_kernel(
    probe: Any,
    states: Any,
    starts: Any,
    scores: Any,
    maxima: Any,
    sums: Any,
    partial: Any,
    rows_per_chunk: Any,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One chunk of one response: scores of its rows, their maximum, the sum of exponentials, and the weighted sum."""
    chunk, b = tl.program_id(0), tl.program_id(1)
    end = tl.load(starts + b + 1)
    first = tl.load(starts + b) + chunk.to(tl.int64) * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, end)
    columns = tl.arange(0, WIDTH)
    inside = columns < P
    own = tl.load(probe + b.to(tl.int64) * P + columns, mask=inside, other=0.0).to(tl.float32)
    highest, total = -float("inf"), 0.0
    mean = tl.zeros((WIDTH,), tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        there = rows < last
        tile = tl.load(
            states + rows[:, None] * P + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        score = tl.sum(tile * own[None, :], 1)
        tl.store(scores + rows, score, mask=there)
        score = tl.where(there, score, -float("inf"))
        # The first row of a tile is always there, so the maximum is a number from the first tile on.
        higher = tl.maximum(highest, tl.max(score, 0))
        shrink, weight = tl.exp(highest - higher), tl.exp(score - higher)
        total = total * shrink + tl.sum(weight, 0)
        mean = mean * shrink + tl.sum(tile * weight[:, None], 0)
        highest = higher
    place = b.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(maxima + place, highest)
    tl.store(sums + place, total)
    tl.store(partial + place * P + columns, mean, mask=inside)


@triton.jit
def _backward_kernel(
    gradient: Any,
    means: Any,
    weights: Any,
    states: Any,
    starts: Any,
    of_scores: Any,
    partial: Any,
    rows_per_chunk: Any,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One chunk of one response: the gradients of its scores, and its part of the gradient of the probe."""
    chunk, b = tl.program_id(0), tl.program_id(1)
    end = tl.load(starts + b + 1)
    first = tl.load(starts + b) + chunk.to(tl.int64) * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, end)
    columns = tl.arange(0, WIDTH)
    inside = columns < P
    own = tl.load(gradient + b.to(tl.int64) * P + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + b)
    summed = tl.zeros((WIDTH,), tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        there = rows < last
        tile = tl.load(
            states + rows[:, None] * P + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        weight = tl.load(weights + rows, mask=there, other=0.0)
        of_score = weight * (tl.sum(tile * own[None, :], 1) - mean)
        tl.store(of_scores + rows, of_score, mask=there)
        summed += tl.sum(tile * of_score[:, None], 0)
    place = b.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(partial + place * P + columns, summed, mask=inside)


def forward(probe_BP: Tensor, states_NP: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the contexts [B, P] and the attention weights [N], both float32. `state_attention.attended` says of what.

    probe_BP: [B, P] float32. states_NP: in any floating dtype. lengths: the number of states of each response.
    """
    layout = _Layout(states_NP, lengths)
    num_chunks, P = layout.num_chunks, states_NP.shape[1]
    scores_N = probe_BP.new_empty(len(states_NP))
    maxima_BC, sums_BC = (probe_BP.new_empty(len(lengths), num_chunks) for _ in range(2))
    partial_BCP = probe_BP.new_empty(len(lengths), num_chunks, P)
    _forward_kernel[layout.grid](
        probe_BP.contiguous(), states_NP.contiguous(), layout.starts, scores_N, maxima_BC, sums_BC, partial_BCP, **layout.sizes
    )  # fmt: skip
    highest_B1 = maxima_BC.amax(1, keepdim=True)
    # A chunk beyond the end of its response has the maximum -inf, so it counts for nothing.
    shares_BC = (maxima_BC - highest_B1).exp()
    totals_B = (sums_BC * shares_BC).sum(1)
    shares_BC = shares_BC / totals_B[:, None]
    context_BP = (shares_BC[:, None] @ partial_BCP).squeeze(1)
    norm_B = highest_B1.squeeze(1) + totals_B.log()
    return context_BP, (scores_N - norm_B.repeat_interleave(layout.lengths, output_size=len(states_NP))).exp()


def backward(
    gradient_BP: Tensor, means_B: Tensor, weights_N: Tensor, states_NP: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the probes [B, P] and of the scores [N].

    gradient_BP: the gradient of the contexts. means_B: its product with the contexts. weights_N: as `forward` returned them.
    """
    layout = _Layout(states_NP, lengths)
    of_scores_N = torch.empty_like(weights_N)
    partial_BCP = gradient_BP.new_empty(len(lengths), layout.num_chunks, states_NP.shape[1])
    _backward_kernel[layout.grid](
        gradient_BP.contiguous(), means_B, weights_N, states_NP.contiguous(), layout.starts, of_scores_N, partial_BCP, **layout.sizes
    )  # fmt: skip
    return partial_BCP.sum(1), of_scores_N


class _Layout:
    """How the rows of all responses are cut into chunks."""

    def __init__(self, states_NP: Tensor, lengths: Sequence[int]) -> None:
        P = states_NP.shape[1]
        width = triton.next_power_of_2(P)
        rows = max(1, _TILE // width)
        processors = (
            torch.cuda.get_device_properties(states_NP.device).multi_processor_count if states_NP.is_cuda else 1
        )
        # Whole tiles, and as many chunks as keep all processors busy.
        wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR)
        rows_per_chunk = triton.cdiv(triton.cdiv(len(states_NP), wanted), rows) * rows
        self.num_chunks: int = triton.cdiv(max(lengths), rows_per_chunk)
        self.grid = (self.num_chunks, len(lengths))
        self.sizes: dict[str, Any] = {"rows_per_chunk": rows_per_chunk, "P": P, "ROWS": rows, "WIDTH": width}
        if states_NP.is_cuda:
            self.sizes["num_warps"] = _WARPS
        self.lengths = torch.tensor(lengths, device=states_NP.device)
        self.starts = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
