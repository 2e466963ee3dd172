"""Reads the records of a data source, checks their fields, and names file and line of a bad one."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from r2m_async import codec
from r2m_async.data.sources import BrokenRow, Source, bare, decoded, is_frayed, items_of, rows
from r2m_async.errors import CodecError, ConfigError, DataError

Content: TypeAlias = str | tuple[tuple[str, str], ...]
"""A prompt: raw text, or (role, content) turns."""
OnBadRecord: TypeAlias = Literal["error", "skip"]
T = TypeVar("T")

_ABSENT = object()
"""Stands for the value of a field that a record lacks. None will not do: a record can have it."""

PROMPT_FIELD = "data.prompt_field"
"""The config key that names the field of the prompt, for messages."""
OR_SKIP = " or set data.on_bad_record: skip"
"""The second remedy, in messages to a user who has a config."""


class BadRecord(DataError):
    """One record cannot be used. `on_bad_record="skip"` catches this error and counts it under its `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        """reason: one word for the count, for example `too_long`. message: what the user reads under "error"."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Lets another process have the error, as in `errors.StageLost`."""
        return type(self), (self.reason, str(self))


class FilteredRecord(BadRecord):
    """A record that the user's filters leave out. It is counted under its `reason` whatever `on_bad_record` says."""


_TURNS_AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*(?=['"](role|content|from|value)['"]\s*:)"""
    r"""(?=.*['"](role|from)['"]\s*:\s*['"](user|assistant|system|human|gpt)['"])""",
    re.DOTALL,
)
"""How a conversation begins that JSON or Python wrote into a text, as writers of CSV do."""

_BESIDES = ("tool_calls", "function_call", "reasoning_content", "thinking", "images", "audio")
"""What a turn may have said beside its `content`. Only the content is read."""

_SIDES = tuple(f"{side}{what}" for side in ("chosen", "rejected") for what in ("", "_score", "_finished"))
_KNOWN = ("prompt", "reference_summary", *_SIDES)
"""Fields that are read here, from prompts or from pairs. One config may name those of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a source, which knows where it comes from.

    Its methods return a checked field, or raise BadRecord with a message that names file and line.
    """

    place: str
    """File and line, or data set and row, for messages."""
    name: str
    """The same in short, for example `posts.jsonl:17`. It becomes the id of the prompt."""
    raw: Any
    """A line of JSON that is not yet decoded, or a row as `sources.Row` has it."""
    only_texts: bool = False
    """Whether every value is a text, also one that stands for a number."""
    or_else: str = ""
    """A second remedy that messages offer at their end. Empty if there is none."""
    names: Mapping[str, str] | None = None
    """For each field, the name that it has in the source. None if the user cannot say so in a config."""

    def refusal(self, reason: str, key: str, value: Any, why: str, remedy: str) -> BadRecord:
        """Returns the error to raise for this record.

        reason: one word for the count. key, value: the field that is wrong, and what it holds. why, remedy: what is
        wrong with it, and what the user can do.
        """
        shown = key if value is _ABSENT else f"{key} = {_excerpt(value)}"
        return BadRecord(reason, f"{self.place}: {shown}: {why}; {remedy}{self.or_else}")

    def fields(self) -> Mapping[str, Any]:
        """Returns all fields by name. Raises BadRecord if the line is not UTF-8 or not a JSON object."""
        fields = self.raw
        if isinstance(fields, BrokenRow):
            raise self.refusal("wrong_type", "row", _ABSENT, fields.why, "quote cells that have the delimiter in them")
        try:
            if isinstance(fields, bytes):
                fields = decoded(fields)
        except UnicodeDecodeError as error:
            why = f"not UTF-8 at byte {error.start + 1} of the line"
            raise self.refusal("not_utf8", "line", self.raw, why, "convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            shown = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            why = f"not JSON, {shown}"
            raise self.refusal("invalid_json", "line", self.raw, why, "write one JSON object a line") from None
        if not isinstance(fields, Mapping):
            shown = f"line = {_excerpt(self.raw)}: " if isinstance(self.raw, bytes) else ""
            why = f"{shown}a JSON {type(fields).__name__}, not an object; write an object for each record"
            raise BadRecord("invalid_json", f"{self.place}: {why}{self.or_else}")
        return fields

    def called(self, key: str) -> str:
        """Returns the name that the source has for a field."""
        return key if self.names is None else self.names.get(key, key)

    def has(self, *keys: str) -> bool:
        """Returns whether the record has all of these fields. Raises BadRecord as `fields` does.

        None is no value: rows of a data set have it for a field that their record lacked.
        """
        fields = self.fields()
        return all(fields.get(self.called(key)) is not None for key in keys)

    def replaced(self, **fields: Any) -> Record:
        """Returns the record with other values of some fields, under the names that these have here."""
        return replace(self, raw={**self.fields(), **{self.called(key): value for key, value in fields.items()}})

    def field(self, key: str) -> Any:
        """Returns the value of one field. Raises BadRecord if the record lacks it."""
        fields, called = self.fields(), self.called(key)
        if called not in fields:
            why = f"missing, the record has {', '.join(map(repr, fields)) or 'no field'}"
            key_of_config = PROMPT_FIELD if key == "prompt" else f"data.columns.{key}"
            remedy = "add it" if self.names is None else f"add it, name another field as {key_of_config}"
            if inner := [name for name, value in fields.items() if _is_list_of_objects(value)]:
                remedy += f", take the list in {inner[0]!r} alone if it has the records"
            raise self.refusal("missing_field", called, _ABSENT, why, remedy)
        return fields[called]

    def content(self, key: str) -> Content:
        """Returns a prompt: raw text, or (role, content) turns that end with the user's.

        Raises BadRecord if the field is missing, empty, or neither text nor such turns.
        """
        value, called = self.field(key), self.called(key)
        return self.text(called, value) if isinstance(value, str) else self.asked(called, self.turns(called, value))

    def turns(self, called: str, value: Any) -> tuple[tuple[str, str], ...]:
        """Returns a conversation, as (role, content). Raises BadRecord if `value` is no list of turns.

        called: the name of the field, for messages.
        """
        if not isinstance(value, list):
            why = f"{type(value).__name__}, neither text nor a list of turns"
            raise self.refusal("wrong_type", called, value, why, 'write text or [{"role": "user", "content": ...}]')
        if not value:
            raise self.refusal("empty", called, value, "no turn", "give it a user turn")
        for index, turn in enumerate(value):
            if not (isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in ("role", "content"))):
                why = "a turn needs a role and a content, both text"
                raise self.refusal("wrong_type", f"{called}[{index}]", turn, why, "correct the turn")
            for part in _BESIDES:
                if turn.get(part):
                    why = "a part of the turn beside its content, which no model would read"
                    raise self.refusal(
                        "wrong_type", f"{called}[{index}].{part}", turn[part], why, "write it into the content"
                    )
            self._unicode(f"{called}[{index}].content", turn["content"])
        return tuple((turn["role"], turn["content"]) for turn in value)

    def asked(self, called: str, turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """Returns turns that end with the user's. Raises BadRecord if they do not, or if that turn is empty."""
        last = f"{called}[{len(turns) - 1}]"
        if turns[-1][0] != "user":
            why = "the last turn must be the user's, for the policy writes the next"
            raise self.refusal("last_turn", f"{last}.role", turns[-1][0], why, "cut the turns after it")
        self.text(f"{last}.content", turns[-1][1])
        return turns

    def response(self, key: str) -> str:
        """Returns a response, which is text. Raises BadRecord if the field is missing, empty or not text."""
        value = self.field(key)
        if not isinstance(value, str):
            why = f"{type(value).__name__}, not text"
            raise self.refusal("wrong_type", self.called(key), value, why, "write the response alone, as text")
        return self.text(self.called(key), value)

    def number(self, key: str) -> float:
        """Returns a finite number. Raises BadRecord if the field is missing or anything else."""
        value = shown = self.field(key)
        if self.only_texts:
            try:
                value = float(value)
            except ValueError:
                pass
        # In Python a bool is an int, so JSON's true would pass as 1. The last test is written so that NaN fails it.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            why = "not a finite number"
            raise self.refusal("wrong_type", self.called(key), shown, why, "write the score as a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean, or `default` if the record lacks it. Raises BadRecord for other values."""
        value = shown = self.field(key) if self.has(key) else default
        if self.only_texts and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if not isinstance(value, bool):
            why = "neither true nor false"
            raise self.refusal("wrong_type", self.called(key), shown, why, "correct it, leave it out")
        return value

    def columns(self, *, without: str) -> dict[str, Any]:
        """Returns every field but `without`, under the names that they have here, as `Prompt.columns` holds them.

        Raises BadRecord for a value that cannot be sent to another process: an integer of more than 64 bits, half of a
        surrogate pair, or an object that is not JSON's.
        """
        names, fields = self.names or {}, self.fields()
        for key, called in names.items():
            if called not in fields and key not in _KNOWN:
                why = f"missing, and data.columns.{key} names it"
                raise self.refusal("missing_field", called, _ABSENT, why, "add it, correct the name")
        renamed = {called: key for key, called in names.items()}
        columns: dict[str, Any] = {}
        for called, value in fields.items():
            key = renamed.get(called, called)
            # A field that was given a name hides one that has this name by itself.
            if key == without or (key == called and self.called(key) != called and self.has(key)):
                continue
            if is_frayed(key):
                why = f"the name of the column has white space at an end, so it is not the column {bare(key)!r}"
                raise self.refusal("column", repr(called), value, why, "rename it, take the field out")
            try:
                columns[key] = _plain(value)
                codec.encoded_size({key: columns[key]})
            except CodecError as error:
                why = f"no value of JSON with integers of up to 64 bits, so it cannot reach reward functions ({error})"
                raise self.refusal("column", called, value, why, "write it as text, take the field out") from None
        return columns

    def text(self, key: str, value: str) -> str:
        """Returns `value` if it holds more than white space and is valid Unicode. Raises BadRecord if not."""
        if not value.strip():
            raise self.refusal("empty", key, value, "no text", "fill it")
        if _TURNS_AS_TEXT.match(value):
            why = "a list of turns that was written as text, which a model would read as it stands"
            raise self.refusal("wrong_type", key, value, why, "write the list itself, in JSONL or Parquet")
        return self._unicode(key, value)

    def _unicode(self, key: str, value: str) -> str:
        """Returns `value` if it is valid Unicode. Raises BadRecord if not.

        JSON can write half of a surrogate pair as an escape. Such a string is no text: tokenizers fail on it.
        """
        try:
            value.encode()
        except UnicodeEncodeError as error:
            why = f"half of a surrogate pair at character {error.start + 1} is no text"
            raise self.refusal("not_utf8", key, value, why, "repair the escape") from None
        return value


def load_records(
    source: Source,
    split: str,
    parse: Callable[[Record], T],
    on_bad_record: OnBadRecord | None = None,
    limit: int | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[tuple[T, ...], dict[str, int]]:
    """Returns the parsed records of a source, and for each reason the number of records that were left out.

    source, split: as in `read_records`.
    parse: makes something of a record, or raises BadRecord.
    on_bad_record: "error" raises at the first bad record. "skip" leaves it out and counts it. None acts like "error",
        but the message does not offer "skip": the user has no config to set it in.
    limit: stop after this many usable records. None takes all.
    names: as in `Record`.

    Raises ConfigError for another `on_bad_record`. Raises DataError if the source cannot be read, a record is bad under
    "error", or no usable record is left.
    """
    if on_bad_record not in ("error", "skip", None):
        raise ConfigError(f"data.on_bad_record: {on_bad_record!r} is neither 'error' nor 'skip'")
    parsed: list[T] = []
    skipped: Counter[str] = Counter()
    for record in read_records(source, split):
        if limit is not None and len(parsed) >= limit:
            break
        record = replace(record, names=names, or_else="" if on_bad_record is None else OR_SKIP)
        try:
            parsed.append(parse(replace(record, raw=record.fields())))
        except FilteredRecord as error:
            skipped[error.reason] += 1
        except BadRecord as error:
            if on_bad_record != "skip":
                raise
            skipped[error.reason] += 1
    if not parsed:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise DataError(f"{', '.join(items_of(source))}: no usable record ({why}); give another source or correct it")
    return tuple(parsed), dict(skipped)


def read_records(source: Source, split: str = "train") -> Iterator[Record]:
    """Yields every record of a source, not yet parsed.

    source, split: as in `sources.rows`, whose errors are raised.
    """
    for row in rows(source, split):
        yield Record(place=row.place, name=row.name, raw=row.raw, only_texts=row.only_texts)


def read_file(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yields every record of one file. Raises DataError as `sources.rows` does, and if there is no such file."""
    if not Path(path).is_file():
        raise DataError(f"{path}: cannot be read (No such file); correct the path (now in {Path.cwd()})")
    return read_records([path])


def _plain(value: Any) -> Any:
    """Returns the value of a field with dates and times as text in ISO 8601. Data sets have such values, JSON has not."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_list_of_objects(value: Any) -> bool:
    """Whether a value is a list of objects that are no turns."""
    return isinstance(value, list) and any(isinstance(one, dict) and "role" not in one for one in value)


def _excerpt(value: Any) -> str:
    """Returns at most 80 characters of the value's repr, for messages."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
