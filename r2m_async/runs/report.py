"""Writes the report of a run, or of several compared: one HTML file with everything in it, which asks the network for nothing.

    write_report([run], run / "report.html")

The page has the panels of `panels.py`, the answers to held-out prompts over time, and the configs. plotly.js draws the
panels; it lies packed in the page. Whatever comes from files, also what models wrote, is shown as text. A Content Security
Policy forbids the page to load anything, and to run any script but its own two.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.errors import ConfigError
from r2m_async.runs.directory import config_of_run
from r2m_async.runs.drawing import COLORS
from r2m_async.runs.panels import Panel, Run, sections
from r2m_async.runs.records import Records, column, finite_or_null, read_metrics, read_records, read_trace
from r2m_async.runs.resuming import keys_of
from r2m_async.runs.samples import prompt_text, read_samples
from r2m_async.runs.view import clock
from r2m_async.whole import write_file

NUM_PROMPTS = 12
"""The most held-out prompts whose answers are shown."""
NUM_ANSWERED = 6
"""The most evaluations of which an answer is shown, spread over the run."""
MAX_CHARACTERS = 2000
"""Where a prompt and an answer are cut."""
LAST_SHARE = 0.1
"""The share of a run's steps, the last ones, of which the table at the top has means."""


def write_report(directories: Sequence[Path], out: Path) -> None:
    """Writes the report of runs. directories: of one run, or of several that are compared.

    Raises ConfigError if a directory is not that of a run, DataError if a record cannot be read, and DiskError.
    """
    runs = [_read(path, label) for path, label in zip(directories, _labels(directories), strict=True)]
    write_file(out, page(runs).encode("utf-8", "replace"))  # JSON may hold halves of characters


def page(runs: Sequence[Run]) -> str:
    """Returns the HTML of the report of runs, at least one."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs of r2m-async"
    panels = sections(runs)
    figures = [panel.figure for _, ones in panels for panel in ones if panel.figure is not None]
    script = _resource("report.js")
    library, packed = _library()
    parts = {
        "title": html.escape(title),
        "policy": _policy(library, _digest(script)),
        "body": "\n".join(_body(title, runs, panels)),
        "plotly": packed,
        # No `<` can end the element that holds the figures.
        "figures": json.dumps(finite_or_null(figures), allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    # In one pass, so that nothing that is put in is taken for a place.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _resource("report.html"))


@functools.cache
def _library() -> tuple[str, str]:
    """The digest of plotly.js, and the library itself, packed: 2 MB in place of 5."""
    from plotly.offline import get_plotlyjs  # it takes a moment, and most of the other commands do without

    text = get_plotlyjs()
    return _digest(text), base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _digest(script: str) -> str:
    """What the Content Security Policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _policy(*scripts: str) -> str:
    """The Content Security Policy of the page. scripts: the digests of all scripts that may run."""
    return f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline'; img-src data: blob:"


def _resource(name: str) -> str:
    return files("r2m_async.runs").joinpath(name).read_text(encoding="utf-8")


# Reading


def _read(path: Path, label: str) -> Run:
    config = config_of_run(path)
    if not (path / "metrics.jsonl").is_file():
        raise ConfigError(f"{path}: is no run of `r2m train`: it has no metrics.jsonl")

    def there(name: str, read: Any) -> Records:
        found: Records = read(path / name) if (path / name).is_file() else []
        return found

    return Run(
        path=path,
        label=label,
        config=config,
        steps=read_metrics(path / "metrics.jsonl"),
        evaluations=there("evaluation.jsonl", read_metrics),
        samples=there("samples.jsonl", read_samples),
        trace=there("trace.jsonl", read_trace),
        resumes=there("resumes.jsonl", read_records),
    )


def _labels(directories: Sequence[Path]) -> list[str]:
    """What each run is called: the name of its directory, or where two have the same, the whole path."""
    names = [path.absolute().name for path in directories]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label}: stands twice; name each run once")
    return labels


# The page


def _body(title: str, runs: Sequence[Run], panels: Sequence[tuple[str, Sequence[Panel]]]) -> Iterable[str]:
    yield f"<h1>{html.escape(title)}</h1>"
    if len(runs) > 1:
        yield "<nav>"
        for place, run in enumerate(runs):
            color = COLORS[place % len(COLORS)]
            box = f'<input type="checkbox" value="{place}" checked autocomplete="off">'
            yield f'<label>{box}<i style="background:{color}"></i>{html.escape(run.label)}</label>'
        yield "</nav>"
    yield from _glance(runs)
    if len(runs) > 1:
        yield from _differences(runs)
    for heading, ones in panels:
        yield f'<h2>{heading}</h2>\n<div class="panels">'
        for panel in ones:
            yield f'<section class="panel{" wide" if panel.wide else ""}"><h3>{html.escape(panel.title)}</h3>'
            yield '<div class="figure"></div>' if panel.figure is not None else '<p class="missing">nothing to show</p>'
            yield "".join(f'<p class="note">{html.escape(note)}</p>' for note in panel.notes) + "</section>"
        yield "</div>"
    yield "<h2>Answers to held-out prompts</h2>"
    yield from _answers(runs)
    yield "<h2>Configs</h2>"
    for run in runs:
        yield f"<details><summary>{html.escape(run.label)}</summary>"
        yield f'<div class="sheet"><pre>{html.escape(run.config.to_yaml())}</pre></div></details>'


