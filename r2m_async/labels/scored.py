"""`by_score`: labels from a function that scores one response, such as a gold reward."""

from __future__ import annotations

from r2m_async.errors import FunctionFailed
from r2m_async.plugins import as_number, called, named_function, shown


def by_score(prompt: str, first: str, second: str, first_finished: bool, second_finished: bool, score: str) -> str:
    """Returns `first`, `second` or `tie`: which of two responses has the higher score.

    Args:
        prompt: the prompt, as the policy reads it.
        first, second: the responses.
        first_finished, second_finished: whether the policy ended them itself.
        score: the function f(prompt, response, finished) -> number, as `module:attr`, like `evaluation.gold`.

    Raises FunctionFailed if the function fails, or returns what cannot be compared.
    """
    function, scores = named_function(score, "labels.options.score"), []
    for which, response, finished in (("first", first, first_finished), ("second", second, second_finished)):
        value = called(function, (prompt, response, finished), "labels.options.score", score, f"the {which} response")
        number = as_number(value)
        if number is None or number != number:
            raise FunctionFailed(
                f"the {which} response: labels.options.score {score!r} returned {shown(value)}, which cannot be compared"
            )
        scores.append(number)
    if scores[0] == scores[1]:
        return "tie"
    return "first" if scores[0] > scores[1] else "second"


def _check(score: str) -> None:
    """Raises ConfigError if there is no such function."""
    named_function(score, "labels.options.score")


by_score.check_options = _check  # type: ignore[attr-defined]
