"""A backend on plain PyTorch: one process, with AdamW on float32 master weights. Runs with `lag: exact` use it."""

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
from r2m_async.models.weights import MasterWeights, adamw, load_weights, named_weights


class TorchBackend:
    """A `backend.PolicyBackend`, or a `backend.Backend` if its model is a critic's `ValueModel`.

    The protocols say what the methods do. There is one rank.
    """

    rank = 0
    num_ranks = 1

    def __init__(self, model: Any, reference: Any | None, config: R2MConfig) -> None:
        """Prepares a model for training.

        Args:
            model: the model. It is trained in place.
            reference: the reference policy pi_ref. None for a critic, and under LoRA.
            config: the run's config.

        Raises ConfigError if `model.lora` cannot be applied to the model.
        """
        # Adapters come first, because they decide which parameters train.
        if config.model.lora:
            add_adapters(model, config.model.lora, config.run.seed)
        self.policy = self.probed = model
        self._reference = reference
        self._max_grad_norm = config.learner.max_grad_norm
        self._trained = TrainedPart(model)
        self._masters = MasterWeights(self._trained)
        self._optimizer = adamw(self._masters.tensors, config.learner.lr, config.learner.weight_decay)
        if config.learner.activation_checkpointing:
            checkpoint_activations(model)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """Gives pi_ref inside the block. Under LoRA that is the policy with its adapters off."""
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self.policy):
            yield self.policy

    def total(self, values: Tensor) -> Tensor:
        """Returns its argument: there is one rank."""
        return values

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a loss to the gradients that are there."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Takes one optimizer step with clipped gradients, and drops the gradients.

        Returns the norm before clipping. If it is not finite, no weight has moved.
        """
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
        """Returns whether all weights that train are finite, and all masters."""
        return all_finite([*self._masters.copies, *self._trained.parameters()])

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the policy's parameters under the base model's names, with adapters merged in."""
        return ((one.name, one.whole()) for one in publications(self.policy))

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """Returns the trained weights, the masters and the optimizer's moments. No files are written."""
        weights, masters = named_weights(self._trained, version), self._masters.copies
        return {"weights": weights, "masters": masters, "optimizer": moments(self._optimizer)}

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Goes on from what `state` returned. Raises ValueError if it does not fit the model."""
        load_weights(self._trained, state["weights"])
        self._masters.restore(state["masters"])
        restore_moments(self._optimizer, state["optimizer"])
