"""Parameters on their way from a learner to an engine, and the float32 masters that the optimizer moves.

A version of the weights can carry a probe: a digest of every parameter, and log-probabilities of a fixed text. With the
digests an engine checks that it has the bytes that were sent. With the log-probabilities it checks that it computes the
same with them.

Shapes: B trajectories, T response tokens, P tokens of the fixed text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from r2m_async.models.policy import logprobs_and_states
from r2m_async.trajectories import Trajectory, WeightProbe, Weights

_PROBE_LENGTH = 12
"""P, the number of tokens in the fixed text."""
_BUCKET = 32 << 20
"""Bytes of a bucket. A larger parameter has a bucket of its own.

Smaller blocks glibc may keep for later: what is not used of them would be memory that is taken.
"""
_ALIGNMENT = 64
"""Bytes at whose multiples a parameter begins in a bucket."""


def tensor_digest(tensor: Tensor) -> str:
    """Returns the XXH3-128 digest of a tensor's bytes, as 32 hexadecimal digits.

    tensor: on any device, of any dtype. The digest does not depend on the device or on the memory layout.

    The digest detects accidents. It is no protection against forgery.
    """
    # Viewed as bytes, because numpy has no bfloat16.
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)


def named_weights(model: Any, version: int, probe: bool = False) -> Weights:
    """Returns a copy of a model's parameters on the CPU.

    model: a module, or anything else with `named_parameters`. Two names that share one tensor give one entry.
    version: the number of this version.
    probe: whether the result carries a `WeightProbe`. The model must then be a language model.
    """
    # The clone is needed on a CPU, where `cpu()` returns the parameter itself, which the next update would change.
    tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return Weights(version=version, tensors=tensors, probe=weight_probe(model) if probe else None)


@torch.no_grad()
def weight_probe(model: Any, tensors: Mapping[str, Tensor] | None = None) -> WeightProbe:
    """Returns what an engine must find once it has loaded these weights.

    That is the digest of every parameter, and the log-probabilities [P - 1] of a fixed text at temperature 1.

    model: a causal language model, or an engine that wraps its `PolicyForward`.
    tensors: the parameters by name. None takes the model's own. They must be given if this rank holds shards only, or
        if the engine gets the parameters under other names.
    """
    size = getattr(model, "module", model).config.get_text_config().vocab_size
    tokens = torch.arange(_PROBE_LENGTH) * 7919 % size  # steps of a large prime reach all parts of the vocabulary
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


def broadcast(group: Any, tensors: Iterable[Tensor]) -> list[Any]:
    """Begins to broadcast tensors on the CPU from rank 0, and returns the work of each, in order.

    group: a process group. On the other ranks the tensors are overwritten. All begin at once, so that one need not wait for
    the answer to another, and who receives can use the first while the last is still on its way.
    """
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    return [group.broadcast([tensor], options) for tensor in tensors]


class Buckets:
    """Main memory for parameters that are sent. They lie one behind the other in buckets, each of which is one message.

    A message for each parameter would take longer. Where a parameter lies depends on the sizes of those before it alone,
    so both ends have the same buckets.
    """

    def __init__(self) -> None:
        """Begins without memory."""
        self._blocks: list[Tensor] = []
        self.clear()

    def clear(self) -> None:
        """Begins again, in the same memory."""
        self._bucket, self._end = -1, _BUCKET + 1  # the first parameter does not fit any more

    def place(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Returns the place of the next parameter: a tensor that has yet to be written."""
        size = math.prod(shape) * dtype.itemsize
        if self._end + size > _BUCKET:
            self._bucket, self._end = self._bucket + 1, 0
            if self._bucket == len(self._blocks) or len(self._blocks[self._bucket]) < size:
                # numpy asks for large pages.
                block = torch.from_numpy(np.empty(max(size, _BUCKET), np.uint8))
                self._blocks[self._bucket : self._bucket + 1] = [block]
        start = self._end
        self._end = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return self._blocks[self._bucket][start : start + size].view(dtype).view(tuple(shape))


def messages(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Returns what tensors of `Buckets` fill of each bucket, by the bucket's address (`bucket_of`), in their order."""
    filled = {}
    for tensor in tensors:
        end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        filled[bucket_of(tensor)] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (end,))
    return filled


