"""Shares out the GPUs of a cluster to the processes of a ring, and settles the keys that depend on that."""

from __future__ import annotations

import math
from typing import Literal

from r2m_async.config import R2MConfig
from r2m_async.config_tree import Options
from r2m_async.errors import ConfigError


def num_users(config: R2MConfig) -> int:
    """Returns how many processes compute with a model: reward annotators, and ranks of rollout actors and policy learner."""
    rollouts = config.rollouts
    annotators = config.reward.replicas if config.reward.model else 0
    return rollouts.num_actors * rollouts.tensor_parallel + annotators + config.learner.num_ranks


def gpu_share(config: R2MConfig, available: float) -> float:
    """Returns how many GPUs each process gets that computes with a model (`num_users`): 1, a part of 1, or 0 without GPUs.

    If there are too few GPUs to give one to each, they all get equal parts.

    Args:
        config: the config of the run.
        available: the number of GPUs in the cluster.

    Raises ConfigError if a stage of several ranks would get parts of GPUs.
    """
    rollouts, users = config.rollouts, num_users(config)
    if config.run.device == "cpu" or available == 0:
        return 0.0
    if available >= users:
        return 1.0
    for key, num_ranks in (
        ("rollouts.tensor_parallel", rollouts.tensor_parallel),
        ("learner.num_ranks", config.learner.num_ranks),
    ):
        if num_ranks > 1:
            raise ConfigError(
                f"{key} is {num_ranks} and the cluster has {available:g} GPUs: ranks cannot share a GPU, so that this run "
                f"needs {users} GPUs; lower rollouts.num_actors or {key.partition('.')[2]}"
            )
    # As many processes share each GPU as must share the fullest one. Rounded down to hundredths, because parts that add
    # up to more than a GPU could not be placed.
    return int(100 / math.ceil(users / available)) / 100


def placed(config: R2MConfig, gpus: float, available: float) -> R2MConfig:
    """Returns the config with the keys filled in that depend on the GPUs of each process.

    `weights.transport: auto` becomes the transport that is used. If processes share GPUs, vLLM gets a limit on its
    share of GPU memory, unless `rollouts.engine_options` has one.

    Args:
        config: the config of the run.
        gpus: the result of `gpu_share`.
        available: the number of GPUs in the cluster.

    Raises ConfigError if these GPUs do not allow the transport, and for `learner.offload` without a GPU.
    """
    shares_one = 0 < gpus < 1 and available == 1
    possible = {"nccl": gpus >= 1, "ipc": shares_one}
    if not possible.get(config.weights.transport, True):
        raise ConfigError(
            f"weights.transport is {config.weights.transport!r}, and each stage has {gpus:g} of the cluster's {available:g} "
            f"GPUs: 'nccl' needs a GPU for each stage, and 'ipc' needs one GPU that all stages share; use 'auto'"
        )
    if not gpus and config.learner.offload != "none":
        raise ConfigError(
            f"learner.offload is {config.learner.offload!r} and the run has no GPU: offloading moves data from a GPU to the "
            f"memory of the CPU; use offload 'none'"
        )
    vllm = config.rollouts.engine == "vllm"
    if config.weights.transport == "auto":
        transport: Literal["nccl", "ipc", "object_store"] = "object_store"
        if vllm and config.scheduling.lag == "bounded":
            transport = "nccl" if possible["nccl"] else "ipc" if possible["ipc"] else "object_store"
        config = config.weights(transport=transport)
    if vllm and 0 < gpus < 1:
        # Without this, vLLM would take most of the GPU for itself.
        memory: Options = {"gpu_memory_utilization": round(0.9 * gpus, 3)}
        config = config.rollouts(engine_options=memory | config.rollouts.engine_options)
    return config
