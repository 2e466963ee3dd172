"""Writes and reads checkpoints. A checkpoint is a directory of files, and a manifest with the size and digest of each.

    step-000040/
      manifest.json            size and XXH3-128 digest of every other file, and a digest of the manifest itself
      config.yaml              the config of the run that saved the checkpoint
      step.msgpack             the number of policy steps taken
      progress.msgpack         the counts of the run so far, a digest of its prompts, and the lengths of its records
      policy_learner.msgpack   the state from which the policy learner goes on
      head_learner.msgpack     the state from which the head learner goes on
      policy_weights_39.msgpack, head_weights_39.msgpack, ...     weight versions that unfinished groups may still need
      deepspeed/ ...           the part that a learner on DeepSpeed writes itself, from every rank

The writer fills a directory inside `whole.whole_directory` and calls `seal` last. So a checkpoint is there whole or
not at all. The reader checks all files before it uses any of them. It refuses, by name, a file that was changed, cut,
lost or added, or that belongs to another checkpoint.
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
from r2m_async.errors import CodecError, ConfigError, DiskError
from r2m_async.runs.resuming import check_resumable
from r2m_async.whole import listed, whole_at

if TYPE_CHECKING:
    from r2m_async.ring.stages import Stages
    from r2m_async.trajectories import Weights

C = TypeVar("C", bound=ConfigTree)

MANIFEST = "manifest.json"
FORMAT = 1
"""The version of the manifest's format. Raise it with every change: readers refuse a format that they do not know."""
_CHUNK = 16 * 2**20
"""Bytes that are read at once to compute a digest. A file may be larger than the memory."""


# Writing


