"""The learner's end of the direct weight transports, by which the learner sends weights to engines itself.

The learner keeps copies of its newest policy versions: they are staged. It has a channel to every engine. With `gloo`
and `nccl` a channel is a process group of the learner and the engine's workers, over which the learner broadcasts. A
restarted engine gets a new channel. With `ipc` the engine gets CUDA handles of the staged copy and reads it itself.

The channels are used in another thread than the one that trains.
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

from r2m_async.child_process import NODE_ADDRESS
from r2m_async.config import R2MConfig
from r2m_async.models.weights import Buckets, broadcast, messages

if TYPE_CHECKING:
    from vllm.distributed.utils import StatelessProcessGroup


class WeightSender:
    """Stages policy versions, and sends them to engines, which are known by their numbers."""

    def __init__(self, config: R2MConfig) -> None:
        """Begins without versions and channels. `weights.transport` must be a direct one."""
        self._config = config
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._channels: dict[int, _Channel] = {}
        self._num_staged = 2 + config.scheduling.max_policy_age
        """How many versions are kept. The policy may get 1 + max_policy_age steps ahead of one that is evaluated."""

    def stage(self, model: Any, version: int) -> dict[str, Any]:
        """Copies a policy version, and drops the oldest if there are too many.

        The copy lies on the policy's device. With `gloo` it lies in main memory, from which gloo sends it.

        Args:
            model: what has the `named_parameters()`, a backend or a module.
            version: its policy version.

        Returns the names, dtypes and shapes, which an engine must know to receive the tensors.
        """
        # Copies, because the next update changes the parameters while they are still being sent.
        if self._config.weights.transport == "gloo":
            buckets = Buckets()
            tensors = {
                name: buckets.place(parameter.dtype, parameter.shape).copy_(parameter.detach())
                for name, parameter in model.named_parameters()
            }
        else:
            tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        kept = sorted([*self._staged, version])[-self._num_staged :]
        # A new dict takes the place of the old one: another thread may be reading that.
        self._staged = {one: tensors if one == version else self._staged[one] for one in kept}
        return {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }

    def staged(self, version: int) -> dict[str, Tensor]:
        """Returns the parameters of a staged version by name.

        Raises RuntimeError if the version is not staged, or no longer.
        """
        staged = self._staged  # read once: another thread may stage a version meanwhile, which drops the oldest
        if version not in staged:
            raise RuntimeError(
                f"policy version {version} is no longer kept for sending; the versions kept are {sorted(staged)}"
            )
        return staged[version]

    def open(self, engine: int) -> dict[str, Any]:
        """Opens a new channel to an engine, in the place of an old one. Returns what the engine needs to join it."""
        channel = _CHANNELS[self._config.weights.transport]
        if old := self._channels.pop(engine, None):
            old.close()
        self._channels[engine] = channel(1 + self._config.rollouts.tensor_parallel, self._config.weights.timeout)
        return self._channels[engine].init_info

    def connect(self, engine: int) -> None:
        """Waits for an engine to join its channel. Raises RuntimeError if it does not do so in time."""
        self._channels[engine].connect()

    def send(self, engine: int, version: int) -> dict[str, Any]:
        """Sends a staged version to an engine over its channel.

        Returns what the engine must know besides to load it. Raises RuntimeError if the version is no longer staged, or
        if it cannot be sent.
        """
        tensors = self.staged(version)
        return self._channels[engine].send(tensors)


class _Channel(Protocol):
    """The learner's end of a way to one engine.

    It is made with two arguments: how many processes meet on it, and the seconds that they wait for each other.
    """

    init_info: dict[str, Any]
    """What the engine's end must know to join."""

    def connect(self) -> None:
        """Waits for the engine's workers to join."""
        ...

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Sends tensors in their order. Returns what the engine must know besides."""
        ...

    def close(self) -> None:
        """Gives up what the channel holds."""
        ...


class _Gloo:
    """A channel that broadcasts over gloo."""

    def __init__(self, world_size: int, timeout: float) -> None:
        host = os.environ.get(NODE_ADDRESS, "127.0.0.1")
        self._timeout = datetime.timedelta(seconds=timeout)
        # The store must not wait here: the engine can join only once it has been told host and port.
        self._store = torch.distributed.TCPStore(
            host, 0, world_size, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        self.init_info = {"host": host, "port": self._store.port, "world_size": world_size, "timeout": timeout}
        self._group: Any = None

    def connect(self) -> None:
        store = torch.distributed.PrefixStore("weights", self._store)
        self._group = torch.distributed.ProcessGroupGloo(store, 0, self.init_info["world_size"], self._timeout)

    def send(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        for work in broadcast(self._group, messages(tensors.values()).values()):
            work.wait()
        return {}

    def close(self) -> None:
        self._group = None


class _NCCL:
    """A channel that broadcasts over NCCL, with vLLM's own process group and packing.

    vLLM has a class for a trainer's end, which would also call the engine. Here the controller does that instead.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

        host = os.environ.get(NODE_ADDRESS, "127.0.0.1")
        self._timeout = timeout
        # The socket stays open until the processes meet. Another program could take a port that is free meanwhile.
        self._socket = socket.create_server((host, 0))
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
        """Meets the engine's workers at the socket that listens already, within our deadline.

        vLLM's `trainer_init` does the same and can take a socket, too. But if nobody comes it closes the socket twice.
        The second time, the same number may belong to another file.
        """
        from vllm.distributed.utils import StatelessProcessGroup

        store = torch.distributed.TCPStore(
            self._info.master_address,
            self._info.master_port,
            self._info.world_size,
            is_master=True,
            timeout=datetime.timedelta(seconds=self._timeout),
            use_libuv=False,
            master_listen_fd=self._socket.detach(),  # from here on the store alone closes it
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
        # A return says that the weights are sent, so the GPU must have finished.
        torch.cuda.current_stream().synchronize()
        return {}

    def close(self) -> None:
        self._socket.close()
        if self._group is not None:
            self._group.destroy()


class _IPC:
    """A channel for a learner and an engine on one GPU. The engine copies the weights out of the staged tensors."""

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
"""The channel of each direct `weights.transport`."""
