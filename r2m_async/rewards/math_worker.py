"""Compares mathematical answers in a process of its own, which `mathematics.py` starts and ends.

A response may hold a number such as 9^9^9^9. SymPy then computes for ever, and nothing in the same process goes on. So the
comparison has a process that can be killed.

It reads a line of JSON with `answer` and `response`, and writes a line of JSON: true, false, or null if the answer itself
cannot be read. It is run as a script and imports nothing of this package.
"""

from __future__ import annotations

import json
import sys


def right(answer: str, response: str) -> bool | None:
    """Whether the last answer in a response equals the right one. None if the right one is no mathematics."""
    from math_verify import parse, verify

    answer = answer.rpartition("####")[2].strip()  # GSM8K has its answers after this mark
    # Bare text is read as a formula as a whole. In a sentence, `2x+1` would be the number 2.
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(answer if marked else f"${answer}$", parsing_timeout=None)
    return verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None) if gold else None


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(right(**json.loads(line))), flush=True)
