"""Says what each process of a ring asks of a cluster, and on which of its nodes the process must lie.

The processes are put into three groups, by what their loss would cost. Each group becomes a placement group of Ray. They are
made one after the other, so that what may lie anywhere takes no room from what may not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from r2m_async.config import R2MConfig
from r2m_async.errors import NoRoom

ANYWHERE: dict[str, float] = {"memory": 1.0}
"""What a process without a GPU asks for: one byte. A bundle of a placement group must ask for something, and every node has
memory, while the head of a cluster often has no CPUs for Ray."""
LOOK_EVERY = 1.0
"""Seconds between two looks whether a placement group has its nodes."""


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that are placed together, in the order in which they get their room."""

    key: str
    """The key of the config that chooses their nodes."""
    labels: Mapping[str, str]
    """The labels of their nodes, as that key has them."""
    strategy: Literal["PACK", "SPREAD"]
    """`PACK`: on as few nodes as possible. `SPREAD`: on as many as possible."""
    processes: dict[str, dict[str, float]]
    """What each process asks for, by its name: GPUs in numbers, `memory` in bytes."""

    def asks(self) -> str:
        """What the processes ask for, to be read: `4 x {GPU: 1} (policy-learner-0, ...)`."""
        alike: dict[str, list[str]] = {}
        for name, resources in self.processes.items():
            alike.setdefault(amounts(resources), []).append(name)
        return ", ".join(f"{len(names)} x {{{what}}} ({', '.join(names)})" for what, names in alike.items())


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster."""

    address: str
    """Its IP address."""
    resources: dict[str, float]
    """All that it has, in Ray's names: `CPU`, `GPU`, `memory` in bytes."""
    labels: dict[str, str] = field(default_factory=dict)
    """Its labels. Ray itself adds `ray.io/node-id`, which is left out."""

    def __str__(self) -> str:
        """The node in a line."""
        has = amounts({name: self.resources.get(name, 0.0) for name in ("GPU", "CPU", "memory")})
        labels = " ".join(f"{label}={value}" for label, value in sorted(self.labels.items())) or "no labels"
        return f"{self.address}: {has}; {labels}"


def amounts(resources: Mapping[str, float]) -> str:
    """Amounts of resources, to be read. Memory is in GiB; a byte of it, which `ANYWHERE` asks for, is `a process`."""
    if resources == ANYWHERE:
        return "a process"
    return ", ".join(
        f"memory: {amount / 2**30:.3g} GiB" if name == "memory" else f"{name}: {amount:g}"
        for name, amount in resources.items()
    )


def groups(config: R2MConfig, gpus: float) -> tuple[Group, ...]:
    """Returns all processes of a ring, in the groups in which they are placed.

    Args:
        config: the config of the run.
        gpus: the number of GPUs of each process that computes with a model (`gpus.gpu_share`).
    """
    cluster, rollouts, learner = config.cluster, config.rollouts, config.learner
    gpu = {"GPU": gpus} if gpus else ANYWHERE
    ranks = ["policy-learner"]
    if learner.backend == "deepspeed":
        ranks = [f"policy-learner-{rank}" for rank in range(learner.num_ranks)]
    annotator = gpu if config.reward.model else ANYWHERE
    if cluster.annotator_memory:
        annotator = {**(annotator if annotator != ANYWHERE else {}), "memory": float(cluster.annotator_memory)}
    engine = {"GPU": gpus * rollouts.tensor_parallel} if gpus else ANYWHERE
    stable = {**dict.fromkeys(ranks, gpu), "queue": ANYWHERE, "head-learner": ANYWHERE}
    if config.labels.active:
        stable["labeller"] = ANYWHERE
    return (
        Group("cluster.stable", cluster.stable, "PACK", stable),
        Group(
            "cluster.annotators",
            cluster.annotators,
            "SPREAD",
            {f"annotator-{index}": annotator for index in range(config.reward.replicas)},
        ),
        Group(
            "cluster.rollouts",
            cluster.rollouts,
            "SPREAD",
            {f"rollout-{index}": engine for index in range(rollouts.num_actors)},
        ),
    )


def chosen(node: Node, labels: Mapping[str, str]) -> bool:
    """Whether a node has the labels that a key such as `cluster.stable` asks for."""
    for label, wanted in labels.items():
        value, positive = wanted.removeprefix("!"), not wanted.startswith("!")
        values = [one.strip() for one in value[3:-1].split(",")] if value.startswith("in(") else [value]
        if (node.labels.get(label) in values) != positive:
            return False
    return True


