"""Reads a preference pair in the forms in which data sets have it.

    chosen, rejected               texts, which answer `prompt`
                                   one assistant's turn each, as a list of messages
                                   whole conversations, as lists of messages; they say the prompt, too
                                   whole transcripts as HH has them: "\\n\\nHuman: ...\\n\\nAssistant: ..."
    conv_A, conv_B, with ratings   Unified-Feedback, on which GRM is trained
    input, targets                 HHH-Alignment, on which GRM is evaluated

Two whole conversations have to agree in all but their last turn, for a pair is two responses to one prompt.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias

from r2m_async.data.records import Content, Record

Turns: TypeAlias = tuple[tuple[str, str], ...]


class Preference(NamedTuple):
    """Two responses to one prompt, of which people (or a label) preferred the first."""

    prompt: Content
    """Raw text, or (role, content) turns that end with the user's."""
    chosen: str
    """The response that was preferred."""
    rejected: str
    """The other response."""


def read_preference(record: Record, chat: bool = False) -> Preference:
    """Returns the pair of a record.

    chat: as in `read_prompt`.

    Raises BadRecord for a record of none of the forms, for conversations that differ before their last turn, and for a
    pair that was rated as equal.
    """
    return read_scored_preference(record, chat, scored=False)[0]


def read_scored_preference(record: Record, chat: bool, *, scored: bool) -> tuple[Preference, float | None]:
    """Returns the pair of a record, and the score of the chosen response minus that of the rejected one.

    scored: whether the scores are needed. If not, the difference is None.

    Raises BadRecord as `read_preference` does, and for scores that are missing and needed.
    """
    record = _as_conversations(record)
    if record.has("prompt") or not record.has("chosen", "rejected"):
        record.content("prompt")  # a mistake in it is told before one in a response
    (said, chosen), (said_too, rejected) = _said(record, "chosen"), _said(record, "rejected")
    if said and said_too and _stripped(said) != _stripped(said_too):
        why = "the two conversations differ before their last turn, so they are no two responses to one prompt"
        raise record.refusal("transcripts", record.called("rejected"), record.field("rejected"), why, "take it out")
    margin = record.number("chosen_score") - record.number("rejected_score") if scored else None
    return Preference(_prompt(record, said or said_too, chat), chosen, rejected), margin


def read_prompt(record: Record, chat: bool = False) -> Content:
    """Returns the prompt of a record: its field `prompt`, or what its two conversations have in common.

    chat: whether a prompt that is a text is a turn of the user.

    Raises BadRecord as `read_preference` does.
    """
    if record.has("prompt") or not _is_pair(record):
        return as_turns(record.content("prompt"), chat)
    return read_preference(record, chat).prompt


def read_response(record: Record, key: str) -> str:
    """Returns the response in the field `key`, such as `chosen`, in any of the forms. Raises BadRecord."""
    record = _as_conversations(record)
    return _said(record, key)[1]


def as_turns(content: Content, chat: bool) -> Content:
    """Returns a prompt, as the user's turn if it is a text and `chat` is true."""
    return (("user", content),) if chat and isinstance(content, str) else content


def _is_pair(record: Record) -> bool:
    """Whether a record without a prompt may have one in its conversations."""
    return record.has("chosen", "rejected") or any(record.has(*fields) for fields in (_UNIFIED, _HHH))


def _prompt(record: Record, said: Turns, chat: bool) -> Content:
    """The prompt of a pair. said: what precedes the response in a whole conversation; empty for a response alone.

    Raises BadRecord if the field `prompt` and the conversation do not say the same.
    """
    if not said or record.has("prompt"):
        prompt = record.content("prompt")
        if not said:
            return as_turns(prompt, chat)
        # A data set's `prompt` leaves out the system's turn, or the roles.
        without_system = _stripped(tuple(turn for turn in said if turn[0] != "system"))
        transcript = _transcript(prompt) if isinstance(prompt, str) else None
        given = (("user", prompt),) if isinstance(prompt, str) else prompt
        if _stripped(given) not in (_stripped(said), without_system) and transcript != without_system:
            why = "the conversations begin with another prompt"
            raise record.refusal(
                "transcripts", record.called("prompt"), prompt, why, "correct one, take this field out"
            )
    return record.asked(record.called("chosen"), said)


def _said(record: Record, key: str) -> tuple[Turns, str]:
    """(what precedes the response, the response) in a field. The first is empty if the field has the response alone."""
    value, called = record.field(key), record.called(key)
    if isinstance(value, str) and (turns := _transcript(value)) is None:
        return (), record.response(key)
    if not isinstance(value, str):
        if not isinstance(value, list):
            why = f"{type(value).__name__}, neither text nor a list of turns"
            raise record.refusal("wrong_type", called, value, why, "write the response as text")
        turns = record.turns(called, value)
    assert turns is not None
    if turns[-1][0] != "assistant":
        why = f"the last turn is {turns[-1][0]!r}'s, and the response must be the assistant's"
        raise record.refusal("last_turn", called, value, why, "cut the turns after the response")
    return turns[:-1], record.text(f"{called}[{len(turns) - 1}].content", turns[-1][1])


def _transcript(text: str) -> Turns | None:
    """The turns of a transcript as HH has them, without white space around them. None for any other text."""
    if not text.startswith("\n\nHuman:") or "\n\nAssistant:" not in text:
        return None
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = tuple((roles[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True))
    # A prompt ends where the assistant is about to speak.
    return turns[:-1] if turns[-1] == ("assistant", "") else turns


def _stripped(turns: Turns) -> Turns:
    """Turns without white space around their contents, to compare them."""
    return tuple((role, content.strip()) for role, content in turns)


# Published data sets of other shapes

_UNIFIED = ("conv_A", "conv_B", "conv_A_rating", "conv_B_rating")
_HHH = ("input", "targets")


def _as_conversations(record: Record) -> Record:
    """A record of a published data set of another shape, as one with `chosen` and `rejected`; others as they are."""
    if record.has("chosen"):
        return record
    if record.has(*_UNIFIED):
        ratings = record.number("conv_A_rating"), record.number("conv_B_rating")
        better, worse = ("A", "B") if ratings[0] > ratings[1] else ("B", "A")
        if ratings[0] == ratings[1]:
            raise _tie(record, "conv_A_rating", ratings[0])
        return record.replaced(
            chosen=record.field(f"conv_{better}"),
            rejected=record.field(f"conv_{worse}"),
            chosen_score=max(ratings),
            rejected_score=min(ratings),
        )
    if record.has(*_HHH):
        return _hhh(record)
    return record


def _hhh(record: Record) -> Record:
    """A record of HHH-Alignment: two choices, of which the label 1 marks the better."""
    asked, targets = record.response("input"), record.field("targets")
    choices = targets.get("choices") if isinstance(targets, dict) else None
    labels = targets.get("labels") if isinstance(targets, dict) else None
    if not (isinstance(choices, list) and len(choices) == 2 and labels in ([0, 1], [1, 0])):
        why = "no two `choices` with the labels 1 and 0"
        raise record.refusal("wrong_type", "targets", targets, why, "correct it")
    turns: Any = _transcript(f"\n\nHuman:{asked}\n\nAssistant:") or (("user", asked),)
    best = labels.index(1)
    return record.replaced(
        prompt=[{"role": role, "content": said} for role, said in turns],
        chosen=choices[best],
        rejected=choices[1 - best],
    )


def _tie(record: Record, key: str, value: Any) -> Exception:
    return record.refusal("tie", key, value, "both responses have this rating, so neither is preferred", "take it out")
