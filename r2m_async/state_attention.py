"""The part of the R2M head that reads the policy's hidden states: one query per response, one head, no projection.

    context = softmax(h p) h        p: the probe of the response, h: its states

It is most of the head's memory traffic, so it has a backward pass of its own. Each direction reads the states once, and
nothing of their size is written. On a CPU a response is converted to the dtype of the probe in a buffer that all responses
share, and which a cache holds. On a GPU one kernel does it all (`state_attention_triton`).

Shapes: B responses, S states of one response, N states of all responses, P hidden size of the policy (D_p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CACHE_LINE = 64
"""Bytes. The memory of each new CPU tensor begins at a multiple of it."""


def attended(probe_BP: Tensor, states: Tensor | Sequence[Tensor], offsets: Tensor | None = None) -> Tensor:
    """Returns the attention-weighted mean of each response's states: [B, P], in the dtype of the probes.

    Args:
        probe_BP: [B, P], the probes. The attention score of a state is its product with the probe.
        states: the states of all responses end to end, [N, P], or a tensor [S, P] for each response, which are not copied
            together on a CPU. They may have a shorter dtype than the probes.
        offsets: [B + 1] for states end to end. Rows offsets[b] to offsets[b + 1] - 1 belong to response b.

    Gradients flow to the probes, and to states that require them.

    Raises ValueError if shapes disagree, and for a response without states.
    """
    parts = _parts(probe_BP, states, offsets)
    if _fused(probe_BP) and not isinstance(states, Tensor):
        states = torch.cat([*parts])
    if isinstance(states, Tensor):
        context: Tensor = _Attention.apply(probe_BP, tuple(map(len, parts)), states)
    else:
        context = _Attention.apply(probe_BP, None, *parts)
    return context


def _fused(probe_BP: Tensor) -> bool:
    """Whether the kernels for a GPU compute this. They sum in float32."""
    return probe_BP.is_cuda and probe_BP.dtype == torch.float32


def _parts(probe_BP: Tensor, states: Tensor | Sequence[Tensor], offsets: Tensor | None) -> Sequence[Tensor]:
    """The states of each response, as views. Raises ValueError if shapes disagree."""
    if isinstance(states, Tensor):
        bounds = [] if offsets is None else offsets.tolist()
        if (
            states.ndim != 2
            or states.shape[1] != probe_BP.shape[1]
            or len(bounds) != len(probe_BP) + 1
            or bounds[0] != 0
            or bounds[-1] != len(states)
        ):
            ends = f"from {bounds[0]} to {bounds[-1]}" if bounds else ""
            raise ValueError(
                f"packed hidden_states must be [N, D_p] with offsets [B + 1] from 0 to N, B = {len(probe_BP)} as in rte "
                f"and D_p = {probe_BP.shape[1]}, got {list(states.shape)} and {len(bounds)} offsets {ends}"
            )
        lengths = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
        for b, length in enumerate(lengths):
            if length <= 0:
                raise ValueError(f"response {b} has no hidden states: offsets {bounds[b]} to {bounds[b + 1]}")
        return states.split(lengths)
    wrong = [list(one.shape) for one in states if one.ndim != 2 or one.shape[1] != probe_BP.shape[1]]
    if wrong or len(states) != len(probe_BP):
        raise ValueError(
            f"hidden_states must be a tensor [S, D_p] for each response, B = {len(probe_BP)} as in rte and "
            f"D_p = {probe_BP.shape[1]}, got {len(states)} of them{f', one of {wrong[0]}' if wrong else ''}"
        )
    for b, rows_SP in enumerate(states):
        if not len(rows_SP):
            raise ValueError(f"response {b} has no hidden states")
    return states


class _Attention(torch.autograd.Function):
    """`attended` with its own backward pass.

    With w the weights, c the context and g the gradient of c, the gradient of the scores is w (h g - c g). So the backward
    pass, too, needs of a response only two products with its states, and both in one reading.
    """

    @staticmethod
    def forward(ctx: Any, probe_BP: Tensor, lengths: tuple[int, ...] | None, *states: Tensor) -> Tensor:
        """states: of each response, or with `lengths` of all end to end."""
        ctx.lengths = lengths
        if _fused(probe_BP):
            from r2m_async.state_attention_triton import forward

            assert lengths is not None
            context_BP, weights_N = forward(probe_BP, states[0], lengths)
        else:
            parts = states if lengths is None else states[0].split(lengths)
            context_BP = torch.empty_like(probe_BP, memory_format=torch.contiguous_format)
            weights_N = probe_BP.new_empty(sum(map(len, parts)))
            weights = weights_N.split([len(part) for part in parts])
            for b, rows_SP in enumerate(_converted(parts, probe_BP.dtype)):
                torch.softmax(rows_SP @ probe_BP[b], 0, out=weights[b])
                torch.mv(rows_SP.T, weights[b], out=context_BP[b])
        ctx.save_for_backward(probe_BP, context_BP, weights_N, *states)
        return context_BP

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BP: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the probes, and of states that require them."""
        probe_BP, context_BP, weights_N, *states = ctx.saved_tensors
        lengths = ctx.lengths or tuple(map(len, states))
        # The mean of h g under the weights is c g.
        means_B = (context_BP * gradient_BP).sum(1)
        if _fused(probe_BP):
            from r2m_async.state_attention_triton import backward

            of_probe_BP, of_scores_N = backward(gradient_BP, means_B, weights_N, states[0], lengths)
        else:
            parts = states if ctx.lengths is None else states[0].split(lengths)
            of_probe_BP, of_scores_N = torch.empty_like(context_BP), torch.empty_like(weights_N)
            weights, of_scores = weights_N.split(lengths), of_scores_N.split(lengths)
            for b, rows_SP in enumerate(_converted(parts, probe_BP.dtype)):
                torch.mul(rows_SP @ gradient_BP[b] - means_B[b], weights[b], out=of_scores[b])
                torch.mv(rows_SP.T, of_scores[b], out=of_probe_BP[b])
        of_states: list[Any] = [None] * len(states)
        if any(ctx.needs_input_grad[2:]):
            owners = torch.arange(len(lengths), device=probe_BP.device).repeat_interleave(
                torch.tensor(lengths, device=probe_BP.device)
            )
            of_all_NP = of_scores_N[:, None] * probe_BP[owners] + weights_N[:, None] * gradient_BP[owners]
            of_states = [*of_all_NP.split([len(one) for one in states])]
            of_states = [part.to(one.dtype) for part, one in zip(of_states, states, strict=True)]
        return of_probe_BP, None, *of_states


def aligned(rows: Tensor) -> Tensor:
    """Returns the rows, or a copy of them if they do not begin where torch's own tensors begin, or have gaps.

    MKL rounds products with a vector, and those of a linear layer, by where in a cache line the rows begin. Tensors that came
    in a message, or were read from a file, lie wherever that lies.
    """
    at_home = rows.is_contiguous() and rows.data_ptr() % _CACHE_LINE == 0
    return rows if at_home else rows.clone(memory_format=torch.contiguous_format)


def _converted(parts: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Yields the states of each response in `dtype`: themselves (`aligned`), or in a buffer that the next response overwrites."""
    buffer = None
    for rows_SP in parts:
        if rows_SP.dtype == dtype:
            yield aligned(rows_SP)
            continue
        if buffer is None:
            buffer = rows_SP.new_empty(max(map(len, parts)), rows_SP.shape[1], dtype=dtype)
        yield buffer[: len(rows_SP)].copy_(rows_SP)
