"""What the policy learner adds to a training step: `python benchmarks/learner_step.py --shape 27m --rounds 6 [--json FILE]`.

The same optimizer step on the same tokens by a plain PyTorch loop, by that loop on bare DeepSpeed, and by our learner on
both backends, by turns in one process: medians over rounds, of seconds (on a CPU: of its time) and of ratios within a
round. One rank, random weights, responses of one length. Ours is `PolicyLearner.train`, with and without the capture of
refreshed states; `proximal`, which the loops have no counterpart of, is timed apart. On a GPU contenders run one after
another, each in a process of its own, and the report has model FLOP/s utilisation and peak memory by part too:
`--shape qwen2.5-3b --dtype bfloat16 --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from learners import deepspeed_backend
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.advantages import get_advantage
from r2m_async.config import R2MConfig
from r2m_async.models.loading import checkpoint_activations, settled
from r2m_async.models.policy import token_logprobs
from r2m_async.models.weights import MasterWeights
from r2m_async.trajectories import GroupRewards, Prompt, Ticket, Trajectory, TrajectoryGroup

GROUP = 4
MICROBATCHES = 2
H200_TFLOPS = 989.0
"""bfloat16, dense, as its data sheet says."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    width: int
    vocabulary: int
    responses: int
    tokens: int
    """Of a prompt with its response: half each."""

    def architecture(self) -> Any:
        return AutoConfig.for_model(
            "qwen2",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.width,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=True,
        )

    def model(self, config: R2MConfig) -> Any:
        torch.manual_seed(0)
        with torch.device(config.run.device):
            model = AutoModelForCausalLM.from_config(
                self.architecture(),
                dtype=getattr(torch, config.model.dtype),
                attn_implementation=config.model.attention,
            )
        return settled(model, config.run.device)

    def flops(self) -> float:
        """Of a step, forward and backward: 6 per weight and token, the head only at response tokens, and causal attention."""
        tokens = self.responses * self.tokens
        head = self.vocabulary * self.hidden
        with torch.device("meta"):
            inner = AutoModelForCausalLM.from_config(self.architecture()).num_parameters() - head
        attention = 6 * self.layers * self.hidden * self.tokens * tokens
        return 6 * inner * tokens + 6 * head * tokens / 2 + attention


