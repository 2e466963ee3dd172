"""Checks the weight files of a model before they are loaded, so that a damaged file is named in the message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import xxhash

from r2m_async.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
SECOND_LAYER = "reward_head.safetensors"
"""The file beside a reward model's weights that holds the rest of a head of two layers. `reward.py` explains it."""
_REMEDY = "copy or download it again"
_CHUNK = 16 * 2**20
"""Bytes that are read at once to compute a digest. A file may be larger than the memory."""


def check_weight_files(key: str, name: str | Path) -> None:
    """Checks that the safetensors files of a model are whole. Only their headers are read.

    key: the config key that names the model, for the message.
    name: HF name or directory. Files that are not on this machine yet are not checked.

    Raises ConfigError, which names the key and the file, if a file is empty, cut off or without a readable header.
    """
    from safetensors import SafetensorError, safe_open

    for path in _files(key, name):
        try:
            # The header says where each tensor ends, and opening the file compares that with the file's length.
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{key} {str(name)!r}: {path} is not a complete weight file: {error}; {_REMEDY}"
            ) from None


def check_tied_weights(key: str, name: str | Path, tied: Mapping[str, str]) -> None:
    """Checks that weights which the config ties are not two different tensors in the files.

    tied: the names of two weights that are one, usually those of the language-model head and of the token embeddings.

    transformers would leave such weights apart, and an engine may tie them. Raises ConfigError, which names both.
    """
    import torch
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in _files(key, name):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def saved(tensor: str) -> Tensor:
        with safe_open(where[tensor], framework="pt") as file:
            return cast("Tensor", file.get_tensor(tensor))

    for one, other in tied.items():
        if one in where and other in where and not torch.equal(saved(one), saved(other)):
            raise ConfigError(
                f"{key} {str(name)!r}: its config.json ties {one} to {other} (tie_word_embeddings), and its files have two "
                f"different tensors for them: set tie_word_embeddings to false, or take {one} out of the files"
            )


def weights_are_here(name: str | Path) -> bool:
    """Returns whether a model's weights are on this machine. name: HF name or directory."""
    return Path(name).is_dir() or any(_found(name, file) for file in (_WEIGHTS, _INDEX))


def weights_digest(key: str, name: str | Path) -> str | None:
    """Returns a digest of a model's weight files, or None if none of them is on this machine.

    All bytes are read. Whoever has just loaded the model has them in memory. key: the config key that names the model.
    """
    digest, paths = xxhash.xxh3_128(), sorted(_files(key, name), key=lambda path: path.name)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest() if paths else None


def _files(key: str, name: str | Path) -> Iterator[Path]:
    """Returns the model's weight files on this machine: those of its index if it has one, and the head's second part.

    Raises ConfigError if the index cannot be read, or if a directory lacks a file that its index names.
    """
    if (index := _found(name, _INDEX)) is None:
        names = {_WEIGHTS}
    else:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key} {str(name)!r}: {index} cannot be read: {error!r}; {_REMEDY}") from None
    found = {one: _found(name, one) for one in sorted({*names, SECOND_LAYER})}
    if index is not None and Path(name).is_dir() and (gone := [one for one in sorted(names) if found[one] is None]):
        raise ConfigError(
            f"{key} {str(name)!r}: {index} names {len(names)} weight files, and {gone[0]} is not there; {_REMEDY}"
        )
    return (path for path in found.values() if path is not None)


def _found(name: str | Path, file: str) -> Path | None:
    """Returns the path of one file of a model, or None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    try:
        cached = try_to_load_from_cache(str(name), file)
    except ValueError:  # `name` cannot be an HF name; the loader says so, with a better message
        return None
    return Path(cached) if isinstance(cached, str) else None
