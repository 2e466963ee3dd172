"""Hurts real runs in every way that can be made here, and says what became of the runs.

    python benchmarks/chaos.py --each 50 --json docs/reliability.json --table docs/reliability.md
    python benchmarks/chaos.py --each 5 --ring vllm-in-flight --kinds "kill engine" "stop engine"

A run is `r2m train --resume-if-exists` in a process of its own, with a checkpoint after every step, as a job that is started again
when it ends. The rings are `transformers` (the default engine and learner), `vllm`, `vllm-in-flight` (several groups at once, in an
engine process of its own), and `deepspeed` (two ranks); a kind of fault is tried in each ring that has something of its own to be
hurt. At seeded moments something happens:

    kill X             SIGKILL to a process: a stage, an engine core of vLLM, a rank, the driver, or a process of Ray's own
    kill queue+driver  two of them, the second up to 5 s after the first: while the ring is being built anew
    stop X             SIGSTOP to it, for ever
    pause X            SIGSTOP to the driver or to all processes, and SIGCONT 10 s later, as on a machine that was suspended
    fill disk          no byte is left on the disk of the run directory, until the job has ended once
    take memory        the job may take 64 MiB more memory, and something takes it: the kernel kills one of its processes
    messages slow      each message between driver and stages takes up to a second more, on its way out and on its way back
    messages twice     calls that change no learner are made twice
    messages late      one answer of five is held back for up to 3 s, so that others overtake it

The next fault comes when the run has taken two steps more than at the fault. The time until then, without that of two undisturbed steps,
is what the fault has cost. A fault that passes (a pause, a full disk) counts from its end.

A run that has reached its end is compared with one that nothing disturbed:

- both learners are the same to the last byte (`scheduling.lag: exact`; not under `--lag bounded`, in flight or with DeepSpeed),
- each step is recorded once, in order, the ledger counts each group once, and no age is above its bound,
- no process, no shared memory, no temporary file and no half-written file is left.

The faults of a run that fails a check count as not survived. Where the system allows it (root, or a user namespace), the command runs
with processes, shared memory and disks of its own, so that whatever it does ends with it. What cannot be done is left out with the
reason: `fill disk` needs to mount, and `take memory` a control group of its own. Messages are disturbed where the driver hands them to
Ray. What stages send each other through Ray's object store is not. With `--json` an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import xxhash
from rows import processor

from r2m_async import cli
from r2m_async.config import R2MConfig
from r2m_async.launch import forked_workers
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.directory import newest_directory
from r2m_async.runs.records import read_records
from r2m_async.whole import write_file

STEPS = 40
"""Policy steps of a run. A run takes about half as many faults."""
PATIENCE = 400.0
"""Seconds within which a run must have recovered."""
MORE = 2
"""Steps that a run takes after a fault before it counts as recovered."""
BARREN = 3
"""Runs in a row in which nothing could be hurt, after which a measurement ends."""
PAUSE, SLOW, LATE = 10.0, 1.0, 3.0
"""Seconds: how long something is paused, how much later a slow message comes, and an answer that is held back."""
MEANT_TO_STAY = ("torchinductor_", "vllm_dist_")
"""How the names begin of temporary files that libraries leave: torch's cache, and the few bytes by which the ranks of an engine of
vLLM have found each other."""
DISK, HEADROOM = 128 * 2**20, 64 * 2**20
"""Bytes of the disk of a run directory, and of the memory that the job may still take under `take memory`."""
TWICE = ("put", "get", "free", "embed", "score", "generate", "load_weights", "abort", "keep", "write", "weights")
"""Calls that are made twice under `messages twice`: they change neither learner."""

OWN = "R2M_CHAOS_NAMESPACES"
"""Environment variable: set in a process that has namespaces of its own."""

STAGES = ("rollout", "queue", "annotator", "policy-learner", "head-learner")
RAY = {
    "raylet": "raylet/raylet",
    "gcs_server": "gcs/gcs_server",
    "ray-agent": "DashboardAgent",
    "ray-runtime-env": "RuntimeEnvAgent",
    "ray-log-monitor": "log_monitor.py",
}
"""Processes of a Ray that the run has started, and what their command lines contain."""
RINGS: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = {
    "transformers": (
        {},
        (
            *(f"{what} {target}" for target in (*STAGES, "raylet", "gcs_server") for what in ("kill", "stop")),
            *(f"kill {target}" for target in ("ray-agent", "ray-runtime-env", "ray-log-monitor", "driver")),
            *("kill queue+driver", "pause driver", "pause everything", "fill disk", "take memory"),
            *("messages slow", "messages twice", "messages late"),
        ),
    ),
    "vllm": (
        {"rollouts": {"engine": "vllm"}},
        ("kill rollout", "stop rollout", "kill driver", "pause everything"),
    ),
    "deepspeed": (
        # DeepSpeed's sums over ranks are rounded otherwise than in one process, so no version of it is the same to the bit.
        {"scheduling": {"lag": "bounded"}, "learner": {"backend": "deepspeed", "num_ranks": 2}},
        ("kill policy-learner", "stop policy-learner", "kill driver", "pause everything"),
    ),
    # Only an engine that takes several groups at once has a process of its own.
    "vllm-in-flight": (
        {
            "scheduling": {"lag": "bounded"},
            "rollouts": {"engine": "vllm", "concurrent_groups": 2, "in_flight_updates": True},
        },
        ("kill engine", "stop engine", "kill rollout", "kill driver", "pause everything"),
    ),
}
"""What each ring has in its config, and which faults are tried in it."""


def config_of(ring: str, arguments: argparse.Namespace, output_dir: Path) -> R2MConfig:
    """The quickstart's world at a size where a step takes a moment."""
    config = R2MConfig().run(name="chaos", num_steps=arguments.steps, output_dir=str(output_dir), device="cpu")
    config = config.run(max_restarts=1000).model(policy="embedded").reward(model="embedded").data(prompts="embedded")
    config = config.rollouts(num_actors=2, prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=12)
    config = config.rollouts(max_restarts=1000, hang_after=10.0).evaluation(every=None).head(width=32)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag=arguments.lag, stall_after=60.0)
    config = config.checkpoint(every=1, keep=2).logging(live=False, tensorboard=False)
    for section, keys in RINGS[ring][0].items():
        config = getattr(config, section)(**keys)
    return config


