"""What a learner asks of whoever moves the weights. With several ranks every method is a collective: all call it, in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Backend(Protocol):
    """What holds one model in training: a policy, or a critic."""

    policy: Any
    """The model: what `logprobs_and_states` takes, or `response_values`."""
    rank: int
    num_ranks: int

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the CPU."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of this rank's part of an update's loss; `last` if a `step` follows."""

    def step(self, lr: float) -> float:
        """Clips, moves the weights and forgets the gradients; the norm before clipping. Not finite: nothing moves."""

    def finite(self) -> bool:
        """Whether all weights that train are finite, on every rank."""

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """What `restore` continues from, bit for bit; large parts may be files in `directory`."""

    def restore(self, state: dict[str, Any], directory: Path | None) -> None: ...


class PolicyBackend(Backend, Protocol):
    """One that holds the policy, and can show pi_ref and publish."""

    probed: Any
    """The policy, for a pass beside another thread's."""

    def as_reference(self) -> AbstractContextManager[Any]:
        """Gives pi_ref, which is as `policy` is; the latter is not to be used meanwhile."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The base model's by their names there, whole whoever holds them, and each only until the next is asked for."""
