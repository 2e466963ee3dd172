"""The policy in training on plain PyTorch: one process, AdamW on float32 masters. What exact mode uses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learners.optimizer_state import moments, restore_moments
from r2m_async.config import R2MConfig
from r2m_async.finite import all_finite
from r2m_async.models.adapters import TrainedPart, adapters_off, add_adapters, publications
from r2m_async.models.loading import checkpoint_activations
from r2m_async.models.weights import MasterWeights, load_weights, named_weights


class TorchBackend:
    """A `backend.PolicyBackend`, or of a critic's `ValueModel` a `backend.Backend`. `model` is trained in place; `reference` is pi_ref, None under LoRA."""

    rank = 0
    num_ranks = 1

    def __init__(self, model: Any, reference: Any | None, config: R2MConfig) -> None:
        if config.model.lora:
            add_adapters(model, config.model.lora, config.run.seed)
        self.policy = self.probed = model
        self._reference = reference
        self._max_grad_norm = config.learner.max_grad_norm
        self._trained = TrainedPart(model)
        self._masters = MasterWeights(self._trained)
        self._optimizer = torch.optim.AdamW(
            self._masters.tensors, lr=config.learner.lr, weight_decay=config.learner.weight_decay
        )
        if config.learner.activation_checkpointing:
            checkpoint_activations(model)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self.policy):
            yield self.policy

    def total(self, values: Tensor) -> Tensor:
        return values

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        self._masters.take_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters.tensors, self._max_grad_norm))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._masters.write_back()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def finite(self) -> bool:
        return all_finite([*self._masters.copies, *self._trained.parameters()])

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((one.name, one.whole()) for one in publications(self.policy))

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        weights, masters = named_weights(self._trained, version), self._masters.copies
        return {"weights": weights, "masters": masters, "optimizer": moments(self._optimizer)}

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        load_weights(self._trained, state["weights"])
        self._masters.restore(state["masters"])
        restore_moments(self._optimizer, state["optimizer"])
