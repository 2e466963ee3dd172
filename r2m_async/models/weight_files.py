"""Weight files of models, looked at before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from r2m_async.errors import ConfigError

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
SECOND_LAYER = "reward_head.safetensors"
"""Beside a reward model's weights where its head has two layers, see `reward_model`."""
_REMEDY = "copy or download it again"


def check_weight_files(key: str, name: str | Path) -> None:
    """Raises ConfigError naming the key and the file unless the model's safetensors files are whole: not cut off, empty or
    without their header. Reads headers alone. `name`: HF name or directory; what is not on this machine yet is not looked at.
    """
    from safetensors import SafetensorError, safe_open

    for path in _files(key, name):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{key} {str(name)!r}: {path} is no whole weight file: {error}; {_REMEDY}") from None


def _files(key: str, name: str | Path) -> Iterator[Path]:
    if (index := _found(name, _INDEX)) is None:
        names = {_WEIGHTS}
    else:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key} {str(name)!r}: {index} cannot be read: {error!r}; {_REMEDY}") from None
    return (path for path in (_found(name, one) for one in sorted({*names, SECOND_LAYER})) if path is not None)


def _found(name: str | Path, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    try:
        cached = try_to_load_from_cache(str(name), file)
    except ValueError:  # no name of a model, which its loader will say
        return None
    return Path(cached) if isinstance(cached, str) else None
