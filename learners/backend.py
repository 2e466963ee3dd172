"""What a learner asks of a backend. A backend holds one model in training and moves its weights.

A backend may be one of several ranks. Then its methods are collectives: all ranks must call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Backend(Protocol):
    """Holds one model in training: a policy, or a critic's value model."""

    policy: Any
    """The model, in the form that `logprobs_and_states` takes (a policy) or `response_values` (a critic)."""
    rank: int
    """Which rank this is. Ranks count from 0."""
    num_ranks: int
    """How many ranks train the model together."""

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over all ranks of a tensor of any shape. The argument and the sum are on the CPU."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a loss to the gradients that are there.

        Args:
            loss: scalar, this rank's part of an update's loss. The parts of all passes and ranks add up to the loss.
            last: whether this is the last pass of the update, after which `step` follows.
        """

    def step(self, lr: float) -> float:
        """Takes one optimizer step with clipped gradients, and drops the gradients.

        Args:
            lr: the learning rate.

        Returns the norm of the whole gradient before it was clipped. If the norm is not finite, no weight has moved.
        """

    def finite(self) -> bool:
        """Returns whether all weights that train are finite, on every rank."""

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """Returns what `restore` needs to go on bit for bit.

        Args:
            version: the policy version that the weights are.
            directory: where a backend may write large parts as files. None if there is no such place.
        """

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Goes on from a saved state.

        Args:
            state: what `state` returned.
            directory: where `state` wrote its files.
        """
        ...


class PolicyBackend(Backend, Protocol):
    """A backend that holds the policy. It can also show the reference policy pi_ref, and publish the weights."""

    probed: Any
    """The policy for the pass of a probe, which may run beside another thread's pass (`publishes_beside_passes`)."""

    def as_reference(self) -> AbstractContextManager[Any]:
        """Returns a block that gives pi_ref, in the form that `policy` has. `policy` must not be used in the block."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the policy's parameters under the names that they have in the base model, without adapters.

        Each tensor is whole, also if the ranks share it out; only in that case is this a collective. A tensor holds
        only until the next one is asked for, so copy what you need.
        """
