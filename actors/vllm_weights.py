"""How weights come into vLLM's workers: one weight-transfer engine per transport, each checking what it receives.

`shared_memory` (the last hop of `weights.transport: object_store`) and `gloo` are ours and run anywhere; `nccl` and
`ipc` are vLLM's own for GPUs. `register` names them to vLLM, in every process of its.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from r2m_async.models.weights import tensor_digest

BACKENDS = {
    "auto": "shared_memory",
    "object_store": "shared_memory",
    "gloo": "gloo",
    "nccl": "checked_nccl",
    "ipc": "checked_ipc",
}
"""`weights.transport` -> the name under which vLLM knows our engine for it; the launch has settled `auto` by then."""
NOT_AS_SENT = "did not arrive as it was sent"


def register() -> None:
    engines = {"shared_memory": SharedMemoryTransfer, "gloo": GlooTransfer}
    engines |= {"checked_nccl": CheckedNCCL, "checked_ipc": CheckedIPC}
    for name, engine in engines.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)


class Checked:
    """Mixed into a transfer engine: compares every parameter with its digest as it is handed to the model.

    An update's `digests` are the learner's, by parameter; without one a parameter is taken as it is.
    """

    def receive_weights(self, update_info: Any) -> None:
        load, self._missing = self.model.load_weights, dict(update_info.digests)
        if self._missing:
            self.model.load_weights = lambda weights: load(_checked(weights, self._missing))
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model.__dict__.pop("load_weights", None)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        repack_head(self.model)
        if self._missing:
            raise RuntimeError(f"{next(iter(self._missing))} {NOT_AS_SENT}: not at all")


def _checked(weights: Iterable[tuple[str, Tensor]], missing: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The weights, their digests taken out of `missing` as they pass."""
    for name, tensor in weights:
        if tensor_digest(tensor) != missing.pop(name, ""):
            raise RuntimeError(f"{name} {NOT_AS_SENT}")
        yield name, tensor


def repack_head(model: torch.nn.Module) -> None:
    """On a CPU the head's weights live packed, and a reload leaves a head that is tied to the embedding unpacked."""
    if current_platform.is_cpu():
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


@dataclass
class NoInit(WeightTransferInitInfo):
    pass


@dataclass
class WeightFile(WeightTransferUpdateInfo):
    path: str
    """A safetensors file in shared memory, one for all workers of the engine."""
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class GlooInit(WeightTransferInitInfo):
    host: str
    port: int
    world_size: int
    """The learner and the engine's workers."""
    timeout: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    digests: dict[str, str] = field(default_factory=dict)


class _Reloading(WeightTransferEngine):
    """Loads checkpoint-shaped weights into a running model."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class _SharedMemory(_Reloading):
    init_info_cls = NoInit
    update_info_cls = WeightFile

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def receive_weights(self, update_info: WeightFile) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in file.keys()])  # noqa: SIM118


class _Gloo(_Reloading):
    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        timeout = datetime.timedelta(seconds=init_info.timeout)
        store = TCPStore(init_info.host, init_info.port, init_info.world_size, is_master=False, timeout=timeout)
        rank = 1 + self.parallel_config.rank
        self._group = ProcessGroupGloo(PrefixStore("weights", store), rank, init_info.world_size, timeout)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        options = BroadcastOptions()
        options.rootRank = 0
        received = []
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast([tensor], options).wait()
            received.append((name, tensor))
        self.model.load_weights(received)


class SharedMemoryTransfer(Checked, _SharedMemory):
    """From a file that the rollout actor writes."""


class GlooTransfer(Checked, _Gloo):
    """Broadcast by the learner over a private process group of its own and this engine's workers."""


@dataclass
class CheckedNCCLUpdate(NCCLWeightTransferUpdateInfo):
    digests: dict[str, str] = field(default_factory=dict)


class CheckedNCCL(Checked, NCCLWeightTransferEngine):
    update_info_cls = CheckedNCCLUpdate


@dataclass
class CheckedIPCUpdate(IPCWeightTransferUpdateInfo):
    digests: dict[str, str] = field(default_factory=dict)


class CheckedIPC(Checked, IPCWeightTransferEngine):
    update_info_cls = CheckedIPCUpdate
