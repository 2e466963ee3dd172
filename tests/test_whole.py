"""Whole or not at all: what a reader finds at every instant of a writer's life, and what a full or read-only disk says."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r2m_async import whole
from r2m_async.errors import DiskError
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.directory import RunDirectory
from r2m_async.runs.records import append_records
from r2m_async.runs.results import write_results
from r2m_async.whole import append, remove_directory, scratch_directory, whole_at, whole_directory, write_file

ROOT = Path(__file__).resolve().parents[1]
READ_ONLY = Path("/sys/r2m")
"""Not even root may write there."""


@pytest.fixture(params=["exchange", "fallback"])
def way(request, monkeypatch) -> str:
    """With the filesystem's exchange of two names, and as on one that has none."""
    if request.param == "fallback":
        monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    return request.param


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int):
    """A real refusal of a real disk, for which one need not be root: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str, replace: bool = True) -> None:
    with whole_directory(path, replace) as new:
        for name in "abc":
            (new / name).write_text(text)


def read(path: Path) -> str:
    found = whole_at(path)
    (text,) = {(found / name).read_text() for name in "abc"}
    return text


def text_at(name: str, folder: int) -> str:
    with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
        return file.read()


# Kills


def test_writers_killed_at_every_instant_lose_nothing_and_no_damage_is_accepted(tmp_path):
    """The short form of what `benchmarks/checkpoint_faults.py --kills 500 --damages 500` does."""
    command = [sys.executable, ROOT / "benchmarks" / "checkpoint_faults.py", "--kills", "20", "--damages", "60"]
    memory = Path("/dev/shm")  # where fsync waits for nothing: the instants are the same
    command += ["--folder", memory if memory.is_dir() else tmp_path, "--json", tmp_path / "result.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "result.json").read_text())
    damaged = results.pop("damages")
    assert damaged == dict(accepted=0, unnamed=0, flip=10, zero=10, cut=10, missing=10, mixed=10, stray=10), done.stderr
    assert len(results) == 6
    for what, counts in results.items():
        assert counts["lost"] == 0 and counts["left_behind"] == 0, (what, done.stderr)
        assert counts["old"] + counts["new"] == counts["inside_a_save"] > 0
        if what.startswith("instants"):
            assert counts["old"] > 20 and counts["new"], (what, counts)


def test_what_a_killed_writer_left_goes_with_the_next_one_and_a_living_writers_stays(tmp_path):
    dead, half = tmp_path / ".gone.r2m-00000000.partial", tmp_path / ".file.r2m-00000001.partial"
    (dead / "sub").mkdir(parents=True)
    half.write_text("half")
    for other in (".mine.partial", ".mine.0123abcd.partial"):
        (tmp_path / other).write_text("of another program")
    with whole_directory(tmp_path / "one") as building:
        (building / "file").write_text("1")
        write_file(tmp_path / "two", "2")
        assert building.is_dir() and not dead.exists() and not half.exists()
    assert names(tmp_path) == [".mine.0123abcd.partial", ".mine.partial", "one", "two"]


# What readers find


def test_a_directory_is_replaced_left_or_refused_as_a_whole(tmp_path, way):
    write(tmp_path / "sub" / "place", "old")
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "sub" / "place", replace=True) as new:
        (new / "a").write_text("new")
        raise ZeroDivisionError
    with pytest.raises(FileExistsError):
        write(tmp_path / "sub" / "place", "new", replace=False)
    assert read(tmp_path / "sub" / "place") == "old" and names(tmp_path / "sub") == ["place"]
    write(tmp_path / "sub" / "place", "new")
    assert read(tmp_path / "sub" / "place") == "new" and names(tmp_path / "sub") == ["place"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new", replace=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match=r"file: cannot be written: Not a directory"):
        write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == ["empty", "file", "sub"]


def test_through_a_link_its_target_is_replaced(tmp_path, way):
    for kind, make in (("directory", write), ("file", write_file)):
        make(tmp_path / kind, "old")
        (tmp_path / f"{kind}-link").symlink_to(tmp_path / kind)
        make(tmp_path / f"{kind}-link", "new")
        assert (tmp_path / f"{kind}-link").is_symlink()
    assert whole_at(tmp_path / "directory-link") == tmp_path / "directory-link"
    assert read(tmp_path / "directory") == (tmp_path / "file").read_text() == "new"
    (tmp_path / "directory").rename(tmp_path / ".directory.r2m-old")
    assert read(tmp_path / "directory-link") == "new"


def test_writers_and_readers_of_one_place_at_once_find_whole_directories(tmp_path, way):
    """Every writer's last word is whole, and so is whatever was there on the way."""
    place, ended, failed = tmp_path / "place", threading.Event(), []

    def writer(name: str) -> None:
        for number in range(25):
            write(place, f"{name} {number}")

    def reader() -> None:
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError):  # replaced and removed while it was read
                folder = os.open(whole_at(place), os.O_RDONLY)
                try:
                    if len(seen := {text_at(name, folder) for name in "abc"}) > 1:
                        failed.append(seen)
                finally:
                    os.close(folder)

    write(place, "first")
    with ThreadPoolExecutor(3) as threads:
        watching = threads.submit(reader)
        try:
            list(threads.map(writer, "xy"))
        finally:
            ended.set()
        watching.result()
    assert not failed
    assert read(place) in ("x 24", "y 24") and names(tmp_path) == ["place"]


