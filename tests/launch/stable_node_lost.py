"""A training run on a cluster of which the node with learner and queue dies: a program that prints what it saw as JSON.

It is a program of its own because a process connects to one cluster at a time, and the tests have theirs.
"""

import json
import sys

import ray
import torch
from ray.cluster_utils import Cluster
from three_nodes import lies

from r2m_async import codec, reference
from r2m_async.config import R2MConfig
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.records import read_records


def main(config: R2MConfig) -> None:
    """Trains, and kills the node of the policy learner after the third step."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    store = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick, **store})
    kinds = {"stable-0": "on-demand", "stable-1": "on-demand", "spot": "spot"}
    nodes = {
        name: cluster.add_node(num_cpus=1, labels={"ray.io/market-type": kind}, **store) for name, kind in kinds.items()
    }
    raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    seen = {"places": []}

    class Watched(Ring):
        def step(self):
            metrics = super().step()
            if metrics["step"] in (3, 5):
                seen["places"].append(lies(self, raylets))
            if metrics["step"] == 3 and len(seen["places"]) == 1:
                cluster.remove_node(nodes.pop(seen["places"][0]["policy-learner"]), allow_graceful=False)
            return metrics

    training.Ring = Watched
    try:
        run = training.train(config)
        seen["steps"] = [record["step"] for record in read_records(run / "metrics.jsonl")]
        seen["because"] = [record["because"] for record in read_records(run / "resumes.jsonl")]
        place = checkpoint_path(run, config.run.num_steps) / f"policy_weights_{config.run.num_steps}.msgpack"
        ours, theirs = codec.decode(place.read_bytes()).tensors, reference.train(config).policy.tensors
        seen["same bits"] = all(torch.equal(ours[name], one) for name, one in theirs.items())
    finally:
        ray.shutdown()
        for node in (*nodes.values(), cluster.head_node):
            cluster.remove_node(node, allow_graceful=False)
    print(f"\nSEEN {json.dumps(seen)}", flush=True)


if __name__ == "__main__":
    main(R2MConfig.from_yaml(sys.argv[1]))
