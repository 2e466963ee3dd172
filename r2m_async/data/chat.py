"""Puts turns through the chat template of a tokenizer. All templates are called here, so that all refusals are one error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from r2m_async.errors import DataError


class TemplateRefusal(DataError):
    """A chat template refuses some turns. `reason` is what it said."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Lets Ray send the error to another process: the default would call `__init__` with the message alone."""
        return type(self), (self.reason, str(self))


def templated(tokenizer: Any, turns: Sequence[Mapping[str, str]], **how: Any) -> str:
    """Returns the text that the chat template makes of turns.

    turns: {"role", "content"}. how: further arguments of transformers' `apply_chat_template`.

    Raises TemplateRefusal for whatever the template raises. It is code of the model's author, so that may be anything.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, **how)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shown = ", ".join(f"{turn['role']}: {turn['content'][:60]!r}" for turn in turns)
        raise TemplateRefusal(
            reason,
            f"the chat template of the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} refuses the turns [{shown[:300]}] "
            f"({reason}); reorder the turns, or correct the template (chat_template)",
        ) from None
    return text
