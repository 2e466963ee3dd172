"""What the controller itself costs per group, by the number of rollout actors: flat, or a herd that every event wakes.

    python benchmarks/herd.py

The real controller and schedule run over stages that only take time, on a clock that costs none (`ring.simulator`): what is
left is the controller's own work, the schedule's and the event loop's. A step has as many groups as there are actors. The
figure that counts is the ratio of the last line to the first, both of one run.
"""

import argparse
import json
import time
from pathlib import Path

from r2m_async.config import R2MConfig
from r2m_async.ring.simulator import StageTimes, simulate

TIMES = StageTimes(generate=10.0, generate_spread=0.3, embed=0.001, score=0.1, proximal=1.0, train=1.0, update=0.5)


def milliseconds_per_group(num_actors: int, num_groups: int) -> float:
    """Of processor time, over a run of about `num_groups` groups."""
    num_steps = max(4, num_groups // num_actors)
    config = R2MConfig.from_dict(
        {
            "run": {"num_steps": num_steps},
            "rollouts": {"num_actors": num_actors, "prompts_per_step": num_actors},
            "scheduling": {"max_policy_age": 1, "max_head_age": 1, "stall_after": 1e6},
        }
    )
    began = time.process_time()
    simulate(config, TIMES)
    return 1000 * (time.process_time() - began) / (num_steps * num_actors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[16, 64, 256, 1000])
    parser.add_argument("--groups", type=int, default=4000, help="groups of a run, about")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which the fastest counts")
    parser.add_argument("--json", type=Path, help="writes the results there")
    parsed = parser.parse_args()
    least = dict.fromkeys(parsed.actors, float("inf"))
    for _ in range(parsed.rounds):  # in turns: another load on the machine meets all alike
        for number in parsed.actors:
            least[number] = min(least[number], milliseconds_per_group(number, parsed.groups))
    for number, cost in least.items():
        print(f"{number:5d} actors: {cost:.3f} ms per group, {cost / least[parsed.actors[0]]:.2f} x the first")
    if parsed.json:
        parsed.json.write_text(json.dumps({"ms_per_group": least}, indent=1) + "\n")


if __name__ == "__main__":
    main()