def write_parts(
    directory: Path,
    parts: Mapping[str, bytes | memoryview],
    config: R2MConfig,
    written: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Fills the directory of a ring's checkpoint and seals it.

    directory: must exist. A learner on DeepSpeed may have written its own files there already.
    parts: the encoded content of every file, by the file's name without `.msgpack`.
    written: the entries of files that a stage has written there already, by name.

    Raises DiskError if this machine does not see such a file.
    """
    for name in written or {}:
        if not (directory / name).is_file():
            raise DiskError(
                f"{directory / name}: a stage has written it on another machine, and it is not here: run.output_dir must be "
                f"on a disk that all machines of the run share (docs/cluster.md)"
            )
    # The digests are of the bytes in memory. So a reader notices what went wrong on their way to the disk.
    known = dict(written or {})
    for name, part in parts.items():
        (directory / f"{name}.msgpack").write_bytes(part)
        known[f"{name}.msgpack"] = _entry(len(part), xxhash.xxh3_128_hexdigest(part))
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    seal(directory, known)


def seal(directory: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Writes the manifest of a directory. Call it last, when all other files are there.

    known: manifest entries of files whose digests are known, by name. All other files are read to compute theirs.

    If a directory inside is sealed already, only its own manifest is listed, which stands for its files.
    """
    known = known or {}
    files = {name: known[name] if name in known else _entry_of(directory / name) for name in _files(directory)}
    (directory / MANIFEST).write_bytes(_manifest(files))


def _manifest(files: Mapping[str, dict[str, Any]]) -> bytes:
    """Returns the bytes of a manifest. files: the entry (see `_entry`) of every file, by name."""
    # The digest covers the compact form, without the digest. A reader makes the manifest anew and compares the bytes.
    content = {"format": FORMAT, "files": dict(sorted(files.items()))}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps(content | {"digest": digest}, indent=1).encode() + b"\n"


def _entry(size: int, digest: str) -> dict[str, Any]:
    """Returns what a manifest says about one file. size: in bytes. digest: XXH3-128, in hexadecimal."""
    return {"bytes": size, "xxh3_128": digest}


def _entry_of(path: Path) -> dict[str, Any]:
    """Returns the manifest entry of a file, by reading it. Raises OSError if it cannot be read."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return _entry(size, digest.hexdigest())


def _files(directory: Path) -> list[str]:
    """Returns the names, relative to `directory`, of the files that its manifest lists, in order.

    These are all files and links, except the manifest. Of a sealed directory inside, only its manifest is listed.
    """
    names = []
    for folder, folders, files in os.walk(directory):
        if folder != str(directory) and MANIFEST in files:
            files, folders[:] = [MANIFEST], []  # emptied in place, which keeps `walk` from going further down
        # `walk` counts a link to a directory as a directory, and does not enter it.
        links = [name for name in folders if Path(folder, name).is_symlink()]
        names += [Path(folder, name).relative_to(directory).as_posix() for name in (*files, *links)]
    return sorted(name for name in names if name != MANIFEST)


# Reading


def read_checkpoint(directory: str | Path, config: R2MConfig) -> dict[str, bytes]:
    """Verifies a ring's checkpoint and returns the encoded content of its files, by name without `.msgpack`.

    config: the config of the run that is to go on.

    Raises ConfigError if the checkpoint is not whole (see `verified`), if it cannot be decoded, or if `config` changes
    what a resumed run must keep (see `resuming`).
    """
    directory = whole_at(directory)
    parts = verified(directory, lambda name: name.endswith(".msgpack") and "/" not in name)
    _check_ring(directory, parts)
    for name, part in parts.items():
        # Only to see that it can be decoded, before anything is started. Decoding makes no copy of the tensors.
        decoded(directory / name, part)
    check_resumable(directory, saved_config(directory, R2MConfig), config)
    return {name.removesuffix(".msgpack"): part for name, part in parts.items()}


def saved_counts(directory: Path) -> dict[str, Any]:
    """Verifies what a ring's checkpoint says of how far the run had come, and returns it (`Ring.save`).

    Raises ConfigError if it is damaged, or if a version of r2m-async without these counts wrote the checkpoint.
    """
    name = "progress.msgpack"
    part = verified(directory, lambda one: one == name, checked=lambda one: one == name)
    if not part:
        raise ConfigError(f"{directory}: has no {name}: an older version of r2m-async wrote it; use that version")
    return dict(decoded(directory / name, part[name]))


def newest_weights(directory: Path) -> tuple[int, Weights, Weights]:
    """Verifies a ring's checkpoint and returns (policy steps taken, the policy's weights, the head's weights).

    Both weights are of the version of that step. Raises ConfigError if the checkpoint is damaged or cannot be decoded.
    """
    parts = verified(directory, lambda name: name == "step.msgpack" or "_weights_" in name)
    _check_ring(directory, parts)
    step = decoded(directory / "step.msgpack", parts["step.msgpack"])
    names = (f"{kind}_weights_{step}.msgpack" for kind in ("policy", "head"))
    policy, head = (decoded(directory / name, parts[name]) for name in names)
    return step, policy, head


def _check_ring(directory: Path, parts: Mapping[str, bytes]) -> None:
    """Raises ConfigError if these are not the files of a ring's checkpoint."""
    if "step.msgpack" not in parts:
        raise ConfigError(f"{directory}: is no checkpoint of a ring: it has no step.msgpack; name one that a run saved")


def kept_versions(saved: Mapping[str, bytes], prefix: str, stages: Stages) -> dict[int, Any]:
    """Returns the weight versions that a checkpoint kept, by version number, as the stages take them.

    saved: the result of `read_checkpoint`. prefix: `policy_weights_` or `head_weights_`.
    """
    names = [name for name in saved if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): stages.from_bytes(saved[name]) for name in names}


def saved_config(directory: Path, kind: type[C]) -> C:
    """Returns the config of the run that saved a checkpoint. Verify the checkpoint first.

    kind: the class of the config. Raises ConfigError if this version of r2m-async does not know the config.
    """
    try:
        return kind.from_yaml(directory / "config.yaml")
    except ConfigError as error:
        raise ConfigError(
            f"{directory / 'config.yaml'}: this version of r2m-async does not know this config: {error}; use the version "
            f"that saved it"
        ) from None


