"""Directories that are expensive to build, kept on disk and shared by all runs: `cached_directory`.

A directory's name ends in the digest of everything that decides its content, so a hit never needs checking. Other
processes see all of it or nothing, and of several concurrent builders the first to finish wins while the others use its
result.
"""

import ast
import hashlib
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from r2m_async.whole import whole_directory


def cache_root() -> Path:
    """`$R2M_CACHE`, or `~/.cache/r2m-async`."""
    return Path(os.environ.get("R2M_CACHE") or Path.home() / ".cache" / "r2m-async").expanduser()


def cached_directory(name: str, key: str | bytes | Iterable[str | bytes], build: Callable[[Path], None]) -> Path:
    """The directory `<cache_root>/<name>-<digest of key>`, made by `build(empty_directory)` if it is not there yet.

    `key` is one part or several; the digest depends on where one part ends and the next begins, and takes `"a"` and
    `b"a"` for the same part. What `build` raises passes through and leaves nothing behind. Raises DiskError.
    """
    final = cache_root() / f"{name}-{key_digest(key)}"
    if final.is_dir():
        return final
    try:
        with whole_directory(final) as building:
            build(building)
    except FileExistsError:
        if not final.is_dir():  # else another process was faster, and has built the same
            raise
    return final


def made_by(*files: str) -> list[str]:
    """Key parts: the code of these source files without its comments, and the versions of what it computes with."""
    code = [ast.unparse(ast.parse(Path(file).read_text(encoding="utf-8"))) for file in files]
    return [*code, *(f"{package} {version(package)}" for package in ("torch", "transformers", "tokenizers"))]


def key_digest(key: str | bytes | Iterable[str | bytes]) -> str:
    """16 hexadecimal digits of the SHA-256 of the key's parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in [key] if isinstance(key, str | bytes) else key:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
