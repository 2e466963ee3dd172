"""How weights reach vLLM's workers. Each transport has a weight-transfer engine, which checks what it receives.

The engines for `shared_memory` and `gloo` are written here and run anywhere. (`shared_memory` is the last hop of
`weights.transport: object_store`.) Those for `nccl` and `ipc` are vLLM's own, for GPUs, with the check added.
`register` makes them known to vLLM. It must be called in every process of vLLM.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from r2m_async.models.weights import ReceivedWeights, tensor_digest

BACKENDS = {
    "auto": "shared_memory",
    "object_store": "shared_memory",
    "gloo": "gloo",
    "nccl": "checked_nccl",
    "ipc": "checked_ipc",
}
"""From `weights.transport` to the name under which vLLM knows our transfer engine for it.

On Ray the launcher has put another transport in the place of `auto` by then. In a run of one process, `auto` stands for
the file in shared memory.
"""
NOT_AS_SENT = "did not arrive as it was sent"
"""Words in every error about a parameter that arrived damaged, or not at all. `VLLMEngine` knows the error by them."""


def register() -> None:
    """Makes our transfer engines known to vLLM in this process. A second call does nothing."""
    engines = {"shared_memory": SharedMemoryTransfer, "gloo": GlooTransfer}
    engines |= {"checked_nccl": CheckedNCCL, "checked_ipc": CheckedIPC}
    for name, engine in engines.items():
        if name not in WeightTransferEngineFactory._registry:  # vLLM refuses a name that it knows already
            WeightTransferEngineFactory.register_engine(name, engine)


class Checked:
    """A mixin for transfer engines. It compares every parameter with its digest as the parameter goes into the model.

    An update's `digests` are the learner's, by parameter name. If an update has none at all, nothing is compared.
    """

    model: Any
    """The model that takes the weights. vLLM's engine, which this is mixed into, sets it."""

    def start_weight_update(self) -> None:
        """Prepares the model for an update."""
        with untouched(tied_heads(self.model)):
            super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        """Receives the weights of one update and hands them to the model.

        Raises RuntimeError, naming the parameter, if one differs from its digest or has none.
        """
        # For the time of the transfer an attribute hides the model's own method. So whatever the transfer engine hands
        # to the model, in however many parts, passes the check.
        load, self._missing = self.model.load_weights, dict(update_info.digests)
        if self._missing:
            self.model.load_weights = lambda weights: load(_checked(weights, self._missing))
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model.__dict__.pop("load_weights", None)

    def finish_weight_update(self) -> None:
        """Ends an update. Raises RuntimeError if a parameter that has a digest never came."""
        super().finish_weight_update()  # type: ignore[misc]
        repack_head(self.model)
        if self._missing:
            raise RuntimeError(f"{next(iter(self._missing))} {NOT_AS_SENT}: not at all")