# The run, in a process of its own


def drive(folder: Path) -> None:
    """`r2m train --resume-if-exists`, which writes the numbers of its processes into a file, and may be disturbed."""
    config = str(folder / "config.yaml")
    forked_workers.prepare(R2MConfig.from_yaml(config).rollouts.engine)  # as `r2m train` does, before it imports torch
    from r2m_async.launch import training
    from r2m_async.launch.ring import Ring

    class Watched(Ring):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            super().__init__(*arguments, **how)
            stages, rng = self.controller.stages, random.Random(os.getpid())
            for stage in (*stages.rollouts, stages.queue, *stages.annotators, stages.policy, stages.head):
                call = functools.partial(disturbed, stage.carrier.call, folder / "messages", rng)
                stage.carrier.call = call  # type: ignore[method-assign]
            self._tell()

        def step(self) -> dict[str, float]:
            metrics = super().step()
            self._tell()
            return metrics

        def _tell(self) -> None:
            # As they were when they were last asked. To ask a stage that is dead would be taken for its loss.
            stages, found = self.controller.stages, {"driver": os.getpid()}
            for stage in (*stages.rollouts, stages.queue, *stages.annotators, stages.policy, stages.head):
                found |= {name: number for name, number, _ in stage.carrier.places()}
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    found |= {name: child.pid for name, part in RAY.items() if part in line}
                    if "Engine" in child.name():
                        found[f"engine-{child.pid}"] = child.pid
            write_file(folder / "pids.json", json.dumps(found))

    training.Ring = Watched  # type: ignore[misc]
    sys.argv = ["r2m", "train", config, "--resume-if-exists"]
    cli.entry()


