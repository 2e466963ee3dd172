"""What the vLLM engine costs and gains: `python benchmarks/vllm_engine.py [--json FILE] [--rounds N]`.

Four tables, each a set of ratios measured in one run, because machines differ and this one may be shared:
tokens/s of vLLM with and without policy states and of the transformers engine, by turns; MB/s of both weight paths that
run anywhere beside a raw broadcast of the same bytes; the pause of an in-flight update; and what other groups in the
batch do to a group's bits. Runs on the GPU where there is one (bfloat16 there), else on the CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from actors.transformers_engine import TransformersEngine
from actors.vllm_engine import VLLMEngine
from learners.weight_sender import WeightSender
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.models.loading import load_policy
from r2m_async.models.weights import named_weights, weight_probe
from r2m_async.trajectories import Prompt, Ticket, Weights

K = TypeVar("K")
CUDA = torch.cuda.is_available()
PROMPT, NEW, VOCABULARY = 16, 64, 2048
SHAPES = {  # name -> hidden size, layers, heads, feed-forward width
    "tiny, D 128": (128, 4, 4, 512),
    "29M, D 512": (512, 8, 8, 1408),
    "wide, D 1024": (1024, 4, 8, 2048),
}


def make_model(directory: Path, shape: tuple[int, int, int, int]) -> str:
    """A random Qwen2-shaped policy as an HF directory."""
    hidden, layers, heads, width = shape
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the kind of tokenizer that Qwen2's class loads
    names = ["<pad>", "</s>", *letters, *(f"w{index}" for index in range(VOCABULARY - len(letters) - 2))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=width,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def config_for(path: str, engine: str, source: str, asynchronous: bool, **rollouts: object) -> R2MConfig:
    return R2MConfig.from_dict(
        {
            "model": {"policy": path, "dtype": "bfloat16" if CUDA else "float32"},
            "feedback": {"source": source},
            "rollouts": {
                "engine": engine,
                "group_size": 64,
                "max_prompt_tokens": PROMPT,
                "max_new_tokens": NEW,
                **rollouts,
            },
            "scheduling": {"max_policy_age": int(asynchronous)},
        }
    )


def ticket(index: int) -> Ticket:
    tokens = tuple(2 + (index * 31 + position * 7) % (VOCABULARY - 2) for position in range(PROMPT))
    prompt = Prompt(prompt_id=str(index), content="", text="", token_ids=tokens)
    return Ticket(group_id=index, due_step=0, seed=index, attempt=0, prompt=prompt)


def by_turns(rounds: int, runs: dict[K, Callable[[int], int]]) -> dict[K, tuple[float, float]]:
    """Per run, the median over rounds of (work per wall second, work per CPU second of this process); one round unmeasured."""
    speeds: dict[K, list[tuple[float, float]]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            done = run(index)
            if index:
                speeds[name].append((done / (time.perf_counter() - wall), done / (time.process_time() - cpu)))
    return {
        name: (statistics.median(wall for wall, _ in measured), statistics.median(cpu for _, cpu in measured))
        for name, measured in speeds.items()
    }


def tokens_of(engine: VLLMEngine | TransformersEngine) -> Callable[[int], int]:
    def run(index: int) -> int:
        group, _ = engine.generate(ticket(index))
        return sum(trajectory.num_response_tokens for trajectory in group.trajectories)

    return run


def throughput(path: str, rounds: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    hidden = AutoConfig.from_pretrained(path).get_text_config().hidden_size
    vllm = {source: config_for(path, "vllm", source, False) for source in ("learner", "rollout")}
    engines = {source: VLLMEngine(path, tokenizer, hidden, config, False) for source, config in vllm.items()}
    plain = {source: config_for(path, "transformers", source, False) for source in ("learner", "rollout")}
    model = load_policy(path, plain["learner"])
    runs = {("vllm", source): tokens_of(engine) for source, engine in engines.items()}
    runs |= {
        ("transformers", source): tokens_of(TransformersEngine(model, tokenizer, config, False))
        for source, config in plain.items()
    }
    measured = by_turns(rounds, runs)
    for engine in engines.values():
        engine.close()
    states = {"learner": "without states", "rollout": "with states"}
    result = {f"{engine}, {states[source]}": wall for (engine, source), (wall, _) in measured.items()}
    result["states' share of vllm's CPU time"] = measured["vllm", "learner"][1] / measured["vllm", "rollout"][1] - 1
    return result


def states_alone(rounds: int) -> None:
    """Prints tokens/s of vLLM without and with states at D 1024, by turns, and what the states cost."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder), SHAPES["wide, D 1024"])
        tokenizer = AutoTokenizer.from_pretrained(path)
        configs = {source: config_for(path, "vllm", source, False) for source in ("learner", "rollout")}
        engines = {source: VLLMEngine(path, tokenizer, 1024, config, False) for source, config in configs.items()}
        speeds = by_turns(rounds, {source: tokens_of(engine) for source, engine in engines.items()})
        (without, _), (with_states, _) = speeds["learner"], speeds["rollout"]
        print(f"{without:.0f} without, {with_states:.0f} with states: they cost {without / with_states - 1:+.1%}")
        for engine in engines.values():
            engine.close()


