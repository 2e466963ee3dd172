"""Kills writers of checkpoints and damages what they wrote, and counts what a reader makes of it.

    python benchmarks/checkpoint_faults.py --kills 500 --damages 500 --json faults.json

A kill is SIGKILL to a process that saves again and again: over one path, with the filesystem's exchange of names and with the
fallback for those that have none, or under a new name each time with the older ones removed, as a run does. First it
comes at a random instant (`kills`), then before each single call of the save that touches the disk (`instants`). Afterwards the
reader must find the last checkpoint that was finished, or the one that was being written, whole.

A damage changes a whole checkpoint (flipped, zeroed or cut bytes, a missing, mixed or stray file); reading it must name the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from r2m_async import whole
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.runs.checkpoints import MANIFEST, checkpoint_path, checkpoints, read_checkpoint, write_parts

CONFIG = R2MConfig()
KEEP = 2
WAYS = ("exchange", "fallback", "prune")
DAMAGES = ("flip", "zero", "cut", "missing", "mixed", "stray")


def save(path: Path, number: int) -> None:
    """What `Ring.save` does, with a learner that writes a file of its own: small, and known by its number."""
    noise = random.Random(number)
    with whole.whole_directory(path, replace=True) as building:
        (building / "deepspeed" / "policy").mkdir(parents=True)
        (building / "deepspeed" / "policy" / "rank_0.pt").write_bytes(noise.randbytes(20_000))
        names = ("policy_learner", "head_learner", f"policy_weights_{number}", f"head_weights_{number}")
        parts = {name: encode([number, noise.randbytes(5_000)]) for name in names}
        write_parts(building, parts | {"step": encode(number)}, CONFIG)


def number_at(path: Path) -> int:
    """Of a whole checkpoint all of whose parts are of one save. Raises ConfigError."""
    parts = {name: decode(part) for name, part in read_checkpoint(path, CONFIG).items()}
    numbers = {part if name == "step" else part[0] for name, part in parts.items()}
    assert len(numbers) == 1, f"{path} is mixed: {numbers}"
    return numbers.pop()


# Kills


def write_on(run: Path, way: str, number: int, tell: Callable[[str], None]) -> None:
    """One save, and in the way of a run the end of older ones. `tell` is told of its beginning and its end."""
    tell(f"b{number} ")
    save(checkpoint_path(run, number) if way == "prune" else run / "checkpoint", number)
    tell(f"e{number} ")
    for old in checkpoints(run)[:-KEEP] if way == "prune" else ():
        whole.remove_directory(old)


def newest(run: Path, way: str) -> int:
    """What a reader finds. Raises ConfigError where any that it is shown is not whole."""
    shown = checkpoints(run) if way == "prune" else [run / "checkpoint"]
    return [number_at(path) for path in shown][-1]


def killed(
    run: Path, way: str, first: int, delay: float | None = None, call: int | None = None
) -> tuple[list[str], bool]:
    """(what a child told before it was killed, whether it was): `delay` seconds after it began, or before its `call`-th
    call."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        if call is not None:
            calls = iter(range(1, call + 1))

            def hook(event: str, _: object) -> None:
                if event in _TOUCHING and next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
        for number in range(first, first + (1 if call else 10**9)):
            write_on(run, way, number, lambda text: os.write(writer, text.encode()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        words = told.read(1)  # it has begun
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        words += told.read()
    return words.split(), os.WIFSIGNALED(status)


_TOUCHING = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree", "fcntl.flock",
    "ctypes.dlsym",
}  # fmt: skip
"""Audit events of the calls that a save makes; between two of them the disk's names and sizes stay as they are, but for a
file's growth."""


class Trials:
    """One folder in which writers are killed again and again, and the counts of what was found there."""

    def __init__(self, run: Path, way: str) -> None:
        self.run, self.way = run, way
        self.counts: Counter[str] = Counter(kills=0, inside_a_save=0, old=0, new=0, lost=0)
        self._last = 1
        write_on(run, way, 1, lambda text: None)

    def kill(self, **when: float) -> bool:
        """Whether there was a writer to kill, or it had come to its end."""
        told, was_killed = killed(self.run, self.way, self._last + 1, **when)
        finished = max((int(word[1:]) for word in told if word[0] == "e"), default=self._last)
        begun = max((int(word[1:]) for word in told if word[0] == "b"), default=self._last)
        inside = begun > finished
        self.counts["kills"] += was_killed
        self.counts["inside_a_save"] += inside and was_killed
        try:
            found = newest(self.run, self.way)
            self.counts["lost"] += not finished <= found <= begun
            self.counts["new" if found > finished else "old"] += inside and was_killed
            self._last = found
        except (ConfigError, IndexError, AssertionError) as error:
            self.counts["lost"] += 1
            print(f"lost: {error}", file=sys.stderr)
            self._last = begun
        return was_killed

    def left_behind(self) -> int:
        """Hidden things that are there after one more save, which removes what killed writers left."""
        write_on(self.run, self.way, self._last + 1, lambda text: None)
        return sum(path.name.startswith(".") for path in self.run.rglob("*"))


def kills(way: str, number: int, seed: int, folder: Path) -> dict[str, int]:
    """At random instants of the first few saves."""
    rng, trials = random.Random(seed), Trials(folder, way)
    began = time.monotonic()
    for _ in range(3):
        write_on(folder / "timed", way, 1, lambda text: None)
    three_saves = time.monotonic() - began
    for _ in range(number):
        trials.kill(delay=rng.uniform(0, three_saves))
    return trials.counts | {"left_behind": trials.left_behind()}


def instants(way: str, folder: Path) -> dict[str, int]:
    """Before the first call, the second, and so on, to the end of the save."""
    trials = Trials(folder, way)
    for _ in range(KEEP):  # so that there is something to remove
        trials.left_behind()
        trials._last += 1
    call = 1
    while trials.kill(call=call):
        call += 1
    return trials.counts | {"left_behind": trials.left_behind()}


# Damages


def damage(checkpoint: Path, other: Path, kind: str, rng: random.Random) -> str:
    """Does it, and returns the name of the file it did it to."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    while True:
        path = rng.choice(files)
        name = path.relative_to(checkpoint).as_posix()
        data = path.read_bytes()
        changed = bytearray(data)
        at, length = rng.randrange(len(data)), rng.randrange(1, len(data) + 1)
        if kind == "missing":
            path.unlink()
            return name
        if kind == "stray":
            name = rng.choice(
                ["notes.txt", "policy_weights_99.msgpack", "deepspeed/rank_1.pt", "sub/file", "copy.yaml"]
            )
            (checkpoint / name).parent.mkdir(exist_ok=True)
            (checkpoint / name).write_bytes(data)
            return name
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == "cut":
            del changed[-length:]
        elif (other / name).is_file():
            changed = bytearray((other / name).read_bytes())
        if changed != data:
            path.write_bytes(changed)
            return name


def damages(checkpoint: Path, other: Path, config: R2MConfig, number: int, seed: int, folder: Path) -> dict[str, int]:
    """Of copies of one checkpoint; `other` is another of the same run. `unnamed`: refused without the file's name."""
    rng, counts = random.Random(seed), Counter(accepted=0, unnamed=0)
    read_checkpoint(checkpoint, config)
    for trial in range(number):
        kind, copy = DAMAGES[trial % len(DAMAGES)], folder / f"copy-{trial}"
        shutil.copytree(checkpoint, copy)
        name = damage(copy, other, kind, rng)
        try:
            read_checkpoint(copy, config)
            counts["accepted"] += 1
            print(f"accepted: {kind} {name}", file=sys.stderr)
        except ConfigError as error:
            counts[kind] += 1
            # Without its own manifest a checkpoint is refused by its name, or that of any file that another's does not have.
            lost = name == MANIFEST and kind in ("missing", "mixed")
            counts["unnamed"] += str(copy if lost else copy / name) not in str(error)
        shutil.rmtree(copy)
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random ones, of each way")
    parser.add_argument("--damages", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to be tried; default: the temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for way in WAYS:
            exchange = whole._exchange
            if way == "fallback":
                whole._exchange = lambda one, other: False
            results[f"instants, {way}"] = instants(way, folder / f"instants-{way}")
            results[f"kills, {way}"] = kills(way, options.kills, options.seed, folder / f"kills-{way}")
            whole._exchange = exchange
        for number in (1, 2):
            save(folder / f"step-{number}", number)
        numbers = (options.damages, options.seed, folder / "damaged")
        results["damages"] = damages(folder / "step-1", folder / "step-2", CONFIG, *numbers)
    for what, counts in results.items():
        print(f"{what:20} {'  '.join(f'{key} {value}' for key, value in counts.items())}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
