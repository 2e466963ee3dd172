"""How much faster the ring is with staleness than without, on one machine in one run, beside what the simulator says.

    python benchmarks/async_speedup.py [CONFIG] [STEPS]

Alternates synchronous (both bounds 0) and asynchronous (both 1) rings, twice each, and prints responses per second (the
first five steps left out), their ratio, the ratio that `r2m plan` predicts from the synchronous run's own stage times, and
the ceiling: the serial time over the busiest stage's. On two cores the stages share the machine, so the ceiling, which
gives every stage its own, is out of reach.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring
from r2m_async.ring.simulator import physical_bound, serial_time, simulate, times_of_run

WARM_UP = 5


def run(config: R2MConfig) -> tuple[float, list[dict]]:
    """(responses per second, trace)."""
    with Ring.of(config) as ring:
        steps = []
        while not ring.finished:
            steps.append(ring.step())
        trace = [dataclasses.asdict(interval) for interval in ring.controller.take_trace()]
    seconds = steps[-1]["time/since_start"] - steps[WARM_UP - 1]["time/since_start"]
    responses = config.rollouts.prompts_per_step * config.rollouts.group_size
    return responses * (len(steps) - WARM_UP) / seconds, trace


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
    config = R2MConfig.from_yaml(path).evaluation(every=None)
    config = config.run(num_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 30)
    ages = {"synchronous": 0, "asynchronous": 1}
    rates: dict[str, list[float]] = {name: [] for name in ages}
    for _ in range(2):
        for name, age in ages.items():
            rate, trace = run(config.scheduling(max_policy_age=age, max_head_age=age))
            rates[name].append(rate)
            if name == "synchronous":
                times = times_of_run(trace)
    rate = {name: statistics.fmean(values) for name, values in rates.items()}
    predicted = {
        name: simulate(config.scheduling(max_policy_age=age, max_head_age=age), times).seconds_per_step
        for name, age in ages.items()
    }
    result = {
        "responses_per_s": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "measured_ratio": round(rate["asynchronous"] / rate["synchronous"], 2),
        "predicted_ratio": round(predicted["synchronous"] / predicted["asynchronous"], 2),
        "ceiling": round(serial_time(config, times) / physical_bound(config, times), 2),
        "stage_times": {name: round(value, 4) for name, value in dataclasses.asdict(times).items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