def test_a_directory_that_was_moved_aside_by_a_killed_writer_is_found_and_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    place = checkpoint_path(tmp_path, 4)
    write(place, "old")
    write(checkpoint_path(tmp_path, 2), "older")
    aside = place.with_name(".step-000004.r2m-old")
    place.rename(aside)
    assert read(place) == "old" and checkpoints(tmp_path) == [checkpoint_path(tmp_path, 2), aside]
    write(place, "new")
    assert read(place) == "new" and names(place.parent) == ["step-000002", "step-000004"]
    write(aside, "stale")  # as a writer leaves it that is killed before it removes it
    assert read(place) == "new" and checkpoints(tmp_path) == [checkpoint_path(tmp_path, 2), place]
    remove_directory(place)
    assert names(place.parent) == ["step-000002"], "and it does not come back"


def test_checkpoints_are_those_of_a_step_and_no_copy_of_one(tmp_path):
    for name in (
        "step-000002",
        "step-000010",
        "step-1000000",
        "step-000002.good",
        "step-3",
        "step-0000004",
        "step-",
        "x",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000011.r2m-00000000.partial").mkdir()
    (tmp_path / "checkpoints" / "step-000012").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000010", "step-1000000"]
    assert checkpoints(tmp_path / "absent") == []


def test_a_scratch_directory_is_beside_its_place_and_gone_however_it_ends(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch_directory(tmp_path / "place") as scratch:
        (scratch / "file").write_text("1")
        assert scratch.parent == tmp_path
        raise ZeroDivisionError
    assert names(tmp_path) == []


# Disks


@pytest.mark.parametrize("write_one", [write_file, write, append], ids=["file", "directory", "append"])
def test_a_disk_that_takes_no_more_is_told_with_its_room_and_nothing_partial_stays(tmp_path, write_one):
    write_one(tmp_path / "place", "old\n")
    with no_file_larger_than(5000), pytest.raises(DiskError) as error:
        write_one(tmp_path / "place", "new" * 5000)
    free = r"\d+ bytes and room for \d+ files are free at"
    place = tmp_path / "place"
    error.match(rf"{place}: cannot be written: File too large; {free} .*; make room there")
    assert names(tmp_path) == ["place"]
    assert (read(place) if write_one is write else place.read_text()) == "old\n"


def test_a_full_disk_is_told_as_one(tmp_path):
    """The kernel's own: every write to it finds no space."""
    with pytest.raises(
        DiskError, match=r"^/dev/full: cannot be written: No space left on device; \d+ bytes .* are free"
    ):
        append("/dev/full", "text")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk; a limit of file sizes is tried above")
def test_a_full_disk_is_as_empty_afterwards_as_before(tmp_path, way):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"root may not mount here, as in many a container: {mounted.stderr.decode().strip()}")
    try:
        write(tmp_path / "place", "old" * 5000)
        before = os.statvfs(tmp_path).f_bfree
        with pytest.raises(DiskError, match=r"place: cannot be written: No space left on device; \d+ bytes"):
            write(tmp_path / "place", "new" * 40_000)
        assert os.statvfs(tmp_path).f_bfree == before and read(tmp_path / "place") == "old" * 5000
        write(tmp_path / "place", "new")
        assert names(tmp_path) == ["place"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda path: write_file(path, "text"),
        lambda path: append(path, "text"),
        lambda path: write(path / "below", "text"),
        lambda path: write_results(path, {}, "table"),
        lambda path: append_records(path, [{}]),
    ],
    ids=["file", "append", "directory", "results", "records"],
)
def test_a_place_that_cannot_be_written_is_told(use):
    with pytest.raises(
        DiskError, match=r"^/sys/r2m\S*: cannot be written: .*; (make|look at) /sys\S*.*, or write to another"
    ):
        use(READ_ONLY)


@pytest.mark.models
def test_what_safetensors_and_torch_could_not_write_is_told_too(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(100_000)}
    for save in (
        lambda new: save_file(tensors, new / "file"),
        lambda new: torch.save(tensors, new / "file"),
        lambda new: torch.save(tensors, new / "file", _use_new_zipfile_serialization=False),
    ):
        refused = pytest.raises(DiskError, match="place: cannot be written: ")
        with no_file_larger_than(5000), refused, whole_directory(tmp_path / "place") as new:
            save(new)
        assert names(tmp_path) == []


def test_another_error_in_the_block_stays_what_it_is(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "gone", "/elsewhere"), OSError("a model"), RuntimeError("a bug")):
        with pytest.raises(type(error)) as raised, whole_directory(tmp_path / "place"):
            raise error
        assert raised.value is error


@pytest.mark.models
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_step_that_the_disk_does_not_take_is_told_and_the_lines_stay_whole(tmp_path, tensorboard):
    from r2m_async.config import R2MConfig

    with (
        pytest.raises(DiskError, match=rf"{tmp_path}\S*: cannot be written: File too large"),
        RunDirectory(tmp_path, R2MConfig().logging(tensorboard=tensorboard)) as run,
    ):
        run.write_step({"step": 1, "loss": 0.5})
        lines = (tmp_path / "metrics.jsonl").read_text()
        events = max((path.stat().st_size for path in tmp_path.glob("events*")), default=0)
        room, num = (events, 3) if tensorboard else (len(lines) + 100, 500)
        with no_file_larger_than(room):
            run.write_step({"step": 2} | {f"loss/{number}": 0.25 for number in range(num)})
    if not tensorboard:
        assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_half_a_results_file_is_no_measurement(tmp_path):
    from r2m_async.studies.reward_models import is_measured

    write_results(tmp_path / "evaluation", {"pairs": {"accuracy": 0.5}}, "table")
    assert is_measured(tmp_path, {"evaluation": "evaluation"})
    path = tmp_path / "evaluation" / "results.json"
    path.write_text(path.read_text()[:-5])
    assert not is_measured(tmp_path, {"evaluation": "evaluation"})
    assert not is_measured(tmp_path, {"best_of_n": "best_of_n"})
