"""The codec and the replay queue against the least that they must do: `python benchmarks/codec.py [--no-ray]`.

A group has 8 responses with states of 4 MiB each. Measured by turns, in one process, as medians and medians of paired ratios:

    encode     against a copy of the same tensors into new memory, which has to be mapped, too; the limit is a copy into
               memory that is mapped already
    decode     shares the memory of the buffer, which is checked; its time does not depend on the size of the tensors
    store      encode, `ray.put`, `ray.get` and decode, against `ray.put` and `ray.get` of the dataclass itself
    queue      put and get of a group's states by the replay queue in its Ray process, against an actor that has a dict and
               nothing else: the rule that the queue owns what it acknowledged costs these two copies by anybody
    metadata   a put, a get and a free of small parts with up to 10,000 groups in the queue
    memory     the real controller with a learner 50 times as slow as the rollouts, on a virtual clock: the most bytes that
               the groups under way hold, against `queue.max_bytes`
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import torch
from rows import Row, emit

from actors.replay_queue import ReplayQueue
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.ring.simulator import SimulatedStage, StageTimes, plan_without_models, run_virtually
from r2m_async.ring.stages import QueueStage, Stages, local_bytes
from r2m_async.trajectories import PolicyFeedback

K, ROWS, D = 8, 1024, 2048


def group() -> PolicyFeedback:
    states = tuple(torch.randn(ROWS, D).bfloat16() for _ in range(K))
    return PolicyFeedback(group_id=0, hidden_states=states, greedy=None, policy_version=0)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def by_turns(rounds: int, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds by name of every round, after one that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            took = timed(run)
            if index:
                seconds[name].append(took)
    return seconds


def paired(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def of_codec(rounds: int) -> None:
    feedback = group()
    arrays = [one.view(torch.uint8).numpy().reshape(-1) for one in feedback.hidden_states]
    size = sum(map(len, arrays))
    mapped = np.ones(size, np.uint8)

    def copy(target: np.ndarray) -> None:
        end = 0
        for array in arrays:
            target[end : end + len(array)] = array
            end += len(array)

    buffer = encode(feedback)
    got = decode(buffer)
    first = np.frombuffer(buffer, np.uint8).ctypes.data
    for one, other in zip(got.hidden_states, feedback.hidden_states, strict=True):
        assert torch.equal(one, other) and first <= one.data_ptr() < first + len(buffer), "a tensor was copied"
    runs = {
        "encode": lambda: encode(feedback),
        "new": lambda: copy(np.empty(size, np.uint8)),
        "mapped": lambda: copy(mapped),
        "decode": lambda: decode(buffer),
    }
    seconds = by_turns(rounds, runs)
    rate = {name: size / 1e9 / statistics.median(values) for name, values in seconds.items()}
    emit(
        Row(
            name="codec: encode a group of 8 x 4 MiB states",
            unit="GB/s",
            ours=rate["encode"],
            other=rate["new"],
            limit=rate["mapped"],
            ratio=paired(seconds["new"], seconds["encode"]),
            means="ours / copy into new memory",
            goal=">= 0.6",
        )
    )
    emit(
        Row(
            name="codec: decode it, without a copy",
            unit="ms",
            ours=1e3 * statistics.median(seconds["decode"]),
            other=1e3 * statistics.median(seconds["mapped"]),
            ratio=paired(seconds["decode"], seconds["mapped"]),
            means="ours / one copy",
            goal="<= 1",
        )
    )


class Dict:
    """The bare minimum: an actor that owns what it was given."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def put(self, key: int, payload: Any) -> int:
        self._kept[key] = payload
        return len(self._kept)

    def get(self, key: int) -> Any:
        return self._kept[key]

    def free(self, key: int) -> None:
        del self._kept[key]


def queue_of_buffers(config: R2MConfig, workload: Any) -> ReplayQueue:
    return ReplayQueue(buffers=True)