def _checked(weights: Iterable[tuple[str, Tensor]], missing: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on after it has compared them, and takes the digest of each out of `missing`."""
    for name, tensor in weights:
        if tensor_digest(tensor) != missing.pop(name, ""):
            raise RuntimeError(f"{name} {NOT_AS_SENT}")
        yield name, tensor


def tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the language-model heads whose weights are those of the token embeddings."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    return [layer for layer in layers if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings]


@contextmanager
def untouched(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Keeps vLLM from preparing these layers for an update that is begun within the block.

    vLLM gives a layer that it has prepared new memory as soon as one of its weights comes. The weights of a tied head
    never come. If the head has a bias of its own (Phi), which does come, the shared weights would be overwritten by what
    the new memory happened to hold.
    """
    infos = [get_layerwise_info(layer) for layer in layers]
    for info in infos:
        info.load_numel_total = 0  # looks as if the layer had been prepared before
    try:
        yield
    finally:
        for info in infos:
            info.reset()


def repack_head(model: torch.nn.Module) -> None:
    """Packs the weights of the language-model head again after a reload. On a GPU it does nothing.

    On a CPU vLLM computes the head with a packed form of its weights. A reload does not renew that form if the head is
    tied to the embedding, so the head would go on computing with its old weights.
    """
    if current_platform.is_cpu():
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


@dataclass
class NoInit(WeightTransferInitInfo):
    """What a worker needs to read files: nothing."""

    pass


@dataclass
class WeightFile(WeightTransferUpdateInfo):
    """An update whose weights are in a file."""

    path: str
    """A safetensors file in shared memory. All workers of the engine read the same one."""
    digests: dict[str, str] = field(default_factory=dict)
    """The learner's digest of every parameter by name; empty if nothing is to be compared."""


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the workers of an engine meet the learner."""

    host: str
    """The machine of the learner, which has a store that all processes meet at."""
    port: int
    """The port of that store."""
    world_size: int
    """How many processes meet: the learner and the engine's workers."""
    timeout: float
    """Seconds that they wait for each other."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """An update whose weights the learner broadcasts, in buckets."""

    names: list[str]
    """The parameters in the order in which they lie in the buckets."""
    dtype_names: list[str]
    """The dtype of each in torch, for example `bfloat16`."""
    shapes: list[list[int]]
    """The shape of each."""
    digests: dict[str, str] = field(default_factory=dict)
    """The learner's digest of every parameter by name; empty if nothing is to be compared."""


class _Reloading(WeightTransferEngine):
    """Loads weights into a running model. They have the names and shapes that they have in a checkpoint."""

    def start_weight_update(self) -> None:
        """Prepares the model: its layers take weights again as they do when vLLM starts."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Ends the reload. The model can compute again."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Does nothing: there is nothing to give back."""
        pass


class _SharedMemory(_Reloading):
    """Reads the weights from a file."""

    init_info_cls = NoInit
    update_info_cls = WeightFile

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Does nothing: a file needs no preparation."""
        pass

    def receive_weights(self, update_info: WeightFile) -> None:
        """Reads the file and hands its weights to the model."""
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in file.keys()])  # noqa: SIM118


class _Gloo(_Reloading):
    """Takes part in the learner's broadcasts."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Joins the process group of the learner and this engine's workers. The learner is rank 0."""
        timeout = datetime.timedelta(seconds=init_info.timeout)
        store = TCPStore(init_info.host, init_info.port, init_info.world_size, is_master=False, timeout=timeout)
        rank = 1 + self.parallel_config.rank
        group = ProcessGroupGloo(PrefixStore("weights", store), rank, init_info.world_size, timeout)
        self._received = ReceivedWeights(group)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Hands every parameter to the model as it arrives, in the learner's order."""
        self.model.load_weights(self._received(update_info.names, update_info.dtype_names, update_info.shapes))


class SharedMemoryTransfer(Checked, _SharedMemory):
    """Takes weights from a file that the rollout actor writes, and checks them."""


class GlooTransfer(Checked, _Gloo):
    """Takes weights that the learner broadcasts to this engine's workers over a private group, and checks them."""


@dataclass
class CheckedNCCLUpdate(NCCLWeightTransferUpdateInfo):
    """vLLM's update over NCCL with digests."""

    digests: dict[str, str] = field(default_factory=dict)
    """The learner's digest of every parameter by name; empty if nothing is to be compared."""


class CheckedNCCL(Checked, NCCLWeightTransferEngine):
    """vLLM's transfer engine for NCCL, which here checks the weights, too."""

    update_info_cls = CheckedNCCLUpdate


@dataclass
class CheckedIPCUpdate(IPCWeightTransferUpdateInfo):
    """vLLM's update by CUDA handles with digests."""

    digests: dict[str, str] = field(default_factory=dict)
    """The learner's digest of every parameter by name; empty if nothing is to be compared."""


class CheckedIPC(Checked, IPCWeightTransferEngine):
    """vLLM's transfer engine for CUDA handles, which here checks the weights, too."""

    update_info_cls = CheckedIPCUpdate
