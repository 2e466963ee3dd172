"""A calculator that the policy may use while it answers: a rollout function, its reward, and prompts for it.

    python examples/calculator.py 200 > sums.jsonl
    PYTHONPATH=examples r2m train examples/calculator.yaml data.prompts=sums.jsonl

The policy writes `<calc>12*7</calc>`. The calculator writes the result behind it, and the policy goes on. Only what the
policy wrote is trained.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import sys
from collections.abc import Callable
from typing import Any

from r2m_async.rollouts import Rollout

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
_LONGEST, _LARGEST = 60, 1e12


async def play(rollout: Rollout, *, max_calls: int = 3) -> None:
    """Lets the policy write, and calculates what it asks for, at most `max_calls` times.

    It notes in `rollout.info` how often it calculated, and the last number of the response.
    """
    rollout.info["calls"] = 0
    try:
        for _ in range(max_calls):
            turn = await rollout.generate(stop="</calc>")
            if turn.stop is None:
                return
            # The token that completes the stop string may have more letters after it.
            asked = turn.text.partition("</calc>")[0].rpartition("<calc>")[2]
            rollout.append(f"<result>{calculated(asked)}</result>")
            rollout.info["calls"] += 1
        await rollout.generate()
    finally:
        # The response may end in any line above, when it has no token left.
        numbers = re.findall(r"-?\d+(?:\.\d+)?", rollout.response)
        rollout.info["answer"] = numbers[-1] if numbers else None


def calculated(text: str) -> str:
    """Returns the value of an expression with + - * / and brackets as text, or `error`. Nothing else is ever run."""
    try:
        if len(text) > _LONGEST:
            raise ValueError(text)
        return f"{_value(ast.parse(text.strip(), mode='eval').body):.10g}"
    except (SyntaxError, ValueError, ArithmeticError):
        return "error"


def _value(node: ast.expr) -> float:
    """The value of a part of an expression. Raises ValueError for anything but numbers and the five operators."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result: float = value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand)
        case _:
            raise ValueError(node)
    if not abs(result) <= _LARGEST:
        raise ValueError(result)
    return result


def right(info: dict[str, Any], answer: str) -> float:
    """A reward function: 1 if the last number of the response is the answer, and 0 otherwise."""
    return float(info["answer"] is not None and float(info["answer"]) == float(answer))


def asked(info: dict[str, Any]) -> float:
    """A reward function: 1 if the policy has used the calculator, and 0 otherwise."""
    return float(info["calls"] > 0)


def problems(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns records of a question each: a conversation that shows how to use the calculator, and the answer."""
    draw, records = random.Random(seed), []
    for _ in range(num):
        a, b = draw.randrange(11, 99), draw.randrange(3, 99)
        shown = [
            ("user", "What is 31 * 4?"),
            ("assistant", "<calc>31*4</calc><result>124</result> The answer is 124."),
            ("user", "What is 18 + 75?"),
            ("assistant", "<calc>18+75</calc><result>93</result> The answer is 93."),
            ("user", f"What is {a} * {b}?"),
        ]
        records.append({"prompt": [{"role": r, "content": c} for r, c in shown], "answer": str(a * b)})
    return records


if __name__ == "__main__":
    for record in problems(int(sys.argv[1])):
        print(json.dumps(record))
