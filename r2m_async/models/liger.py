"""The kernels of the package liger-kernel for norms and gated layers (arXiv 2410.10989): fewer intermediate results on a GPU.

They compute what the model's own layers compute, up to rounding. The fused loss is never applied: log-probabilities come
from the model's own logits. Neither are the rotary embeddings, which the package replaces for all models of a process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from r2m_async.errors import ConfigError, all_at_once

FAMILIES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3"),
    *("qwen2", "qwen3", "smollm3"),
)
"""The families (`model_type` of config.json) of decoders of text whose norms and gated layers the package knows."""
_ELSE = "or use model.liger false"


def check_liger(device: str) -> None:
    """Checks that the kernels can run on this machine.

    device: the value of `run.device`.

    Raises ConfigError, with a line for each, if the package is not installed and if there is no GPU to compute on.
    """
    all_at_once(_check_package, lambda: _check_device(device))


def _check_package() -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            f"model.liger is true, and the package liger-kernel is not installed: pip install 'r2m-async[liger]', {_ELSE}"
        )


def _check_device(device: str) -> None:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        reason = "run.device is 'cpu'" if device == "cpu" else "torch finds no GPU on this machine"
        raise ConfigError(f"model.liger is true, whose kernels run on GPUs alone, and {reason}: use one, {_ELSE}")


def check_family(key: str, name: str | Path, model: Any) -> None:
    """Raises ConfigError if the package has no kernels for a model, or if the model computes with Python code of its own.

    key: the key of the config that names the model. name: its Hugging Face name or directory.
    """
    family, module = model.config.model_type, type(model).__module__
    if family not in FAMILIES or not module.startswith("transformers."):
        what = f"is of the family {family!r}" if family not in FAMILIES else "computes with Python code of its own"
        raise ConfigError(
            f"model.liger is true and {key} is {str(name)!r}, which {what}: there are kernels for {', '.join(FAMILIES)} as "
            f"transformers has them; name such a model, {_ELSE}"
        )


def apply_liger(model: Any) -> None:
    """Lets the norms and gated layers of a loaded model compute with the kernels. `check_family` must have let it through.

    The package also puts its classes in the place of the family's own, for all models that the process makes later. That
    is taken back.

    Raises ConfigError if the package that is installed does not know the family.
    """
    decoder = model.base_model
    family = decoder.config.model_type
    apply = getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{family}", None)
    if apply is None:
        raise ConfigError(
            f"model.liger is true, and the liger-kernel that is installed has no kernels for the family {family!r}: pip "
            f"install 'r2m-async[liger]', {_ELSE}"
        )
    module = vars(sys.modules[type(decoder).__module__])
    before = dict(module)
    # The decoder alone: the package knows it in a language model and in a classifier.
    apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, model=decoder)
    module.update(before)
