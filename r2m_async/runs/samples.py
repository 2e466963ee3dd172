"""Reads samples.jsonl: what a run answered to held-out prompts at each evaluation."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

from r2m_async.errors import DataError
from r2m_async.runs.records import read_records


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Returns the records of samples.jsonl, which have the fields of `Sample` and `step`.

    Of an evaluation that a resumed run made again, the newer records count. Raises DataError.
    """
    samples = read_records(path, {"step": Real, "prompt_id": str, "response": str})
    for sample in samples:
        prompt = sample.get("prompt")
        turns = prompt if isinstance(prompt, list) else []
        if not isinstance(prompt, str) and not (turns and all(_is_turn(turn) for turn in turns)):
            raise DataError(f"{path}: step {sample['step']:g} has {str(prompt)[:60]!r} as 'prompt': it was changed")
        for name in ("reward", "gold"):
            if not isinstance(score := sample.get(name, math.nan), Real):
                raise DataError(f"{path}: step {sample['step']:g} has {str(score)[:60]!r} as {name!r}: it was changed")
    return list({(one["step"], one["prompt_id"]): one for one in samples}.values())


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)


def prompt_text(prompt: str | list[list[str]]) -> str:
    """Returns a prompt as text. Of several turns each begins with its role."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0][1] if len(prompt) == 1 else "\n".join(f"{role}: {text}" for role, text in prompt)
