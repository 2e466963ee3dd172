"""Keeps directories that are expensive to build on disk, and shares them between all runs: `cached_directory`.

The name of a directory ends with a digest of everything that decides its content (the key). So a directory that is
found never needs to be compared. But its files may have been damaged or removed since, so each is checked against the
manifest that was written with it. A damaged directory is built anew. One that a version without manifests has built is not checked.

Other processes see a directory whole or not at all. If several processes build the same one, the first to finish wins,
and the others use its result.
"""

import ast
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path

from r2m_async.models.pretrained import quiet
from r2m_async.runs.checkpoints import MANIFEST, damage_of, seal
from r2m_async.whole import whole_directory

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Returns the directory of the cache: `$R2M_CACHE`, or `~/.cache/r2m-async` if that is not set."""
    return Path(os.environ.get("R2M_CACHE") or Path.home() / ".cache" / "r2m-async").expanduser()


class NotCached(LookupError):
    """A directory is not in the cache, and must not be built now."""


_ONLY_CACHED: ContextVar[bool] = ContextVar("only_cached", default=False)


@contextmanager
def only_cached() -> Iterator[None]:
    """Lets `cached_directory` build nothing within the block."""
    token = _ONLY_CACHED.set(True)
    try:
        yield
    finally:
        _ONLY_CACHED.reset(token)


def found_in_cache(name: str, key: str | bytes | Iterable[str | bytes]) -> Path | None:
    """Returns a cached directory, or None if it is not there or is damaged. Arguments are those of `cached_directory`."""
    final = cache_root() / f"{name}-{key_digest(key)}"
    if not final.is_dir():
        return None
    if (final / MANIFEST).is_file() and (damage := damage_of(final)):
        log.warning("%s: what the cache holds is made anew", damage)
        return None
    return final


def cached_directory(name: str, key: str | bytes | Iterable[str | bytes], build: Callable[[Path], None]) -> Path:
    """Returns a cached directory, and builds it first if it is not there yet, or is damaged.

    name: what the directory holds. Its path is `<cache_root>/<name>-<digest of key>`.
    key: everything that decides the content, see `key_digest`.
    build: is called with an empty directory, and fills it.

    Raises DiskError, and what `build` raises. Nothing is left behind then. Within `only_cached` it raises NotCached
    instead of building.
    """
    if found := found_in_cache(name, key := _parts(key)):
        return found
    if _ONLY_CACHED.get():
        raise NotCached(name)
    final = cache_root() / f"{name}-{key_digest(key)}"
    try:
        with quiet(), whole_directory(final, replace=final.is_dir()) as building:
            build(building)
            seal(building)
    except FileExistsError:
        # Another process was faster and has built the same. If no directory is there, something else has the name.
        if not final.is_dir():
            raise
    return final


def made_by(*files: str) -> list[str]:
    """Returns the parts of a key that say which code builds the content.

    files: paths of Python source files. The parts are the code of these files, and the versions of torch,
    transformers and tokenizers. Comments and layout of the files do not count, but docstrings do.
    """
    # Parsed and written out again, which drops comments and layout.
    code = [ast.unparse(ast.parse(Path(file).read_text(encoding="utf-8"))) for file in files]
    return [*code, *(f"{package} {version(package)}" for package in ("torch", "transformers", "tokenizers"))]


def key_digest(key: str | bytes | Iterable[str | bytes]) -> str:
    """Returns the digest of a key, as 16 hexadecimal digits.

    key: one part or several. Text counts as its UTF-8 bytes, so "a" and b"a" are the same part. The digest depends on
        where one part ends and the next begins: ("ab",) and ("a", "b") differ.
    """
    digest = hashlib.sha256()
    for part in _parts(key):
        data = part.encode() if isinstance(part, str) else part
        # With the length in front, no two keys give the same bytes to the digest.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _parts(key: str | bytes | Iterable[str | bytes]) -> list[str | bytes]:
    """Returns the parts of a key."""
    return [key] if isinstance(key, str | bytes) else list(key)
