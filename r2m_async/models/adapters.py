"""LoRA adapters, added by peft, and the merged parameters that leave the learner.

With LoRA, a linear layer keeps its base weight and gets two small trained matrices beside it. Engines and exported
models know no adapters. So `publications` gives every parameter under the base model's name, with the adapters added
in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.config import LoRA
from r2m_async.errors import ConfigError


def add_adapters(model: Any, lora: LoRA | None, seed: int) -> None:
    """Adds LoRA adapters to `model` in place and freezes its other weights. The head of a `ValueModel` stays trainable.

    A fresh adapter adds zero, so the model's outputs do not change at first.

    model: a transformers model, or another module with `add_adapter` and `device`, such as `ValueModel`.
    lora: the config's `model.lora`, with rank, alpha and targets. It must not be None.
    seed: seeds the adapters' first weights. Every rank must pass the same seed, to start from the same weights.

    Raises ConfigError if peft is not installed, if peft refuses the targets because no module has such a name, and if an
    adapter sits on something else than a linear layer, such as the experts of a mixture, which `publications` cannot merge.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("model.lora is set and peft is not installed: pip install 'r2m-async[lora]'") from None
    assert lora is not None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    names = [name for name, _ in model.named_parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    # The fork restores the caller's random state, so that training with LoRA draws the same numbers as without it.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
        except ValueError as error:
            raise ConfigError(f"model.lora.targets is {lora.targets!r}: {error}") from None
    if stray := sorted({one.name for one in publications(model)}.symmetric_difference(names)):
        raise ConfigError(
            f"model.lora.targets is {lora.targets!r}: it reaches {stray[-1]!r}, which is no linear layer, and adapters are "
            f"merged into linear layers alone; name such layers, for example [q_proj, k_proj, v_proj, o_proj]"
        )
    model.eval()  # the modules that peft made are in training mode, and the rest of the model is not


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switches the adapters off within the block, so that the model computes what its base model computes.

    This gives the reference policy pi_ref without a second copy of the weights.
    """
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


class TrainedPart:
    """A view of a model that lists only the parameters that are trained.

    It has the two methods by which a module lists its parameters, so it can stand in for the module there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) for every parameter with `requires_grad`, under the names of the model."""
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter with `requires_grad`, in the order of `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())


@dataclass(frozen=True, slots=True)
class Publication:
    """One parameter of the base model, and how to compute it from the parameters of the adapted model."""

    name: str
    """The parameter's name in the base model."""
    parts: tuple[nn.Parameter, ...]
    """The parameters of the adapted model that `whole` reads."""
    whole: Callable[[], Tensor]
    """Returns the parameter, adapters included.

    Under ZeRO stage 3 every rank holds a shard of each part. The caller must gather the parts first.
    """


def publications(model: nn.Module) -> list[Publication]:
    """Returns one `Publication` for every parameter of the base model.

    model: a model with or without adapters. Without adapters every parameter is published as it is.

    Two names that share one tensor (tied embeddings) give one `Publication`, under the first of the two names.
    """
    found = []
    for name, parameter in model.named_parameters():
        module_name, _, own_name = name.rpartition(".")
        if "lora_" in name:
            continue  # it is published as a part of the weight that it adapts
        if not module_name.endswith(".base_layer"):
            found.append(Publication(name, (parameter,), functools.partial(_itself, parameter)))
            continue
        # peft wraps an adapted layer: the layer itself is now `base_layer`, one level below its old name.
        layer = model.get_submodule(module_name.removesuffix(".base_layer"))
        plain = f"{module_name.removesuffix('.base_layer')}.{own_name}"
        if own_name == "weight":
            parts = tuple(layer.parameters())
            found.append(Publication(plain, parts, functools.partial(_merged, parameter, layer)))
        else:
            # LoRA adapts the weight alone, so a bias is published as it is.
            found.append(Publication(plain, (parameter,), functools.partial(_itself, parameter)))
    return found


def _itself(parameter: nn.Parameter) -> Tensor:
    return parameter


@torch.no_grad()
def _merged(weight: nn.Parameter, layer: Any) -> Tensor:
    # The sum is formed in float32, so that it is rounded only once, to the weight's dtype.
    return (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