class Learner:
    """The sending side, in a process of its own."""

    def __init__(self, path: str, config: R2MConfig) -> None:
        torch.set_num_threads(1)
        self._model = load_policy(path, config)
        self._sender = WeightSender(config)

    def publish(self) -> np.ndarray:
        return np.frombuffer(encode(named_weights(self._model, 1, probe=True)), np.uint8)

    def stage(self) -> np.ndarray:
        layout = self._sender.stage(self._model, 1)
        return np.frombuffer(
            encode(Weights(version=1, tensors={}, probe=weight_probe(self._model), layout=layout)), np.uint8
        )

    def open(self) -> dict:
        return self._sender.open(0)

    def connect(self) -> None:
        self._sender.connect(0)

    def send(self) -> None:
        self._sender.send(0, 1)

    def broadcast(self, num_bytes: int, port: int) -> None:
        raw_broadcast(num_bytes, port, 0)


def raw_broadcast(num_bytes: int, port: int, rank: int) -> float:
    """Seconds for one flat gloo broadcast between two processes, after one that warms it up."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
    group = torch.distributed.ProcessGroupGloo(torch.distributed.PrefixStore("raw", store), rank, 2)
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    tensor = torch.ones(num_bytes, dtype=torch.uint8)
    for _ in range(2):
        began = time.perf_counter()
        group.broadcast([tensor], options).wait()
    return time.perf_counter() - began


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def weight_paths(path: str, rounds: int) -> dict[str, float]:
    """MB/s from the learner's model to an engine that has probed its own, per transport; and of a raw broadcast."""
    num_bytes = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(path).parameters())
    tokenizer = AutoTokenizer.from_pretrained(path)
    hidden = AutoConfig.from_pretrained(path).get_text_config().hidden_size
    result = {"MB": num_bytes / 1e6}
    for transport in ("object_store", "gloo"):
        config = config_for(path, "vllm", "learner", True, in_flight_updates=True).weights(transport=transport)
        learner = ray.remote(Learner).options(max_concurrency=2).remote(path, config)
        engine = VLLMEngine(path, tokenizer, hidden, config, False)
        if transport == "gloo":
            channel, connected = ray.get(learner.open.remote()), learner.connect.remote()
            engine.join(channel)
            ray.get(connected)

        def update(_: int, transport: str = transport, learner: object = learner, engine: VLLMEngine = engine) -> int:
            if transport == "gloo":
                header = decode(ray.get(learner.stage.remote()))
                sending = learner.send.remote()
                engine.load(header, {})
                ray.get(sending)
            else:
                engine.load(decode(ray.get(learner.publish.remote())))
            return num_bytes

        result[transport] = by_turns(rounds, {transport: update})[transport][0] / 1e6
        if transport == "object_store":
            result["pause, ms, idle"] = (
                1000 * engine.load(decode(ray.get(learner.publish.remote())))["weights/pause_seconds"]
            )
            result["pause, ms, 64 requests"] = pause_while_generating(engine, decode(ray.get(learner.publish.remote())))
            port = free_port()
            sending = learner.broadcast.remote(num_bytes, port)
            result["raw broadcast"] = num_bytes / 1e6 / raw_broadcast(num_bytes, port, 1)
            ray.get(sending)
        engine.close()
        ray.kill(learner)
    return result


