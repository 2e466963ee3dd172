"""How many CPU threads torch uses: one where bits have to be the same, and the same number in each Python thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def share_threads() -> None:
    """Gives the Python thread that calls it the number of CPU threads that `torch.set_num_threads` has set in another.

    OpenMP and MKL keep a number for each Python thread. In a new one it is OMP_NUM_THREADS until torch is asked for its own, and
    a product of matrices does not ask. It would take more threads than elsewhere, and round in another way.
    """
    torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one CPU thread within the block, and as many as before after it.

    A sum on the CPU rounds differently when more threads share it. With one thread, the bits are always the same.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
