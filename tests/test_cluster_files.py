"""The files of `configs/cluster/`: each is what its reader expects, and has room for the run that it is made for."""

import contextlib
import copy
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from r2m_async.config import R2MConfig
from r2m_async.launch.gpus import gpu_share
from r2m_async.launch.placement import Node, first_without_room, groups

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "cluster"
RAY_UP = [CLUSTER / f"{name}.yaml" for name in ("aws_3b", "aws_8b", "gcp_3b", "gcp_8b", "local")]
KUBERAY = [CLUSTER / f"kuberay_{size}.yaml" for size in ("3b", "8b")]
SKYPILOT = [CLUSTER / f"skypilot_{size}.yaml" for size in ("3b", "8b")]
SLURM, DOCKERFILE = CLUSTER / "slurm.sh", CLUSTER / "Dockerfile"
SPOT = {"ray.io/market-type": "spot"}


def named(path):
    return path.stem


def program(name):
    """A program beside Python or on the path, or a skip: the extra `test` brings it."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def command_of(path):
    """The config and the overrides of the `r2m train` in a file, which may go on over several lines of a comment."""
    text = re.sub(r"\s*\\?\n#?\s+", " ", path.read_text())
    file, overrides = re.search(
        r"r2m train (?:/\S+/)?(configs/\S+\.yaml) ((?:[a-z_]+\.\S+ )+)--resume-if-exists", text
    ).groups()
    return R2MConfig.from_yaml(ROOT / file, overrides.split())


def nodes_of(path):
    """The nodes that a file asks for, each with what Ray would see of it."""
    tree = yaml.safe_load(path.read_text())
    if path in KUBERAY:
        cluster, found = tree["spec"]["rayClusterSpec"], []
        for group in ({"replicas": 1, **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            has = {
                "GPU": float(limits.get("nvidia.com/gpu", 0)),
                "memory": float(limits["memory"].removesuffix("Gi")) * 2**30,
            }
            found += [Node(group.get("groupName", "head"), has, group["labels"])] * group["replicas"]
        return found
    if path in SKYPILOT:
        gpus = float(tree["resources"]["accelerators"].rpartition(":")[2])
        return [Node("node", {"GPU": gpus, "memory": 2.0**40})] * tree["num_nodes"]
    head = tree["head_node_type"]
    return [
        Node(
            name,
            dict.fromkeys(("GPU",), 0.0) | {key: float(value) for key, value in kind["resources"].items()},
            kind["labels"],
        )
        for name, kind in tree["available_node_types"].items()
        for _ in range(1 if name == head else kind["min_workers"])
    ]


@pytest.mark.parametrize("path", RAY_UP, ids=named)
def test_ray_up_reads_the_file_with_rays_own_schema(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = yaml.safe_load(path.read_text())
    validate_config(prepare_config(copy.deepcopy(tree)))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(copy.deepcopy(tree) | {"max_worker": 3}))


@pytest.mark.parametrize("path", [*RAY_UP[:4], *KUBERAY, *SKYPILOT], ids=named)
def test_a_cluster_has_room_for_the_run_that_its_file_names_and_counts_its_gpus(path):
    config, nodes = command_of(path), nodes_of(path)
    assert config.run.name.endswith({"3b": "3b", "8b": "8b"}[path.stem[-2:]])
    assert config.cluster.gpus == sum(node.resources["GPU"] for node in nodes)
    share = gpu_share(config, config.cluster.gpus)
    assert share == 1.0 and first_without_room(groups(config, share), nodes) is None
    assert config.run.output_dir == "/shared/runs" and config.checkpoint.every
    if path not in SKYPILOT:
        kept = [node for node in nodes if node.labels != SPOT]
        assert len(kept) < len(nodes), "nothing is spot"
        stable, annotators, _ = groups(config, share)
        assert first_without_room((stable, annotators), kept) is None
        lost = first_without_room(groups(config, share), kept)
        assert lost and lost[0].key == "cluster.rollouts", "a cluster without its spot nodes lacks engines alone"


@pytest.mark.parametrize("path", [CLUSTER / "local.yaml", *KUBERAY], ids=named)
def test_every_file_names_a_run_that_goes_on_where_it_was(path):
    config = command_of(path)
    assert config.cluster.gpus == 8 and config.run.output_dir == "/shared/runs" and not config.logging.live


@pytest.mark.parametrize("path", KUBERAY, ids=named)
def test_a_rayjob_tries_again_shares_a_volume_and_leaves_nothing_behind(path):
    tree = yaml.safe_load(path.read_text())
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayJob")
    spec = tree["spec"]
    assert spec["backoffLimit"] == 3 and spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "r2m-shared"}} in pod["volumes"]
        assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("path", KUBERAY, ids=named)
def test_a_rayjob_is_valid_under_kuberays_published_schema(path):
    """KubeRay's file is too large to lie here: R2M_RAYJOB_CRD names it, `ray.io_rayjobs.yaml` of a release."""
    crd = os.environ.get("R2M_RAYJOB_CRD")
    if not crd:
        pytest.skip("R2M_RAYJOB_CRD names no copy of KubeRay's ray.io_rayjobs.yaml")
    (version,) = (one for one in yaml.safe_load(Path(crd).read_text())["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    tree = yaml.safe_load(path.read_text())
    jsonschema.validate(tree, schema)
    tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(tree, schema)


def closed(schema):
    """A schema of Kubernetes as JSON Schema has it: keys that it does not name are refused, as Kubernetes prunes them."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if found.get("type") == "object" and isinstance(found.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found = {key: value for key, value in found.items() if key not in ("type", "anyOf")}
    return found


@pytest.mark.parametrize("path", SKYPILOT, ids=named)
def test_skypilot_gets_a_task_of_nodes_with_gpus_that_start_a_ray_of_their_own(path):
    tree = yaml.safe_load(path.read_text())
    assert tree.keys() == {"name", "num_nodes", "resources", "envs", "setup", "run"}
    assert "--port 6380" in tree["run"], "SkyPilot's own Ray has the port 6379"
    sky = pytest.importorskip("sky")
    assert sky.Task.from_yaml(str(path)).num_nodes == tree["num_nodes"]


@pytest.mark.parametrize("text", [SLURM, *SKYPILOT], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(text, tmp_path):
    script = text
    if text in SKYPILOT:
        tree, script = yaml.safe_load(text.read_text()), tmp_path / "run.sh"
        script.write_text(f"#!/bin/bash\nNFS=\n{tree['setup']}\n{tree['run']}")
    done = subprocess.run([program("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing():
    done = subprocess.run([program("hadolint"), "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_images_copy_what_the_package_is_made_of():
    text = DOCKERFILE.read_text()
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.M) == ["cpu", "cuda"]
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    allowed = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text()
    assert all((ROOT / name).exists() and f"!{name}\n" in allowed for name in copied)
    assert {"pyproject.toml", "constraints.txt", "r2m_async", "actors", "learners", "configs"} <= set(copied)


@pytest.mark.cross
def test_the_image_for_a_cpu_can_be_built():
    docker = program("docker")
    if subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers")
    command = [docker, "build", "--quiet", "--file", str(DOCKERFILE), "--target", "cpu", str(ROOT)]
    subprocess.run(command, check=True, timeout=3600)


# SLURM, with programs that stand in for its own


STAND_INS = {
    "scontrol": """
        if [ "$1" = show ]; then printf 'one\\ntwo\\n'; else echo "scontrol $*" >> "$LOG"; fi""",
    "srun": """
        while [[ "$1" == --* ]]; do where="${where:-} $1"; shift; done
        if [ "$1" = hostname ]; then echo 127.0.0.1; else echo "srun$where: $*" >> "$LOG"; exec sleep 60; fi""",
    "r2m": """
        trap 'echo "r2m was ended" >> "$LOG"; exit 143' TERM
        echo "r2m $* at $RAY_ADDRESS" >> "$LOG"
        if [ -n "${LONG:-}" ]; then sleep 60 & wait; fi
        exit 3""",
}


def the_port_of_a_job():
    """Listens at one of the ports that the script gives to a head, from 20000 to 39999."""
    while True:
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", random.randrange(20000, 40000)))


@pytest.fixture
def slurm(tmp_path):
    """Starts the script in an allocation of two nodes with four GPUs each. Returns the process and the log."""
    home, log = tmp_path / "home", tmp_path / "log"
    (home / ".venv" / "bin").mkdir(parents=True)
    for name, text in STAND_INS.items():
        file = home / ".venv" / "bin" / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    started = []

    def start(**environment):
        listener = the_port_of_a_job()
        job = {
            "SLURM_JOB_ID": str(listener.getsockname()[1] - 20000),
            "SLURM_JOB_NODELIST": "one,two",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "32",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(home),
            "LOG": str(log),
        }
        process = subprocess.Popen(
            ["bash", str(SLURM), "configs/presets/dialogue_qwen2.5_3b.yaml", "run.seed=1"],
            env=os.environ | job | environment,
            start_new_session=True,
        )
        started.append((process, listener))
        return process, log

    yield start
    for process, listener in started:
        listener.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines_of(log, number):
    """The lines of the log, once there are so many."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) >= number:
            return lines
        time.sleep(0.05)
    raise AssertionError(lines)


def test_the_slurm_script_starts_ray_on_all_nodes_and_ends_with_the_status_of_the_run(slurm):
    process, log = slurm()
    assert process.wait(60) == 3
    lines = lines_of(log, 3)
    (head,) = (line for line in lines if "--head" in line)
    assert head.startswith("srun --nodes=1 --ntasks=1 --nodelist=one: ray start --head --node-ip-address=127.0.0.1")
    assert head.endswith("--num-cpus=32 --num-gpus=4 --labels=ray.io/market-type=on-demand --block")
    (worker,) = (line for line in lines if "--exclude=one" in line)
    assert worker.startswith("srun --nodes=1 --ntasks=1 --exclude=one: bash -c until") and worker.endswith("--block")
    (run,) = (line for line in lines if line.startswith("r2m"))
    assert run.startswith("r2m train configs/presets/dialogue_qwen2.5_3b.yaml cluster.gpus=8 cluster.wait=600")
    assert re.search(r"run\.output_dir=\S+/home/runs .* run\.seed=1 --resume-if-exists at 127\.0\.0\.1:\d+$", run)


def test_the_slurm_script_puts_the_job_back_into_the_line_when_its_time_ends(slurm):
    process, log = slurm(LONG="1")
    lines_of(log, 3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    ended = lines_of(log, 5)[3:]
    assert ended[0] == "r2m was ended" and ended[1].startswith("scontrol requeue ")
