"""What a checkpoint is on disk: files, and a manifest that knows each of them by size and digest.

    step-000040/
      manifest.json            every other file's size and XXH3-128 digest, and a digest of itself
      config.yaml              of the run that saved it
      step.msgpack             policy steps taken
      policy_learner.msgpack   and head_learner: what `restore` goes on from
      policy_weights_39.msgpack, head_weights_39.msgpack, ...     versions that groups under way may still need
      deepspeed/ ...           a learner on DeepSpeed writes its part itself, from every rank

A checkpoint is built by `whole.whole_directory`; `seal` comes last. A reader checks everything before it uses anything:
what was changed, cut, lost, added, or belongs to another checkpoint is refused by its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from r2m_async.codec import decode
from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import CodecError, ConfigError
from r2m_async.runs.resuming import check_resumable
from r2m_async.whole import listed, whole_at

if TYPE_CHECKING:
    from r2m_async.ring.stages import Stages
    from r2m_async.trajectories import Weights

C = TypeVar("C", bound=ConfigTree)

MANIFEST = "manifest.json"
FORMAT = 1
"""Raise it with any change of what a manifest says: readers refuse what they do not know."""
_CHUNK = 16 * 2**20


# Writing


def write_parts(directory: Path, parts: Mapping[str, bytes | memoryview], config: R2MConfig) -> None:
    """Fills the directory of a ring's checkpoint, in which the learner may have written already, and seals it."""
    known = {}
    for name, part in parts.items():
        (directory / f"{name}.msgpack").write_bytes(part)
        known[f"{name}.msgpack"] = _entry(len(part), xxhash.xxh3_128_hexdigest(part))
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    seal(directory, known)


def seal(directory: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Writes the manifest of all files below, last of all. `known`: entries of files that need not be read again.

    A sealed directory within stands in it by its own manifest.
    """
    known = known or {}
    files = {name: known[name] if name in known else _entry_of(directory / name) for name in _files(directory)}
    (directory / MANIFEST).write_bytes(_manifest(files))


def _manifest(files: Mapping[str, dict[str, Any]]) -> bytes:
    content = {"format": FORMAT, "files": dict(sorted(files.items()))}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps(content | {"digest": digest}, indent=1).encode() + b"\n"


def _entry(size: int, digest: str) -> dict[str, Any]:
    return {"bytes": size, "xxh3_128": digest}


def _entry_of(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return _entry(size, digest.hexdigest())


def _files(directory: Path) -> list[str]:
    """Names of what is not a directory, but for the manifest; of a sealed directory within, that alone."""
    names = []
    for folder, folders, files in os.walk(directory):
        if folder != str(directory) and MANIFEST in files:
            files, folders[:] = [MANIFEST], []
        links = [name for name in folders if Path(folder, name).is_symlink()]
        names += [Path(folder, name).relative_to(directory).as_posix() for name in (*files, *links)]
    return sorted(name for name in names if name != MANIFEST)


# Reading


def read_checkpoint(directory: str | Path, config: R2MConfig) -> dict[str, bytes]:
    """The parts of a ring's checkpoint by name, all of it verified.

    Raises ConfigError for what `verified` refuses, for parts that another version of r2m-async wrote, and if `config`
    changes what a resumed run must keep (`resuming`).
    """
    directory = whole_at(directory)
    parts = verified(directory, lambda name: name.endswith(".msgpack") and "/" not in name)
    _check_ring(directory, parts)
    for name, part in parts.items():
        decoded(directory / name, part)  # without a copy
    check_resumable(directory, saved_config(directory), config)
    return {name.removesuffix(".msgpack"): part for name, part in parts.items()}


def newest_weights(directory: Path) -> tuple[int, Weights, Weights]:
    """(step, policy, head) of a ring's checkpoint, which is verified. Raises ConfigError."""
    parts = verified(directory, lambda name: name == "step.msgpack" or "_weights_" in name)
    _check_ring(directory, parts)
    step = decoded(directory / "step.msgpack", parts["step.msgpack"])
    names = (f"{kind}_weights_{step}.msgpack" for kind in ("policy", "head"))
    policy, head = (decoded(directory / name, parts[name]) for name in names)
    return step, policy, head


def _check_ring(directory: Path, parts: Mapping[str, bytes]) -> None:
    if "step.msgpack" not in parts:
        raise ConfigError(f"{directory}: is no checkpoint of a ring: it has no step.msgpack; name one that a run saved")


def kept_versions(saved: Mapping[str, bytes], prefix: str, stages: Stages) -> dict[int, Any]:
    """The kept weights of a checkpoint by version."""
    names = [name for name in saved if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): stages.from_bytes(saved[name]) for name in names}


def saved_config(directory: Path, kind: type[C] = R2MConfig) -> C:
    """Of a checkpoint that was verified. Raises ConfigError."""
    try:
        return kind.from_yaml(directory / "config.yaml")
    except ConfigError as error:
        raise ConfigError(
            f"{directory / 'config.yaml'}: this version of r2m-async does not know this config: {error}; use the version "
            f"that saved it"
        ) from None


