"""Running out of memory becomes an error that says what was being computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r2m_async.errors import LearnerOutOfMemory, StepFailed

_OUT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
"""Words by which errors of the CPU's allocator, of CUDA and of its libraries are recognised."""


@contextmanager
def memory_enough_for(what: str) -> Iterator[None]:
    """Turns an error inside the block into LearnerOutOfMemory if memory ran out, on the device or in this process.

    Other errors pass. `what` says in the message what was being computed.
    """
    try:
        yield
    except StepFailed:  # it may tell of a user's estimator that ran out of memory, and names it already
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            words in str(error) for words in _OUT_OF_MEMORY
        ):
            raise
        raise LearnerOutOfMemory(
            f"{what}: the policy learner is out of memory. Lower learner.tokens_per_microbatch, or use "
            f"learner.activation_checkpointing, or backend deepspeed with more num_ranks or a higher zero_stage. {error}"
        ) from None