async def disturbed(
    call: Callable[..., Awaitable[tuple[Any, ...]]], how: Path, rng: random.Random, method: Any, *arguments: Any
) -> tuple[Any, ...]:
    """A call of a stage, as slow or as often as the file `how` says at this moment. Without the file it is as ever."""
    way = how.read_text() if how.exists() else ""
    if way == "slow":
        await asyncio.sleep(rng.random() * SLOW)
    answer = await call(method, *arguments)
    if way == "twice" and method.name in TWICE:
        answer = await call(method, *arguments)
    if way == "slow":
        await asyncio.sleep(rng.random() * SLOW)
    if way == "late" and rng.random() < 0.2:
        await asyncio.sleep(rng.random() * LATE)
    return answer


class Job:
    """A run that is started again whenever it ends before its last step. A context manager, which ends it."""

    def __init__(self, ring: str, arguments: argparse.Namespace, folder: Path) -> None:
        """Starts it. `folder` is an empty folder with a short path, because Ray makes sockets in it."""
        self.folder, self.log = folder, folder / "log.txt"
        for name in ("runs", "tmp", "ray"):
            (folder / name).mkdir()
        self._ends = ExitStack()
        if os.environ.get(OWN) and _done(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder / "runs")]):
            self._ends.callback(_done, ["umount", "--lazy", str(folder / "runs")])
        self.config = config_of(ring, arguments, folder / "runs")
        (folder / "config.yaml").write_text(self.config.to_yaml())
        self.memory = memory_group(folder.name)
        if self.memory:
            self._ends.callback(_done, ["rmdir", str(self.memory)])  # in vain if a process is not gone yet
        self.starts = 0
        self.seen: set[psutil.Process] = set()
        """All processes that the job ever had, as far as they were seen."""
        self._looked = 0.0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the run, or starts it again."""
        (self.folder / "pids.json").unlink(missing_ok=True)
        own = {"TMPDIR": str(self.folder / "tmp"), "RAY_TMPDIR": str(self.folder / "ray"), "RAY_ADDRESS": ""}
        own["RAY_worker_niceness"] = "0"  # Ray's own is 15: beside other work its workers would hardly run
        with self.log.open("ab") as log:
            command = [sys.executable, __file__, "--drive", str(self.folder)]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own)
        if self.memory:
            (self.memory / "cgroup.procs").write_text(str(process.pid))
        self.starts += 1
        return process

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self._ends.close()

    @property
    def run(self) -> Path | None:
        """The run directory, or None as long as there is none."""
        return newest_directory(self.config.run.output_dir, self.config.run.name)

    def step(self) -> int:
        """The last step that is recorded, 0 before the first."""
        try:
            records = read_records(self.run / "metrics.jsonl") if self.run else []
        except OSError:
            return 0
        return int(records[-1]["step"]) if records else 0

    def processes(self) -> list[psutil.Process]:
        """The processes that the job has now: the driver and all that it has started."""
        try:
            driver = psutil.Process(self.process.pid)
            found = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self.seen |= set(found)
        return found

    def named(self, target: str, rng: random.Random) -> psutil.Process | None:
        """A process of this name, or one of several. None if there is none: the run is between two rings."""
        try:
            numbers = json.loads((self.folder / "pids.json").read_text())
        except OSError:
            return None
        wanted = [number for name, number in numbers.items() if target in (name, name.rsplit("-", 1)[0])]
        there = [process for process in self.processes() if process.pid in wanted]
        return rng.choice(there) if there else None

    def wait_for(self, step: int) -> bool:
        """Waits until a step is recorded, and starts the job again if it ends before. Returns whether that came."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.step() >= step:
                return True
            if self.process.poll() is not None:
                time.sleep(1)  # whatever starts jobs again takes a moment
                self.process = self.start()
            if time.monotonic() > self._looked + 1:
                self.processes()
                self._looked = time.monotonic()
            time.sleep(0.05)
        return False

    def told(self) -> str:
        """The end of what the job has printed."""
        return self.log.read_text()[-3000:]