SHAPES = {
    "tiny": Shape(hidden=64, layers=2, heads=2, key_value_heads=1, width=128, vocabulary=256, responses=8, tokens=16),
    "27m": Shape(
        hidden=512, layers=8, heads=8, key_value_heads=8, width=1408, vocabulary=2048, responses=8, tokens=128
    ),
    "qwen2.5-3b": Shape(
        hidden=2048, layers=36, heads=16, key_value_heads=2, width=11008, vocabulary=151936, responses=8, tokens=1024
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every contender trains on."""

    shape: Shape
    config: R2MConfig
    tokens_BS: Tensor
    behaviour_BT: Tensor
    advantages_B: Tensor
    groups: list[TrajectoryGroup]
    rewards: list[GroupRewards]


def work_for(shape: Shape, config: R2MConfig) -> Work:
    """The behaviour is the policy's own before training: all ratios start at 1."""
    tokens_BS = torch.randint(shape.vocabulary, (shape.responses, shape.tokens))
    first = shape.tokens // 2
    versions = torch.zeros(shape.tokens, dtype=torch.int32)

    def trajectory(row: Tensor, logprobs: Tensor) -> Trajectory:
        padded = nn.functional.pad(logprobs, (first, 0))
        return Trajectory(
            token_ids=row,
            prompt_len=first,
            behaviour_logprobs=padded,
            policy_versions=versions,
            finish_reason="length",
            text="",
        )

    unknown = [trajectory(row, torch.zeros(shape.tokens - first)) for row in tokens_BS]
    behaviour_BT = token_logprobs(shape.model(config), unknown, config)
    trajectories = [trajectory(*one) for one in zip(tokens_BS, behaviour_BT, strict=True)]
    groups, rewards = [], []
    for group_id in range(shape.responses // GROUP):
        prompt = Prompt(prompt_id="", content="", text="", token_ids=(0,) * first)
        ticket = Ticket(group_id=group_id, due_step=0, seed=0, attempt=0, prompt=prompt)
        own = tuple(trajectories[GROUP * group_id : GROUP * (group_id + 1)])
        groups.append(TrajectoryGroup(ticket=ticket, trajectories=own, greedy=None))
        drawn = torch.randn(GROUP)
        rewards.append(
            GroupRewards(
                group_id=group_id, rewards=drawn, model_rewards=drawn, greedy_reward=None, head_version=0, omega=1.0
            )
        )
    device = config.run.device
    return Work(
        shape=shape,
        config=config,
        tokens_BS=tokens_BS.to(device),
        behaviour_BT=behaviour_BT.to(device),
        advantages_B=torch.randn(shape.responses, device=device),
        groups=groups,
        rewards=rewards,
    )


class ResponseLogprobs(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor, length: int) -> Tensor:
        states_BSD = self.model.base_model(input_ids=tokens_BS[:, :-1], use_cache=False).last_hidden_state
        logits_BTV = self.model.get_output_embeddings()(states_BSD[:, -length:]).float()
        return logits_BTV.log_softmax(-1).gather(-1, tokens_BS[:, -length:, None]).squeeze(-1)


def losses(work: Work, forward: Callable[[Tensor, int], Tensor]) -> Any:
    """The clipped sequence ratio, a micro-batch at a time."""
    parts = (whole.chunk(MICROBATCHES) for whole in (work.tokens_BS, work.behaviour_BT, work.advantages_B))
    for tokens_BS, behaviour_BT, advantages_B in zip(*parts, strict=True):
        ratio_B = (forward(tokens_BS, behaviour_BT.shape[1]) - behaviour_BT).sum(1).exp()
        clipped_B = torch.minimum(ratio_B * advantages_B, ratio_B.clamp(0.8, 1.2) * advantages_B)
        yield -clipped_B.sum() / work.shape.responses


Contender = dict[str, Callable[[], dict[str, float]]]
"""By name, what takes a step and returns seconds by what took them."""


def timed(run: Callable[[], object], name: str) -> dict[str, float]:
    began = clock()
    run()
    return {name: clock() - began}


def clock() -> float:
    """On a CPU this process's seconds of it, which others on the machine do not add to; one rank waits for nobody."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def plain(work: Work) -> Contender:
    learner = work.config.learner
    model = work.shape.model(work.config)
    if learner.activation_checkpointing:
        checkpoint_activations(model)
    forward, masters = ResponseLogprobs(model), MasterWeights(model)
    optimizer = torch.optim.AdamW(masters.tensors, lr=learner.lr, weight_decay=learner.weight_decay, fused=True)

    def step() -> None:
        for loss in losses(work, forward):
            loss.backward()
        masters.take_gradients()
        nn.utils.clip_grad_norm_(masters.tensors, learner.max_grad_norm)
        optimizer.step()
        masters.write_back()
        optimizer.zero_grad()

    return {"plain": lambda: timed(step, "plain")}


def bare(work: Work, stage: int) -> Contender:
    config = with_stage(work.config, stage)
    deepspeed = deepspeed_backend._import_deepspeed(on_cpu=config.run.device == "cpu")
    model = work.shape.model(config)
    if config.learner.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learner.lr, weight_decay=config.learner.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=ResponseLogprobs(model), optimizer=optimizer, config=deepspeed_backend._settings(config)
    )

    def step() -> None:
        for index, loss in enumerate(losses(work, engine)):
            engine.set_gradient_accumulation_boundary(index == MICROBATCHES - 1)
            engine.backward(loss)
            engine.step()

    name = f"bare zero-{stage}"
    return {name: lambda: timed(step, name)}


def ours(work: Work, stage: int | None, memory: dict[str, dict[str, float]]) -> Contender:
    """On torch, or on DeepSpeed in a stage. Writes how many GB each part takes on a GPU to `memory`."""
    name = "ours torch" if stage is None else f"ours zero-{stage}"
    config = work.config if stage is None else with_stage(work.config, stage)
    held = Allocated()
    policy = work.shape.model(config)
    held.take("weights")
    reference = work.shape.model(config)
    held.take("reference")
    make = TorchBackend if stage is None else deepspeed_backend.DeepSpeedBackend
    backend = make(policy, reference, config)
    estimator = get_advantage(config.advantage.name)
    learner, without = (PolicyLearner(backend, estimator, one) for one in (config, config.head(variant="vanilla")))
    learner.proximal(0, work.groups)
    learner.train(0, work.rewards)
    held.take("optimizer state and masters")
    memory[name] = held.during_a_step(backend, learner, work)

    def step(learner: PolicyLearner, name: str) -> dict[str, float]:
        proximal = timed(lambda: learner.proximal(0, work.groups), f"{name}, proximal")
        return proximal | timed(lambda: learner.train(0, work.rewards), name)

    return {name: lambda: step(learner, name), f"{name}, no refresh": lambda: step(without, f"{name}, no refresh")}


class Allocated:
    """GB of GPU memory by what holds it; all 0 on a CPU."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._before = torch.cuda.memory_allocated()

    def take(self, name: str) -> None:
        now = torch.cuda.memory_allocated()
        self.parts[name], self._before = (now - self._before) / 1e9, now

    def during_a_step(self, backend: Any, learner: PolicyLearner, work: Work) -> dict[str, float]:
        """With what one more step needs for a while: the first micro-batch has no gradients beside it yet."""
        peaks, held = [], []
        real = backend.backward

        def backward(loss: Tensor, last: bool) -> None:
            peaks.append(torch.cuda.max_memory_allocated())
            real(loss, last)
            held.append(torch.cuda.memory_allocated())

        learner.proximal(0, work.groups)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        backend.backward = backward
        *_, refreshed = learner.train(0, work.rewards)
        backend.backward = real
        states = [state for group in refreshed for state in group.hidden_states]
        return self.parts | {
            "activations": (peaks[0] - self._before) / 1e9,
            "gradients": (held[0] - self._before) / 1e9,
            "peak of a step": torch.cuda.max_memory_allocated() / 1e9,
            "kept states (CPU)": sum(state.nbytes for state in states) / 1e9,
        }


def with_stage(config: R2MConfig, stage: int) -> R2MConfig:
    return config.learner(backend="deepspeed", zero_stage=stage)


def measure(
    options: argparse.Namespace, contenders: list[tuple[str, int | None]]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Of contenders by turns: seconds of every round by name, after one unmeasured, and `memory_gb` of ours."""
    shape = SHAPES[options.shape]
    config = R2MConfig.from_dict(
        {
            "run": {"device": options.device},
            "model": {"dtype": options.dtype},
            "objective": {"epochs": 1},
            "learner": {
                "tokens_per_microbatch": shape.responses * shape.tokens // MICROBATCHES,
                "activation_checkpointing": options.checkpointing,
            },
        }
    )
    stages = [stage for _, stage in contenders if stage is not None]
    if stages:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        deepspeed_backend.join_ranks(0, "127.0.0.1", store.port, with_stage(config, stages[0]))
    torch.manual_seed(0)
    work = work_for(shape, config)
    steps, seconds, memory = [], defaultdict(list), {}
    for kind, stage in contenders:
        made = ours(work, stage, memory) if kind == "ours" else plain(work) if stage is None else bare(work, stage)
        steps += made.values()
    for index in range(options.rounds + 1):
        for step in steps:
            for name, value in step().items():
                seconds[name] += [value] if index else []
    if stages:
        torch.distributed.destroy_process_group()  # gloo's threads, still running at the end, would abort the process
    return dict(seconds), memory


def measure_alone(
    options: argparse.Namespace, contenders: list[tuple[str, int | None]]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Each in a process of its own: DeepSpeed never gives all of an engine's memory back."""
    seconds, memory = {}, {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for own_seconds, own_memory in processes.map(measure, repeat(options), [[one] for one in contenders]):
            seconds |= own_seconds
            memory |= own_memory
    return seconds, memory


def ratios(seconds: dict[str, list[float]], stages: list[int]) -> dict[str, float]:
    pairs = [("ours torch", "plain"), ("ours torch", "ours torch, no refresh")]
    for stage in stages:
        engine, mine = f"bare zero-{stage}", f"ours zero-{stage}"
        pairs += [(engine, "plain"), (mine, engine), (mine, f"{mine}, no refresh")]
    return {
        f"{over} / {under}": statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
        for over, under in pairs
    }


def matmul_tflops(rounds: int = 20, size: int = 8192) -> float:
    """What the GPU reaches in a bfloat16 product: a ceiling nearer than the data sheet's."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a @ b
    seconds = timed(lambda: [a @ b for _ in range(rounds)], "matmul")["matmul"]
    return 2 * size**3 * rounds / seconds / 1e12


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    shape, on_gpu = SHAPES[options.shape], options.device == "cuda"
    stages = [stage for stage in options.stages if stage or options.dtype == "float32"]
    contenders = [("plain", None), ("ours", None)] + [(kind, stage) for stage in stages for kind in ("bare", "ours")]
    rounds, memory = (measure_alone if on_gpu or options.alone else measure)(options, contenders)
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    flops = shape.flops()
    result: dict[str, Any] = {
        "setting": {
            "shape": options.shape,
            "dtype": options.dtype,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "tokens": shape.responses * shape.tokens,
            "microbatches": MICROBATCHES,
            "activation_checkpointing": options.checkpointing,
            "rounds": options.rounds,
            "tflops_per_step": flops / 1e12,
        },
        "seconds": seconds,
        "ratios": ratios(rounds, stages),
    }
    steps = {name: value for name, value in seconds.items() if not name.endswith("proximal")}
    result["tokens_per_s"] = {name: shape.responses * shape.tokens / value for name, value in steps.items()}
    if on_gpu:
        ceilings = {"data sheet": options.peak_tflops, "measured matmul": matmul_tflops()}
        result["setting"]["peak_tflops"] = ceilings
        result["mfu"] = {
            f"{name}, of the {ceiling}": flops / 1e12 / value / peak
            for name, value in steps.items()
            for ceiling, peak in ceilings.items()
        }
        result["memory_gb"] = memory
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="27m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3], help="0 is left out in bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="contenders one after another, as always on a GPU")
    parser.add_argument("--checkpointing", action="store_true", help="layers are computed again in the backward pass")
    parser.add_argument("--peak-tflops", type=float, default=H200_TFLOPS, help="of the GPU in this dtype")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":  # on a machine with a GPU too: what is timed, and how, follows from there being one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Here, because benchmarks/gpu takes the rest of this file to machines that lack the package.
    from rich.console import Console
    from rich.table import Table

    result = benchmark(options)
    console = Console(width=110)
    for section in ("seconds", "ratios", "tokens_per_s", "mfu", "memory_gb"):
        table = Table("", section, title=f"{options.shape}, {options.dtype}, {result['setting']['device']}")
        for name, value in result.get(section, {}).items():
            parts = value if isinstance(value, dict) else {"": value}
            for part, number in parts.items():
                table.add_row(f"{name} {part}", f"{number:.4g}")
        if table.rows:
            console.print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
