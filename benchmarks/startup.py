"""Measures what `r2m train` does before its first step: seconds, and seconds of a processor by kind of process.

    python benchmarks/startup.py --rounds 3 --json docs/startup.json

The ring is that of benchmarks/chaos.py, on Ray, with two rollout actors. Each round starts it twice: with workers that are forked from
a process that has made their imports, as `r2m train` does on a machine without a GPU, and with workers that Ray starts in its own
way, which make their own. The two take turns. What is printed are medians.

- `driver`: the command itself; until `starting the ring` it imports torch and transformers, and resolves the config,
- `template`: the process that workers are forked from, which imports the same beside the driver,
- `Ray`: its GCS, raylet, agents and monitors,
- `workers`: the processes of the stages, until the first step has been taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from r2m_async.config import R2MConfig
from r2m_async.launch import forked_workers
from r2m_async.whole import write_file

WAYS = {
    "forked": "from r2m_async.cli import entry; entry()",
    # On a machine with such a device no worker is forked.
    "plain": "from r2m_async.launch import forked_workers as f; f._GPUS = ('/',); from r2m_async.cli import entry; entry()",
}
KINDS = ("driver", "template", "Ray", "workers")
MARKS = ("starting the ring", "step 1/")


def config_of(folder: Path) -> R2MConfig:
    """The quickstart's world at a size where a step takes a moment."""
    config = R2MConfig().run(name="startup", num_steps=1, output_dir=str(folder), device="cpu")
    config = config.model(policy="embedded").reward(model="embedded").data(prompts="embedded").head(width=32)
    config = config.rollouts(num_actors=2, prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=12)
    return config.evaluation(every=None).logging(live=False, tensorboard=False)


def kind_of(process: psutil.Process, driver: int) -> str:
    """Which of `KINDS` a process is."""
    if process.pid == driver:
        return "driver"
    line = " ".join(process.cmdline())
    if f"{forked_workers.__file__} --serve" in line:
        return "template"
    worker = line.startswith(("ray::_Process", "ray::IDLE")) or "worker" in line
    return "workers" if worker and process.name() not in ("raylet", "gcs_server") else "Ray"


def started(way: str) -> dict[str, float]:
    """One start: the seconds at each of `MARKS`, and the processor seconds of each kind of process at the first step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(config_of(folder / "runs").to_yaml())
        command = [sys.executable, "-u", "-c", WAYS[way], "train", str(folder / "config.yaml")]
        began, found, used = time.monotonic(), dict[str, float](), dict[psutil.Process, tuple[str, float]]()
        with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as driver:
            while driver.poll() is None and len(found) < len(MARKS):
                with suppress(psutil.NoSuchProcess):
                    me = psutil.Process(driver.pid)
                    for process in (me, *me.children(recursive=True)):
                        with suppress(psutil.NoSuchProcess):
                            times = process.cpu_times()
                            used[process] = (kind_of(process, driver.pid), times.user + times.system)
                said = (folder / "log").read_text()
                found |= {mark: time.monotonic() - began for mark in MARKS if mark in said and mark not in found}
                time.sleep(0.05)
            driver.wait()
        if driver.returncode:
            raise SystemExit((folder / "log").read_text())
    spent = {kind: sum(seconds for one, seconds in used.values() if one == kind) for kind in KINDS}
    return found | spent | {"processor": sum(spent.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rounds = [{way: started(way) for way in WAYS} for _ in range(arguments.rounds)]
    middle = {way: {key: statistics.median(one[way][key] for one in rounds) for key in rounds[0][way]} for way in WAYS}
    columns = {"starting the ring": "s until the ring", "step 1/": "s until a step", "processor": "processor s"}
    columns |= {kind: f"{kind} s" for kind in KINDS}
    print(f"{'':8}" + "".join(f"{name:>18}" for name in columns.values()))
    for way, values in middle.items():
        print(f"{way:8}" + "".join(f"{values[key]:18.2f}" for key in columns))
    ratios = {key: middle["forked"][key] / middle["plain"][key] for key in ("step 1/", "processor")}
    print(f"forked to plain: {ratios['step 1/']:.2f} of the seconds, {ratios['processor']:.2f} of the processor's")
    if arguments.json:
        machine = f"{os.cpu_count()} cores of a {platform.machine()}"
        result = {"rounds": arguments.rounds, "machine": machine, "median": middle, "forked / plain": ratios}
        write_file(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
