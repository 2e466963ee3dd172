"""Where the processes of a ring lie in a cluster of several nodes, and what is said if there is no room for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.placement import ANYWHERE, Node, chosen, first_without_room, groups, no_room

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "presets"
SPOT, GIB = {"ray.io/market-type": "spot"}, 2.0**30


def node(gpus, labels=(), memory=64.0):
    return Node("10.0.0.1", {"GPU": float(gpus), "CPU": 8.0, "memory": memory * GIB}, dict(labels))


@pytest.fixture(scope="module")
def preset():
    """3 engines, 1 annotator and 4 ranks, a GPU each."""
    return R2MConfig.from_yaml(PRESETS / "dialogue_qwen2.5_3b.yaml")


def test_every_process_of_a_ring_is_in_one_group_with_what_it_asks_for(preset):
    stable, annotators, rollouts = groups(preset.cluster(annotator_memory=10**9).reward(replicas=2), 1.0)
    gpu = {"GPU": 1.0}
    ranks = {f"policy-learner-{rank}": gpu for rank in range(4)}
    assert stable.processes == {**ranks, "queue": ANYWHERE, "head-learner": ANYWHERE}
    assert annotators.processes == {f"annotator-{index}": {"GPU": 1.0, "memory": 1e9} for index in (0, 1)}
    assert rollouts.processes == {f"rollout-{index}": gpu for index in range(3)}
    assert [group.strategy for group in (stable, annotators, rollouts)] == ["PACK", "SPREAD", "SPREAD"]


def test_an_engine_of_several_gpus_is_one_bundle_and_without_gpus_nothing_asks_for_any(preset):
    wide = preset.rollouts(tensor_parallel=2, num_actors=2)
    assert groups(wide, 1.0)[2].processes == {f"rollout-{index}": {"GPU": 2.0} for index in (0, 1)}
    config = R2MConfig().cluster(annotator_memory=5)
    asked = [group.processes for group in groups(config, 0.0)]
    assert asked[0] == dict.fromkeys(("policy-learner", "queue", "head-learner"), ANYWHERE)
    assert asked[1:] == [{"annotator-0": {"memory": 5.0}}, {"rollout-0": ANYWHERE}]


@pytest.mark.parametrize(
    ("wanted", "none", "spot", "other"),
    [
        ("spot", False, True, False),
        ("!spot", True, False, True),
        ("in(spot, b)", False, True, True),
        ("!in(spot,b)", True, False, False),
    ],
)
def test_a_selector_is_read_as_ray_reads_it(wanted, none, spot, other):
    labels = [{}, {"market": "spot"}, {"market": "b"}]
    assert [chosen(node(0, labels=one), {"market": wanted}) for one in labels] == [none, spot, other]


def test_what_may_not_be_lost_finds_no_room_on_spot_nodes_and_takes_its_own_before_what_may(preset):
    assert first_without_room(groups(preset, 1.0), [node(5), node(3, SPOT)]) is None
    group, name = first_without_room(groups(preset, 1.0), [node(3), node(5, SPOT)])
    assert (group.key, name) == ("cluster.stable", "policy-learner-3")
    group, name = first_without_room(groups(preset, 1.0), [node(4), node(4, SPOT)])
    assert (group.key, name) == ("cluster.annotators", "annotator-0")
    anywhere = preset.cluster(stable={}, annotators={})
    assert first_without_room(groups(anywhere, 1.0), [node(8, SPOT)]) is None
    wide = preset.rollouts(num_actors=1, tensor_parallel=4)
    group, name = first_without_room(groups(wide, 1.0), [node(7), node(2, SPOT)])
    assert (group.key, name) == ("cluster.rollouts", "rollout-0"), "no engine lies on two nodes"


def test_an_annotator_lies_where_its_memory_is(preset):
    config = preset.cluster(annotator_memory=100 * 2**30)
    group, name = first_without_room(groups(config, 1.0), [node(8)])
    assert (group.key, name) == ("cluster.annotators", "annotator-0")
    assert first_without_room(groups(config, 1.0), [node(7), node(1, memory=128)]) is None


def test_the_message_names_the_key_what_was_asked_for_and_every_node(preset):
    stable = groups(preset, 1.0)[0]
    said = no_room(stable, [node(4, SPOT), node(2)], " within 60 s (cluster.wait)")
    assert said.startswith(
        "cluster.stable is {ray.io/market-type: !spot} and the cluster has no room for 4 x {GPU: 1} (policy-learner-0, "
        "policy-learner-1, policy-learner-2, policy-learner-3), 2 x {a process} (queue, head-learner) on nodes with such "
        "labels within 60 s (cluster.wait)"
    )
    assert "10.0.0.1: GPU: 4, CPU: 8, memory: 64 GiB; ray.io/market-type=spot (not chosen)\n" in said
    assert "10.0.0.1: GPU: 2, CPU: 8, memory: 64 GiB; no labels\n" in said
    assert "learner.num_ranks" in said


def test_a_selector_that_ray_would_not_read_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"cluster\.stable.*'spot!' is no selector of the label 'market'"):
        R2MConfig().cluster(stable={"market": "spot!"})
    for one in ("spot", "!spot", "in(a, b-2)", "!in(a)"):
        R2MConfig().cluster(stable={"market": one})


@pytest.mark.ring
def test_a_run_waits_for_the_gpus_that_it_counts_on_and_is_told_in_time_that_they_did_not_come(ray_session):
    from r2m_async.launch.ray_stages import RayProcesses

    config = R2MConfig().run(device="cuda").rollouts(num_actors=2).cluster(gpus=4, wait=1.0)
    with pytest.raises(
        ConfigError, match=r"^cluster\.stable is .*1 x \{GPU: 1\} \(policy-learner\).* within 1 s"
    ) as failed:
        RayProcesses(config)
    assert "other work" not in str(failed.value)
    RayProcesses(config.cluster(gpus=None)).close()


@pytest.mark.ring
def test_in_a_trial_of_tune_nothing_is_reserved_beside_what_tune_has_reserved(ray_session):
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    config = R2MConfig().cluster(gpus=8, wait=1.0)

    @ray.remote(num_cpus=0)
    def trial():
        from r2m_async.launch.placement import placed_on_ray

        return placed_on_ray(config, 1.0, own=False)

    trials = placement_group([{"CPU": 1.0}])
    inside = PlacementGroupSchedulingStrategy(trials, placement_group_capture_child_tasks=True)
    assert ray.get(trial.options(scheduling_strategy=inside).remote()) == ({}, [])
    with pytest.raises(ConfigError, match="no room for 1 x"):
        ray.get(trial.remote())
    remove_placement_group(trials)


@pytest.fixture
def on_three_nodes(tiny_config, tmp_path):
    """What a program saw of a config's ring on a cluster of its own: `three_nodes.py` or another."""

    def run(config, name="three_nodes.py"):
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        program = Path(__file__).with_name(name)
        done = subprocess.run([sys.executable, str(program), str(path)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.rpartition("SEEN ")[2])

    return run


@pytest.mark.ring
def test_spot_nodes_that_die_cost_rollout_actors_alone_which_come_back_on_a_node_that_joins(
    on_three_nodes, tiny_config
):
    config = tiny_config.run(num_steps=12).rollouts(num_actors=2).logging(actors=False)
    config = config.scheduling(max_policy_age=2, max_head_age=1, lag="exact").cluster(rollouts=SPOT, wait=300.0)
    seen = on_three_nodes(config)
    kept = dict.fromkeys(("queue", "annotator-0", "policy-learner", "head-learner"), "stable")
    assert {name: seen["before"][name] for name in kept} == kept == {name: seen["after"][name] for name in kept}
    assert {seen["before"][f"rollout-{index}"] for index in (0, 1)} == {"spot-0", "spot-1"}, "engines are spread"
    assert {seen["after"][f"rollout-{index}"] for index in (0, 1)} == {"spot-2"}
    assert seen["reissued"]["actor_died"] >= 1
    assert seen["trained"] == 24 and seen["same bits"]
    assert set(seen["reserved"]) == {"REMOVED"}, "room stays reserved after the run"


@pytest.mark.ring
def test_the_node_of_learner_and_queue_dies_and_the_ring_is_built_anew_on_another(
    on_three_nodes, tiny_config, tmp_path
):
    config = tiny_config.run(num_steps=6, output_dir=str(tmp_path / "runs")).logging(actors=False, live=False)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag="exact").checkpoint(every=1)
    chosen = {"ray.io/market-type": "on-demand"}
    seen = on_three_nodes(config.cluster(stable=chosen, annotators=chosen, wait=120.0), "stable_node_lost.py")
    before, after = (seen["places"][place] for place in (0, -1))
    stable = ("queue", "policy-learner", "head-learner")
    assert {before[name] for name in stable} != {after[name] for name in stable}
    assert {before[name] for name in stable} | {after[name] for name in stable} == {"stable-0", "stable-1"}
    assert seen["steps"] == [1, 2, 3, 4, 5, 6] and seen["same bits"]
    assert len(seen["because"]) >= 1 and "was lost" in seen["because"][0]