def _done(command: list[str]) -> bool:
    """Whether a command is there and does its work."""
    return bool(shutil.which(command[0])) and not subprocess.run(command, capture_output=True).returncode


def memory_group(name: str) -> Path | None:
    """Makes a control group that can limit memory, by version 1 or 2 of Linux's. None: that is not allowed here."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        for old in parent.glob("r2m-*"):
            with contextlib.suppress(OSError):
                old.rmdir()  # of a measurement that was killed; one with processes is not removed
        group = parent / name
        with contextlib.suppress(OSError):
            group.mkdir()
            if any((group / limit).exists() for limit in ("memory.limit_in_bytes", "memory.max")):
                return group
            group.rmdir()
    return None


# The faults

CANNOT: dict[str, Callable[[Job], str | None]] = {
    "fill disk": lambda job: None if os.path.ismount(job.folder / "runs") else "no disk can be mounted here",
    "take memory": lambda job: None if job.memory else "no control group can be made here",
}
"""Says of a kind why it cannot be done."""


def harm(job: Job, kind: str, rng: random.Random, after: ExitStack) -> bool:
    """Does it. Returns whether there was something to hurt. `after` gets what ends it once the run has recovered."""
    what, target = kind.split(" ", 1)
    if what == "messages":
        (job.folder / "messages").write_text(target)
        after.callback((job.folder / "messages").unlink)
        return True
    if what == "fill":
        return fill_disk(job)
    if what == "take":
        return take_memory(job)
    hit = False
    for number, one in enumerate(target.split("+")):
        time.sleep(rng.random() * 5 if number else 0)
        hurt = job.processes() if one == "everything" else [job.named(one, rng)]
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in hurt:
                if process:
                    process.send_signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
                    hit = True
        if what == "pause":
            time.sleep(PAUSE)
            for process in hurt:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process:
                        process.send_signal(signal.SIGCONT)
    return hit


def fill_disk(job: Job) -> bool:
    """Leaves no room until the job has ended for want of it."""
    filler = job.folder / "runs" / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 2**16)
            file.flush()
    try:
        deadline = time.monotonic() + PATIENCE
        while job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return job.process.poll() is not None
    finally:
        filler.unlink()


HOG = """
import time
open("/proc/self/oom_score_adj", "w").write("-1000")
held = []
while True:
    held.append(b"0" * 2**22)
    time.sleep(0.02)
