"""Feeds damaged input to everything that reads a file or a message, and counts what it makes of it.

    python benchmarks/fuzz.py --inputs 1000000
    python benchmarks/fuzz.py --kinds codec journal --inputs 10000 --seed 3

Each input is a whole one to which something was done: bytes flipped, cut, put in, doubled or taken from another one; in text
also words that readers are known to stumble over. The reader must accept it, or refuse it with its one error, which names
the file. Anything else is a fault: another exception, more than a second, more than 1 GB of memory. A fault is printed with
the seed that makes the input again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.data.prompts import load_prompts
from r2m_async.errors import CodecError, ConfigError, DataError
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.runs.checkpoints import newest_whole, read_checkpoint, write_parts
from r2m_async.runs.records import jsonl, read_metrics, read_trace
from r2m_async.studies.study import read_study

SECONDS = 1.0
MEMORY = 1024**3
STUMBLES = (
    b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"[[[[", b"{{{{", b"}}}}", b"&a *a", b"!!python/object:os.system", b"<<: *b",
    b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"9" * 5000, b"1:30", b"0x1F", b"\xef\xbb\xbf", b"\r", b"\xe2\x80\xa8", b"'", b'"',
    b"\\", b"#", b"- ", b": ", b"\t", b"__proto__", b"self", b"../..", b"%s{0}", b"-0", b"1_000",
)  # fmt: skip
"""Bytes that readers of text are known to stumble over."""


def mutated(data: bytes, others: list[bytes], rng: random.Random, text: bool) -> bytes:
    """A whole input to which one to four things were done."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(new) + 1)
        end = min(len(new), at + rng.choice((1, 2, 8, 64, 4096)))
        what = rng.randrange(8 if text else 6)
        if what == 0 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del new[at:end]
        elif what == 2:
            del new[at:]
        elif what == 3:
            new[at:at] = new[at:end] * rng.choice((1, 2, 50))
        elif what == 4:
            new[at:end] = rng.randbytes(end - at)
        elif what == 5:
            other = rng.choice(others)
            first = rng.randrange(len(other) + 1)
            new[at:end] = other[first : first + rng.choice((4, 64, 100_000))]
        else:
            new[at : rng.choice((at, end))] = rng.choice(STUMBLES)
    return bytes(new)


# What is read. A reader gets an input and a folder for files, and returns whether it has accepted it.


def read_codec(data: bytes, folder: Path) -> bool:
    try:
        decode(data)
        return True
    except CodecError:
        return False


CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def read_config(data: bytes, folder: Path) -> bool:
    """The first byte says whose config it is. It lies beside the other ones, which it may name as its base."""
    if not (folder / "configs").exists():
        shutil.copytree(CONFIGS, folder / "configs")
    kind = data[0] % 3 if data else 0
    path = folder / "configs" / ("", "reward_model", "studies")[kind] / "fuzzed.yaml"
    path.write_bytes(data[1:])
    try:
        if kind == 2:
            read_study(path, folder / "out")
        else:
            (R2MConfig, RewardModelConfig)[kind].from_yaml(path)
        return True
    except ConfigError as error:
        assert str(folder) in str(error), f"no file is named: {error}"
        return False


def read_data(data: bytes, folder: Path) -> bool:
    path = folder / ("prompts.csv" if data.startswith(b"prompt,") else "prompts.jsonl")
    path.write_bytes(data)
    try:
        load_prompts(str(path), tokenizer=Words(), max_prompt_tokens=64)
        return True
    except DataError as error:
        assert path.name in str(error), f"the file is not named: {error}"
        return False


class Words:
    """A tokenizer: one token for each character."""

    chat_template = eos_token_id = bos_token_id = None
    is_fast, add_bos_token = True, False

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(one) for one in text]}

    encode = lambda self, text, **_: [ord(one) for one in text]  # noqa: E731