def decoded(path: Path, data: bytes) -> Any:
    """What the bytes of a checkpoint's file stand for. Raises ConfigError."""
    try:
        return decode(data)
    except CodecError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; use the version that saved the checkpoint") from None


def _always(name: str) -> bool:
    return True


def _never(name: str) -> bool:
    return False


def verified(
    directory: str | Path,
    wanted: Callable[[str], bool] = _never,
    strays: Callable[[str], bool] = _never,
    checked: Callable[[str], bool] = _always,
) -> dict[str, bytes]:
    """Checks the files of a sealed directory; those that are `wanted` are read once, and returned by name.

    strays: files that the manifest does not know and that may be there all the same. checked: the others are not read.
    Raises ConfigError naming the directory, the file, what is wrong with it, and the newest whole directory beside it.
    """
    while True:
        place, before = whole_at(directory), None
        try:
            before = _manifest_of(place)
            return _verified(place, before, wanted, strays, checked)
        except _Damaged as damage:
            if not _replaced(directory, before):
                raise ConfigError(f"{damage}; {_remedy(place)}") from None


class _Damaged(Exception):
    pass


def _manifest_of(directory: Path) -> bytes | None:
    path = directory / MANIFEST
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _Damaged(f"{path}: cannot be read: {error.strerror}") from None


def _replaced(directory: str | Path, before: bytes | None) -> bool:
    """Whether a new one took its place while it was read."""
    try:
        return _manifest_of(whole_at(directory)) != before
    except _Damaged:
        return False


def _entries(directory: Path, manifest: bytes | None) -> dict[str, dict[str, Any]]:
    if manifest is None:
        if not directory.is_dir():
            raise _Damaged(f"{directory}: is not there" if not directory.exists() else f"{directory}: is no directory")
        why = (
            "it is no checkpoint or export, or it has lost that file, or an older version of r2m-async wrote it without"
        )
        raise _Damaged(f"{directory}: has no {MANIFEST}: {why}")
    try:
        content = json.loads(manifest)
        if content["format"] == FORMAT and manifest == _manifest(content["files"]):
            return content["files"]
        number = content["format"]
    except (ValueError, TypeError, KeyError, AttributeError):
        number = FORMAT
    if number != FORMAT:
        raise _Damaged(f"{directory / MANIFEST}: has format {number!r}, and this version of r2m-async reads {FORMAT}")
    raise _Damaged(f"{directory / MANIFEST}: is damaged: it does not have its own digest")


def _verified(
    directory: Path,
    manifest: bytes | None,
    wanted: Callable[[str], bool] = _never,
    strays: Callable[[str], bool] = _never,
    checked: Callable[[str], bool] = _always,
) -> dict[str, bytes]:
    entries = _entries(directory, manifest)
    if others := [name for name in _files(directory) if name not in entries and not strays(name)]:
        raise _Damaged(f"{directory / others[0]}: is no file of this checkpoint, whose manifest does not know it")
    read = {}
    for name, entry in entries.items():
        if not checked(name):
            continue
        path = directory / name
        try:
            data = path.read_bytes() if wanted(name) else None
            found = _entry_of(path) if data is None else _entry(len(data), xxhash.xxh3_128_hexdigest(data))
        except OSError as error:
            raise _Damaged(f"{path}: cannot be read: {error.strerror}") from None
        if found != entry:
            what = "its bytes are not those that were written"
            if found["bytes"] != entry["bytes"]:
                what = f"it has {found['bytes']} bytes, and {entry['bytes']} were written"
            raise _Damaged(f"{path}: is damaged{_origin(directory, name, found)}: {what}")
        if data is not None:
            read[name] = data
    return read


def _others(directory: Path) -> Iterator[Path]:
    """Directories beside it, and those in which a run keeps checkpoints, newest first by their names."""
    paths = [*listed(directory.absolute().parent).values(), *listed(directory / "checkpoints").values()]
    paths.sort(key=lambda path: (len(path.name), path.name), reverse=True)
    return (path for path in paths if path.name != directory.name and (path / MANIFEST).is_file())


def _origin(directory: Path, name: str, entry: dict[str, Any]) -> str:
    for other in _others(directory):
        with contextlib.suppress(_Damaged):
            if _entries(other, _manifest_of(other)).get(name) == entry:
                return f", or rather that of {other.name}"
    return ""


def _remedy(directory: Path) -> str:
    for other in _others(directory):
        with contextlib.suppress(_Damaged):
            _verified(other, _manifest_of(other))
            return f"use {other}, the newest whole one"
    return "there is no whole one beside it"


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first; one that was interrupted has another name, and so have copies."""
    steps = {_step(name): path for name, path in listed(run / "checkpoints").items()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def _step(name: str) -> int | None:
    """Of the name that `checkpoint_path` gives to a step's checkpoint, and of no other."""
    number = re.fullmatch(r"step-(\d{6,})", name)
    return int(number[1]) if number and checkpoint_path(Path(), int(number[1])).name == name else None
