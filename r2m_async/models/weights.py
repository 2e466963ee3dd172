"""A policy's parameters as they travel: copies, digests and a probe, float32 masters.

By digests and probe the receiver knows that it has what was sent and computes the same with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from r2m_async.models.policy import logprobs_and_states
from r2m_async.trajectories import Trajectory, WeightProbe, Weights

_PROBE_LENGTH = 12


def tensor_digest(tensor: Tensor) -> str:
    """XXH3 of the bytes, wherever the tensor lies: 32 hexadecimal digits against accidents, not against forgers."""
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)


def named_weights(model: Any, version: int, probe: bool = False) -> Weights:
    """A copy of the `named_parameters()` on the CPU; a tied pair stands once. With `probe`, what an engine must see of them."""
    tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return Weights(version=version, tensors=tensors, probe=weight_probe(model) if probe else None)


@torch.no_grad()
def weight_probe(model: Any, tensors: Mapping[str, Tensor] | None = None) -> WeightProbe:
    """`tensors` are the parameters by name, where the model itself does not hold them whole."""
    size = getattr(model, "module", model).config.get_text_config().vocab_size
    tokens = torch.arange(_PROBE_LENGTH) * 7919 % size  # a prime: all over the vocabulary
    text = Trajectory(
        token_ids=tokens,
        prompt_len=1,
        behaviour_logprobs=torch.zeros(_PROBE_LENGTH),
        policy_versions=torch.zeros(_PROBE_LENGTH, dtype=torch.int32),
        finish_reason="length",
        text="",
    )
    logprobs_BT, _ = logprobs_and_states(model, [text], temperature=1.0)
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return WeightProbe(digests=digests, token_ids=tokens, logprobs=logprobs_BT[0].cpu())


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Overwrites the parameters. Raises ValueError naming what is missing, unknown or of another shape."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.tensors.keys():
        raise ValueError(f"weights and model differ in {sorted(parameters.keys() ^ weights.tensors.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != weights.tensors[name].shape:
            raise ValueError(f"{name} is {list(parameter.shape)}, the weights have {list(weights.tensors[name].shape)}")
        parameter.copy_(weights.tensors[name])


class MasterWeights:
    """What the optimizer moves: float32 copies of the parameters, or the parameters themselves where they are float32.

    A step of 1e-6 vanishes in bfloat16. After `backward`: `take_gradients`, clip and step on `tensors`, `write_back`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self.tensors = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._copies = [(m, p) for m, p in zip(self.tensors, self._parameters, strict=True) if m is not p]

    @property
    def copies(self) -> list[Tensor]:
        """The masters that are no parameter: what a checkpoint must keep beside the weights."""
        return [master for master, _ in self._copies]

    def take_gradients(self) -> None:
        for master, parameter in self._copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for master, parameter in self._copies:
            parameter.copy_(master)

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor]) -> None:
        for master, saved in zip(self.copies, copies, strict=True):
            master.copy_(saved)
