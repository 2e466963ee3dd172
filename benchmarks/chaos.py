"""Kills and freezes the processes of real runs, and says what became of the runs.

    python benchmarks/chaos.py --each 50 --json docs/reliability.json
    python benchmarks/chaos.py --each 5 --engine vllm --json docs/reliability_vllm.json

A run trains in a process of its own, with a checkpoint after every step, as a job that is started again when it ends
(`r2m train --resume-if-exists`). At seeded moments one of its processes is killed (SIGKILL) or frozen for ever (SIGSTOP). The
next fault comes when the run has taken a step more than ever before. The time until then is the time of recovery.

A run that has reached its end is compared with one that nothing disturbed:

- both learners are the same to the last byte (`scheduling.lag: exact`; not under `--lag bounded`),
- each step is recorded once, in order, and the ledger counts each group once,
- no process, no shared memory and no half-written file is left.

With `--json` an interrupted measurement goes on where it was. The faults of a run that fails a check count as not survived.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from r2m_async.config import R2MConfig
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.models.loading import one_thread
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.directory import newest_directory
from r2m_async.runs.records import read_records
from r2m_async.whole import write_file

STEPS = 40
"""Policy steps of a run. A run takes about half as many faults."""
PATIENCE = 400.0
"""Seconds within which a run must have recovered."""
STAGES = ("rollout", "queue", "annotator", "policy-learner", "head-learner")
RAYS = ("raylet", "gcs_server")
"""Processes of a Ray that the run has started. Without one of them Ray ends its driver, and the job starts again."""


def config_of(arguments: argparse.Namespace, output_dir: Path) -> R2MConfig:
    """The quickstart's world at a size where a step takes a moment."""
    config = R2MConfig().run(name="chaos", num_steps=arguments.steps, output_dir=str(output_dir), device="cpu")
    config = config.run(max_restarts=1000).model(policy="embedded").reward(model="embedded").data(prompts="embedded")
    config = config.rollouts(num_actors=2, prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=12)
    config = config.rollouts(max_restarts=1000, hang_after=10.0, engine=arguments.engine)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag=arguments.lag, stall_after=60.0)
    config = config.head(width=32).evaluation(every=None).checkpoint(every=1, keep=2)
    return config.logging(live=False, tensorboard=False).learner(backend=arguments.learner)


# The run, in a process of its own