# r2m check --cluster

CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
store = {"object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
nodes = [cluster.add_node(num_cpus=1, **node, **store) for node in json.loads(sys.argv[1])]
print(f"ADDRESS {cluster.address}", flush=True)
sys.stdin.read()
for node in (*nodes, cluster.head_node):
    cluster.remove_node(node, allow_graceful=False)
"""


@pytest.fixture(scope="module")
def eight_gpus():
    """The address of a cluster that says it has 5 GPUs on a stable node and 3 on a spot node. It has none."""
    nodes = json.dumps([{"num_gpus": 5}, {"num_gpus": 3, "labels": SPOT}])
    command, pipe = [sys.executable, "-c", CLUSTER, nodes], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as cluster:
        yield next(line.split()[1] for line in cluster.stdout if line.startswith("ADDRESS"))
        cluster.stdin.close()


def check(*arguments, **environment):
    """`r2m check` with these arguments, in a process of its own."""
    command = [sys.executable, "-c", "from r2m_async.cli import entry; entry()", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


PRESET = str(PRESETS / "dialogue_qwen2.5_3b.yaml")


@pytest.mark.ring
def test_check_says_what_a_preset_asks_of_a_cluster_and_what_it_has(eight_gpus):
    done = check(PRESET, "--cluster", eight_gpus)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "# cluster: 3 nodes\n" in said and "GPU: 3, CPU: 1, memory" in said and "; ray.io/market-type=spot\n" in said
    assert "# each process that computes with a model gets 1 GPUs of 8\n" in said
    assert "# weights.transport: nccl\n" in said
    assert "# cluster.rollouts {}: 3 x {GPU: 1} (rollout-0, rollout-1, rollout-2)\n" in said
    assert "# 3 nodes have Python " in said
    assert said.splitlines()[-1].startswith("# ok")


@pytest.mark.ring
def test_check_refuses_a_cluster_that_has_no_room_with_status_2(eight_gpus):
    done = check(PRESET, "cluster.stable={ray.io/market-type: spot}", "--cluster", RAY_ADDRESS=eight_gpus)
    assert done.returncode == 2 and "# ok" not in done.stdout
    assert "cluster.stable is {ray.io/market-type: spot} and the cluster has no room for 4 x {GPU: 1}" in done.stderr
    assert "on nodes with such labels now. " in done.stderr and done.stderr.count("(not chosen)") == 2
    done = check(PRESET, "learner.num_ranks=5", "--cluster", eight_gpus)
    assert done.returncode == 2 and "this run needs 9 GPUs" in done.stderr


@pytest.mark.ring
def test_check_without_an_address_says_how_to_give_one():
    done = check(PRESET, "--cluster", RAY_ADDRESS="")
    assert done.returncode == 2 and "no address was given and RAY_ADDRESS is not set" in done.stderr


def test_a_node_is_told_apart_by_its_python_its_source_and_the_files_it_lacks(tmp_path):
    from r2m_async.launch.cluster_check import _look

    here, lacking = str(tmp_path), str(tmp_path / "none")
    python, package, missing = _look((here, lacking))
    assert python == "{}.{}.{}".format(*sys.version_info[:3])
    assert len(package) == 12 and missing == (lacking,)


def on_eight_gpus(program, address):
    """This program, with the preset's path, connected to the cluster."""
    command, here = [sys.executable, "-c", program, PRESET], os.environ | {"RAY_ADDRESS": address}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=here)


