"""Responses per second of a whole run: the ring with R2M, the ring without R2M's head, and TRL's RLOOTrainer.

    python3 -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.19.0    # once
    python benchmarks/end_to_end.py --trl trl/bin/python [--config CONFIG] [--rounds N] [--steps N] [--json FILE]

All have the same policy, reward model, prompts, lengths, batch, epochs and learning rate. TRL runs with every number of
threads first (`--threads`), and then with the fastest. After that all contenders run by turns, each `--rounds` times, and
a ratio is the median over the rounds. Start-up and the first steps are left out of all.

TRL computes no hidden states and trains no reward head, and its schedule is synchronous. Without `--trl` the ring is
compared with itself alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rows import Row, emit, processor

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import Workload, resolve

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5
"""Steps that are left out at the beginning."""


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def ring_rate(config: R2MConfig, workload: Workload) -> float:
    """Responses per second of a ring after its first steps."""
    with Ring(config, workload) as ring:
        for _ in range(WARM_UP):
            ring.step()
        began, responses = time.perf_counter(), 0.0
        while not ring.finished:
            responses += ring.step()["throughput/responses"]
        return responses / (time.perf_counter() - began)


def trl_rate(python: str, config: R2MConfig, workload: Workload, threads: int) -> float:
    """Responses per second of TRL's RLOOTrainer after its first steps, in a process of its own."""
    rollouts, objective = config.rollouts, config.objective
    setting = {
        "policy": str(workload.policy),
        "reward_model": str(workload.reward_model),
        "prompts": [prompt.text for prompt in workload.prompts],
        "responses": rollouts.prompts_per_step * rollouts.group_size,
        "group_size": rollouts.group_size,
        "max_new_tokens": rollouts.max_new_tokens,
        "temperature": rollouts.temperature,
        "epochs": objective.epochs,
        "kl_coef": objective.kl_coef,
        "lr": config.learner.lr,
        "seed": config.run.seed,
        "steps": config.run.num_steps,
        "warm_up": WARM_UP,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as directory:
        setting["output"] = directory
        result = subprocess.run(
            [python, str(ROOT / "benchmarks" / "trl_rloo.py"), json.dumps(setting)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(json.loads(result.stdout.splitlines()[-1])["responses_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="the Python of an environment that has TRL")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=[*range(1, min(cores, 4) + 1)], help="of TRL, to try")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args()
    config = R2MConfig.from_yaml(parsed.config, parsed.overrides).evaluation(every=None).run(num_steps=parsed.steps)
    workload = resolve(config)
    without = config.head(variant="vanilla")
    contenders = {
        "ring with R2M": lambda: ring_rate(config, workload),
        "ring without": lambda: ring_rate(without, workload),
    }
    tried: dict[int, float] = {}
    if parsed.trl:
        tried = {threads: trl_rate(parsed.trl, config, workload, threads) for threads in parsed.threads}
        best = max(tried, key=tried.__getitem__)
        contenders["TRL"] = lambda: trl_rate(parsed.trl, config, workload, best)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(parsed.rounds):
        for name, rate in contenders.items():
            rates[name].append(rate())
            print(f"{name:14} {rates[name][-1]:8.1f} responses/s", file=sys.stderr, flush=True)
    pairs = {"ring with R2M / ring without": ("ring with R2M", "ring without")}
    if parsed.trl:
        pairs["ring with R2M / TRL"] = ("ring with R2M", "TRL")
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))
        for name, (one, other) in pairs.items()
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "responses_per_s": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
        "median_responses_per_s": {name: round(value, 1) for name, value in median.items()},
        "trl_responses_per_s_by_threads": {threads: round(rate, 1) for threads, rate in tried.items()},
        "median_ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    print(json.dumps(result, indent=1))
    goals = {"ring with R2M / ring without": ">= 0.9", "ring with R2M / TRL": ">= 2"}
    for name, (one, other) in pairs.items():
        emit(
            Row(
                name=f"{Path(parsed.config).stem} on {config.rollouts.engine}: {one}, beside {other}",
                unit="responses/s",
                ours=median[one],
                other=median[other],
                ratio=ratios[name],
                means=name,
                goal=goals[name],
            )
        )
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