"""
"""Takes memory for ever. The kernel rather kills any other process."""


def take_memory(job: Job) -> bool:
    """Lets the kernel kill one process of the job for want of memory."""
    assert job.memory
    old = (job.memory / "memory.limit_in_bytes").exists()
    limit, usage = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
    counter = job.memory / ("memory.oom_control" if old else "memory.events")

    def num_killed() -> int:
        return next(int(line.split()[1]) for line in counter.read_text().splitlines() if line.startswith("oom_kill "))

    before = num_killed()
    (job.memory / f"memory.{limit}").write_text(str(int((job.memory / f"memory.{usage}").read_text()) + HEADROOM))
    with subprocess.Popen([sys.executable, "-c", HOG]) as hog:
        (job.memory / "cgroup.procs").write_text(str(hog.pid))
        deadline = time.monotonic() + 60
        try:
            while num_killed() == before and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            hog.kill()
            (job.memory / f"memory.{limit}").write_text("-1" if old else "max")
    return num_killed() > before


@dataclass
class Outcomes:
    """What became of the faults of one kind."""

    tried: int = 0
    survived: int = 0
    by: dict[str, int] = field(default_factory=dict)
    """How the run went on: `itself`, or as a job that was `started again`."""
    seconds: list[float] = field(default_factory=list)
    """What each has cost: the time until the run had taken `MORE` steps, without that of as many undisturbed ones."""


def strike(job: Job, kind: str, rng: random.Random, outcomes: Outcomes) -> bool:
    """One fault, at a moment of the next two steps. Waits for the recovery, and returns whether the run has recovered."""
    assert job.run
    per_step = Ended.of(job.run).per_step
    # The fastest step, not the median: a run's first step is slow, and a short run would be over before it is hurt.
    fastest = min(record["time/step"] for record in read_records(job.run / "metrics.jsonl"))
    time.sleep(rng.random() * 2 * fastest)
    starts, step = job.starts, job.step()
    if step >= job.config.run.num_steps - MORE:
        return True  # there are no steps left from which a recovery could be seen
    with ExitStack() as after:
        if not harm(job, kind, rng, after):
            return job.wait_for(step + MORE)  # the run is between two rings: nothing was tried
        outcomes.tried += 1
        began = time.monotonic()
        if not job.wait_for(step + MORE):
            return False
        outcomes.seconds.append(max(0.0, time.monotonic() - began - MORE * per_step))
    print(f"{kind}: {outcomes.seconds[-1]:.1f} s", flush=True)
    outcomes.survived += 1
    how = "itself" if job.starts == starts else "started again"
    outcomes.by[how] = outcomes.by.get(how, 0) + 1
    return True


# The checks


@dataclass(frozen=True)
class Ended:
    """What has come of a run so far."""

    learners: dict[str, str]
    """Digests of the states and the weights of both learners, by the file's name."""
    per_step: float
    """Seconds of a step, the median."""

    @classmethod
    def of(cls, run: Path) -> Ended:
        """Of a run directory with a checkpoint of its last step, or one that has none of it yet."""
        records = read_records(run / "metrics.jsonl")
        folder = checkpoint_path(run, len(records))
        files = [path for name in ("policy", "head") for path in folder.glob(f"{name}_*.msgpack")]
        learners = {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(files)}
        return cls(learners, statistics.median(record["time/step"] for record in records))


def undisturbed_run(ring: str, arguments: argparse.Namespace) -> tuple[list[str], Ended | None]:
    """What is wrong with a run that nothing disturbs, and what it is. DeepSpeed and vLLM need processes of their own."""
    if ring != "transformers":
        return one_run(ring, arguments, {}, None, -1)
    from r2m_async.cpu_threads import one_thread
    from r2m_async.launch import training

    with tempfile.TemporaryDirectory() as folder, one_thread(), contextlib.redirect_stdout(sys.stderr):
        return [], Ended.of(training.train(config_of(ring, arguments, Path(folder)), in_process=True))


def faults_of(job: Job, undisturbed: dict[str, str] | None) -> Iterator[str]:
    """What is wrong with a run that has reached its end."""
    run, config = job.run, job.config
    assert run
    steps = config.run.num_steps
    records = read_records(run / "metrics.jsonl")
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        yield f"steps are recorded as {[record['step'] for record in records]}"
    groups = steps * config.rollouts.prompts_per_step
    if records[-1]["ledger/trained"] + records[-1]["ledger/voided"] != groups:
        yield f"{records[-1]['ledger/trained']} + {records[-1]['ledger/voided']} groups of {groups}"
    if any(record["age/policy_max"] > 1 or record["age/head"] > 1 for record in records):
        yield "a bound is broken"
    if undisturbed and config.scheduling.lag == "exact":
        learners = Ended.of(run).learners
        yield from (f"{name} is another" for name, digest in undisturbed.items() if learners.get(name) != digest)
    if left := [str(path) for path in run.rglob("*") if path.name.startswith(".") or path.name == "journal"]:
        yield f"half-written files are left: {left}"


