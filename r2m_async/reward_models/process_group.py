"""The torch.distributed process group of a command that torchrun started, one process per rank:

    torchrun --nproc-per-node 2 -m r2m_async.cli reward-model train CONFIG

Without a group the functions below answer for the one process there is.
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
    """Within it this process is a rank of torchrun's group; where torchrun did not start it nothing changes.

    device: auto, cpu or cuda, as `run.device`. On GPUs a rank has that of its LOCAL_RANK, and NCCL sums what lies there;
    gloo what lies on the CPU. The standard output of all ranks but the first is dropped.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """`tensor` itself, with the sum over the ranks in it."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def made_by_first(make: Callable[[], Path]) -> Path:
    """What `make` returns in the first rank, which alone calls it, in all ranks.

    Raises in all of them if it fails there: its own error in the first, StageLost naming that in the others.
    """
    if rank() > 0:
        return _told_by_first()
    with _telling_failure():
        made = make()
    _tell(made=made)
    return made


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks come in when the first one is out: they find what it has built or fetched.

    Raises StageLost in them if the first one fails: they wait no longer, and do not come in.
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
    try:
        yield
    except BaseException as error:  # Ctrl-C, too: the others wait for this rank, whatever ends it
        with suppress(RuntimeError):  # they are gone already: what ended this rank is the news
            _tell(failure=f"{type(error).__name__}: {error}")
        raise


def _tell(made: Path | None = None, failure: str | None = None) -> None:
    if num_ranks() > 1:
        dist.broadcast_object_list([made, failure])


def _told_by_first() -> Any:
    told: list[Any] = [None, None]
    dist.broadcast_object_list(told)
    made, failure = told
    if failure is not None:
        raise StageLost("rank 0", f"the first rank failed, and this one ends with it: {failure}")
    return made
