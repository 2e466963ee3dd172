"""The parts of the GPU measurement: `python benchmarks/gpu/parts.py PART [--dry-run]`. run.sh runs all of them.

Each checks what it computes before it times it, and prints rows (`benchmarks/rows.py`). Shares are of ceilings that are
measured on this very device, in the same process: a copy from device to device, and a large product of matrices. A dry run
takes tiny shapes, and the CPU where there is no GPU: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# What run.sh has unpacked comes last: it is for what the machine lacks.
sys.path += [os.environ["R2M_GPU_WHEELS"]] if "R2M_GPU_WHEELS" in os.environ else []

import torch  # noqa: E402
from rows import Row, emit  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def seconds(run: Callable[[], object], rounds: int = 15, warm: int = 3) -> float:
    """The median time of a call on the device."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        if CUDA:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1000)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def copy_bytes_per_second(dry: bool) -> float:
    """Bytes read plus bytes written by a copy of fresh random data that no cache holds."""
    source = torch.randn((1 << 20) if dry else (1 << 31), dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def product_flops_per_second(dry: bool) -> float:
    size = 128 if dry else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def ceilings(dry: bool) -> None:
    """What the device reaches at best: the ceilings that shares are quoted of."""
    copied, product = copy_bytes_per_second(dry) / 1e12, product_flops_per_second(dry) / 1e12
    emit(
        Row(
            name="copy on the device",
            unit="TB/s read + written",
            ours=copied,
            limit=4.8,
            ratio=copied / 4.8,
            means="ours / data sheet of an H200",
        )
    )
    emit(
        Row(
            name="bfloat16 product, 8192 x 8192 x 8192",
            unit="TFLOP/s",
            ours=product,
            limit=989,
            ratio=product / 989,
            means="ours / data sheet of an H200",
        )
    )


def literal_rewards(head: Any, rte: Tensor, states: list[Tensor], omega: float) -> Tensor:
    """Eq. 3-4 as they are printed, a response at a time."""
    rewards = []
    for one, rows in zip(rte, states, strict=True):
        rows = rows.to(one.dtype)
        query, keys, values = one[None] @ head.query, rows @ head.key, rows @ head.value
        mixed = torch.softmax(query @ keys.T / math.sqrt(query.shape[1]), -1) @ values @ head.output
        rewards.append(head.scoring_head((1 - omega) * mixed + omega * one[None])[0, 0])
    return torch.stack(rewards)


def head(dry: bool) -> None:
    """The R2M head, forward and backward, at the paper's sizes: checked against float64, then timed."""
    from r2m_async.reward_head import R2MHead

    D_m, D_p, d, B, S = (24, 16, 8, 4, 12) if dry else (4096, 2048, 2048, 64, 1024)
    torch.manual_seed(0)
    lengths = [S - 3 * (b % 5) for b in range(B)]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    offsets = torch.tensor(bounds)
    module = R2MHead(D_m, D_p, d, nn.Linear(D_m, 1)).to(DEVICE)
    rte = torch.randn(B, D_m, device=DEVICE)
    states = torch.randn(bounds[-1], D_p, device=DEVICE, dtype=torch.bfloat16)

    def both(rewards: Tensor) -> tuple[Tensor, ...]:
        return rewards, *torch.autograd.grad(
            (rewards * torch.linspace(-1, 2, B, device=DEVICE)).sum(), [*module.parameters()]
        )

    ours = both(module(rte, states, None, 0.6, offsets=offsets))
    exact = R2MHead(D_m, D_p, d, nn.Linear(D_m, 1), dtype=torch.float64).to(DEVICE)
    exact.load_state_dict(module.state_dict())
    rows = [part.double() for part in states.split(lengths)]
    true = literal_rewards(exact, rte.double(), rows, 0.6)
    true = (
        true,
        *torch.autograd.grad(
            (true * torch.linspace(-1, 2, B, device=DEVICE, dtype=torch.float64)).sum(), [*exact.parameters()]
        ),
    )
    error = max(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, true, strict=True))
    emit(
        Row(
            name="head: largest relative error against Eq. 3 in float64",
            unit="",
            ours=error,
            ratio=error,
            means="error",
            goal="<= 1e-4",
        )
    )
    del exact, true, rows, ours
    release()

    def step() -> None:
        both(module(rte, states, None, 0.6, offsets=offsets))

    # The least that must move: the states twice, once in each direction; the four matrices once in each, and their
    # gradients once.
    weights = sum(p.nbytes for p in module.parameters())
    least = 2 * states.nbytes + 3 * weights
    copied = copy_bytes_per_second(dry)
    took = seconds(step)
    literal = seconds(lambda: both(literal_rewards(module, rte, list(states.split(lengths)), 0.6)), 5, 1)
    emit(
        Row(
            name=f"head: forward + backward, batch {B}, {S} states, bfloat16",
            unit="ms",
            ours=1e3 * took,
            other=1e3 * literal,
            limit=1e3 * least / copied,
            ratio=least / took / copied,
            means="bytes that must move / ours, of the copy's rate",
        )
    )
    emit(
        Row(
            name="head: literal Eq. 3 against ours",
            unit="ms",
            ours=1e3 * took,
            other=1e3 * literal,
            ratio=literal / took,
            means="literal / ours",
            goal=">= 50",
        )
    )
    attention(dry, lengths, states, offsets, copied)


