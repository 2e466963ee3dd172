"""The memory in which an engine's processes hand over hidden states."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import actors.state_slab
from actors.state_slab import SlabShape, StateSlab, create_slab_file


def test_the_slabs_size_is_what_its_formula_says(tmp_path, monkeypatch):
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        shape = SlabShape(num_blocks=3, num_sequences=5, num_rows=7, hidden_size=11, dtype=dtype)
        assert shape.num_bytes == 3 * 5 * 7 * (11 * itemsize + 4)
        path = create_slab_file(shape, tmp_path)
        assert os.path.getsize(path) == shape.num_bytes
        slab = StateSlab(path, shape)
        os.unlink(path)
        rows = torch.arange(3 * 5 * 7)
        slab.write(rows, torch.full((len(rows), 11), 2.0), 1)
        assert slab.states.eq(2).all() and slab.versions.eq(1).all()


@pytest.fixture
def small_slab(tmp_path, monkeypatch):
    """Two sides of a slab of 2 blocks x 3 sequences x 6 rows whose file is unlinked."""
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    shape = SlabShape(num_blocks=2, num_sequences=3, num_rows=6, hidden_size=2, dtype="float32")
    path = create_slab_file(shape, tmp_path)
    ours, theirs = StateSlab(path, shape), StateSlab(path, shape)
    os.unlink(path)
    return ours, theirs


def _write(slab, block, sequence, positions, version):
    """The state at a position is (100 block + 10 sequence + position, version)."""
    positions = torch.tensor(positions)
    states = torch.stack([100.0 * block + 10 * sequence + positions, torch.full((len(positions),), float(version))], 1)
    slab.write((block * 3 + sequence) * 6 + positions, states, version)


def test_rows_written_on_one_side_are_read_on_the_other_each_from_its_place(small_slab):
    ours, theirs = small_slab
    for block in (0, 1):
        ours.clear(block)
        for sequence in range(3):
            _write(theirs, block, sequence, range(6), version=5)
    states, oldest = ours.read(1, {0: 4, 2: 6}, prompt_len=2)
    assert [part[:, 0].tolist() for part in states] == [[100, 101, 102], [120, 121, 122, 123, 124]]
    assert oldest == 5


def test_prompt_rows_that_the_cache_had_come_from_a_sibling_and_response_rows_never_do(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    _write(theirs, 0, 0, range(5), version=3)
    _write(theirs, 0, 1, range(2, 5), version=4)
    states, oldest = ours.read(0, {0: 6, 1: 6}, prompt_len=3)
    assert states[1][:, 0].tolist() == [0, 1, 12, 13, 14]
    assert oldest == 3
    with pytest.raises(RuntimeError, match=r"tokens \[0, 1\] of sequence 1"):
        ours.read(0, {1: 6}, prompt_len=0)


def test_a_missing_row_is_an_error_and_clearing_makes_all_rows_missing(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    for sequence in range(3):
        _write(theirs, 0, sequence, [0, 1, 3], version=1)
    with pytest.raises(RuntimeError, match=r"lacks the states of tokens \[2\] of sequence 1"):
        ours.read(0, {1: 5}, prompt_len=2)
    assert ours.read(0, {1: 3}, prompt_len=2)[1] == 1
    ours.clear(0)
    with pytest.raises(RuntimeError, match=r"tokens \[0, 1\] of sequence 2"):
        ours.read(0, {2: 3}, prompt_len=2)


def test_the_oldest_version_counts_the_rows_that_are_read_and_no_others(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    _write(theirs, 0, 0, range(6), version=8)
    _write(theirs, 0, 1, range(6), version=9)
    _write(theirs, 0, 1, [4], version=2)
    assert ours.read(0, {0: 6}, prompt_len=1)[1] == 8
    assert ours.read(0, {1: 5}, prompt_len=1)[1] == 9
    assert ours.read(0, {0: 6, 1: 6}, prompt_len=1)[1] == 2


def test_states_read_are_copies_that_the_next_group_does_not_change(small_slab):
    ours, theirs = small_slab
    _write(theirs, 0, 0, range(6), version=1)
    (states,), _ = ours.read(0, {0: 6}, prompt_len=2)
    before = states.clone()
    _write(theirs, 0, 0, range(6), version=2)
    assert torch.equal(states, before)


def test_too_little_shared_memory_is_an_error_with_both_sizes_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "posix_fallocate", full)
    shape = SlabShape(num_blocks=2, num_sequences=9, num_rows=1024, hidden_size=896, dtype="bfloat16")
    with pytest.raises(OSError, match=rf"1234 bytes free .*need {shape.num_bytes} ") as raised:
        create_slab_file(shape, tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import actors.state_slab

actors.state_slab.DIRECTORY = sys.argv[1]
with actors.state_slab.shared_folder("weights") as folder:
    (folder / "weights").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_shared_memory_that_a_killed_process_has_left_goes_with_the_next_one(tmp_path, monkeypatch):
    """An actor may be killed while its engine starts, or while it loads weights: again and again on one machine."""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    with actors.state_slab.shared_folder("states") as folder, actors.state_slab.shared_folder("weights") as other:
        assert {*tmp_path.iterdir()} == {folder, other} and folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
