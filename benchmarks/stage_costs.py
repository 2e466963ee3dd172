"""What the stages of a step cost, each in the form that runs beside the form that it replaced or could take.

    python benchmarks/stage_costs.py [--config CONFIG] [--rounds N] [--json FILE] [section.key=value ...]

One process with one thread, so that CPU seconds are comparable while other processes run. The forms of a stage run by
turns, on the same groups of one step, and each number is the median over the rounds. A ratio is that of two forms in one
round, again the median. `pass_in_tokens` is what a further pass of the learner costs, in tokens of a pass, and decides
`padding.MOST_PADDING`. The learner's time with two threads is wall time, and means something on idle cores alone.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from end_to_end import ROOT, machine

from r2m_async.config import R2MConfig
from r2m_async.launch.workload import TicketOffice, resolve
from r2m_async.models import padding
from r2m_async.models.generation import sample_groups
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback, microbatches, policy_pass
from r2m_async.models.pretrained import pretrained_tokenizer
from r2m_async.models.reward import embed_responses, load_reward_model
from r2m_async.models.weights import adamw
from r2m_async.trajectories import Trajectory


@contextlib.contextmanager
def most_padding(tokens: float) -> Iterator[None]:
    """Lets a pass have this much padding."""
    before, padding.MOST_PADDING = padding.MOST_PADDING, tokens  # type: ignore[assignment]
    try:
        yield
    finally:
        padding.MOST_PADDING = before


def forms_of(config: R2MConfig) -> tuple[dict[str, Callable[[], Any]], list[Trajectory]]:
    """The forms of all stages, as functions without arguments, and the trajectories that the learner's get.

    The part of a name before the colon is the stage's. The first form of a stage is the one that runs.
    """
    workload = resolve(config)
    policy, reward_model = load_policy(workload.policy, config), load_reward_model(workload.reward_model, config)
    tokenizer = pretrained_tokenizer("model.policy", workload.policy, config.model.trust_remote_code)
    reward_tokenizer = pretrained_tokenizer("reward.model", workload.reward_model, config.reward.trust_remote_code)
    office = TicketOffice(config, workload)
    tickets = [office.group(number, 0) for number in range(config.rollouts.prompts_per_step)]
    stateless = config.head(variant="vanilla")

    def sample(of: list[Any], how: R2MConfig = config) -> list[Any]:
        twin = workload.estimator.needs_greedy
        return [
            one for ticket in of for one in sample_groups(policy, tokenizer, ticket, how, greedy_twin=twin, version=0)
        ]

    groups = [group for group, _ in sample([tickets])]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]

    def train() -> None:
        for rows in microbatches(trajectories, config.learner.tokens_per_microbatch):
            logprobs, _, _ = policy_pass(policy, [trajectories[row] for row in rows], config.rollouts.temperature)
            logprobs.sum().backward()
        policy.zero_grad(set_to_none=True)

    def padded() -> None:
        with most_padding(float("inf")):
            train()

    def one_by_one() -> None:
        with most_padding(-1):
            train()

    moved = [torch.zeros_like(parameter) for parameter in policy.parameters()]
    for tensor in moved:
        tensor.grad = torch.ones_like(tensor)
    fused, single = adamw(moved, 1e-4), torch.optim.AdamW(moved, 1e-4, foreach=False)
    forms: dict[str, Callable[[], Any]] = {
        "generate: one batch": lambda: sample([tickets]),
        "generate: group by group": lambda: sample([[ticket] for ticket in tickets]),
        "generate: without states": lambda: sample([tickets], stateless),
        "generate: states by another pass": lambda: (
            sample([tickets], stateless),
            [group_feedback(policy, group, config, 0) for group in groups],
        ),
        "train: similar lengths": train,
        "train: one padded pass": padded,
        "train: a pass for each": one_by_one,
        "embed: together": lambda: embed_responses(reward_model, reward_tokenizer, groups, config),
        "embed: group by group": lambda: [
            embed_responses(reward_model, reward_tokenizer, [group], config) for group in groups
        ],
        "adamw: fused": fused.step,
        "adamw: tensor by tensor": single.step,
    }
    return forms, trajectories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    config = R2MConfig.from_yaml(parsed.config, parsed.overrides)
    forms, trajectories = forms_of(config)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    two_threads: list[float] = []
    for turn in range(parsed.rounds + 1):
        for name, form in forms.items():
            began = time.process_time()
            form()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
        torch.set_num_threads(2)
        began = time.perf_counter()
        forms["train: similar lengths"]()
        two_threads += [time.perf_counter() - began] * bool(turn)
        torch.set_num_threads(1)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    first: dict[str, str] = {}
    for name in forms:
        first.setdefault(name.partition(":")[0], name)
    ratios = {
        f"{name} / {first[stage].partition(': ')[2]}": statistics.median(
            a / b for a, b in zip(values, seconds[first[stage]], strict=True)
        )
        for name, values in seconds.items()
        if name != first[stage := name.partition(":")[0]]
    }
    # Seconds are a times the tokens of all passes, padding included, plus b times the passes.
    lengths = [len(one.token_ids) for one in trajectories]
    passes = microbatches(trajectories, config.learner.tokens_per_microbatch)
    padded_tokens = sum(max(lengths[row] for row in rows) * len(rows) for rows in passes)
    several, many = median["train: similar lengths"], median["train: a pass for each"]
    system = torch.tensor([[padded_tokens, len(passes)], [sum(lengths), len(lengths)]], dtype=torch.float64)
    a, b = torch.linalg.solve(system, torch.tensor([several, many], dtype=torch.float64)).tolist()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "cpu_seconds_of_a_step": {name: round(value, 5) for name, value in median.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "tokens": {"own": sum(lengths), "with padding": padded_tokens, "passes": len(passes)},
        "pass_in_tokens": round(b / a, 1),
        "train_wall_seconds_with_two_threads": round(statistics.median(two_threads), 5),
    }
    print(json.dumps(result, indent=1))
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
