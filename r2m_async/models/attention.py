"""What must be there for the attention that `model.attention` names. It is asked before any model is loaded."""

from __future__ import annotations

import importlib.util

from r2m_async.errors import ConfigError, all_at_once

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn", "pip install 'r2m-async[flash-attn]' --no-build-isolation"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3", "build it from the sources of flash-attention"),
    "flash_attention_4": ("flash_attn", "flash-attn-4", "pip install flash-attn-4"),
}
"""Of an attention of transformers: the module that has its kernels, the package of it, and how to get that."""
_ELSE = "or use model.attention 'sdpa' or 'eager'"


def check_attention(attention: str, device: str, dtype: str) -> None:
    """Checks that a model can train with an attention on this machine.

    attention: the value of `model.attention`. device, dtype: those of `run.device` and `model.dtype`.

    Raises ConfigError for an attention whose package is not installed, which needs a GPU where there is none, which
    does not compute in the dtype, or which is no attention of whole texts. Whether a model has the attention shows when
    the model is loaded.
    """
    if attention.startswith("paged|"):
        raise ConfigError(
            f"model.attention is {attention!r}, which reads the cache of an engine that batches continuously, and here whole "
            f"texts are read: use {attention.removeprefix('paged|')!r}"
        )
    all_at_once(
        lambda: _check_package(attention),
        lambda: _check_device(attention, device),
        lambda: _check_dtype(attention, dtype),
    )


def _check_package(attention: str) -> None:
    module, package, remedy = _PACKAGES.get(attention, ("", "", ""))
    if "/" in attention:  # of Hugging Face's hub
        module, package = "kernels", "kernels, which fetches it from Hugging Face,"
        remedy = "pip install 'transformers[kernels]'"
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"model.attention is {attention!r}, and the package {package} is not installed: {remedy}, {_ELSE}"
        )


def _check_device(attention: str, device: str) -> None:
    # flex_attention computes on a CPU, too, but has no backward pass there.
    if not attention.startswith(("flash_attention", "flex_attention")):
        return
    import torch

    if device == "cpu":
        raise ConfigError(
            f"model.attention is {attention!r}, which trains on GPUs alone, and run.device is 'cpu': use run.device 'auto' or "
            f"'cuda', {_ELSE}"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.attention is {attention!r}, which trains on GPUs alone, and torch finds no GPU on this machine: run it "
            f"where there is one, {_ELSE}"
        )


def _check_dtype(attention: str, dtype: str) -> None:
    if "flash" in attention and dtype == "float32":
        raise ConfigError(
            f"model.attention is {attention!r}, whose kernels compute in 16 bits alone, and model.dtype is {dtype!r}: use "
            f"model.dtype bfloat16, {_ELSE}"
        )
