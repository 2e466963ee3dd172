"""A policy version on its way to a vLLM engine over gloo, against a raw broadcast of the same bytes: `python benchmarks/weights.py`.

A learner in a process of its own stages a version and sends it, at 40 MB and at 540 MB (SmolLM2-135M). By turns, medians:

    raw         one flat broadcast of the same bytes between the same two processes, into memory that is mapped already
    transfer    `WeightSender.send` to `ReceivedWeights`, parameter by parameter, without an engine
    load        the engine's reload and repacking of a version that lies in shared memory, without digests
    pause       from pause to resume of the engine, with transfer, digests, load, repacking, labels and caches; what is beyond
                raw and load is ours

Beside them it prints what does not hold the engine up: the copy that the learner keeps, the digests, and the probe's pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rows import Row, emit
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm_engine import config_for, make_model

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.from_scratch.smollm2 import smollm2_model
from r2m_async.models.loading import load_policy
from r2m_async.models.weights import ReceivedWeights, broadcast, tensor_digest, weight_probe
from r2m_async.trajectories import Weights

ENGINE, HERE, RAW = 0, 1, 2
"""The numbers of the channels: to the engine, and to this process."""


def learner(pipe: Any, path: str, config: R2MConfig) -> None:
    """The sending process. It answers every message with what was asked for, or None."""
    from learners.weight_sender import WeightSender

    torch.set_num_threads(1)
    model, sender = load_policy(path, config), WeightSender(config)
    flat = torch.ones(sum(one.nbytes for one in model.parameters()), dtype=torch.uint8)
    while (asked := pipe.recv()) is not None:
        what, *arguments = asked
        if what == "open":
            pipe.send(sender.open(*arguments))
            sender.connect(*arguments)
        elif what == "stage":
            took = {}
            began = time.perf_counter()
            layout = sender.stage(model, 1)
            took["copy"] = time.perf_counter() - began
            began = time.perf_counter()
            for tensor in sender.staged(1).values():
                tensor_digest(tensor)
            took["digests"] = time.perf_counter() - began
            began = time.perf_counter()
            probe = weight_probe(model, sender.staged(1))
            took["digests and probe"] = time.perf_counter() - began
            pipe.send((layout, probe, took))
        elif what == "send":
            sender.send(arguments[0], 1)
            pipe.send(None)
        elif what == "raw":
            (work,) = broadcast(sender._channels[RAW]._group, [flat])  # type: ignore[attr-defined]
            work.wait()
            pipe.send(None)


def join(channel: dict[str, Any]) -> Any:
    """Joins a channel of the learner's as an engine's worker does."""
    timeout = timedelta(seconds=channel["timeout"])
    store = torch.distributed.TCPStore(channel["host"], channel["port"], channel["world_size"], False, timeout)
    return torch.distributed.ProcessGroupGloo(torch.distributed.PrefixStore("weights", store), 1, 2, timeout)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def load_seconds(path: str, rounds: int) -> float:
    """The median time in which an engine in this process reloads and repacks weights from shared memory."""
    from actors.vllm_engine import VLLMEngine

    config = config_for(path, "vllm", "learner", False, group_size=2)
    engine = VLLMEngine(path, AutoTokenizer.from_pretrained(path), hidden_size(path), config, False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="r2m-bench-") as file:
        save_file({name: one.detach().contiguous() for name, one in model.named_parameters()}, file.name)
        del model
        info = {"path": file.name, "digests": {}}
        seconds = [timed(lambda: engine._driver.rpc("r2m_update", info=info, version=1)) for _ in range(rounds + 1)][1:]
    engine.close()
    return statistics.median(seconds)


def hidden_size(path: str) -> int:
    return int(AutoConfig.from_pretrained(path).get_text_config().hidden_size)


def measure(path: str, rounds: int) -> None:
    from actors.vllm_engine import VLLMEngine

    load = load_seconds(path, rounds)
    config = config_for(path, "vllm", "learner", True, in_flight_updates=True, group_size=2).weights(transport="gloo")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=learner, args=(theirs, path, config), daemon=True)
    process.start()

    def ask(*what: Any) -> Any:
        ours.send(what)
        return ours.recv()

    engine = VLLMEngine(path, AutoTokenizer.from_pretrained(path), hidden_size(path), config, False)
    engine.join(ask("open", ENGINE))
    receive, raw = ReceivedWeights(join(ask("open", HERE))), join(ask("open", RAW))
    layout, probe, _ = ask("stage")
    num_bytes = sum(
        getattr(torch, name).itemsize * torch.Size(shape).numel()
        for name, shape in zip(layout["dtype_names"], layout["shapes"], strict=True)
    )
    flat = torch.ones(num_bytes, dtype=torch.uint8)

    def raw_broadcast() -> None:
        ours.send(("raw",))
        (work,) = broadcast(raw, [flat])
        work.wait()
        ours.recv()

    def transfer() -> None:
        ours.send(("send", HERE))
        for _ in receive(layout["names"], layout["dtype_names"], layout["shapes"]):
            pass
        ours.recv()

    def pause() -> float:
        ours.send(("send", ENGINE))
        paused: float = engine.load(Weights(version=1, tensors={}, probe=probe, layout=layout), {})[
            "weights/pause_seconds"
        ]
        ours.recv()
        return paused

    took: dict[str, list[float]] = {"raw": [], "transfer": [], "pause": [], "copy": [], "digests": [], "probe": []}
    for index in range(rounds + 1):
        *_, staged = ask("stage")
        one = {"raw": timed(raw_broadcast), "transfer": timed(transfer), "pause": pause()}
        one |= {
            "copy": staged["copy"],
            "digests": staged["digests"],
            "probe": staged["digests and probe"] - staged["digests"],
        }
        if index:
            for name, value in one.items():
                took[name].append(value)
    ours.send(None)
    process.join(10)
    engine.close()
    median = {name: statistics.median(values) for name, values in took.items()}
    size = f"{num_bytes / 1e6:.0f} MB"
    print(
        f"{size}: load and repack {load:.3f} s; " + ", ".join(f"{name} {value:.3f} s" for name, value in median.items())
    )
    emit(
        Row(
            name=f"weights over gloo, {size}: transfer",
            unit="GB/s",
            ours=num_bytes / median["transfer"] / 1e9,
            limit=num_bytes / median["raw"] / 1e9,
            ratio=statistics.median(a / b for a, b in zip(took["raw"], took["transfer"], strict=True)),
            means="ours / raw broadcast",
            goal=">= 0.8",
        )
    )
    least = median["raw"] + load
    emit(
        Row(
            name=f"weights over gloo, {size}: pause of the engine",
            unit="ms",
            ours=1e3 * median["pause"],
            limit=1e3 * least,
            ratio=1e3 * (median["pause"] - least),
            means="milliseconds beyond transfer, load and repacking",
            goal="<= 50",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="only the 40 MB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(make_model(Path(folder, "40"), (320, 7, 5, 896)), options.rounds)
    if not options.small:
        try:
            path = str(smollm2_model())
        except ConfigError as error:
            raise SystemExit(f"540 MB were not measured: {error}") from None
        measure(path, options.rounds)


if __name__ == "__main__":
    main()