def first_without_room(wanted: Sequence[Group], nodes: Sequence[Node]) -> tuple[Group, str] | None:
    """Places groups on empty nodes, one after the other as `placed_on_ray` does.

    Args:
        wanted: the groups, in order.
        nodes: the nodes of the cluster.

    Returns the first group that does not fit with the name of the process for which there is no node. None: all fit.
    """
    left = [dict(node.resources) for node in nodes]
    for group in wanted:
        here = Counter[int]()
        for name, resources in group.processes.items():
            fits = [
                place
                for place, node in enumerate(nodes)
                if chosen(node, group.labels)
                and all(left[place].get(what, 0.0) >= amount - 1e-9 for what, amount in resources.items())
            ]
            if not fits:
                return group, name
            few = 1 if group.strategy == "SPREAD" else -1
            place = min(fits, key=lambda place: (few * here[place], -left[place].get("GPU", 0.0)))
            here[place] += 1
            for what, amount in resources.items():
                left[place][what] -= amount
    return None


def no_room(group: Group, nodes: Sequence[Node], why: str) -> str:
    """The message that a group has no room, with what it asks for and what the cluster has.

    Args:
        group: the group.
        nodes: the nodes of the cluster.
        why: goes on from `the cluster has no room for ...`.
    """
    labels = ", ".join(f"{label}: {value}" for label, value in group.labels.items())
    has = "\n".join(f"  {node}{'' if chosen(node, group.labels) else ' (not chosen)'}" for node in nodes)
    return (
        f"{group.key} is {{{labels}}} and the cluster has no room for {group.asks()} on nodes with such labels{why}. "
        f"The cluster has\n{has}\n"
        f"Start such nodes, give nodes these labels, choose other labels, or ask for fewer processes (rollouts.num_actors, "
        f"rollouts.tensor_parallel, reward.replicas, learner.num_ranks)"
    )


def nodes_of_ray() -> list[Node]:
    """Returns the nodes of the cluster that this process is connected to. Those that are gone are left out."""
    import ray

    return [
        Node(
            str(row["NodeManagerAddress"]),
            dict(row["Resources"]),
            {label: value for label, value in (row.get("Labels") or {}).items() if label != "ray.io/node-id"},
        )
        for row in ray.nodes()
        if row["Alive"]
    ]


def placed_on_ray(config: R2MConfig, gpus: float, own: bool) -> tuple[dict[str, Any], list[Any]]:
    """Reserves the room of all processes, and waits for it at most `cluster.wait` seconds.

    Nothing is reserved where nobody else can take it: in a Ray that the run started itself, in a trial of Tune, which has
    reserved it, and on one node without GPUs. On one node labels are not looked at, unless `cluster.gpus` is set.

    Args:
        config: the config of the run.
        gpus: the number of GPUs of each process that computes with a model (`gpus.gpu_share`).
        own: whether this run started the cluster.

    Returns Ray's scheduling strategy of each process by its name, and the placement groups, which the caller must remove.
    Raises NoRoom if the cluster has no room in time. Nothing stays reserved then.
    """
    from ray.util import get_current_placement_group, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    alone = len(nodes_of_ray()) <= 1 and config.cluster.gpus is None
    if own or get_current_placement_group() or (alone and not gpus):
        return {}, []
    strategies: dict[str, Any] = {}
    reserved: list[Any] = []
    until = time.monotonic() + config.cluster.wait
    try:
        for group in groups(config, gpus):
            labels = {} if alone else dict(group.labels)
            bundles = list(group.processes.values())
            reserved.append(
                placement_group(
                    bundles, group.strategy, bundle_label_selector=[labels] * len(bundles) if labels else None
                )
            )
            while not reserved[-1].wait(LOOK_EVERY):
                if time.monotonic() >= until:
                    why = f" within {config.cluster.wait:g} s (cluster.wait)"
                    if not first_without_room(groups(config, gpus), nodes_of_ray()):
                        why += ": other work takes it"
                    raise NoRoom(no_room(group, nodes_of_ray(), why))
            for index, name in enumerate(group.processes):
                strategies[name] = PlacementGroupSchedulingStrategy(reserved[-1], placement_group_bundle_index=index)
    except BaseException:
        for one in reserved:
            remove_placement_group(one)
        raise
    return strategies, reserved
