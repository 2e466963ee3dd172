"""Memory that runs out, told by what was being computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r2m_async.errors import LearnerOutOfMemory, StepFailed

_OUT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
"""What a process's allocator, CUDA and its libraries say."""


@contextmanager
def memory_enough_for(what: str) -> Iterator[None]:
    """Raises LearnerOutOfMemory naming `what` where memory, the device's or this process's, ran out."""
    try:
        yield
    except StepFailed:  # a user's estimator, too, may say that it is out of memory
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