RANKS = """
import asyncio, psutil, sys
from r2m_async.config import R2MConfig
from r2m_async.launch.ray_stages import RayProcesses

class Idle:
    pass

def idle(config, workload):
    return Idle()

config = R2MConfig.from_yaml(sys.argv[1]).learner(num_ranks=2).rollouts(num_actors=2)
processes = RayProcesses(config.logging(actors=False))
try:
    learner = processes.gang("policy-learner", lambda rank, host, port: idle, None, processes.gpus)
    engines = [processes.stage(f"rollout-{index}", idle, None, processes.gpus) for index in range(2)]
    async def raylets():
        return [psutil.Process(pid).ppid() for one in (learner, *engines) for pid in await one.pids()]
    print("RAYLETS", *asyncio.run(raylets()), flush=True)
finally:
    processes.close()
"""


@pytest.mark.ring
def test_ranks_with_a_gpu_each_lie_together_and_engines_on_as_many_nodes_as_there_are(eight_gpus):
    done = on_eight_gpus(RANKS, eight_gpus)
    assert done.returncode == 0, done.stderr
    *ranks, one, other = next(line for line in done.stdout.splitlines() if line.startswith("RAYLETS")).split()[1:]
    assert len(ranks) == 2 and ranks[0] == ranks[1], "ranks are packed"
    assert one != other, "engines are spread"


@pytest.mark.ring
def test_labels_that_no_node_has_end_the_run_in_time_with_what_the_cluster_has(eight_gpus):
    done = on_eight_gpus(
        RANKS.replace("config.logging", 'config.cluster(stable={"rack": "none"}, wait=3.0).logging'), eight_gpus
    )
    said = done.stderr.rpartition("NoRoom: ")[2]
    assert said.startswith(
        "cluster.stable is {rack: none} and the cluster has no room for 2 x {GPU: 1} (policy-learner-0, policy-learner-1)"
    )
    assert "within 3 s (cluster.wait)" in said and said.count("(not chosen)") == 3
