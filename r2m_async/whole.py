"""Writes files and directories so that a reader finds them whole or not at all, even if the writer is killed.

    write_file(path, data)               writes a file, or replaces one; `with whole_file(path) as file` does so bit by bit
    with whole_directory(path) as new:   the block fills the directory `new`, which then becomes `path`
    remove_directory(path)               removes a directory; no part of it is ever visible under its name

Anything new is built beside its final place, under the name `.NAME.r2m-<8 digits>.partial`. It is flushed to the disk
(fsync) and then renamed to NAME, which is one atomic step.

The writer holds a lock (flock) on what it builds. The lock ends with the writer. So a `.partial` that nobody has locked
was left by a killed writer, and the next writer in that folder removes it. On a filesystem without locks it stays.

If a directory replaces an old one, the two exchange their names in one step, and a reader finds either of them at every
moment. Some filesystems, NFS among them, cannot exchange names. On these the old directory is first renamed to
`.NAME.r2m-old`, and for a moment NAME does not exist. `whole_at` finds the old directory in that case.
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
from typing import BinaryIO

from r2m_async.errors import DiskError

_HIDDEN = re.compile(r"\..*\.r2m-[0-9a-f]{8}\.partial")
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
_EXCHANGE, _WORKING_DIRECTORY = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers that mean trouble with the disk itself, whatever the file: it is full, read-only or broken."""


def write_file(path: str | Path, data: str | bytes | memoryview) -> None:
    """Writes a file, or replaces one. A reader finds the old file or all of `data`, never a part.

    The folder of the file must exist. Text is written as UTF-8. If `path` is a link, the file that it leads to is
    replaced. Raises DiskError.
    """
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A context manager that yields a new file to write. It becomes `path` at the end of the block, as in `write_file`.

    If the block raises, the new file is removed, and `path` stays as it was. Raises DiskError, also in the place of an
    OSError of the block.
    """
    path = _followed(path)
    with disk_errors(path):
        _remove_leftovers(path.parent)
        building, lock = _claim(path, lambda hidden: hidden.touch(exist_ok=False))
        try:
            with building.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # The data must be on the disk before the name is: otherwise a crash of the machine could leave an empty
            # file under the name.
            os.replace(building, path)
            _sync_folder(path.parent)
        finally:
            _delete(building)
            os.close(lock)


def append(path: str | Path, data: str | bytes) -> None:
    """Appends text or bytes to a file, which is created if it does not exist.

    Raises DiskError if they do not fit. The file is then cut back to its old length. A writer that is killed
    meanwhile may leave a part of `data`. Only one process may append to a file at a time.
    """
    path, rest = Path(path), memoryview(data.encode() if isinstance(data, str) else data)
    with disk_errors(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # This would also cut off what another writer had appended in the meantime.
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def append_lines(path: str | Path, lines: str | bytes) -> None:
    """Appends lines as `append` does. A half-written last line, which a killed writer has left, is removed first."""
    path = Path(path)
    with disk_errors(path), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                cut_partial_line(path)
    append(path, lines)


def cut_partial_line(path: Path) -> None:
    """Removes a last line that has no line end. Makes the file if it is not there. Raises DiskError.

    A killed writer leaves such a line, and the next line would be appended to it.
    """
    with disk_errors(path):
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


@contextlib.contextmanager
def whole_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A context manager that yields a new directory to fill. It becomes `path` at the end of the block.

    If the block raises, the new directory is removed, and `path` stays as it was.

    Args:
        replace: whether the new directory may replace an old one. Without it, FileExistsError is raised if something
            exists at `path`, unless that is an empty directory.

    Raises DiskError, also for an error of the disk inside the block.
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
        _recover(path)  # removes the old directory, if it had to be moved aside


@contextlib.contextmanager
def scratch_directory(beside: str | Path) -> Iterator[Path]:
    """A context manager that yields a hidden directory in the same folder as `beside`.

    The directory is removed at the end of the block. Raises DiskError if it cannot be made.
    """
    with _hidden_directory(_followed(beside)) as directory:
        yield directory


def remove_directory(path: str | Path) -> None:
    """Removes a directory. A directory that does not exist is no error. Raises DiskError.

    It is renamed before it is deleted, so no part of it is ever visible under its name.
    """
    path = _followed(path)
    # A directory that a killed writer had moved aside goes first: `whole_at` would bring it back.
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
    """Returns where a reader finds the directory `path`.

    This is `path` itself, or the place of the old directory if a writer has moved it aside and `path` does not exist.
    """
    path, old = Path(path), _aside(_followed(path))
    return old if not path.exists() and old.is_dir() else path


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[bool]:
    """A context manager that locks a directory or a file, and yields whether no other process has it locked.

    Who appends to files in a directory, or to a file, must be the only one. A file must not be replaced meanwhile: the lock
    is that of the old one. On a filesystem without locks it yields True. The lock ends with the process. Raises DiskError
    if there is nothing that can be opened.
    """
    with disk_errors(path, doing="opened"):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        alone = _locks(descriptor) is not False
        # The last writer may have removed it between the opening and the lock. Then the lock is that of nothing.
        with contextlib.suppress(FileNotFoundError):
            alone &= os.path.samestat(os.stat(path), os.fstat(descriptor))
        yield alone and os.path.lexists(path)
    finally:
        os.close(descriptor)


def listed(folder: Path) -> dict[str, Path]:
    """Returns the directories in a folder by name, sorted, each at the place where `whole_at` finds it.

    Hidden directories are left out. A folder that does not exist gives an empty dict.
    """
    names = {path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")}
    names |= {path.name[1:].removesuffix(".r2m-old") for path in folder.glob(".*.r2m-old") if path.is_dir()}
    return {name: whole_at(folder / name) for name in sorted(names)}


@contextlib.contextmanager
def disk_errors(path: Path, building: Path | None = None, doing: str = "written") -> Iterator[None]:
    """A context manager that turns errors of the disk in its block into DiskError.

    Args:
        path: what is written, for the message.
        building: given if the block does other things besides writing below this directory. Then only two kinds of
            errors become DiskError: trouble with the disk itself, and a refused access below the directory.
        doing: the verb in the message.
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
    """The errno of a failed write by Python, safetensors or torch; None for any other error.

    torch gives no errno for its archives. A full disk is recognised by its text, and anything else counts as EIO.
    """
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and re.search(r"inline_container\.cc|PytorchStreamWriter|^write\(\): fd", text):
        return errno.ENOSPC if "No space left" in text else errno.EIO
    return None


