"""The form in which benchmarks print results, and what collects them into a table.

A script prints one line for each result: `ROW ` and the fields of `Row` as JSON. `run` runs a script with a time limit of its
own, and takes these lines out of its output. So a script that fails, or hangs, costs the rows that it has not printed yet.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_MARK = "ROW "
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result: ours, what it is held against, and their ratio, all of one run."""

    name: str
    """What was measured. It is the same in every run, so that runs can be compared."""
    unit: str
    """Of `ours`, `other` and `limit`."""
    ours: float
    other: float | None = None
    """What a user would pick instead, or the plain way to do the same. None if there is no such thing."""
    limit: float | None = None
    """What cannot be beaten, as the script derives it. None if it is not known."""
    ratio: float
    """The number that counts. Paired measurements give the median of their ratios, not the ratio of medians."""
    means: str
    """What `ratio` is, e.g. `limit / ours`."""
    goal: str = ""
    """`>= 0.8` or `<= 2`: what the ratio should be. Empty: nothing was promised."""

    def __post_init__(self) -> None:
        if self.goal and self.goal.split()[0] not in (">=", "<="):
            raise ValueError(f"goal {self.goal!r} of {self.name!r} must be '>= NUMBER' or '<= NUMBER'")

    @property
    def met(self) -> bool | None:
        """Whether the goal is met. None without a goal."""
        if not self.goal:
            return None
        sign, number = self.goal.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller ratio is the better one."""
        return self.goal.startswith("<=")


def emit(row: Row) -> None:
    """Prints a row, for people and for `run`."""
    told = {True: ", met", False: ", NOT MET", None: ""}[row.met]
    goal = f" (goal {row.goal}{told})" if row.goal else ""
    sides = " ".join(
        f"{name} {value:.4g}" for name in ("ours", "other", "limit") if (value := getattr(row, name)) is not None
    )
    print(f"{row.name}: {sides} {row.unit}; {row.means} = {row.ratio:.3g}{goal}", flush=True)
    print(_MARK + json.dumps(asdict(row)), flush=True)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one script."""

    command: str
    seconds: float
    rows: list[Row] = field(default_factory=list)
    failure: str = ""
    """Why it did not end well: its last lines, or that its time was up. Empty if it did."""


def run(command: Sequence[str], limit: float, name: str = "") -> Outcome:
    """Runs a script, and ends it with all its processes after `limit` seconds. Its output is shown as it comes.

    name: the command as the table has it. Empty: the command itself.
    """
    began, lines, late = time.monotonic(), [], False
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    told = b""
    while True:
        # The pipe may stay open after the script's end, in a process that it has left behind.
        ended = process.poll() is not None
        told += process.stdout.read() or b""
        *whole, told = told.split(b"\n")
        for line in (one.decode(errors="replace") for one in whole):
            lines.append(line)
            if not line.startswith(_MARK):
                print(line, flush=True)
        late = time.monotonic() - began > limit
        if ended or late:
            break
        time.sleep(0.02)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdout.close()
    lines += [told.decode(errors="replace")] if told else []
    rows = [Row(**json.loads(line.removeprefix(_MARK))) for line in lines if line.startswith(_MARK)]
    failure = ""
    if late and not ended:
        failure = f"its {limit:g} s were up"
    elif process.returncode:
        last = [line for line in lines if line.strip() and not line.startswith(_MARK)][-3:]
        failure = f"exit status {process.returncode}: " + " | ".join(last)
    return Outcome(
        command=name or " ".join(map(str, command)), seconds=time.monotonic() - began, rows=rows, failure=failure
    )


def machine() -> str:
    """Says in a line on which machine and with which libraries this is measured."""
    told = [processor(), f"{os.cpu_count()} cores", f"Python {platform.python_version()}"]
    try:
        import torch

        told.append(f"torch {torch.__version__}")
        if torch.cuda.is_available():
            told.insert(0, torch.cuda.get_device_name())
        import transformers

        told.append(f"transformers {transformers.__version__}")
    except ImportError as error:
        told.append(str(error))
    return ", ".join(told)


def processor() -> str:
    """The name of this machine's processor, as far as it is known."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit that is checked out, with `+` if files differ from it. Empty outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if changed else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Writes a table of all outcomes to `path`, which ends in .md, and the same as JSON beside it."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    lines = [f"# {title}", "", f"{machine()}. Commit {commit()}, {when} UTC, load {os.getloadavg()[0]:.1f}.", ""]
    lines += [
        "| what | unit | ours | other | limit | ratio | is | goal | command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        for row in outcome.rows:
            verdict = {True: " met", False: " **not met**", None: ""}[row.met]
            sides = " | ".join(map(_number, (row.ours, row.other, row.limit)))
            cells = (
                row.name,
                row.unit,
                sides,
                f"{row.ratio:.3g}",
                row.means,
                row.goal + verdict,
                f"`{outcome.command}`",
            )
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| command | seconds | what failed |", "|---|---|---|"]
    for outcome in outcomes:
        failed = outcome.failure.replace("|", "/").replace("\n", " ") or "nothing"
        lines.append(f"| `{outcome.command}` | {outcome.seconds:.0f} | {failed} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = {"machine": machine(), "commit": commit(), "when": when, "outcomes": [asdict(one) for one in outcomes]}
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def outcomes_of(text: str) -> list[Outcome]:
    """What a JSON file that `write` wrote has."""
    outcomes = json.loads(text)["outcomes"]
    return [Outcome(**one | {"rows": [Row(**row) for row in one["rows"]]}) for one in outcomes]


def rows_of(text: str) -> dict[str, Row]:
    """The rows by name of a JSON file that `write` wrote."""
    return {row.name: row for outcome in outcomes_of(text) for row in outcome.rows}


def slower(now: dict[str, Row], then: dict[str, Row], tolerance: float) -> list[str]:
    """A line for each row whose ratio is worse than it was by more than `tolerance`, a share, or which is gone."""
    told = []
    for name, old in then.items():
        if name not in now:
            told.append(f"{name}: was {old.ratio:.3g} ({old.means}), and was not measured now")
            continue
        new = now[name].ratio
        worse = new / old.ratio - 1 if old.lower_is_better else old.ratio / new - 1
        if worse > tolerance:
            told.append(f"{name}: {old.means} was {old.ratio:.3g} and is {new:.3g}, worse by {worse:.0%}")
    return told


if __name__ == "__main__":
    sys.exit("this is a module of the other benchmarks")
