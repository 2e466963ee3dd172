"""A ring on a cluster of three nodes, one of them stable and two spot: a program that prints what it saw as JSON.

It is a program of its own because a process connects to one cluster at a time, and the tests have theirs.
"""

import json
import sys
import time

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from r2m_async import reference
from r2m_async.config import R2MConfig
from r2m_async.errors import StageLost
from r2m_async.launch.ring import Ring

SPOT = {"ray.io/market-type": "spot"}


def lies(ring: Ring, nodes: dict[str, int]) -> dict[str, str]:
    """The node on which each process of the stages runs, by the stage's name: a node's processes are its raylet's children."""
    names = {pid: name for name, pid in nodes.items()}
    ids = ring.process_ids()
    return {name: names.get(psutil.Process(pid).ppid(), "?") for name, (pid,) in ids.items()}


def back(ring: Ring, nodes: dict[str, int]) -> dict[str, str]:
    """The same, once every process is there. A lost one may die again, on a node that Ray does not know to be dead yet."""
    until = time.monotonic() + 200
    while True:
        try:
            return lies(ring, nodes)
        except (StageLost, psutil.NoSuchProcess):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def main(config: R2MConfig) -> None:
    """Takes three steps, kills both spot nodes and adds another, and takes the rest."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    store = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick, **store})

    def add(name: str) -> None:
        nodes[name] = cluster.add_node(num_cpus=1, labels=SPOT, **store)
        raylets[name] = raylet(nodes[name])

    def raylet(node) -> int:
        return node.all_processes["raylet"][0].process.pid

    nodes, raylets = {}, {"stable": raylet(cluster.head_node)}
    add("spot-0")
    add("spot-1")
    # A ring that found the cluster's processes among its own children would take the cluster for its own.
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    seen = {}
    try:
        with Ring.of(config) as ring:
            while not ring.finished:
                step = ring.step()["step"]
                if step == 3:
                    seen["before"] = lies(ring, raylets)
                    for name in ("spot-0", "spot-1"):
                        cluster.remove_node(nodes.pop(name), allow_graceful=False)
                    add("spot-2")
                # Nobody notices a lost actor before it is asked for something.
                if step > 3 and "after" not in seen and ring.controller.schedule.reissued:
                    seen["after"] = back(ring, raylets)
            ring.drain()
            seen["reissued"] = dict(ring.controller.schedule.reissued)
            seen["trained"] = ring.controller.schedule.policy_ledger.trained
            expected = reference.train(config)
            ours = ring.policy_weights().tensors
            seen["same bits"] = all(torch.equal(ours[name], one) for name, one in expected.policy.tensors.items())
        seen["reserved"] = [one["state"] for one in placement_group_table().values()]
    finally:
        ray.shutdown()
        for node in (*nodes.values(), cluster.head_node):
            cluster.remove_node(node, allow_graceful=False)
    print(f"\nSEEN {json.dumps(seen)}", flush=True)


if __name__ == "__main__":
    main(R2MConfig.from_yaml(sys.argv[1]))
