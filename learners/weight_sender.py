"""The learner's end of the direct weight transports: staged copies of the newest versions, a channel to every engine.

`gloo` and `nccl` broadcast over a private process group of the learner and one engine's workers, made anew whenever
the engine is; `ipc` hands out CUDA handles of the staged copy. Channels are served from another thread than trains.
"""

from __future__ import annotations

import base64
import datetime
import os
import pickle
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.ring.stages import NODE_ADDRESS

if TYPE_CHECKING:
    from vllm.distributed.utils import StatelessProcessGroup


class WeightSender:
    def __init__(self, config: R2MConfig) -> None:
        self._config = config
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._channels: dict[int, _Channel] = {}
        self._num_staged = 2 + config.scheduling.max_policy_age
        """An evaluation may ask for a version that the policy has since left by this many steps."""

    def stage(self, model: Any, version: int) -> dict[str, Any]:
        """Copies the model's `named_parameters()` where they lie; what an engine's transfer backend must be told of them."""
        tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        kept = sorted([*self._staged, version])[-self._num_staged :]
        self._staged = {one: tensors if one == version else self._staged[one] for one in kept}
        return {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }

    def staged(self, version: int) -> dict[str, Tensor]:
        """Raises RuntimeError for a version that is not, or no longer, staged."""
        staged = self._staged  # read once: another thread may stage a version meanwhile, which drops the oldest
        if version not in staged:
            raise RuntimeError(f"policy version {version} is no longer staged; those are {sorted(staged)}")
        return staged[version]

    def open(self, engine: int) -> dict[str, Any]:
        """A new channel to an engine; what the engine needs to join it."""
        channel = _CHANNELS[self._config.weights.transport]
        if old := self._channels.pop(engine, None):
            old.close()
        self._channels[engine] = channel(1 + self._config.rollouts.tensor_parallel, self._config.weights.timeout)
        return self._channels[engine].init_info

    def connect(self, engine: int) -> None:
        """Waits for the engine to join."""
        self._channels[engine].connect()

    def send(self, engine: int, version: int) -> dict[str, Any]:
        """Sends a staged version; what the engine must be told besides, in time for it to load."""
        tensors = self.staged(version)
        return self._channels[engine].send(tensors)


class _Channel(Protocol):
    """Made with the number of processes that meet on it and the seconds they wait for each other."""

    init_info: dict[str, Any]
    """What the engine's end must know."""

    def connect(self) -> None: ...

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]: ...

    def close(self) -> None: ...


class _Gloo:
    def __init__(self, world_size: int, timeout: float) -> None:
        host = os.environ.get(NODE_ADDRESS, "127.0.0.1")
        self._timeout = datetime.timedelta(seconds=timeout)
        self._store = torch.distributed.TCPStore(
            host, 0, world_size, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        self.init_info = {"host": host, "port": self._store.port, "world_size": world_size, "timeout": timeout}
        self._group: Any = None

    def connect(self) -> None:
        store = torch.distributed.PrefixStore("weights", self._store)
        self._group = torch.distributed.ProcessGroupGloo(store, 0, self.init_info["world_size"], self._timeout)

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        for tensor in tensors.values():
            self._group.broadcast([tensor.cpu()], options).wait()
        return {}

    def close(self) -> None:
        self._group = None


class _NCCL:
    """vLLM's own group and packing, without the handshake its trainer class would drive: the controller does that."""

    def __init__(self, world_size: int, timeout: float) -> None:
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

        host = os.environ.get(NODE_ADDRESS, "127.0.0.1")
        self._timeout = timeout
        self._socket = socket.create_server(
            (host, 0)
        )  # kept: a port that is let go may be another's when we meet there
        self._info = NCCLWeightTransferInitInfo(
            master_address=host,
            master_port=self._socket.getsockname()[1],
            rank_offset=1,
            world_size=world_size,
            packed=True,
        )
        self.init_info = worker_init_payload(self._info)
        self._group: Any = None

    def connect(self) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.utils.nccl import unpinned_nccl_env

        processes = self._meet()
        with unpinned_nccl_env():
            self._group = PyNcclCommunicator(processes, device=torch.accelerator.current_device_index())

    def _meet(self) -> StatelessProcessGroup:
        """As vLLM's `trainer_init` does, but at the socket that listens already, and within our deadline.

        vLLM can be handed a socket, too, but closes it a second time where nobody comes, which then may be another file.
        """
        from vllm.distributed.utils import StatelessProcessGroup

        store = torch.distributed.TCPStore(
            self._info.master_address,
            self._info.master_port,
            self._info.world_size,
            is_master=True,
            timeout=datetime.timedelta(seconds=self._timeout),
            use_libuv=False,
            master_listen_fd=self._socket.detach(),
        )
        return StatelessProcessGroup(rank=0, world_size=self._info.world_size, store=store)

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=iter(tensors.items()),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=self._info.packed_buffer_size_bytes,
            num_buffers=self._info.packed_num_buffers,
        )
        torch.cuda.current_stream().synchronize()
        return {}

    def close(self) -> None:
        self._socket.close()
        if self._group is not None:
            self._group.destroy()


class _IPC:
    """One GPU for learner and engine: the engine copies out of the staged tensors."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.init_info = {"packed": False}

    def connect(self) -> None:
        pass

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{uuid: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        return {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}

    def close(self) -> None:
        pass


_CHANNELS: dict[str, Callable[[int, float], _Channel]] = {"gloo": _Gloo, "nccl": _NCCL, "ipc": _IPC}