def attention(dry: bool, lengths: list[int], states: Tensor, offsets: Tensor, copied: float) -> None:
    """The part of the head that reads states, alone."""
    from r2m_async.state_attention import attended

    if CUDA:
        from r2m_async import state_attention_triton as kernels
    probe = torch.randn(len(lengths), states.shape[1], device=DEVICE, requires_grad=True)
    gradient = torch.randn_like(probe)

    def both() -> None:
        attended(probe, states, offsets).backward(gradient)

    def forward() -> None:
        with torch.no_grad():
            attended(probe, states, offsets)

    if CUDA:
        # What the kernels could be set to: for whoever tunes them, no rows.
        chosen = kernels._TILE, kernels._PROGRAMS_PER_PROCESSOR, kernels._WARPS
        for tile in (4_096, 8_192, 16_384, 32_768):
            for programs in (2, 4, 8):
                for warps in (4, 8):
                    kernels._TILE, kernels._PROGRAMS_PER_PROCESSOR, kernels._WARPS = tile, programs, warps
                    rate = 2 * states.nbytes / seconds(both, 7, 2)
                    print(
                        f"tile {tile}, {programs} programs a processor, {warps} warps: {rate / 1e12:.2f} TB/s",
                        flush=True,
                    )
        kernels._TILE, kernels._PROGRAMS_PER_PROCESSOR, kernels._WARPS = chosen
    for name, run, passes in (("forward + backward", both, 2), ("forward", forward, 1)):
        took, least = seconds(run), passes * states.nbytes
        emit(
            Row(
                name=f"head: attention alone, {name}",
                unit="TB/s read",
                ours=least / took / 1e12,
                limit=copied / 1e12,
                ratio=least / took / copied,
                means="ours / copy on the device",
                goal=">= 0.7",
            )
        )


