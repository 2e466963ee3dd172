"""One update of the head against one of the whole reward model (R2M Fig. 7b): `python benchmarks/head_update.py [--json FILE]`.

Both take one AdamW step on Eq. 7's loss over the same groups of responses, a group's graph at a time, by turns in one
process: medians over rounds of seconds (on a CPU: of its time) and of their ratio within a round; peak memory is that of
all tensors, in a round of its own. The head reads embeddings and states that the ring has already, from scoring and from
the policy's update; what those passes cost is in neither number. Random weights, responses of one length. Nearer to the
paper's: `--device cuda --dtype bfloat16 --hidden 4096 --layers 32 --policy-hidden 4096 --width 2048 --tokens 1024`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from learner_step import clock
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForSequenceClassification

from learners.head_learner import HeadLearner
from r2m_async.config import R2MConfig
from r2m_async.head_objectives import grebt
from r2m_async.models.heads import build_head
from r2m_async.models.reward import reward_token_embeddings, scoring_head
from r2m_async.trajectories import GroupRewards, PolicyFeedback, RewardEmbeddings

VOCABULARY = 1024


class PeakMemory(TorchDispatchMode):
    """The most bytes that were held at once by the `tensors` given and by those made within, those on their device."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._alive = WeakIdKeyDictionary()
        self.num_bytes = 0
        for tensor in tensors:
            self._device = tensor.device.type
            self._alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.device.type == self._device:
                self._alive[one.untyped_storage()] = one.untyped_storage().nbytes()
        self.num_bytes = max(self.num_bytes, sum(self._alive.values()))
        return made


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What takes a step, and the tensors that it reads."""

    step: Callable[[], Any]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: list[torch.Tensor]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def seconds(self) -> float:
        began = clock()
        self.step()
        return clock() - began

    def peak_bytes(self) -> int:
        """Of a step that is not the first, with weights, gradients, activations, moments and inputs."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        with PeakMemory([*moments, *self.inputs, *self.module.parameters()]) as peak:
            self.step()
        return peak.num_bytes


def reward_model(options: argparse.Namespace) -> Any:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 64),
        intermediate_size=options.hidden * 7 // 2,
        max_position_embeddings=options.tokens,
        pad_token_id=0,
        num_labels=1,
    )
    with torch.device(options.device):
        return AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def full_update(options: argparse.Namespace, model: Any, ids_NKS: torch.Tensor, config: R2MConfig) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.head.lr, weight_decay=0.0)
    mask_KS = torch.ones_like(ids_NKS[0])

    def step() -> None:
        for ids_KS in ids_NKS:
            rewards_K = scoring_head(model)(reward_token_embeddings(model, ids_KS, mask_KS)).squeeze(-1)
            (grebt(rewards_K[None].float(), config.head.alpha) / len(ids_NKS)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(step=step, module=model, optimizer=optimizer, inputs=[ids_NKS, mask_KS])


@torch.no_grad()
def head_update(options: argparse.Namespace, model: Any, ids_NKS: torch.Tensor, config: R2MConfig) -> Contender:
    head = build_head(scoring_head(model), options.hidden, options.policy_hidden, config).to(options.device)
    learner = HeadLearner(head, config)
    embeddings, feedback, annotated = [], [], []
    for group, ids_KS in enumerate(ids_NKS):
        rte = reward_token_embeddings(model, ids_KS, torch.ones_like(ids_KS)).float()
        states = torch.randn(
            len(ids_KS), options.tokens - 1, options.policy_hidden, dtype=getattr(torch, options.dtype)
        )
        rewards = torch.zeros(len(ids_KS))
        empty = {"greedy_rte": None, "greedy_bonus": None, "bonus": rewards, "frozen_rewards": rewards}
        embeddings.append(RewardEmbeddings(group_id=group, rte=rte, **empty))
        feedback.append(
            PolicyFeedback(
                group_id=group, hidden_states=tuple(states.to(options.device)), greedy=None, policy_version=0
            )
        )
        annotated.append(
            GroupRewards(
                group_id=group, rewards=rewards, model_rewards=rewards, greedy_reward=None, head_version=0, omega=1.0
            )
        )
    inputs = [one.rte for one in embeddings] + [states for one in feedback for states in one.hidden_states]

    def step() -> None:
        learner.update(0, embeddings, feedback, annotated)

    return Contender(step=step, module=head, optimizer=learner._optimizer, inputs=inputs)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = R2MConfig.from_dict({"run": {"device": options.device}, "head": {"width": options.width}})
    model = reward_model(options)
    shape = (options.groups, options.responses, options.tokens)
    ids_NKS = torch.randint(1, VOCABULARY, shape, device=options.device)
    contenders = {
        name: make(options, model, ids_NKS, config) for name, make in (("head", head_update), ("full", full_update))
    }
    for one in contenders.values():  # the first step makes the moments
        one.step()
    rounds = [{name: one.seconds() for name, one in contenders.items()} for _ in range(options.rounds)]
    peaks = {name: one.peak_bytes() for name, one in contenders.items()}
    return {
        "setting": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **{name: value for name, value in vars(options).items() if name not in ("json", "device")},
        },
        "parameters": {name: one.num_parameters for name, one in contenders.items()},
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in contenders},
        "peak_mb": {name: peak / 1e6 for name, peak in peaks.items()},
        "full / head": {
            "seconds": statistics.median(one["full"] / one["head"] for one in rounds),
            "peak_mb": peaks["full"] / peaks["head"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 6, "policy_hidden": 256, "width": 256, "groups": 4, "responses": 4, "tokens": 128}
    for name, size in sizes.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=size, metavar="N", help=f"(default {size})"
        )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of reward model and states"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = benchmark(options)
    table = Table("", "head", "full", "full / head")
    for name, unit in (("parameters", ""), ("seconds", ""), ("peak_mb", " MB")):
        head, full = result[name]["head"], result[name]["full"]
        ratio = result["full / head"].get(name, full / head)
        table.add_row(name, f"{head:.4g}{unit}", f"{full:.4g}{unit}", f"{ratio:.3g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
