"""The policy's hidden states that outlive a forward pass. They are copied off the device while the step goes on.

`train` keeps those of a step's last epoch (R2M, Algorithm 1, line 13). `proximal` keeps pi_old's if these score.

Shapes: S prompt + response tokens of one trajectory, D_p hidden size of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.models.policy import feedback_states


class KeptStates:
    """Collects hidden states by the row of their trajectory in the step.

    On a GPU a stream of its own copies the states into pinned memory of the CPU. A trajectory's states take
    (S - 1) x D_p numbers in `feedback.dtype`, without padding. The schedule has reserved room for that. On the device
    nothing outlives its micro-batch but a copy that is under way.
    """

    def __init__(self, device: torch.device, config: R2MConfig) -> None:
        """Begins with no states.

        Args:
            device: where the forward passes run.
            config: the run's config.
        """
        self._config = config
        self._rows: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, rows: Sequence[int], states: Sequence[Tensor]) -> None:
        """Keeps the states of a micro-batch. On a GPU the copies go on after the return.

        Args:
            rows: the rows of its trajectories in the step.
            states: the hidden states of each trajectory, [S - 1, D_p] on the device.
        """
        if self._stream is None:
            self._rows |= zip(rows, feedback_states(states, self._config), strict=True)
            return
        dtype = getattr(torch, self._config.feedback_dtype)
        narrowed = [one.to(dtype) for one in states]
        # The copies must wait for the pass that computes the states.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for row, one in zip(rows, narrowed, strict=True):
                self._rows[row] = torch.empty(one.shape, dtype=dtype, pin_memory=True).copy_(one, non_blocking=True)
                # Or torch could give this memory to the next pass before the copy has read it.
                one.record_stream(self._stream)

    def taken(self) -> dict[int, Tensor]:
        """Waits until all copies have arrived. Returns the states by row, on the CPU."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._rows

    @property
    def num_bytes(self) -> int:
        """Bytes of all states that are kept."""
        return sum(one.numel() * one.element_size() for one in self._rows.values())
