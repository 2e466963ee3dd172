"""The policy states of a step's last epoch (Algorithm 1, line 13), on their way off the device while the step goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.models.policy import feedback_states


class KeptStates:
    """By row of the step; on a GPU copied by a stream of their own into pinned memory.

    They are what the queue reserved for them, `feedback.dtype` x (S - 1) x D_p per trajectory, and no more: padding stays
    behind, and on the device nothing outlives its micro-batch but a copy under way.
    """

    def __init__(self, device: torch.device, config: R2MConfig) -> None:
        self._config = config
        self._rows: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, rows: Sequence[int], states: Sequence[Tensor]) -> None:
        if self._stream is None:
            self._rows |= zip(rows, feedback_states(states, self._config), strict=True)
            return
        dtype = getattr(torch, self._config.feedback_dtype)
        narrowed = [one.to(dtype) for one in states]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for row, one in zip(rows, narrowed, strict=True):
                self._rows[row] = torch.empty(one.shape, dtype=dtype, pin_memory=True).copy_(one, non_blocking=True)
                one.record_stream(self._stream)

    def taken(self) -> dict[int, Tensor]:
        """All that were kept, once they have arrived."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._rows

    @property
    def num_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self._rows.values())
