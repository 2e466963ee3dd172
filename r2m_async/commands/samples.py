"""`r2m samples`: what a run answered to its held-out prompts, before training and after."""

from __future__ import annotations

import argparse
import math
import shutil
import textwrap
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import whole_number
from r2m_async.errors import ConfigError

_WIDTH = 110
"""The most letters of a line, and their number where the output is no terminal."""
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""The characters that turn the direction of writing, by their bidirectional class."""
_UNKNOWN = "–"
"""What was not measured."""
_COLUMNS = ("reward", "proxy", "frozen", "gold")


def add_samples(commands: Any) -> None:
    """Adds the command."""
    text = "Show what a run answered to held-out prompts, at its first evaluation and at its last, and all rewards."
    samples = commands.add_parser("samples", help=text, description=text)
    samples.add_argument("run", metavar="RUN", type=Path, help="a run directory of `train` with `evaluation.every`")
    samples.add_argument("--num", type=whole_number, default=3, metavar="N", help="prompts to show (default 3)")
    samples.set_defaults(command=_samples)


def _samples(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.runs.records import read_metrics
    from r2m_async.runs.results import markdown_table
    from r2m_async.runs.samples import prompt_text, read_samples

    if not parsed.run.exists():
        raise ConfigError(f"{parsed.run}: is not there; name the directory of a run of `r2m train`")
    files = [parsed.run / name for name in ("evaluation.jsonl", "samples.jsonl")]
    evaluations, samples = (
        read(file) if file.is_file() else [] for read, file in zip((read_metrics, read_samples), files, strict=True)
    )
    if not evaluations or not samples:
        raise ConfigError(
            f"{parsed.run} has no evaluations with samples: name the directory of a run with evaluation.every set"
        )
    names = [name for name in _COLUMNS if any(name in one for one in evaluations)]
    rows = [
        [f"{one['step']:.0f}", *(_with_error(one, name) for name in names), _number(one, "length", ".1f")]
        for one in evaluations
    ]
    print(markdown_table(["step", *names, "tokens"], rows), end="")
    of_step = {(one["step"], one["prompt_id"]): one for one in samples}
    steps = sorted({step for step, _ in of_step})
    for name in list(dict.fromkeys(name for _, name in of_step))[: parsed.num]:
        prompt = next(one["prompt"] for (_, named), one in of_step.items() if named == name)
        print(f"\n{_shown(f'{name}: {prompt_text(prompt)}', '  ').lstrip()}")
        for step in dict.fromkeys((steps[0], steps[-1])):
            if (step, name) in of_step:  # else the run was killed while it wrote the answers of this evaluation
                print(_answer(of_step[step, name]))
    return {"evaluations": evaluations, "samples": list(of_step.values())}


def _with_error(evaluation: Mapping[str, Any], name: str) -> str:
    """A mean reward with its standard error."""
    error = _number(evaluation, f"{name}_se", ".3f")
    return _number(evaluation, name, ".3f") + (f" ± {error}" if error != _UNKNOWN else "")


def _number(evaluation: Mapping[str, Any], name: str, form: str) -> str:
    value = evaluation.get(name, math.nan)
    return format(value, form) if math.isfinite(value) else _UNKNOWN


def _answer(sample: Mapping[str, Any]) -> str:
    """A line with a response's step, reward and end, and the response."""
    scores = {name: sample.get(name, math.nan) for name in ("reward", "gold")}
    known = "".join(f", {name} {score:.2f}" for name, score in scores.items() if math.isfinite(score))
    end = "" if sample.get("finished", True) else ", cut off"
    return f"  step {sample['step']:.0f}{known}{end}:\n{_shown(sample['response'], '    ')}"


def _shown(text: str, indent: str) -> str:
    """A text with its lines broken and indented."""
    width = max(20, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns) - len(indent))
    lines = [part for line in map(_printable, text.strip().splitlines()) for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(indent + line for line in lines or ["(nothing)"])


def _printable(line: str) -> str:
    """A line in which characters that command a terminal stand as their escapes."""
    # Cc: control characters. Bidirectional ones of Cf turn the direction of all that follows.
    return "".join(
        one.encode("unicode_escape").decode()
        if one != "\t" and (unicodedata.category(one) == "Cc" or unicodedata.bidirectional(one) in _TURNING)
        else one
        for one in line
    )