def pause_while_generating(engine: VLLMEngine, weights: Weights) -> float:
    """Milliseconds from pause to resume, half-way through 64 responses."""
    began = time.perf_counter()
    engine.generate(ticket(0))
    whole = time.perf_counter() - began
    running = threading.Thread(target=engine.generate, args=(ticket(1),))
    running.start()
    time.sleep(whole / 2)
    paused = engine.load(weights)["weights/pause_seconds"]
    running.join()
    return 1000 * paused


def composition(path: str) -> dict[str, float]:
    """Twelve groups of 4, alone and three at a time: shares of responses with the same tokens and the same bits."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    hidden = AutoConfig.from_pretrained(path).get_text_config().hidden_size
    engine = VLLMEngine(
        path, tokenizer, hidden, config_for(path, "vllm", "rollout", False, group_size=4, concurrent_groups=3), False
    )
    tickets = [ticket(index) for index in range(12)]
    alone = [engine.generate(one)[0] for one in tickets]
    again = [engine.generate(one)[0] for one in tickets]
    together: dict[int, object] = {}

    def generate(one: Ticket) -> None:
        together[one.group_id] = engine.generate(one)[0]

    for first in range(0, 12, 3):
        threads = [threading.Thread(target=generate, args=(one,)) for one in tickets[first : first + 3]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    engine.close()

    def compare(others: list) -> tuple[float, float, float]:
        pairs = [
            (one, other)
            for group, other_group in zip(alone, others, strict=True)
            for one, other in zip(group.trajectories, other_group.trajectories, strict=True)
        ]
        same = [(a, b) for a, b in pairs if torch.equal(a.token_ids, b.token_ids)]
        bits = sum(torch.equal(a.behaviour_logprobs, b.behaviour_logprobs) for a, b in same)
        worst = max(((a.behaviour_logprobs - b.behaviour_logprobs).abs().max().item() for a, b in same), default=0.0)
        return len(same) / len(pairs), bits / len(pairs), worst

    names = ("same tokens", "same bits", "largest log-prob difference")
    return {
        f"{what}, {name}": value
        for what, others in (
            ("one by one again", again),
            ("three at a time", [together[one.group_id] for one in tickets]),
        )
        for name, value in zip(names, compare(others), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--states", action="store_true", help="only what keeping states costs vLLM at D 1024")
    options = parser.parse_args()
    if options.states:
        states_alone(options.rounds)
        return
    ray.init(include_dashboard=False, num_cpus=2, logging_level="ERROR", log_to_driver=False)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: make_model(Path(folder, str(index)), shape) for index, (name, shape) in enumerate(SHAPES.items())
        }
        for name, path in paths.items():
            results[name] = {"tokens/s": throughput(path, options.rounds), "batch": composition(path)}
            results[name]["weights, MB/s"] = weight_paths(path, options.rounds)
    ray.shutdown()
    console = Console(width=110)
    for section in ("tokens/s", "weights, MB/s", "batch"):
        table = Table(title=f"{section} on {torch.cuda.get_device_name() if CUDA else 'CPU'}")
        table.add_column("")
        for name in results:
            table.add_column(name, justify="right")
        for row in next(iter(results.values()))[section]:
            table.add_row(row, *(f"{result[section][row]:.4g}" for result in results.values()))
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