def decoded(path: Path, data: bytes) -> Any:
    """Decodes the bytes of a checkpoint's file. Raises ConfigError, which names `path`, if they cannot be decoded."""
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
    """Checks the files of a sealed directory against its manifest, and returns the content of some of them by name.

    The three functions take a file's name relative to the directory.

    wanted: True for files whose content is returned. Such a file is read once, so what is returned is what was checked.
    strays: True for files that may be there although the manifest does not list them.
    checked: False for listed files that are neither checked nor read.

    Raises ConfigError if a file is damaged, missing or not listed, or if the manifest is. The message names the file,
    what is wrong with it, and the newest whole directory beside this one.
    """
    # A running training may replace the directory while it is read. Files of two checkpoints then look like damage.
    # So a failure counts only if the manifest is still the one from before; else the new directory is checked.
    while True:
        place, before = whole_at(directory), None
        try:
            before = _manifest_of(place)
            return _verified(place, before, wanted, strays, checked)
        except _Damaged as damage:
            if not _replaced(directory, before):
                raise ConfigError(f"{damage}; {_remedy(place)}") from None


def damage_of(directory: Path) -> str | None:
    """Returns what is wrong with a sealed directory, in words that name the file, or None if it is whole."""
    try:
        _verified(directory, _manifest_of(directory))
    except _Damaged as damage:
        return str(damage)
    return None


class _Damaged(Exception):
    """A directory or a file in it is not what was sealed. The message says what is wrong, but not what to do."""

    pass


def _manifest_of(directory: Path) -> bytes | None:
    """Returns the bytes of a directory's manifest, or None if it has none. Raises _Damaged if it cannot be read."""
    path = directory / MANIFEST
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _Damaged(f"{path}: cannot be read: {error.strerror}") from None


def _replaced(directory: str | Path, before: bytes | None) -> bool:
    """Returns whether another directory has taken this one's place since its manifest was `before` (None: had none)."""
    try:
        return _manifest_of(whole_at(directory)) != before
    except _Damaged:
        return False


def _entries(directory: Path, manifest: bytes | None) -> dict[str, dict[str, Any]]:
    """Returns a manifest's entries by file name. Raises _Damaged if it is missing, damaged or of another format."""
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        number = FORMAT  # it says no format, so it is damaged and not of another version
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
    """Does once what `verified` does, with a manifest that was read before. Raises _Damaged."""
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
    """Yields sealed directories beside this one, and checkpoints inside it if it is a run. The newest comes first."""
    # By name, the longer one later: step-1000000 is newer than step-999999.
    paths = [*listed(directory.absolute().parent).values(), *listed(directory / "checkpoints").values()]
    paths.sort(key=lambda path: (len(path.name), path.name), reverse=True)
    return (path for path in paths if path.name != directory.name and (path / MANIFEST).is_file())


def _origin(directory: Path, name: str, entry: dict[str, Any]) -> str:
    """Returns words for a message that name the checkpoint a wrong file came from, or nothing if none is known."""
    for other in _others(directory):
        with contextlib.suppress(_Damaged):
            if _entries(other, _manifest_of(other)).get(name) == entry:
                return f", or rather that of {other.name}"
    return ""


def _remedy(directory: Path) -> str:
    """Returns words for a message that name the newest whole directory beside a damaged one, if there is one."""
    for other in _others(directory):
        with contextlib.suppress(_Damaged):
            _verified(other, _manifest_of(other))
            return f"use {other}, the newest whole one"
    return "there is no whole one beside it"


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns the directory of a run's checkpoint after `step` policy steps."""
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Returns the directories of a run's checkpoints, the oldest first.

    A checkpoint whose writing was interrupted has another name and is left out. So are copies under other names.
    """
    steps = {step_of(name): path for name, path in listed(run / "checkpoints").items()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def newest_whole(run: Path) -> tuple[Path, list[str]]:
    """Returns a run's newest checkpoint that is whole, and what is wrong with each newer one.

    Raises ConfigError if there is none.
    """
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            _verified(checkpoint, _manifest_of(checkpoint))
            return checkpoint, damaged
        except _Damaged as damage:
            damaged.append(str(damage))
    if damaged:
        raise ConfigError(
            "\n".join([f"{run}: none of its checkpoints is whole; bring one back, or start anew:", *damaged])
        )
    raise ConfigError(f"{run}: has no checkpoint to go on from (checkpoint.every); start anew with `r2m train`")


def step_of(name: str) -> int | None:
    """Returns the step in a name that `checkpoint_path` gives, or None for any other name."""
    number = re.fullmatch(r"step-(\d{6,})", name)
    return int(number[1]) if number and checkpoint_path(Path(), int(number[1])).name == name else None