def bucket_of(tensor: Tensor) -> int:
    """Returns the address of the bucket that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


class ReceivedWeights:
    """Receives versions of the weights over a process group, always into the same memory.

    New memory would have to be mapped page by page, which takes longer than the transfer.
    """

    def __init__(self, group: Any) -> None:
        """group: a process group whose rank 0 sends `messages` of `Buckets` by `broadcast`."""
        self._group = group
        self._buckets = Buckets()

    def __call__(
        self, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and the tensor of each parameter once it has arrived.

        Arguments are the names, the dtypes in torch and the shapes, in the order in which they are sent. The tensors hold
        until the next call.
        """
        self._buckets.clear()
        sizes = zip(dtype_names, shapes, strict=True)
        tensors = [self._buckets.place(getattr(torch, dtype), shape) for dtype, shape in sizes]
        filled = messages(tensors)
        works = dict(zip(filled, broadcast(self._group, filled.values()), strict=True))
        for name, tensor in zip(names, tensors, strict=True):
            works[bucket_of(tensor)].wait()
            yield name, tensor


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Overwrites the parameters of `model` with `weights`, in place.

    Raises ValueError, which names the parameter, if one is missing, unknown or has another shape.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.tensors.keys():
        raise ValueError(f"weights and model differ in {sorted(parameters.keys() ^ weights.tensors.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != weights.tensors[name].shape:
            raise ValueError(f"{name} is {list(parameter.shape)}, the weights have {list(weights.tensors[name].shape)}")
        parameter.copy_(weights.tensors[name])


def adamw(parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Returns the optimizer of policies, critics and reward heads, in the ring and in the reference alike.

    parameters: the tensors that it moves. There may be none, as in a reward head without a reward model.
    lr: the learning rate. Whoever has a schedule sets it before each step.
    """
    # One kernel for all tensors. In a group of its own, because torch refuses a list without any tensor.
    group = {"params": list(parameters)}
    return torch.optim.AdamW([group], lr=lr, weight_decay=weight_decay, fused=True)


class MasterWeights:
    """The float32 tensors that the optimizer moves, one for each parameter of a model.

    A parameter in bfloat16 gets a float32 copy, its master. A step of 1e-6 would vanish in bfloat16, but it adds up
    in the master. A parameter that is float32 already is its own master.

    After each `backward`, call `take_gradients`, clip the gradients of `tensors`, step the optimizer on `tensors`,
    and call `write_back`.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: a module, or anything else with `parameters`. Its parameters stay the ones that compute."""
        self._parameters = list(model.parameters())
        self.tensors = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._copies = [(m, p) for m, p in zip(self.tensors, self._parameters, strict=True) if m is not p]

    @property
    def copies(self) -> list[Tensor]:
        """The masters that are copies. A checkpoint must keep them beside the weights, which are rounded."""
        return [master for master, _ in self._copies]

    def take_gradients(self) -> None:
        """Moves the gradient of every copied parameter to its master, in float32. The parameter keeps none."""
        for master, parameter in self._copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes every copied master back into its parameter, rounded to the parameter's dtype."""
        for master, parameter in self._copies:
            parameter.copy_(master)

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor]) -> None:
        """Takes over the masters that a checkpoint saved from `copies`, in the same order."""
        for master, saved in zip(self.copies, copies, strict=True):
            master.copy_(saved)


class MovingReference:
    """A reference policy that follows the policy (TR-DPO, arXiv 2404.09656), in hard or in soft updates."""

    def __init__(self, model: nn.Module, mix: float) -> None:
        """Keeps the model, which is changed in place.

        model: the reference policy. Its parameters have the names and shapes of the policy's.
        mix: alpha of the paper, above 0 and at most 1. 1 replaces the reference.
        """
        self._mix, self._names = mix, [name for name, _ in model.named_parameters()]
        # A small part of a small change would vanish in bfloat16, so soft updates add up in float32 masters.
        self._masters = MasterWeights(model) if mix < 1 else None
        self._tensors = self._masters.tensors if self._masters else list(model.parameters())

    @torch.no_grad()
    def move(self, policy: Iterable[tuple[str, Tensor]]) -> None:
        """Makes every weight (1 - mix) times what it was, plus mix times the policy's.

        policy: the policy's parameters by name. Raises ValueError, which names one, if they are not the reference's.
        """
        own = dict(zip(self._names, self._tensors, strict=True))
        for name, tensor in policy:
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"{name} {list(tensor.shape)} of the policy is no parameter of the reference")
            weight = own.pop(name)
            if self._mix == 1:
                weight.copy_(tensor)
            else:
                weight.mul_(1 - self._mix).add_(tensor.to(weight), alpha=self._mix)
        if own:
            raise ValueError(f"{next(iter(own))} of the reference is no parameter of the policy")
        if self._masters:
            self._masters.write_back()

    def state(self) -> list[Tensor]:
        """Returns what `restore` needs to go on bit for bit, as copies on the CPU."""
        return [tensor.detach().to("cpu", copy=True) for tensor in self._tensors]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Goes on from what `state` returned."""
        for tensor, saved in zip(self._tensors, state, strict=True):
            tensor.copy_(saved)
        if self._masters:
            self._masters.write_back()
