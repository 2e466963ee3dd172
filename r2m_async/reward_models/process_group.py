"""Training on several ranks, in the torch.distributed process group of a command that torchrun started.

A rank is one process of the group:

    torchrun --nproc-per-node 2 -m r2m_async.cli reward-model train CONFIG

Without torchrun there is no group, and the functions below behave as if this process were its only rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from r2m_async.errors import StageLost


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """A context in which this process is a rank of torchrun's group. If torchrun did not start it, nothing changes.

    device: auto, cpu or cuda, as in `run.device`. On GPUs a rank uses the GPU whose number is its LOCAL_RANK; NCCL sums
        what is on GPUs, and gloo sums what is on the CPU.

    The standard output of all ranks but the first is dropped, so that every line is printed once.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Metrics are summed on the CPU and gradients on the device, so both kinds of memory need a backend.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield


def rank() -> int:
    """The number of this process in the group, from 0 on; 0 where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """The number of processes in the group; 1 where there is no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Replaces `tensor` in place by its sum over all ranks, and returns it.

    Every rank has to call this, in the same order: each call waits for all of them.
    """
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def made_by_first(make: Callable[[], Path]) -> Path:
    """Calls `make` in the first rank alone, and returns its result in all ranks.

    If `make` fails, every rank raises: the first one the error itself, the others StageLost, which names that error.
    """
    if rank() > 0:
        return _told_by_first()
    with _telling_failure():
        made = make()
    _tell(made=made)
    return made


@contextmanager
def first_rank_first() -> Iterator[None]:
    """A context that the first rank leaves before any other rank enters it.

    So the others find what the first one has built or downloaded. If the first rank fails in it, the others do not
    enter: they stop waiting and raise StageLost.
    """
    if rank() > 0:
        _told_by_first()
        yield
        return
    with _telling_failure():
        yield
    _tell()


@contextmanager
def _telling_failure() -> Iterator[None]:
    """Tells the other ranks about an error in this context, and raises it here."""
    try:
        yield
    except BaseException as error:  # Ctrl-C, too: the other ranks wait for this one, whatever ends it
        with suppress(RuntimeError):  # the others may be gone; the error to report is this rank's own
            _tell(failure=f"{type(error).__name__}: {error}")
        raise


def _tell(made: Path | None = None, failure: str | None = None) -> None:
    """Sends the other ranks what the first rank made, or how it failed."""
    if num_ranks() > 1:
        dist.broadcast_object_list([made, failure])


def _told_by_first() -> Any:
    """Waits for the first rank. Returns what it made, or raises StageLost if it failed."""
    told: list[Any] = [None, None]
    dist.broadcast_object_list(told)
    made, failure = told
    if failure is not None:
        raise StageLost("rank 0", f"the first rank failed, and this one ends with it: {failure}")
    return made