def read_metric_records(data: bytes, folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    try:
        (read_trace if data.startswith(b'{"stage') else read_metrics)(path)
        return True
    except DataError as error:
        assert str(path) in str(error), f"the file is not named: {error}"
        return False


def read_group_journal(data: bytes, folder: Path) -> bool:
    from actors.replay_queue import ReplayQueue

    path = folder / "journal" / "step-000001.groups"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    (found,) = ReplayQueue(buffers=True).recover(str(path.parent))
    assert all(str(path) in damage for damage in found["damages"])
    return not found["damages"]


def read_a_checkpoint(data: bytes, folder: Path) -> bool:
    """The first two bytes say which file of a checkpoint is replaced by the rest."""
    run, place = folder / "run", folder / "run" / "checkpoints" / "step-000003"
    if not place.exists():
        place.mkdir(parents=True)
        write_parts(place, CHECKPOINT, R2MConfig())
    names = sorted(path.name for path in place.iterdir())
    path = place / names[data[0] % len(names) if data else 0]
    whole = path.read_bytes()
    path.write_bytes(data[1:])
    try:
        assert newest_whole(run)[0] == place
        read_checkpoint(place, R2MConfig())
        assert data[1:] == whole, "another content was accepted"
        return True
    except ConfigError as error:
        assert str(place) in str(error), f"the file is not named: {error}"
        return False
    finally:
        path.write_bytes(whole)


CHECKPOINT = {"step": encode(3), "policy_learner": encode({"a": [1, 2]}), "head_learner": encode({"b": "x" * 99})}


def seeds_of_codec() -> list[bytes]:
    import torch

    trees = [
        None,
        [1, -5, 2**60, 1.5, "text", b"bytes", (1, (2,)), {"a": {"b": []}, 3: None}],
        {
            "weights": torch.arange(12.0).reshape(3, 4),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "none": torch.zeros(0, 4),
        },
    ]
    return [bytes(encode(tree)) for tree in trees]


def seeds_of_config() -> list[bytes]:
    ours = {"reward_model": b"\1", "studies": b"\2", "cluster": b""}
    kinds = {path: ours.get(path.parent.name, b"\0") for path in sorted(CONFIGS.rglob("*.yaml"))}
    return [kind + path.read_bytes() for path, kind in kinds.items() if kind]


def seeds_of_data() -> list[bytes]:
    rows = [{"prompt": "the river", "answer": 4, "tags": ["a"]}, {"prompt": [{"role": "user", "content": "hi"}]}]
    return [jsonl(rows[:1] * 3).encode(), jsonl(rows[1:] * 2).encode(), b'prompt,answer\n"a, b",1\nriver,2\n']


def seeds_of_metrics() -> list[bytes]:
    steps = ({"step": float(step), "reward/mean": step / 3, "bad": float("nan")} for step in range(1, 6))
    trace = ({"stage": "queue", "method": "put", "step": step, "start": step, "end": step + 0.5} for step in range(4))
    return [jsonl(steps).encode(), jsonl(trace).encode()]


def seeds_of_journal() -> list[bytes]:
    from actors.group_journal import GroupJournal

    with tempfile.TemporaryDirectory() as folder:
        journal = GroupJournal(Path(folder) / "a", 10**6)
        for group_id in range(5):
            journal.append({"group_id": group_id}, {"group": bytes(encode(["x"] * group_id)), "feedback": b"y" * 40})
        return [(Path(folder) / "a").read_bytes()]


def seeds_of_checkpoint() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), CHECKPOINT, R2MConfig())
        return [bytes([index]) + path.read_bytes() for index, path in enumerate(sorted(Path(folder).iterdir()))]


Reader = Callable[[bytes, Path], bool]
KINDS: dict[str, tuple[Reader, Callable[[], list[bytes]], bool, float]] = {
    "codec": (read_codec, seeds_of_codec, False, 0.6),
    "journal": (read_group_journal, seeds_of_journal, False, 0.1),
    "metrics": (read_metric_records, seeds_of_metrics, True, 0.15),
    "data": (read_data, seeds_of_data, True, 0.1),
    "checkpoint": (read_a_checkpoint, seeds_of_checkpoint, True, 0.03),
    "config": (read_config, seeds_of_config, True, 0.02),
}
"""For each kind its reader, its whole inputs, whether it is text, and its share of all inputs: a config takes long."""


class TooLong(BaseException):
    """No `Exception`, so that a reader which catches those does not catch this."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """At most `SECONDS` in the block, by the processor's clock. Memory is limited for good, by `limit_memory`."""

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def limit_memory() -> None:
    """This process may take `MEMORY` bytes more than it has now."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(kind: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Reads `count` inputs of a kind. Returns how many were accepted and refused, and the faults."""
    reader, make_seeds, text, _ = KINDS[kind]
    seeds, counts, faults = make_seeds(), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            rng = random.Random(f"{kind} {seed} {number}")
            data = mutated(rng.choice(seeds), seeds, rng, text)
            try:
                with limits():
                    counts["accepted" if reader(data, Path(name)) else "refused"] += 1
            except (Exception, TooLong):
                counts["faults"] += 1
                if len(faults) < 5:
                    faults.append(
                        f"{kind} --seed {seed}, input {number}: {data[:200]!r}\n{traceback.format_exc(limit=-4)}"
                    )
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs of all kinds together (10000)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares = {kind: KINDS[kind][3] for kind in arguments.kinds}
    bad = False
    print(f"{'what':12} {'inputs':>8} {'accepted':>9} {'refused':>8} {'faults':>7} {'seconds':>8}")
    for kind, share in shares.items():
        KINDS[kind][1]()  # imports are no part of the limits
        limit_memory()
        began, count = time.monotonic(), round(arguments.inputs * share / sum(shares.values()))
        counts, faults = fuzz(kind, count, arguments.seed)
        seconds = time.monotonic() - began
        print(
            f"{kind:12} {count:8} {counts['accepted']:9} {counts['refused']:8} {counts['faults']:7} {seconds:8.1f}",
            flush=True,
        )
        for fault in faults:
            print(fault, file=sys.stderr)
        bad = bad or bool(faults)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
