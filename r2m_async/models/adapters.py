"""LoRA by peft, and a policy's parameters as engines and checkpoints know them: under the base model's names, merged."""

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
    """Puts `model.lora`'s adapters into the model, in place; they alone train. At first they change nothing.

    seed: of the adapters' first weights, the same on every rank. Raises ConfigError if peft is not installed or finds no module that a target names.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("model.lora is set and peft is not installed: pip install 'r2m-async[lora]'") from None
    assert lora is not None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
        except ValueError as error:
            raise ConfigError(f"model.lora.targets is {lora.targets!r}: {error}") from None
    model.eval()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within, the model is its base."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


class TrainedPart:
    """Of a model, what the optimizer moves; it has the methods of a module by which parameters are listed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())


@dataclass(frozen=True, slots=True)
class Publication:
    """One parameter of the base model."""

    name: str
    parts: tuple[nn.Parameter, ...]
    """What it is made of."""
    whole: Callable[[], Tensor]
    """Makes it; the parts must be whole."""


def publications(model: nn.Module) -> list[Publication]:
    """Of every parameter of the base model; a tied pair stands once."""
    found = []
    for name, parameter in model.named_parameters():
        module_name, _, own_name = name.rpartition(".")
        if "lora_" in name:
            continue
        if not module_name.endswith(".base_layer"):
            found.append(Publication(name, (parameter,), functools.partial(_itself, parameter)))
            continue
        layer = model.get_submodule(module_name.removesuffix(".base_layer"))
        plain = f"{module_name.removesuffix('.base_layer')}.{own_name}"
        if own_name == "weight":
            parts = tuple(layer.parameters())
            found.append(Publication(plain, parts, functools.partial(_merged, parameter, layer)))
        else:
            found.append(Publication(plain, (parameter,), functools.partial(_itself, parameter)))
    return found


def _itself(parameter: nn.Parameter) -> Tensor:
    return parameter


@torch.no_grad()
def _merged(weight: nn.Parameter, layer: Any) -> Tensor:
    return (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