def drive(config: R2MConfig, pids: Path, links: bool) -> None:
    """Trains as `r2m train --resume-if-exists` does, and writes the numbers of its processes to the file `pids`."""

    class Watched(Ring):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            super().__init__(*arguments, **how)
            if links:
                disturb_links(self, random.Random(os.getpid()))
            self._tell()

        def step(self) -> dict[str, float]:
            metrics = super().step()
            self._tell()
            return metrics

        def _tell(self) -> None:
            found = {name: numbers[0] for name, numbers in self.process_ids().items()}
            for name, number in list(found.items()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    engines = [one.pid for one in psutil.Process(number).children() if "Engine" in one.name()]
                    found |= {f"engine-{name}": engine for engine in engines}
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() in RAYS:
                        found[child.name()] = child.pid
            write_file(pids, json.dumps(found | {"driver": os.getpid()}))

    training.Ring = Watched  # type: ignore[misc]
    training.train(config, resume_if_exists=True)


def disturb_links(ring: Ring, rng: random.Random) -> None:
    """From here on every message to a stage may come up to 0.2 s late, and some come twice."""
    stages = ring.controller.stages
    for stage in (*stages.rollouts, stages.queue, *stages.annotators, stages.policy, stages.head):
        call = stage.carrier.call

        async def late(method: Any, *arguments: Any, call: Any = call) -> Any:
            await asyncio.sleep(rng.random() * 0.2)
            if method.name in ("put", "get", "free", "embed", "score") and rng.random() < 0.2:
                await call(method, *arguments)
            return await call(method, *arguments)

        stage.carrier.call = late  # type: ignore[method-assign]


# The faults


@dataclass
class Outcomes:
    """What became of the faults of one kind."""

    tried: int = 0
    survived: int = 0
    by: Counter[str] = field(default_factory=Counter)
    """How the run went on: `itself`, or as a job that was `started again`."""
    seconds: list[float] = field(default_factory=list)
    """The times of recovery."""


class Job:
    """A run that is started again whenever it ends before its last step."""

    def __init__(self, config: R2MConfig, folder: Path, links: bool) -> None:
        self.config, self.folder = config, folder
        self.pids_file, self.log = folder / "pids.json", folder / "log.txt"
        (folder / "config.yaml").write_text(config.to_yaml())
        self.links = links
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.seen: set[int] = set()
        """The numbers of all processes that the job ever had."""

    def start(self) -> None:
        self.pids_file.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--drive", str(self.folder / "config.yaml"), "--pids", str(self.pids_file)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *(["--links"] if self.links else [])], stdout=log, stderr=log)
        self.starts += 1

    @property
    def run(self) -> Path | None:
        return newest_directory(self.config.run.output_dir, self.config.run.name)

    def step(self) -> int:
        """The last step that is recorded, 0 before the first."""
        try:
            records = read_records(self.run / "metrics.jsonl") if self.run else []
        except OSError:
            return 0
        return int(records[-1]["step"]) if records else 0

    def pids(self) -> dict[str, int]:
        try:
            found = json.loads(self.pids_file.read_text())
        except OSError:
            return {}
        self.seen |= set(found.values())
        return dict(found)

    def wait_for(self, step: int) -> bool:
        """Waits until a step is recorded, and starts the job again if it ends before. Returns whether that came."""
        deadline = time.monotonic() + PATIENCE
        assert self.process
        while time.monotonic() < deadline:
            if self.step() >= step:
                return True
            if self.process.poll() is not None:
                self.start()
            time.sleep(0.02)
        return False


def strike(job: Job, kind: str, rng: random.Random, outcomes: Outcomes) -> bool:
    """One fault: waits a moment, hurts a process, and waits for the recovery. Returns whether the run has recovered."""
    what, target = kind.split(" ", 1)
    time.sleep(rng.random() * 1.5)
    pids = job.pids()
    names = [name for name in pids if name.rsplit("-", 1)[0] == target or name == target]
    starts, step = job.starts, job.step()
    if not names or step >= job.config.run.num_steps - 2:
        return True  # the run is between two rings, or at its end: nothing was tried
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[rng.choice(names)], signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        outcomes.tried += 1
        began = time.monotonic()
        if not job.wait_for(step + 2):
            return False
        outcomes.survived += 1
        outcomes.seconds.append(time.monotonic() - began)
        outcomes.by["itself" if job.starts == starts else "started again"] += 1
    return True


# The checks


def faults_of(run: Path, config: R2MConfig, undisturbed: Path | None) -> Iterator[str]:
    """What is wrong with a run that has reached its end."""
    records = read_records(run / "metrics.jsonl")
    if [record["step"] for record in records] != list(range(1, config.run.num_steps + 1)):
        yield f"steps are recorded as {[record['step'] for record in records]}"
    groups = config.run.num_steps * config.rollouts.prompts_per_step
    if records[-1]["ledger/trained"] + records[-1]["ledger/voided"] != groups:
        yield f"{records[-1]['ledger/trained']} + {records[-1]['ledger/voided']} groups of {groups}"
    if any(record["age/policy_max"] > 1 or record["age/head"] > 1 for record in records):
        yield "a bound is broken"
    for name in ("policy_learner", "head_learner") if undisturbed else ():
        ours, theirs = (checkpoint_path(one, config.run.num_steps) / f"{name}.msgpack" for one in (run, undisturbed))
        if ours.read_bytes() != theirs.read_bytes():
            yield f"{name} is not that of the undisturbed run"
    if left := [path.name for path in run.rglob("*.partial")]:
        yield f"half-written files are left: {left}"


def left_behind(seen: set[int], shared: set[str], within: float = 60.0) -> list[str]:
    """Processes and shared memory of a job that are still there after its end, `within` seconds later."""
    deadline = time.monotonic() + within
    while True:
        processes = [f"process {number}" for number in seen if psutil.pid_exists(number)]
        left = [*processes, *(f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def one_run(
    arguments: argparse.Namespace, table: dict[str, Outcomes], undisturbed: Path | None, number: int, links: bool
) -> list[str]:
    """One run with faults until it ends. Returns what is wrong with it."""
    rng = random.Random(f"{arguments.seed} {number}")
    shared, before = set(os.listdir("/dev/shm")), {kind: one.survived for kind, one in table.items()}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config_of(arguments, Path(folder) / "runs"), Path(folder), links)
        job.start()
        wrong: list[str] = []
        try:
            if not job.wait_for(2):
                return [f"the run did not begin: {job.log.read_text()[-2000:]}"]
            while job.step() < job.config.run.num_steps - 2:
                open_kinds = [kind for kind, one in table.items() if one.tried < arguments.each]
                if not open_kinds:
                    break
                kind = rng.choice(open_kinds)
                if not strike(job, kind, rng, table[kind]):
                    wrong.append(f"no step within {PATIENCE:g} s after {kind!r}: {job.log.read_text()[-3000:]}")
                    break
            if not wrong and not job.wait_for(job.config.run.num_steps):
                wrong.append(f"the run did not end: {job.log.read_text()[-2000:]}")
            if not wrong:
                assert job.process and job.run
                if job.process.wait(PATIENCE):
                    # Its end was hurt: a job that is started again finds a finished run, or the last step to take.
                    job.start()
                    job.process.wait(PATIENCE)
                wrong += faults_of(job.run, job.config, undisturbed)
        finally:
            job.pids()
            assert job.process
            job.process.kill()
            job.process.wait()
        wrong += left_behind(job.seen, shared)
    if wrong:  # what had seemed to be survived was not
        for kind, one in table.items():
            one.survived = before[kind]
    return wrong


# The table


def saved(table: dict[str, Outcomes], arguments: argparse.Namespace, runs: int, wrong: list[str]) -> dict[str, Any]:
    """The results as plain values."""
    rows = {}
    for kind, one in table.items():
        rows[kind] = {"tried": one.tried, "survived": one.survived, "by": dict(one.by)}
        if one.seconds:
            rows[kind] |= {
                "median_s": round(statistics.median(one.seconds), 1),
                "worst_s": round(max(one.seconds), 1),
                "effective_at_one_a_minute": round(1 - min(60.0, statistics.fmean(one.seconds)) / 60, 3),
            }
        rows[kind]["seconds"] = [round(seconds, 2) for seconds in one.seconds]
    what = {name: getattr(arguments, name) for name in ("engine", "learner", "lag", "steps", "seed")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {**what, "machine": machine, "runs": runs, "wrong": wrong, "faults": rows}


def printed(result: dict[str, Any]) -> str:
    """The table, as text."""
    lines = [
        f"{'fault':24} {'tried':>6} {'survived':>9} {'by itself':>10} {'median s':>9} {'worst s':>8} {'effective':>10}"
    ]
    for kind, row in result["faults"].items():
        numbers = [row.get(key, math.nan) for key in ("median_s", "worst_s", "effective_at_one_a_minute")]
        lines.append(
            f"{kind:24} {row['tried']:6} {row['survived']:9} {row['by'].get('itself', 0):10} {numbers[0]:9.1f} "
            f"{numbers[1]:8.1f} {numbers[2]:10.1%}"
        )
    tail = "; ".join(result["wrong"]) or "none"
    return "\n".join([*lines, f"{result['runs']} runs reached their end; wrong with them: {tail}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=50, help="faults of each kind (50)")
    parser.add_argument("--kinds", nargs="+", help="kinds of faults, such as 'kill rollout' (all)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--learner", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--lag", choices=("exact", "bounded"), default="exact")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"policy steps of a run ({STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--links", action="store_true", help="messages come late, and some twice")
    parser.add_argument("--json", type=Path, help="where results go; if the file is there, the measurement goes on")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pids", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(R2MConfig.from_yaml(arguments.drive), arguments.pids, arguments.links)
        return 0
    kinds = [f"kill {stage}" for stage in (*STAGES, "driver", *RAYS)]
    kinds += [f"stop {stage}" for stage in ("rollout", "queue", "annotator", "policy-learner")]
    kinds += ["kill engine-rollout"] if arguments.engine == "vllm" else []
    table = {kind: Outcomes() for kind in arguments.kinds or kinds}
    runs, wrong = 0, []
    if arguments.json and arguments.json.exists():
        known = json.loads(arguments.json.read_text())
        runs, wrong = known["runs"], known["wrong"]
        for kind, row in known["faults"].items():
            table[kind] = Outcomes(row["tried"], row["survived"], Counter(row["by"]), row["seconds"])
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = None
        if arguments.lag == "exact":
            with one_thread(), contextlib.redirect_stdout(sys.stderr):
                config = config_of(arguments, Path(folder))
                in_process = arguments.learner == "torch"
                undisturbed = training.train(config, in_process=in_process)
        while any(one.tried < arguments.each for one in table.values()):
            wrong += one_run(arguments, table, undisturbed, runs, arguments.links)
            runs += 1
            result = saved(table, arguments, runs, wrong)
            if arguments.json:
                write_file(arguments.json, json.dumps(result, indent=1) + "\n")
            print(printed(result), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