def left_behind(job: Job, shared: set[str], within: float = 60.0) -> list[str]:
    """Processes, shared memory and temporary files of a job that are there `within` seconds after its end."""
    deadline = time.monotonic() + within
    while True:
        alive = []
        for process in job.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(f"process {process.pid} {process.name()}")
        left = [*alive, *(f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared)]
        files = [path for path in (job.folder / "tmp").glob("*") if not path.name.startswith(MEANT_TO_STAY)]
        left += [str(path) for path in files if not path.is_socket()]  # vLLM leaves those to its engine cores
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def one_run(
    ring: str,
    arguments: argparse.Namespace,
    table: dict[str, Outcomes],
    undisturbed: dict[str, str] | None,
    number: int,
) -> tuple[list[str], Ended | None]:
    """One run, with faults until each kind has its number, and the rest of the steps without.

    Returns what is wrong with it. If nothing is, it also returns what is to be known of it as an undisturbed one.
    """
    rng, wrong, known = random.Random(f"{arguments.seed} {number}"), list[str](), None
    shared, before = set(os.listdir("/dev/shm")), {kind: one.survived for kind, one in table.items()}
    with tempfile.TemporaryDirectory(prefix="r2m-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with Job(ring, arguments, Path(folder)) as job:
            for kind in [kind for kind in table if kind in CANNOT]:
                if reason := CANNOT[kind](job):
                    print(f"{kind!r} is left out: {reason}", flush=True)
                    del table[kind]
            wrong += to_the_end(job, table, arguments.each, rng)
            if not wrong:
                assert job.run
                wrong += faults_of(job, undisturbed)
                known = Ended.of(job.run)
        wrong += left_behind(job, shared)
    if wrong:  # what had seemed to be survived was not
        for kind, one in table.items():
            one.survived = before[kind]
    return wrong, known


def to_the_end(job: Job, table: dict[str, Outcomes], each: int, rng: random.Random) -> Iterator[str]:
    """Lets a job take all its steps, and hurts it on the way. Yields why it does not reach its end, if it does not."""
    last = job.config.run.num_steps
    if not job.wait_for(2):
        yield f"the run did not begin: {job.told()}"
        return
    while job.step() < last - MORE and (kinds := [kind for kind, one in table.items() if one.tried < each]):
        kind = rng.choice(kinds)
        if not strike(job, kind, rng, table[kind]):
            yield f"no step within {PATIENCE:g} s after {kind!r}: {job.told()}"
            return
    # Its end may have been hurt: a job that is started again then finds a finished run, or a checkpoint to make.
    for _ in range(3):
        if not job.wait_for(last):
            break
        try:
            if job.process.wait(PATIENCE) == 0:
                return
        except subprocess.TimeoutExpired:
            break
        job.process = job.start()
    yield f"the run did not end: {job.told()}"


# The table


def row_of(kind: str, one: dict[str, Any]) -> list[str]:
    """One kind of fault, as the cells of a line."""
    cells = [kind, str(one["tried"]), str(one["survived"]), str(one["by"].get("itself", 0))]
    if not one["seconds"]:
        return [*cells, "", "", ""]
    mean = statistics.fmean(one["seconds"])
    times = [f"{statistics.median(one['seconds']):.1f}", f"{max(one['seconds']):.1f}"]
    return [*cells, *times, f"{100 * max(0.0, 1 - mean / 60):.0f} %"]


def table_of(results: dict[str, Any]) -> str:
    """All results as text in Markdown."""
    head = ["fault", "times", "survived", "by itself", "median s", "worst s", "training at one a minute"]
    text = []
    for name, ring in results.items():
        rows = [row_of(kind, one) for kind, one in sorted(ring["faults"].items()) if one["tried"]]
        kills = [one["seconds"] for kind, one in ring["faults"].items() if kind.startswith("kill ") and one["seconds"]]
        if len(kills) > 1:
            share = 1 - statistics.fmean(map(statistics.fmean, kills)) / 60
            rows.append(["any kill, each kind as often", "", "", "", "", "", f"{100 * max(0.0, share):.0f} %"])
        lines = [head, ["---"] * len(head), *rows]
        wrong = "; ".join(ring["wrong"]) or "nothing"
        text.append(f"### {name}\n")
        text += [f"| {' | '.join(line)} |" for line in lines]
        text.append(
            f"\n{ring['runs']} runs of {ring['how']['steps']} steps of {ring['per_step']:.2f} s, "
            f"`lag: {ring['how']['lag']}`, on {ring['how']['machine']}. Wrong with them at their end: {wrong}.\n"
        )
    return "\n".join(text)


BEGIN, END = "<!-- the table of benchmarks/chaos.py -->\n", "<!-- its end -->\n"


def write_table(path: Path, results: dict[str, Any]) -> None:
    """Puts the table into a document, between the two marks. Raises ValueError if they are not there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not end:
        raise ValueError(f"{path}: has no lines {BEGIN.strip()} and {END.strip()}, between which the table belongs")
    write_file(path, f"{before}{begin}{table_of(results)}{end}{behind}")


def in_own_namespaces() -> None:
    """Starts this command anew with processes, shared memory and mounts of its own. All of them end with it."""
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *rights, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["bash", "-c", 'mount -t tmpfs tmpfs /dev/shm && "$@"; exit $?', "bash"]
    if os.environ.get(OWN):
        return
    if not _done([*command, "true"]):
        print("no namespaces can be made here: processes that others start meanwhile may be taken for the runs'")
        return
    os.execvpe(command[0], [*command, sys.executable, *sys.argv], os.environ | {OWN: "yes"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=50, help="faults of each kind (50)")
    parser.add_argument("--ring", nargs="+", choices=[*RINGS], default=[*RINGS], help="the rings to hurt (all)")
    parser.add_argument("--kinds", nargs="+", help="kinds of faults, such as 'kill rollout' (all of a ring)")
    parser.add_argument("--lag", choices=("exact", "bounded"), default="exact")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"policy steps of a run ({STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where results go; if the file is there, the measurement goes on")
    parser.add_argument("--table", type=Path, help="a document into which the table is put")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
        return 0
    in_own_namespaces()
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}

    def keep(ring: str, known: dict[str, Any]) -> None:
        results[ring] = known
        if arguments.json:
            write_file(arguments.json, json.dumps(results, indent=1) + "\n")
        if arguments.table:
            write_table(arguments.table, results)

    for ring in arguments.ring:
        # Another processor rounds otherwise: a measurement that goes on there needs an undisturbed run of its own.
        lag = config_of(ring, arguments, Path()).scheduling.lag
        how = {"steps": arguments.steps, "lag": lag, "machine": f"{os.cpu_count()} cores, {processor()}"}
        known = results.get(ring, {"how": None, "faults": {}, "wrong": [], "runs": 0})
        if known["how"] != how:
            wrong, ended = undisturbed_run(ring, arguments)
            if not ended or wrong:
                print("\n".join(wrong), file=sys.stderr)
                return 1
            known |= {"how": how, "undisturbed": ended.learners, "per_step": ended.per_step}
            keep(ring, known)
        kinds = arguments.kinds or RINGS[ring][1]
        table = {kind: Outcomes(**known["faults"].get(kind, {})) for kind in kinds}
        barren = 0
        while any(one.tried < arguments.each for one in table.values()):
            tried = sum(one.tried for one in table.values())
            wrong, ended = one_run(ring, arguments, table, known["undisturbed"], known["runs"])
            known |= {"runs": known["runs"] + 1, "wrong": known["wrong"] + wrong}
            known |= {"per_step": ended.per_step} if ended else {}
            known["faults"] |= {kind: asdict(one) for kind, one in table.items()}
            keep(ring, known)
            print(table_of({ring: results[ring]}), flush=True)
            # A short run may have reached its end before this process, on a busy machine, came to hurt it.
            barren = barren + 1 if not wrong and tried == sum(one.tried for one in table.values()) else 0
            if barren == BARREN:
                missing = [kind for kind, one in table.items() if one.tried < arguments.each]
                print(f"in {BARREN} runs nothing was there to be hurt: {missing}")
                return 1
    return int(any(ring["wrong"] for ring in results.values()))


if __name__ == "__main__":
    sys.exit(main())
