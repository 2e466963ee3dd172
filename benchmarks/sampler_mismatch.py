"""How much of the off-policy weight w is rounding: `python benchmarks/sampler_mismatch.py --model DIR --prompts FILE`.

vLLM samples responses (mu) and the learner computes their log-probabilities (pi). With the same weights both are one
policy, so every w = pi / mu other than 1 comes from their rounding. Then the learner takes steps on these responses, and w
is measured again: now it comes from rounding and from the age of the responses together. w is formed per response and per
token, as `objective.off_policy_level` does. Two numbers tell what that costs: the effective sample size of the weights,
(sum w)^2 / (N sum w^2), and the share of w outside of [1/2, 2].

The policy trains with adapters at the rate of `configs/smollm2_cpu.yaml`, on a reward for short answers.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from actors.vllm_engine import VLLMEngine
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.config import R2MConfig
from r2m_async.launch.workload import TicketOffice, resolve
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import behaviour_logprobs, response_mask, token_logprobs
from r2m_async.models.pretrained import pretrained_tokenizer
from r2m_async.trajectories import GroupRewards

GROUP_SIZE = 4


def config_of(options: argparse.Namespace, dtype: str, prompts_per_step: int) -> R2MConfig:
    """The run whose engine and learner are compared."""
    unused = {"function": "r2m_async.rewards.texts:length_window", "options": {"low": 1, "high": 1}}  # see `_rewards`
    return R2MConfig.from_dict(
        {
            "run": {"num_steps": max(options.ages) + 1, "seed": options.seed, "device": "cpu"},
            "model": {"policy": options.model, "dtype": dtype, "lora": {"rank": 16, "alpha": 32}},
            "reward": {"model": None, "functions": {"unused": unused}},
            "head": {"variant": "vanilla"},
            "data": {"prompts": str(options.prompts), "chat": True, "on_bad_record": "skip"},
            "rollouts": {
                "engine": "vllm",
                "concurrent_groups": prompts_per_step,
                "prompts_per_step": prompts_per_step,
                "group_size": GROUP_SIZE,
                "temperature": 1.0,
                "max_prompt_tokens": 80,
                "max_new_tokens": max(options.lengths),
            },
            "objective": {"epochs": 1, "kl_coef": 0.02},
            "learner": {"lr": options.lr, "tokens_per_microbatch": 2048, "max_mismatch": 10.0},
        }
    )


def weight_statistics(difference_BT: Tensor, mask_BT: Tensor) -> dict[str, dict[str, float]]:
    """Statistics of w by level. difference_BT: [B, T], log pi - log mu of each token, 0 where the mask is False."""
    logs = {"sequence": difference_BT.sum(1), "token": difference_BT[mask_BT]}
    told = {}
    for level, log_w in logs.items():
        w = log_w.double().exp()
        told[level] = {
            "effective_sample_size": round((w.sum().square() / (len(w) * w.square().sum())).item(), 4),
            "outside_half_and_double": round(((w > 2) | (w < 0.5)).double().mean().item(), 4),
            "log_w_sd": round(log_w.double().std().item(), 4),
        }
    return told


def measured(options: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """The rows of one dtype."""
    config = config_of(options, dtype, options.responses // GROUP_SIZE)
    workload = resolve(config)
    tokenizer = pretrained_tokenizer("model.policy", workload.policy)
    engine = VLLMEngine(workload.policy, tokenizer, workload.policy_hidden_size, config, False)
    office = TicketOffice(config, workload)
    groups = [engine.generate(office.group(index, 0))[0] for index in range(config.rollouts.prompts_per_step)]
    engine.close()
    responses = [one for group in groups for one in group.trajectories]
    mask, mu = response_mask(responses), behaviour_logprobs(responses)
    backend = TorchBackend(load_policy(workload.policy, config), None, config)
    learner = PolicyLearner(backend, workload.estimator, config)
    quarter = len(groups) // 4  # each step trains another part of the responses
    rows = []
    for age in range(max(options.ages) + 1):
        if age in options.ages:
            difference = (token_logprobs(backend.policy, responses, config) - mu).masked_fill(~mask, 0)
            for length in options.lengths if age == 0 else options.lengths[-1:]:
                # Responses that are at least so long, and their beginnings of this length.
                long = mask.sum(1) >= length
                if long.sum() < 8:
                    continue
                part = (difference[long, :length], mask[long, :length])
                row = {"dtype": dtype, "age": age, "tokens": length, "responses": int(long.sum())}
                row["token_mismatch"] = round(part[0].abs().sum().item() / part[1].sum().item(), 5)
                rows.append(row | weight_statistics(*part))
                print(json.dumps(rows[-1]), flush=True)
        chosen = groups[age % 4 * quarter : (age % 4 + 1) * quarter]
        rewards = [_rewards(group) for group in chosen]
        learner.proximal(age, chosen)
        learner.train(age, rewards)
    return rows


def _rewards(group: Any) -> GroupRewards:
    """Answers of few characters are better. Unlike tokens, characters differ where all answers reach the limit, too."""
    rewards = torch.tensor([-len(one.text) / 64 for one in group.trajectories])
    return GroupRewards(
        group_id=group.ticket.group_id,
        rewards=rewards,
        model_rewards=torch.zeros_like(rewards),
        greedy_reward=None,
        head_version=0,
        omega=1.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a chat model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 48, 128])
    parser.add_argument("--ages", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.lengths.sort()
    results = {"responses": options.responses, "lr": options.lr, "rows": []}
    for dtype in options.dtypes:
        results["rows"] += measured(options, dtype)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
