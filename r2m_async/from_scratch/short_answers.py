"""A reward that a program can verify: whether an answer is short and whole. `configs/smollm2_cpu.yaml` trains on it."""

from __future__ import annotations

FEWEST, MOST = 5, 25
"""A short answer has this many words."""

_ENDS = (".", "!", "?")


def short_answer(prompt: str, response: str, finished: bool = True) -> float:
    """Returns how short and whole an answer is, from 0 to 1. It is for `reward.functions` and for `evaluation.gold`.

    Half of it is for the end: 0.5 if the answer ends with a full stop, an exclamation mark or a question mark. The
    other half is for the length: 0.5 for 5 to 25 words, and less for more words, down to 0 for 50. Fewer than 5 words
    give 0 in all, since saying nothing is no short answer.

    prompt, finished: not looked at. An answer that was cut off seldom ends with a sentence.
    """
    words = len(response.split())
    if words < FEWEST:
        return 0.0
    whole = response.rstrip().endswith(_ENDS)
    return 0.5 * whole + 0.5 * min(1.0, max(0.0, (2 * MOST - words) / MOST))