def _told(path: Path, doing: str, number: int, error: Exception) -> str:
    """The message of a DiskError: what failed, why, how much room is left, and what to do."""
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
    """The path with all links resolved. The target of a link is replaced, and not the link."""
    return Path(os.path.realpath(path))


def _aside(path: Path) -> Path:
    """Where an old directory lies for a moment, on filesystems that cannot exchange names."""
    return path.with_name(f".{path.name}.r2m-old")


def _hidden_name(path: Path) -> Path:
    """A new random name beside `path`, of the form that `_remove_leftovers` knows."""
    return path.with_name(f".{path.name}.r2m-{secrets.token_hex(4)}.partial")


def _claim(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Makes something new beside `path` and locks it. Returns its path and the descriptor that holds the lock."""
    while True:
        hidden = _hidden_name(path)
        make(hidden)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(hidden, os.O_RDONLY)
            # Until it is locked, another writer may take it for a leftover and remove it. It is then made anew.
            if _locks(lock) is not False and hidden.exists():
                return hidden, lock
            os.close(lock)


def _locks(descriptor: int) -> bool | None:
    """Tries to lock a file or directory. True: done. False: another process holds it. None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


@contextlib.contextmanager
def _hidden_directory(path: Path) -> Iterator[Path]:
    """Yields a new locked directory beside `path`. Whatever has its name at the end of the block is deleted."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        building, lock = _claim(path, Path.mkdir)
    try:
        yield building
    finally:
        # After an exchange of names this is the old directory, and otherwise what was not put into its place.
        _delete(building)
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    """Deletes what killed writers left in a folder. Errors are ignored: another writer may do the same right now."""
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
    """Deletes a hidden file or directory as far as it can. The next writer tries to delete what is left."""
    if hidden.is_dir():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            hidden.unlink()


def _recover(path: Path) -> None:
    """Finishes a replacement by moving aside, or undoes it.

    If `path` exists, the old directory that was moved aside is removed. Otherwise it gets its name back.
    """
    with contextlib.suppress(OSError):
        if os.path.lexists(path):
            hidden = _hidden_name(path)
            os.rename(_aside(path), hidden)
            _delete(hidden)
        else:
            os.rename(_aside(path), path)


def _put(building: Path, path: Path, replace: bool) -> bool:
    """Renames `building` to `path`. Returns False if something is there and `replace` is False."""
    while True:  # again, if another writer of the same path came first
        try:
            os.rename(building, path)  # works if `path` does not exist or is an empty directory
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
    """Exchanges two names in one step. Returns False, and does nothing, if the system or filesystem cannot do that."""
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
    """Flushes all files and folders below a directory, and the directory itself, to the disk."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk. A rename survives a crash of the machine only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some filesystems have no fsync for folders
            raise
    finally:
        os.close(descriptor)
