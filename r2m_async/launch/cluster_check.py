"""Compares what a config asks of a Ray cluster with what the cluster has. This is what `r2m check --cluster` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import r2m_async
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.gpus import gpu_share, placed
from r2m_async.launch.placement import first_without_room, groups, no_room, nodes_of_ray
from r2m_async.launch.ray_connection import RayConnection

LOOK_TIMEOUT = 60.0
"""Seconds in which every node must say which Python and which files it has."""


def check_cluster(config: R2MConfig, address: str) -> Iterator[str]:
    """Joins a cluster, and yields lines about what the config asks for, what the cluster has, and whether it is enough.

    Args:
        config: the config of the run.
        address: the address of the cluster, as in RAY_ADDRESS. If it is empty, RAY_ADDRESS itself is used.

    Raises ConfigError if the run could not start on the cluster as it is now: too few GPUs, too little memory, no nodes with
    the labels, another version of Python or of this package on a node, or a file that not every node sees. It is also raised
    without an address, or if nobody answers there.
    """
    if address:
        os.environ["RAY_ADDRESS"] = address
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "--cluster: no address was given and RAY_ADDRESS is not set, so there is no cluster to compare with; write "
            "`--cluster HOST:6379`, or run the command inside the cluster with `ray job submit`"
        )
    connection = RayConnection(config)
    try:
        nodes, available = nodes_of_ray(), config.cluster.gpus or connection.num_gpus
        yield f"cluster: {len(nodes)} nodes"
        yield from (f"  {node}" for node in nodes)
        if config.run.device == "cuda" and not available:
            raise ConfigError(
                "run.device is 'cuda' and the cluster has no GPU: the models would have no device to compute on; start nodes "
                "with GPUs, set cluster.gpus if they come only when something asks for them, or use device 'cpu'"
            )
        share = gpu_share(config, available)
        yield f"each process that computes with a model gets {share:g} GPUs of {available:g}"
        yield f"weights.transport: {placed(config, share, available).weights.transport}"
        wanted = groups(config, share)
        lacking = first_without_room(wanted, nodes)
        for group in wanted:
            labels = ", ".join(f"{label}: {value}" for label, value in group.labels.items())
            yield f"{group.key} {{{labels}}}: {group.asks()}"
        if lacking:
            raise ConfigError(no_room(lacking[0], nodes, " now"))
        yield from _each_node(config, connection)
    finally:
        connection.close(lambda: None)


def _each_node(config: R2MConfig, connection: RayConnection) -> Iterator[str]:
    """Asks every node for its Python, for this package and for the config's files. Raises ConfigError if one differs."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    named = {
        "model.policy": config.model.policy,
        "model.reference": config.model.reference,
        "critic.model": config.critic.model,
        "reward.model": config.reward.model,
    }
    paths = {key: str(Path(value).absolute()) for key, value in named.items() if value and Path(value).exists()}
    look: Any = ray.remote(num_cpus=0, max_retries=0)(_look)
    rows = [row for row in ray.nodes() if row["Alive"]]
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(row["NodeID"], soft=False)).remote(
            tuple(paths.values())
        )
        for row in rows
    ]
    here = _look(tuple(paths.values()))
    for row, answer in zip(rows, asked, strict=True):
        address = row["NodeManagerAddress"]
        try:
            python, package, missing = ray.get(answer, timeout=LOOK_TIMEOUT)
        except GetTimeoutError:
            raise ConfigError(
                f"{address}: this node started no process within {LOOK_TIMEOUT:g} s; is it alive and has it memory left?"
            ) from None
        except RayError as error:
            why = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"{address}: this node cannot run r2m-async ({why}): every node needs the same packages; install them there, "
                f"or start all nodes from one image"
            ) from None
        if (python, package) != here[:2]:
            raise ConfigError(
                f"{address}: this node has Python {python} and r2m-async {package}, and here are {here[0]} and {here[1]}: the "
                f"processes of a run exchange pickled objects; start all nodes from one image"
            )
        for key, path in paths.items():
            if path in missing:
                raise ConfigError(
                    f"{key} is {named[key]!r} and {address} does not see {path}: every process loads its model from its own "
                    f"node; put it on a disk that all nodes share, or name a model of Hugging Face"
                )
    yield f"{len(rows)} nodes have Python {here[0]}, r2m-async {here[1]} and the files of {', '.join(paths) or 'no model'}"


def _look(paths: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    """Runs on a node. Returns its version of Python, a digest of this package's source, and the paths that it lacks."""
    from hashlib import sha256

    digest, home = sha256(), Path(r2m_async.__file__).parent
    for path in sorted(home.rglob("*.py")):
        digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:3]))
    return python, digest.hexdigest()[:12], tuple(path for path in paths if not Path(path).exists())
