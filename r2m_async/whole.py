"""Files and directories that are there whole or not at all, whenever and however their writer ends.

    write_file(path, data)               a file in the place of another, or of none
    with whole_directory(path) as new:   a directory, filled as `new`
    remove_directory(path)               no part of it is ever seen under its name

What is new grows beside its place as `.NAME.r2m-<8 digits>.partial`, is brought to the disk (fsync) and then takes its
place in one step. Its writer holds a lock (flock) on it: what bears such a name and is not locked was left by a writer
that was killed, and the next one that writes into the folder removes it. (Where a filesystem has no locks it stays.)

An old directory and a new one exchange their names, so that a reader finds one of them at every instant. Filesystems
that cannot exchange names (NFS is one) rename the old one to `.NAME.r2m-old` for a moment: `whole_at` finds it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from r2m_async.errors import DiskError

_HIDDEN = re.compile(r"\..*\.r2m-[0-9a-f]{8}\.partial")
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
_EXCHANGE, _WORKING_DIRECTORY = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk says to those who write, whatever the file."""


def write_file(path: str | Path, data: str | bytes | memoryview) -> None:
    """The file's folder must be there. A reader finds what was there before, or all of `data`. Raises DiskError."""
    path = _followed(path)
    with disk_errors(path):
        _remove_leftovers(path.parent)
        building, lock = _claim(path, lambda hidden: hidden.touch(exist_ok=False))
        try:
            with building.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(building, path)
            _sync_folder(path.parent)
        finally:
            _delete(building)
            os.close(lock)


def append(path: str | Path, text: str) -> None:
    """Raises DiskError, and has then appended nothing. A killed writer may leave part of `text`."""
    path, rest = Path(path), memoryview(text.encode())
    with disk_errors(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def whole_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A directory to fill. It takes its place at the end of the block; left by an exception, it is removed.

    replace: an old directory may be there and gives way. Else FileExistsError is raised unless that is an empty one.
    Raises DiskError, also for an error of the disk in the block.
    """
    path = _followed(path)
    with _hidden_directory(path) as building:
        with disk_errors(path, building):
            yield building
        with disk_errors(path):
            _sync_tree(building)
            placed = _put(building, path, replace)
            _sync_folder(path.parent)
        if not placed:
            raise FileExistsError(errno.EEXIST, "there is something already", str(path))
        _recover(path)  # of the old one's place aside, if it had to make way


@contextlib.contextmanager
def scratch_directory(beside: str | Path) -> Iterator[Path]:
    """A hidden directory that is gone after the block. Raises DiskError if it cannot be made."""
    with _hidden_directory(_followed(beside)) as directory:
        yield directory


def remove_directory(path: str | Path) -> None:
    """What is not there is removed already. Raises DiskError."""
    path = _followed(path)
    for one in (_aside(path), path):
        hidden = _hidden_name(path)
        with disk_errors(path, doing="removed"):
            try:
                os.rename(one, hidden)
            except FileNotFoundError:
                continue
            _sync_folder(path.parent)
        _delete(hidden)


def whole_at(path: str | Path) -> Path:
    """Where a reader finds the directory: `path`, or where the old one is if a killed writer had moved it aside."""
    path, old = Path(path), _aside(_followed(path))
    return old if not path.exists() and old.is_dir() else path


def listed(folder: Path) -> dict[str, Path]:
    """The directories of a folder by their good names, each where `whole_at` finds it; none if it is not there."""
    names = {path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")}
    names |= {path.name[1:].removesuffix(".r2m-old") for path in folder.glob(".*.r2m-old") if path.is_dir()}
    return {name: whole_at(folder / name) for name in sorted(names)}


@contextlib.contextmanager
def disk_errors(path: Path, building: Path | None = None, doing: str = "written") -> Iterator[None]:
    """Raises DiskError for what the disk says to a writer of `path`.

    building: the block does more than write, below `building`; meant are errors that come of writing alone, or are about
        what may be done there.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskError) or (number := _number(error)) is None:
            raise
        if building is not None and number not in _OF_WRITING:
            below = Path(str(getattr(error, "filename", None))).is_relative_to(building)
            if not (below and number in (errno.EACCES, errno.EPERM, errno.ESTALE)):
                raise
        raise DiskError(_told(path, doing, number, error)) from error


def _number(error: Exception) -> int | None:
    """The errno of a failed write: Python's own, safetensors', or torch's, which tells none for its archives."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and re.search(r"inline_container\.cc|PytorchStreamWriter|^write\(\): fd", text):
        return errno.ENOSPC if "No space left" in text else errno.EIO
    return None


def _told(path: Path, doing: str, number: int, error: Exception) -> str:
    said = f"{path}: cannot be {doing}: {os.strerror(number)}"
    if not isinstance(error, OSError):
        said += f" ({str(error).splitlines()[0]})"
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            disk = os.statvfs(there)
            said += f"; {disk.f_bavail * disk.f_frsize} bytes and room for {disk.f_favail} files are free at {there}"
        return f"{said}; make room there, or write to another disk"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{said}; make {there} writable, or write to another place"
    return f"{said}; look at {there}, or write to another place"


def _followed(path: str | Path) -> Path:
    """Where links lead: it is their target that is replaced."""
    return Path(os.path.realpath(path))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.r2m-old")


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.r2m-{secrets.token_hex(4)}.partial")


def _claim(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Something new beside `path`, and the descriptor by which this process has locked it."""
    while True:
        hidden = _hidden_name(path)
        make(hidden)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(hidden, os.O_RDONLY)
            # Between the two lines above another writer may have taken it for left behind.
            if _locks(lock) is not False and hidden.exists():
                return hidden, lock
            os.close(lock)


def _locks(descriptor: int) -> bool | None:
    """False: another process has locked it. None: the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


@contextlib.contextmanager
def _hidden_directory(path: Path) -> Iterator[Path]:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        building, lock = _claim(path, Path.mkdir)
    try:
        yield building
    finally:
        _delete(building)
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for name in filter(_HIDDEN.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    if _locks(descriptor):
                        _delete(folder / name)
                finally:
                    os.close(descriptor)


def _delete(hidden: Path) -> None:
    """What cannot be deleted now stays hidden, for the next writer."""
    if hidden.is_dir():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            hidden.unlink()


def _recover(path: Path) -> None:
    """Undoes, or ends, what a killed writer began."""
    with contextlib.suppress(OSError):
        if os.path.lexists(path):
            hidden = _hidden_name(path)
            os.rename(_aside(path), hidden)
            _delete(hidden)
        else:
            os.rename(_aside(path), path)


def _put(building: Path, path: Path, replace: bool) -> bool:
    """False if there is something and it is not to be replaced."""
    while True:  # once more where another writer of the same path was faster
        try:
            os.rename(building, path)  # onto nothing, or an empty directory
            return True
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if not replace:
            return False
        try:
            if _exchange(building, path):
                return True
            _recover(path)
            os.rename(path, _aside(path))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Whether this filesystem can exchange two names; it has then done so."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if library.renameat2(_WORKING_DIRECTORY, names[0], _WORKING_DIRECTORY, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of filesystems that keep folders otherwise
            raise
    finally:
        os.close(descriptor)