def _glance(runs: Sequence[Run]) -> Iterable[str]:
    """A row for each run: how far it came, and the means of its last steps."""
    means = {
        "proxy": "reward/mean",
        "gold": "reward/gold",
        "KL": "kl/sequence",
        "tokens": "length/mean",
        "responses/s": "throughput/responses_per_s",
        "policy age": "age/policy_mean",
    }
    counts = {"issued again": "ledger/reissued", "given up": "ledger/voided", "rings built anew": "restarts/ring"}
    head = ["steps", "time", *means, *counts, "resumed"]
    yield (
        '<div class="sheet"><table><tr><th>run</th>'
        + "".join(f'<th class="number">{one}</th>' for one in head)
        + "</tr>"
    )
    for run in runs:
        done = int(run.steps[-1]["step"]) if run.steps else 0
        last = run.steps[-max(1, round(len(run.steps) * LAST_SHARE)) :]
        seconds = run.steps[-1].get("time/since_start", math.nan) if run.steps else math.nan
        values = [f"{done} of {run.config.run.num_steps}", clock(seconds) if math.isfinite(seconds) else seconds]
        values += [_mean(last, key) for key in means.values()]
        values += [run.steps[-1].get(key, math.nan) if run.steps else math.nan for key in counts.values()]
        yield f'<tr><td class="name">{html.escape(run.label)}</td>{"".join(map(_cell, [*values, float(len(run.resumes))]))}</tr>'
    yield f'</table><p class="note">Means are those of the last {LAST_SHARE:.0%} of the steps. – was not measured.</p></div>'
    for run in runs:
        for resume in run.resumes:
            told = f"{run.label} was resumed after step {resume.get('step'):g}, {resume.get('at')}. {resume.get('because') or ''}"
            yield f'<p class="note">{html.escape(told)}</p>'


def _mean(records: Records, key: str) -> float:
    values = column(records, key)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _cell(value: str | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return '<td class="lacking">–</td>'
    return f'<td class="number">{value if isinstance(value, str) else f"{value:.4g}"}</td>'


def _differences(runs: Sequence[Run]) -> Iterable[str]:
    """The keys in which the configs differ, with the value of each run."""
    yield "<h2>What differs in the configs</h2>"
    configs = [keys_of(run.config) for run in runs]
    differing = [key for key in configs[0] if any(one[key] != configs[0][key] for one in configs)]
    if not differing:
        yield '<p class="note">Nothing: the configs are the same.</p>'
        return
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    yield f'<div class="sheet"><table><tr><th>key</th>{head}</tr>'
    for key in differing:
        values = "".join(f'<td class="value">{html.escape(json.dumps(one[key], default=str))}</td>' for one in configs)
        yield f"<tr><td><code>{html.escape(key)}</code></td>{values}</tr>"
    yield "</table></div>"


def _answers(runs: Sequence[Run]) -> Iterable[str]:
    """What the runs answered to the same held-out prompts, over time."""
    for run in runs:
        if not run.samples:
            told = f"not recorded by {run.label}: samples.jsonl (needs evaluation.every)"
            yield f'<p class="note">{html.escape(told)}</p>'
    with_samples = [run for run in runs if run.samples]
    answered = [{(one["step"], one["prompt_id"]): one for one in run.samples} for run in with_samples]
    prompts = list(dict.fromkeys(name for of_run in answered for _, name in of_run))
    if len(prompts) > NUM_PROMPTS:
        yield f'<p class="note">{NUM_PROMPTS} of {len(prompts)} prompts are shown; samples.jsonl has all.</p>'
    steps = _spread(sorted({step for of_run in answered for step, _ in of_run}))
    for number, name in enumerate(prompts[:NUM_PROMPTS]):
        prompt = next(one["prompt"] for of_run in answered for (_, named), one in of_run.items() if named == name)
        yield f"<details{' open' if number == 0 else ''}><summary>{html.escape(str(name))}</summary>"
        yield f'<div class="sheet"><pre>{_cut(prompt_text(prompt))}</pre></div>'
        head = "".join(f"<th>{html.escape(run.label)}</th>" for run in with_samples)
        yield f'<div class="sheet"><table class="answers"><tr><th>step</th>{head}</tr>'
        for step in steps:
            cells = "".join(_answer(of_run.get((step, name))) for of_run in answered)
            yield f'<tr><td class="number">{step:g}</td>{cells}</tr>'
        yield "</table></div></details>"


def _spread(steps: Sequence[float]) -> list[float]:
    """At most `NUM_ANSWERED` of the steps: the first, the last, and some between."""
    places = np.linspace(0, len(steps) - 1, min(NUM_ANSWERED, len(steps))).round().astype(int)
    return [steps[place] for place in dict.fromkeys(places.tolist())]


def _answer(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return '<td class="lacking">–</td>'
    scores = [f"{name} {sample[name]:.3g}" for name in ("reward", "gold") if math.isfinite(sample.get(name, math.nan))]
    scores += [] if sample.get("finished", True) else ["cut off"]
    return f'<td><span class="scores">{", ".join(scores)}</span><pre>{_cut(sample["response"])}</pre></td>'


def _cut(text: str) -> str:
    """A text for HTML, without its end if it is too long."""
    more = len(text) - MAX_CHARACTERS
    return html.escape(text[:MAX_CHARACTERS]) + (f"<i> … {more} more characters</i>" if more > 0 else "")
