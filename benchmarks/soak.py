"""Trains a small ring for many steps, and says whether its processes, its object store and its files grow.

    python benchmarks/soak.py --json docs/soak.json
    python benchmarks/soak.py --steps 200

It is `r2m train` on Ray, with a checkpoint every 10 steps, an evaluation every 50 and two rollout actors in exact mode with ages.
After every fifth step these are measured, in MiB:

- the memory of each process of the run (resident set), Ray's own processes among them,
- what Ray's object store holds, and how many objects that are,
- what the run directory has on the disk: its records, and all else.

The first fifth of the steps is left out: caches fill, and Python's and torch's allocators take what they will keep. A line through
the rest is fitted by least squares. The error of its slope is the spread of the slopes of ten parts of equal length, because the
measurements of neighbouring steps are not independent. "Grows" is a slope of more than three errors that would also add more than
one in a hundred in a thousand steps. The records of a run grow with its steps, and are told apart. Processes that were not there
all the time, such as Ray's idle workers, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from r2m_async.config import R2MConfig
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.whole import write_file

MIB = 2.0**20
EVERY = 5
"""Steps from one measurement to the next."""
PARTS = 10
"""Parts of the steps whose slopes are compared."""
Numbers = dict[str, float]


def config_of(num_steps: int, output_dir: str) -> R2MConfig:
    """The quickstart's world at a size where a step takes a moment, with all that a run does beside its steps."""
    config = R2MConfig().run(name="soak", num_steps=num_steps, output_dir=output_dir, device="cpu")
    config = config.model(policy="embedded").reward(model="embedded").data(prompts="embedded").head(width=32)
    config = config.rollouts(num_actors=2, prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=12)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag="exact").checkpoint(every=10, keep=2)
    return config.evaluation(every=50, num_prompts=4).logging(live=False)


def measured(ring: Ring, run: Path) -> Numbers:
    """What the processes, the object store, the disk and shared memory take now. All but the number of objects is in MiB."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    names = {number: name for name, numbers in ring.process_ids().items() for number in numbers}
    found: Numbers = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            name = "driver" if process == me else names.get(process.pid, process.name().removeprefix("ray::"))
            found[name] = found.get(name, 0.0) + process.memory_info().rss / MIB
    store = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    found["object store"] = store.object_store_bytes_used / MIB
    found["objects in the store (number)"] = float(store.num_local_objects)
    records = ("metrics.jsonl", "trace.jsonl", "evaluation.jsonl", "samples.jsonl")
    files = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    is_record = {path: path.name in records or path.name.startswith("events.out") for path in files}
    found["disk: records"] = sum(size for path, size in files.items() if is_record[path]) / MIB
    found["disk: all else"] = sum(size for path, size in files.items() if not is_record[path]) / MIB
    return found


def soak(config: R2MConfig) -> tuple[dict[str, list[float]], float]:
    """Trains, and returns the measurements by name, and the seconds that the run has taken."""
    series: dict[str, list[float]] = {}
    began = time.monotonic()

    class Watched(Ring):
        def step(self) -> dict[str, float]:
            metrics = super().step()
            if metrics["step"] % EVERY:
                return metrics
            (run,) = Path(config.run.output_dir).iterdir()
            with suppress(FileNotFoundError):  # a checkpoint that is replaced at this moment
                for name, number in measured(self, run).items():
                    series.setdefault(name, []).append(number)
            return metrics

    training.Ring = Watched  # type: ignore[misc]
    training.train(config)
    return series, time.monotonic() - began


def slope(numbers: list[float]) -> tuple[float, float, float]:
    """(mean, slope for 1,000 steps, error of the slope) of what was measured, without the first fifth."""
    kept = np.array(numbers[len(numbers) // 5 :])
    steps = np.arange(len(kept)) * EVERY / 1000
    parts = [
        np.polyfit(x, y, 1)[0]
        for x, y in zip(np.array_split(steps, PARTS), np.array_split(kept, PARTS), strict=True)
        if len(x) > 1
    ]
    # A part is a tenth as long, so its slope errs by 10 ** 1.5 as much as that of the whole.
    error = float(np.std(parts, ddof=1)) / PARTS**1.5 if len(parts) > 1 else float("nan")
    return float(kept.mean()), float(np.polyfit(steps, kept, 1)[0]), error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="policy steps (1000)")
    parser.add_argument("--json", type=Path, help="where the slopes go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        series, seconds = soak(config_of(arguments.steps, folder))
    rows: dict[str, Any] = {}
    print(f"{'MiB':30} {'mean':>9} {'in 1000 steps':>14} {'error':>8}")
    whole = {name: numbers for name, numbers in series.items() if len(numbers) > 0.9 * len(series["driver"])}
    for name, numbers in sorted(whole.items()):
        mean, by, error = slope(numbers)
        grows = by > 3 * error and by > 0.01 * mean and name != "disk: records"
        rows[name] = {"mean": round(mean, 3), "slope": round(by, 4), "error": round(error, 4), "grows": bool(grows)}
        print(f"{name:30} {mean:9.2f} {by:+14.3f} {error:8.3f} {'  grows' if grows else ''}")
    machine = f"{os.cpu_count()} cores of a {platform.machine()}"
    print(f"{arguments.steps} steps in {seconds:.0f} s on {machine}")
    if arguments.json:
        result = {"steps": arguments.steps, "seconds": round(seconds, 1), "machine": machine, "MiB": rows}
        write_file(arguments.json, json.dumps(result, indent=1) + "\n")
    return int(any(row["grows"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