def on_ray(rounds: int) -> None:
    import ray

    from r2m_async.launch.ray_stages import RayStage

    ray.init("local", include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=1 << 30)
    feedback = group()
    size = sum(one.nbytes for one in feedback.hidden_states)
    store = by_turns(
        rounds,
        {
            "ours": lambda: decode(ray.get(ray.put(np.frombuffer(encode(feedback), np.uint8)))),
            "plain": lambda: ray.get(ray.put(feedback)),
        },
    )
    rate = {name: size / 1e9 / statistics.median(values) for name, values in store.items()}
    emit(
        Row(
            name="store: a group of 8 x 4 MiB states through Ray's object store",
            unit="GB/s",
            ours=rate["ours"],
            other=rate["plain"],
            ratio=paired(store["plain"], store["ours"]),
            means="ray.put of the dataclass / ours",
        )
    )
    payload = np.frombuffer(encode(feedback), np.uint8)
    small = np.frombuffer(encode({"reward": 1.0}), np.uint8)
    stage = QueueStage(RayStage("queue", queue_of_buffers, R2MConfig(), None, None, {"num_cpus": 0}))
    bare = ray.remote(num_cpus=0)(Dict).remote()

    async def ours(what: np.ndarray) -> None:
        await stage.put(0, ("feedback",), ray.put(what))
        _, got = await stage.get((0,), "feedback")
        assert len(await got) == len(what)
        await stage.free((0,))

    async def least(what: np.ndarray) -> None:
        await bare.put.remote(0, ray.put(what))
        assert len(await bare.get.remote(0)) == len(what)
        await bare.free.remote(0)

    loop = asyncio.new_event_loop()

    def runs(what: np.ndarray) -> dict[str, Callable[[], object]]:
        return {
            "ours": lambda: loop.run_until_complete(ours(what)),
            "least": lambda: loop.run_until_complete(least(what)),
        }

    large, little = by_turns(rounds, runs(payload)), by_turns(5 * rounds, runs(small))
    emit(
        Row(
            name="queue: put, get and free of 8 x 4 MiB states in its Ray process",
            unit="GB/s",
            ours=size / 1e9 / statistics.median(large["ours"]),
            other=size / 1e9 / statistics.median(large["least"]),
            ratio=paired(large["least"], large["ours"]),
            means="an actor with a dict / ours",
            goal=">= 0.8",
        )
    )
    emit(
        Row(
            name="queue: one call with a small part in its Ray process",
            unit="ms",
            ours=1e3 * statistics.median(little["ours"]) / 3,
            other=1e3 * statistics.median(little["least"]) / 3,
            limit=1.0,
            ratio=1e3 * statistics.median(little["ours"]) / 3,
            means="milliseconds",
            goal="<= 1",
        )
    )
    loop.close()
    ray.shutdown()


def metadata(rounds: int) -> None:
    def seconds_at(num_groups: int) -> float:
        queue = ReplayQueue()
        for index in range(num_groups):
            queue.put(index, ("group", "feedback", "embeddings"), 0, 0, 0)
        repeats = 1000

        def calls() -> None:
            for _ in range(repeats):
                queue.put(-1, ("group", "feedback", "embeddings"), 0, 0, 0)
                queue.get((-1,), "group")
                queue.free((-1,))

        return min(timed(calls) for _ in range(rounds)) / repeats

    few, many = seconds_at(10), seconds_at(10_000)
    emit(
        Row(
            name="queue: a put, a get and a free with 10,000 groups in it",
            unit="us",
            ours=1e6 * many,
            other=1e6 * few,
            ratio=many / few,
            means="with 10,000 groups / with 10",
            goal="<= 1.5",
        )
    )


class CountingQueue(SimulatedStage):
    """A queue that takes no time, and counts the groups that it holds."""

    most = 0

    def __init__(self) -> None:
        super().__init__("queue", lambda method: 0.0)
        self._held: set[int] = set()

    async def call(self, method: Any, *args: Any) -> tuple[Any, ...]:
        if method.name == "put":
            self._held.add(args[0])
        if method.name == "free":
            self._held -= set(args[0])
        self.most = max(self.most, len(self._held))
        return await super().call(method, *args)


def memory() -> None:
    times = StageTimes(generate=0.1, train=40.0)  # 8 groups in 0.8 s, and a step in 40
    config = R2MConfig.from_dict(
        {
            "run": {"num_steps": 12},
            "rollouts": {"prompts_per_step": 8, "num_actors": 1},
            "scheduling": {"max_policy_age": 10, "max_head_age": 10, "stall_after": 1e6},
        }
    )
    each, limit = 64 << 20, 20 * (64 << 20)
    plan = replace(plan_without_models(config), max_bytes=limit, group_bytes=each)
    queue = CountingQueue()

    def stage(name: str) -> SimulatedStage:
        return SimulatedStage(name, lambda method: getattr(times, method, 0.0), group_bytes=each)

    stages = Stages.carried_by(
        rollouts=(stage("rollout-0"),),
        queue=queue,
        annotators=(stage("annotator-0"),),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        **local_bytes(),
    )
    run_virtually(config, plan, stages)
    emit(
        Row(
            name="queue: most bytes held with a learner 50 times as slow as the rollouts",
            unit="MiB",
            ours=queue.most * each / 2**20,
            limit=limit / 2**20,
            ratio=queue.most * each / limit,
            means="ours / queue.max_bytes",
            goal="<= 1",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-ray", action="store_true", help="only what needs no Ray")
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_codec(options.rounds)
    metadata(options.rounds)
    memory()
    if not options.no_ray:
        on_ray(options.rounds)


if __name__ == "__main__":
    main()
