"""`r2m samples`: what a run answered to its held-out prompts, before training and after."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2m_async.errors import ConfigError

_WIDTH = 110
_COLUMNS = ("reward", "proxy", "frozen", "gold")


def add_samples(commands: Any) -> None:
    """Adds the command."""
    text = "Show what a run answered to held-out prompts, at its first evaluation and at its last, and all rewards."
    samples = commands.add_parser("samples", help=text, description=text)
    samples.add_argument("run", metavar="RUN", type=Path, help="a run directory of `train` with `evaluation.every`")
    samples.add_argument("--num", type=int, default=3, metavar="N", help="prompts to show (default 3)")
    samples.set_defaults(command=_samples)


def _samples(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.runs.records import read_metrics
    from r2m_async.runs.results import markdown_table
    from r2m_async.runs.samples import prompt_text, read_samples

    files = [parsed.run / name for name in ("evaluation.jsonl", "samples.jsonl")]
    evaluations, samples = (
        read(file) if file.is_file() else [] for read, file in zip((read_metrics, read_samples), files, strict=True)
    )
    if not evaluations or not samples:
        raise ConfigError(
            f"{parsed.run} has no evaluations with samples: name the directory of a run with evaluation.every set"
        )
    names = [name for name in _COLUMNS if name in evaluations[0]]
    rows = [
        [f"{one['step']:.0f}", *(_with_error(one, name) for name in names), f"{one['length']:.1f}"]
        for one in evaluations
    ]
    print(markdown_table(["step", *names, "tokens"], rows), end="")
    of_step = {(one["step"], one["prompt_id"]): one for one in samples}
    steps = sorted({step for step, _ in of_step})
    for name in list(dict.fromkeys(name for _, name in of_step))[: parsed.num]:
        prompt = next(one["prompt"] for (_, named), one in of_step.items() if named == name)
        print(f"\n{name}: {_shown(prompt_text(prompt), '  ').lstrip()}")
        for step in dict.fromkeys((steps[0], steps[-1])):
            if (step, name) in of_step:  # else the run was killed while it wrote the answers of this evaluation
                print(_answer(of_step[step, name]))
    return {"evaluations": evaluations, "samples": list(of_step.values())}


def _with_error(evaluation: Mapping[str, Any], name: str) -> str:
    """A mean reward with its standard error."""
    return f"{evaluation.get(name, math.nan):.3f} ± {evaluation.get(f'{name}_se', math.nan):.3f}"


def _answer(sample: Mapping[str, Any]) -> str:
    """A line with a response's step, reward and end, and the response."""
    scores = {name: sample.get(name, math.nan) for name in ("reward", "gold")}
    known = "".join(f", {name} {score:.2f}" for name, score in scores.items() if math.isfinite(score))
    end = "" if sample.get("finished", True) else ", cut off"
    return f"  step {sample['step']:.0f}{known}{end}:\n{_shown(sample['response'], '    ')}"


def _shown(text: str, indent: str) -> str:
    """A text with its lines broken and indented."""
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    return "\n".join(indent + line for line in lines or ["(nothing)"])