def learner(dry: bool) -> None:
    """The policy learner's step at the shape of Qwen2.5-3B: the share of the device's arithmetic, refresh, memory."""
    from learner_step import SHAPES, Shape, matmul_tflops, plain, timed, work_for

    from learners.policy_learner import PolicyLearner
    from learners.torch_backend import TorchBackend
    from r2m_async.advantages import get_advantage
    from r2m_async.config import R2MConfig

    shape: Shape = SHAPES["tiny" if dry else "qwen2.5-3b"]
    shape = shape if dry else dataclasses.replace(shape, responses=32)
    config = R2MConfig.from_dict(
        {
            "run": {"device": DEVICE},
            "model": {"dtype": "float32" if dry else "bfloat16"},
            "objective": {"epochs": 1},
            "learner": {"tokens_per_microbatch": shape.responses * shape.tokens // (2 if dry else 4)},
        }
    )
    torch.manual_seed(0)
    work = work_for(shape, config)
    release()
    backend = TorchBackend(shape.model(config), shape.model(config), config)
    estimator = get_advantage(config.advantage.name)
    learners = {
        True: PolicyLearner(backend, estimator, config),
        False: PolicyLearner(backend, estimator, config.head(variant="vanilla")),
    }
    took: dict[bool, list[float]] = {True: [], False: []}
    passes: list[float] = []
    for index in range(2 if dry else 6):
        for refreshes, one in learners.items():
            passes += timed(lambda one=one: one.proximal(0, work.groups), "").values()
            took[refreshes] += timed(lambda one=one: one.train(0, work.rewards), "").values()
        if not index:
            took, passes = {True: [], False: []}, []
    if CUDA:
        peak = torch.cuda.max_memory_allocated() / 1e9
        emit(
            Row(
                name="learner: peak memory of a step",
                unit="GB",
                ours=peak,
                limit=torch.cuda.get_device_properties(0).total_memory / 1e9,
                ratio=peak * 1e9 / torch.cuda.get_device_properties(0).total_memory,
                means="ours / the device's",
            )
        )
    del backend, learners, one
    release()
    ours, flops = statistics.median(took[True]), shape.flops()
    (step,) = plain(dataclasses.replace(work, config=config)).values()
    others = [one for _ in range(2 if dry else 4) for one in step().values()][1:]
    other = statistics.median(others)
    for name, peak in (("data sheet", 989.0), ("product measured here", matmul_tflops() if CUDA else 1.0)):
        goal = ">= 0.45" if name == "data sheet" else ""
        emit(
            Row(
                name=f"learner: model FLOP/s utilisation, {'tiny' if dry else 'Qwen2.5-3B'}, of the {name}",
                unit="TFLOP/s",
                ours=flops / ours / 1e12,
                other=flops / other / 1e12,
                limit=peak,
                ratio=flops / ours / 1e12 / peak,
                means="ours / limit",
                goal=goal,
            )
        )
    emit(
        Row(
            name="learner: a step against a plain loop",
            unit="s",
            ours=ours,
            other=other,
            ratio=ours / other,
            means="ours / plain loop",
        )
    )
    refresh = statistics.median(a / b for a, b in zip(took[True], took[False], strict=True))
    emit(
        Row(
            name="learner: what capturing refreshed states costs",
            unit="s",
            ours=ours,
            other=statistics.median(took[False]),
            ratio=refresh,
            means="with / without",
            goal="<= 1.03",
        )
    )
    emit(
        Row(
            name="learner: proximal pass",
            unit="s",
            ours=statistics.median(passes),
            ratio=statistics.median(passes) / ours,
            means="proximal pass / step",
        )
    )


def logprobs(dry: bool) -> None:
    """Peak memory of a pass over a large vocabulary, all logits at once and a chunk at a time."""
    from large_vocabulary import measured

    from r2m_async.models import policy

    at_once = policy.LOGITS_AT_ONCE
    responses, tokens = (2, 8) if dry else (48, 1024)
    told = {}
    for chunked in (True, False):
        release()
        policy.LOGITS_AT_ONCE = at_once
        told[chunked] = measured(chunked, responses, tokens, True, True, dry)
    policy.LOGITS_AT_ONCE = at_once
    ours, other = told[True], told[False]
    assert math.isclose(ours["sum"], other["sum"], rel_tol=1e-3), told
    emit(
        Row(
            name="log-probabilities: memory of a pass, SmolLM2's vocabulary",
            unit="MiB",
            ours=ours["mib"],
            other=other["mib"],
            ratio=ours["mib"] / max(other["mib"], 1),
            means="chunked / all at once",
        )
    )
    emit(
        Row(
            name="log-probabilities: time of a pass, SmolLM2's vocabulary",
            unit="s",
            ours=ours["seconds"],
            other=other["seconds"],
            ratio=ours["seconds"] / max(other["seconds"], 1e-9),
            means="chunked / all at once",
        )
    )


def smollm2(dry: bool) -> None:
    """SmolLM2-135M in a whole ring in this process, with R2M and with a frozen reward model."""
    from r2m_async.config import R2MConfig
    from r2m_async.launch.ring import Ring

    with tempfile.TemporaryDirectory() as folder:
        policy, reward = (random_model(Path(folder, name), dry, name == "reward") for name in ("policy", "reward"))
        if not dry:
            try:
                from r2m_async.from_scratch.smollm2 import smollm2_model

                policy = str(smollm2_model())
                print("the policy has SmolLM2's own weights", flush=True)
            except Exception as error:  # whatever it is, speed does not depend on the weights
                print(f"random weights in the shape of SmolLM2: {error}", flush=True)
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text(
            "\n".join(json.dumps({"prompt": f"Tell me about the number {index}."}) for index in range(64))
        )
        steps = 2 if dry else 3
        config = R2MConfig.from_dict(
            {
                "run": {"num_steps": steps, "device": DEVICE},
                "model": {"policy": policy, "dtype": "float32" if dry else "bfloat16"},
                "reward": {"model": reward, "dtype": "float32" if dry else "bfloat16"},
                "data": {"prompts": str(prompts)},
                "rollouts": {
                    "prompts_per_step": 2 if dry else 4,
                    "group_size": 2 if dry else 8,
                    "concurrent_groups": 2 if dry else 4,
                    "max_prompt_tokens": 32,
                    "max_new_tokens": 4 if dry else 96,
                },
                "scheduling": {"max_policy_age": 1, "max_head_age": 1},
                "head": {"width": 16 if dry else 1024},
            }
        )
        took: dict[str, float] = {}
        for variant in ("r2m", "vanilla"):
            with Ring.of(config.head(variant=variant), in_process=True) as ring:
                ring.step()
                began = time.perf_counter()
                for _ in range(steps - 1):
                    metrics = ring.step()
                took[variant] = (time.perf_counter() - began) / (steps - 1)
            assert math.isfinite(metrics["reward/mean"]), metrics
            release()
    responses = config.rollouts.prompts_per_step * config.rollouts.group_size
    emit(
        Row(
            name="SmolLM2-135M on the transformers engine, one process: responses",
            unit="1/s",
            ours=responses / took["r2m"],
            other=responses / took["vanilla"],
            ratio=took["r2m"] / took["vanilla"],
            means="step with R2M / with a frozen reward model",
            goal="<= 1.1",
        )
    )


def random_model(directory: Path, dry: bool, reward: bool) -> str:
    """A model in the shape of SmolLM2-135M with random weights and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = 512 if dry else 49_152
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "</s>", *letters, *(f"w{index}" for index in range(vocabulary - len(letters) - 2))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=36 if dry else 576,
        num_hidden_layers=2 if dry else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=64 if dry else 1536,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(1 + reward)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device(DEVICE):
        model = kind.from_config(config)
    model.cpu().save_pretrained(directory)
    return str(directory)


def ipc(dry: bool) -> None:
    """A version of the weights from one process to another on the same GPU; on a CPU over gloo."""
    import multiprocessing

    from r2m_async.config import R2MConfig

    transport = "ipc" if CUDA else "gloo"
    num_bytes = 1 << 16 if dry else 540 << 20
    ours, theirs = multiprocessing.Pipe()
    # Not forked: this process has asked for a device, and a copy of a process that has done so cannot use it.
    receiver = multiprocessing.get_context("spawn").Process(
        target=receive, args=(theirs, transport, num_bytes), daemon=True
    )
    receiver.start()
    from learners.weight_sender import WeightSender

    config = (
        R2MConfig.from_dict({"run": {"device": DEVICE}})
        .rollouts(engine="vllm")
        .weights(transport=transport, timeout=30)
    )
    sender = WeightSender(config)
    model = weights_of(num_bytes)
    ours.send(sender.open(0))
    sender.connect(0)
    stages, sends = [], []
    for version in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        began = device_now()
        layout = sender.stage(model, version)
        staged = device_now()
        ours.send((layout, {} if transport == "gloo" else sender.send(0, version)))
        if transport == "gloo":
            sender.send(0, version)
        if not ours.poll(30):
            raise RuntimeError("the receiver did not answer within 30 s")
        got = ours.recv()
        if isinstance(got, Exception):
            raise got
        stages.append(staged - began)
        sends.append(device_now() - staged)
        expected = sum(parameter.double().sum().item() for parameter in model.parameters())
        assert math.isclose(got, expected, rel_tol=1e-6), (got, expected)
    ours.send(None)
    receiver.join(10)
    copied = copy_bytes_per_second(dry)
    sent, least = statistics.median(sends[1:]), 2 * num_bytes / copied
    emit(
        Row(
            name=f"weights by {transport}: {num_bytes >> 20} MiB, handles to copied and checked",
            unit="GB/s",
            ours=num_bytes / sent / 1e9,
            limit=copied / 2e9,
            ratio=least / sent,
            means="ours / copy on the device",
        )
    )
    emit(
        Row(
            name="weights: staging a version on the device",
            unit="GB/s",
            ours=num_bytes / statistics.median(stages[1:]) / 1e9,
            limit=copied / 2e9,
            ratio=least / statistics.median(stages[1:]),
            means="ours / copy on the device",
        )
    )


def device_now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def weights_of(num_bytes: int) -> nn.Module:
    """A model of that many bytes in float32, in 64 matrices."""
    model = nn.Module()
    model.layers = nn.ParameterList(torch.randn(num_bytes // 64 // 4 // 32, 32, device=DEVICE) for _ in range(64))
    return model


def receive(pipe: Any, transport: str, num_bytes: int) -> None:
    """Another process: copies every version that is sent into a model of its own, and answers with the sum of the weights."""
    try:
        channel = pipe.recv()
        parameters = list(weights_of(num_bytes).parameters())
        received = None
        if transport == "gloo":
            from datetime import timedelta

            from r2m_async.models.weights import ReceivedWeights

            store = torch.distributed.TCPStore(channel["host"], channel["port"], 2, False, timedelta(seconds=30))
            group = torch.distributed.ProcessGroupGloo(
                torch.distributed.PrefixStore("weights", store), 1, 2, timedelta(seconds=30)
            )
            received = ReceivedWeights(group)
        while (told := pipe.recv()) is not None:
            layout, sent = told
            with torch.no_grad():
                if received is not None:
                    for parameter, (_, tensor) in zip(parameters, received(**layout), strict=True):
                        parameter.copy_(tensor)
                else:
                    for parameter, tensor in zip(parameters, opened(sent), strict=True):
                        parameter.copy_(tensor)
            device_now()
            pipe.send(sum(parameter.double().sum().item() for parameter in parameters))
    except Exception as error:
        pipe.send(RuntimeError(f"receiver: {error!r}"))


def opened(sent: dict[str, Any]) -> list[Tensor]:
    """The tensors behind CUDA handles, as vLLM's engine opens them."""
    import base64
    import pickle

    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    handles = pickle.loads(base64.b64decode(sent["ipc_handles_pickled"]))
    return [rebuild_cuda_tensor(*arguments) for handle in handles for arguments in handle.values()]


PARTS = {one.__name__: one for one in (ceilings, head, learner, logprobs, ipc, smollm2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them, one after the other, without it")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not CUDA and not options.dry_run:
        sys.exit("torch finds no CUDA device here: use --dry-run")
    if not CUDA:
        torch.set_num_threads(1)
    for part in [options.part] if options.part else PARTS:
        PARTS[part](options.dry_run)


if __name__ == "__main__":
    main()
