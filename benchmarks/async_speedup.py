"""How much faster the ring is with staleness than without, on one machine, beside what the simulator says.

    python benchmarks/async_speedup.py [--config CONFIG] [--steps N] [--rounds N] [--json FILE] [section.key=value ...]

Synchronous rings (both bounds 0) and asynchronous ones (both 1) run by turns, and generate as many groups at once. The
simulator gets the stage times of the synchronous rings, the cores of this machine, and what the synchronous rings took of
them besides: their CPU time that no stage's call explains, which is that of the driver, the queue and Ray. It then predicts
both. The bound is what no schedule can undercut: the busiest stage, or the CPU time of a step on all cores.

All numbers are seconds per step, medians over the rounds. Start-up and the first steps are left out.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from end_to_end import ROOT, WARM_UP, machine
from rows import Row, emit

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import Workload, resolve
from r2m_async.ring.simulator import physical_bound, queue_time, serial_time, simulate, times_of_run

AGES = {"synchronous": 0, "asynchronous": 1}


def cpu_seconds() -> dict[int, float]:
    """CPU seconds so far of this process and all below it, by their numbers."""
    this = psutil.Process()
    found = {}
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured of one ring."""

    seconds: float
    """Wall seconds per step."""
    cpu: dict[str, float]
    """CPU seconds per step, by stage. `others` are the driver and Ray's own processes."""
    trace: list[dict[str, Any]]


def run(config: R2MConfig, workload: Workload) -> Run:
    """Runs a ring, and measures the steps after the first ones."""
    with Ring(config, workload) as ring:
        stages = {pid: name for name, pids in ring.process_ids().items() for pid in pids}
        for _ in range(WARM_UP):
            ring.step()
        began, before = time.perf_counter(), cpu_seconds()
        steps = 0
        while not ring.finished:
            ring.step()
            steps += 1
        seconds, after = time.perf_counter() - began, cpu_seconds()
        trace = [dataclasses.asdict(interval) for interval in ring.controller.take_trace()]
    cpu: dict[str, float] = {}
    for pid, used in after.items():
        name = stages.get(pid, "others")
        cpu[name] = cpu.get(name, 0.0) + (used - before.get(pid, 0.0)) / steps
    return Run(seconds / steps, cpu, trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args()
    config = R2MConfig.from_yaml(parsed.config, parsed.overrides).evaluation(every=None).run(num_steps=parsed.steps)
    configs = {name: config.scheduling(max_policy_age=age, max_head_age=age) for name, age in AGES.items()}
    at_once = configs["asynchronous"].concurrent_groups
    configs = {name: own.rollouts(concurrent_groups=at_once) for name, own in configs.items()}
    workload, cores = resolve(config), len(os.sched_getaffinity(0))
    runs: dict[str, list[Run]] = {name: [] for name in AGES}
    for _ in range(parsed.rounds):
        for name, own in configs.items():
            runs[name].append(run(own, workload))
            print(f"{name:12} {runs[name][-1].seconds:.4f} s a step", file=sys.stderr, flush=True)
    synchronous = runs["synchronous"]
    times = times_of_run([interval for one in synchronous for interval in one.trace])
    cpu = statistics.median(sum(one.cpu.values()) for one in synchronous)
    calls = queue_time(config, dataclasses.replace(times, queue=1.0))
    times = dataclasses.replace(times, queue=max(0.0, cpu - serial_time(configs["synchronous"], times)) / calls)
    measured = {name: statistics.median(one.seconds for one in ones) for name, ones in runs.items()}
    predicted = {name: simulate(own, times, cores=cores).seconds_per_step for name, own in configs.items()}
    bound = physical_bound(configs["asynchronous"], times, cores)
    responses = config.rollouts.prompts_per_step * config.rollouts.group_size
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "measured": {name: round(seconds, 4) for name, seconds in measured.items()},
        "measured_by_round": {name: [round(one.seconds, 4) for one in ones] for name, ones in runs.items()},
        "predicted": {name: round(seconds, 4) for name, seconds in predicted.items()},
        "bound": round(bound, 4),
        "responses_per_s": {name: round(responses / seconds, 1) for name, seconds in measured.items()},
        "measured_speedup": round(measured["synchronous"] / measured["asynchronous"], 3),
        "predicted_speedup": round(predicted["synchronous"] / predicted["asynchronous"], 3),
        "most_speedup": round(predicted["synchronous"] / bound, 3),
        "cpu_seconds": {
            name: {
                stage: round(statistics.median(one.cpu.get(stage, 0.0) for one in ones), 4)
                for stage in sorted({stage for one in ones for stage in one.cpu})
            }
            for name, ones in runs.items()
        },
        "stage_times": {name: round(value, 5) for name, value in dataclasses.asdict(times).items()},
    }
    print(json.dumps(result, indent=1))
    for name in AGES:
        emit(
            Row(
                name=f"a step of a {name} ring, measured and predicted",
                unit="s",
                ours=measured[name],
                other=predicted[name],
                limit=bound,
                ratio=abs(measured[name] / predicted[name] - 1),
                means="|measured / predicted - 1|",
                goal="<= 0.1",
            )
        )
    emit(
        Row(
            name="a step of an asynchronous ring, measured and bound",
            unit="s",
            ours=measured["asynchronous"],
            limit=bound,
            ratio=bound / measured["asynchronous"],
            means="bound / measured",
            goal=">= 0.9",
        )
    )
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
