"""The slab: shared memory through which the policy's hidden states go from vLLM's worker to the rollout actor.

The worker writes states as it decodes, and the rollout actor reads them when a group has ended. Each token has a row:
its hidden state and the policy version that computed it. Rows form blocks. A block belongs to one group that is being
generated. It has room for the K responses and the greedy twin, each at full length.

The file is unlinked once both sides have opened it. From then on no kind of exit can leave it behind. Until then it lies in a
folder of its own (`shared_folder`), which the next process removes if this one is killed.

Shapes: N rows, S prompt + response tokens of one sequence, D hidden size of the policy.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r2m_async.whole import scratch_directory

DIRECTORY = "/dev/shm"
"""The folder of shared memory on Linux. Files in it lie in memory, not on a disk."""
UNWRITTEN = -1
"""The version of a row that nobody has written. Every policy version is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabShape:
    """The dimensions of a slab. Both sides need the same ones, because the file has no header."""

    num_blocks: int
    """How many groups can be generated at once."""
    num_sequences: int
    """Sequences of one group: its K responses, and one more if it has a greedy twin."""
    num_rows: int
    """Rows of one sequence: the most tokens that a prompt and its response may have together."""
    hidden_size: int
    """D: how many numbers one hidden state has."""
    dtype: str
    """The name of the states' dtype in torch, for example `bfloat16`."""

    @property
    def num_bytes(self) -> int:
        """Size of the file in bytes: blocks x sequences x rows x (hidden size x item size + 4 for the version)."""
        itemsize = getattr(torch, self.dtype).itemsize
        return self.num_blocks * self.num_sequences * self.num_rows * (self.hidden_size * itemsize + 4)


class StateSlab:
    """One side's view of a slab.

    `states` is [blocks, sequences, rows, D] in the slab's dtype. `versions` is [blocks, sequences, rows] int32.
    Both lie in shared memory, so what one process writes the other one sees.
    """

    def __init__(self, path: str, shape: SlabShape) -> None:
        """Opens the file at `path`, which `create_slab_file` made for the same `shape`."""
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), shape.num_bytes)
        rows = (shape.num_blocks, shape.num_sequences, shape.num_rows)
        num_rows = shape.num_blocks * shape.num_sequences * shape.num_rows
        self.shape = shape
        # The file has all versions first, then all states.
        self.versions = torch.frombuffer(self._memory, dtype=torch.int32, count=num_rows).view(rows)
        self.states = torch.frombuffer(
            self._memory, dtype=getattr(torch, shape.dtype), count=num_rows * shape.hidden_size, offset=4 * num_rows
        ).view(*rows, shape.hidden_size)

    def clear(self, block: int) -> None:
        """Marks every row of a block as unwritten.

        It must be called before a group's first request. Otherwise rows of the block's last group would pass for this
        group's own.
        """
        self.versions[block].fill_(UNWRITTEN)

    def write(self, rows: Tensor, states: Tensor, version: int) -> None:
        """Writes hidden states, and beside each the policy version that computed it.

        Args:
            rows: [N] int64, row numbers counted from the start of the slab through all blocks and sequences.
            states: [N, D] in any dtype and on any device. They are converted to the slab's dtype.
            version: the policy version.
        """
        self.states.flatten(0, 2).index_copy_(0, rows, states.to(self.states.device, self.states.dtype))
        self.versions.flatten().index_fill_(0, rows, version)

    def read(self, block: int, lengths: dict[int, int], prompt_len: int) -> tuple[tuple[Tensor, ...], int]:
        """Copies the hidden states of one group out of its block.

        The prefix cache spares a sequence the prompt tokens that a sibling has computed already. The rows of these
        tokens are taken from the sibling.

        Args:
            block: the group's block.
            lengths: S, prompt and response tokens, by the index of the sequence. Other sequences are not read.
            prompt_len: prompt tokens, the same for all sequences of the group.

        Returns the states [S - 1, D] of each sequence in the order of `lengths`, and the oldest policy version among
        them. The last token of a sequence was never an input, so it has no state. Raises RuntimeError if a row is
        missing.
        """
        states, versions, every = self.states[block], self.versions[block], torch.arange(prompt_len)
        # For each prompt token, the sequence that computed it with the newest version. UNWRITTEN never wins.
        holder = versions[:, :prompt_len].argmax(0)
        taken, oldest = [], []
        for sequence, length in lengths.items():
            # Copies, because the next group writes into the same block.
            rows, own = states[sequence, : length - 1].clone(), versions[sequence, : length - 1].clone()
            cached = own[:prompt_len] == UNWRITTEN
            rows[:prompt_len][cached] = states[holder, every][cached]
            own[:prompt_len][cached] = versions[holder, every][cached]
            if missing := (own == UNWRITTEN).nonzero().flatten().tolist():
                raise RuntimeError(f"the slab lacks the states of tokens {missing} of sequence {sequence}")
            taken.append(rows)
            oldest.append(int(own.min()))
        return tuple(taken), min(oldest)


@contextmanager
def shared_folder(name: str) -> Iterator[Path]:
    """A context manager that yields a new folder in shared memory, and removes it and what is in it at the end of its block.

    What killed processes have left there is removed first: it would fill the memory of the machine, for good.

    name: says what it is for, in the name of the folder. Raises DiskError if it cannot be made.
    """
    with scratch_directory(Path(DIRECTORY) / f"r2m-{name}") as folder:
        folder.chmod(0o700)  # all users of a machine share this memory
        yield folder


def create_slab_file(shape: SlabShape, folder: Path) -> str:
    """Creates a file of the slab's size in a folder in shared memory, and returns its path.

    The caller must unlink the file once both sides have opened it. Raises OSError, naming the free and the needed
    bytes, if shared memory is too small.
    """
    path = str(folder / "states")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Reserves the memory now. A file that is only extended would kill a process with SIGBUS on some later write.
        os.posix_fallocate(handle, 0, shape.num_bytes)
    except OSError as error:
        os.unlink(path)
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"{DIRECTORY} has {shutil.disk_usage(DIRECTORY).free} bytes free and the policy's states need {shape.num_bytes} "
            f"({shape.num_blocks} groups at once): give the container more shared memory, lower "
            f"rollouts.concurrent_groups, or use feedback.source learner",
        ) from None
    finally:
        os.close(handle)
    return path
