"""Reads the records of a data source, checks their fields, and names file and line of a bad one.

A source is a JSONL file, several of them, a directory that the package `datasets` wrote, or a data set of the Hugging
Face hub.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from r2m_async import codec
from r2m_async.errors import CodecError, ConfigError, DataError

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Content: TypeAlias = str | tuple[tuple[str, str], ...]
"""A prompt: raw text, or (role, content) turns."""
OnBadRecord: TypeAlias = Literal["error", "skip"]
T = TypeVar("T")

_ABSENT = object()
"""Stands for the value of a field that a record lacks. None will not do: a record can have it."""


class BadRecord(DataError):
    """One record cannot be used. `on_bad_record="skip"` catches this error and counts it under its `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        """reason: one word for the count, for example `too_long`. message: what the user reads under "error"."""
        super().__init__(message)
        self.reason = reason


PROMPT_FIELD = "data.prompt_field"
"""The config key that names the field of the prompt, for messages."""
OR_SKIP = " or set data.on_bad_record: skip"
"""The second remedy, in messages to a user who has a config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a source, which knows where it comes from.

    Its methods return a checked field, or raise BadRecord with a message that names file and line.
    """

    place: str
    """File and line, or data set and row, for messages."""
    name: str
    """The same in short, for example `posts.jsonl:17`. It becomes the id of the prompt."""
    raw: bytes | Mapping[str, Any]
    """A line of JSON that is not yet decoded, or a row of a data set."""
    or_else: str = ""
    """A second remedy that messages offer at their end. Empty if there is none."""

    def refusal(self, reason: str, key: str, value: Any, why: str, remedy: str) -> BadRecord:
        """Returns the error to raise for this record.

        reason: one word for the count. key, value: the field that is wrong, and what it holds. why, remedy: what is
        wrong with it, and what the user can do.
        """
        shown = key if value is _ABSENT else f"{key} = {_excerpt(value)}"
        return BadRecord(reason, f"{self.place}: {shown}: {why}; {remedy}{self.or_else}")

    def fields(self) -> Mapping[str, Any]:
        """Returns all fields by name. Raises BadRecord if the line is not UTF-8 or not a JSON object."""
        if not isinstance(self.raw, bytes):
            return self.raw
        try:
            fields = json.loads(self.raw.decode("utf-8-sig"))  # which drops a byte-order mark at the file's start
        except UnicodeDecodeError as error:
            why = f"not UTF-8 at byte {error.start + 1} of the line"
            raise self.refusal("not_utf8", "line", self.raw, why, "convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            shown = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            why = f"not JSON, {shown}"
            raise self.refusal("invalid_json", "line", self.raw, why, "write one JSON object a line") from None
        if not isinstance(fields, dict):
            why = f"a JSON {type(fields).__name__}, not an object"
            raise self.refusal("invalid_json", "line", self.raw, why, "write one JSON object a line")
        return fields

    def field(self, key: str, named_by: str | None = None) -> Any:
        """Returns the value of one field. Raises BadRecord if the record lacks it.

        named_by: the config key by which the user chose this field, for the message. None if the field's name is fixed.
        """
        fields = self.fields()
        if key not in fields:
            why = f"missing, the record has {', '.join(map(repr, fields)) or 'no field'}"
            remedy = "add it" if named_by is None else f"add it, name another field as {named_by}"
            raise self.refusal("missing_field", key, _ABSENT, why, remedy)
        return fields[key]

    def content(self, key: str, named_by: str | None = None) -> Content:
        """Returns a prompt: raw text, or (role, content) turns that end with the user's.

        key, named_by: as in `field`. Raises BadRecord if the field is missing, empty, or neither text nor such turns.
        """
        value = self.field(key, named_by)
        if isinstance(value, str):
            return self._text(key, value)
        if not isinstance(value, list):
            why = f"{type(value).__name__}, neither text nor a list of turns"
            raise self.refusal("wrong_type", key, value, why, 'write text or [{"role": "user", "content": ...}]')
        if not value:
            raise self.refusal("empty", key, value, "no turn", "give it a user turn")
        for index, turn in enumerate(value):
            if not (isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in ("role", "content"))):
                why = "a turn needs a role and a content, both text"
                raise self.refusal("wrong_type", f"{key}[{index}]", turn, why, "correct the turn")
            self._unicode(f"{key}[{index}].content", turn["content"])
        last = f"{key}[{len(value) - 1}]"
        if value[-1]["role"] != "user":
            why = "the last turn must be the user's, for the policy writes the next"
            raise self.refusal("last_turn", f"{last}.role", value[-1]["role"], why, "cut the turns after it")
        self._text(f"{last}.content", value[-1]["content"])
        return tuple((turn["role"], turn["content"]) for turn in value)

    def response(self, key: str) -> str:
        """Returns a response, which is text. Raises BadRecord if the field is missing, empty or not text."""
        value = self.field(key)
        if not isinstance(value, str):
            why = f"{type(value).__name__}, not text"
            raise self.refusal("wrong_type", key, value, why, "write the response alone, as text")
        return self._text(key, value)

    def columns(self, *, without: str) -> dict[str, Any]:
        """Returns every field but `without`, as `Prompt.columns` holds them.

        Raises BadRecord for a value that cannot be sent to another process: an integer of more than 64 bits, half of a
        surrogate pair, or an object that is not JSON's.
        """
        columns = {}
        for key, value in self.fields().items():
            if key == without:
                continue
            try:
                columns[key] = _plain(value)
                codec.encoded_size({key: columns[key]})
            except CodecError as error:
                why = f"no value of JSON with integers of up to 64 bits, so it cannot reach reward functions ({error})"
                raise self.refusal("column", key, value, why, "write it as text, take the field out") from None
        return columns

    def _text(self, key: str, value: str) -> str:
        """Returns `value` if it holds more than white space and is valid Unicode. Raises BadRecord if not."""
        if not value.strip():
            raise self.refusal("empty", key, value, "no text", "fill it")
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
) -> tuple[tuple[T, ...], dict[str, int]]:
    """Returns the parsed records of a source, and for each reason the number of records that were left out.

    source, split: as in `read_records`.
    parse: makes something of a record, or raises BadRecord.
    on_bad_record: "error" raises at the first bad record. "skip" leaves it out and counts it. None acts like "error",
        but the message does not offer "skip": the user has no config to set it in.
    limit: stop after this many usable records. None takes all.

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
        try:
            parsed.append(parse(record if on_bad_record is None else replace(record, or_else=OR_SKIP)))
        except BadRecord as error:
            if on_bad_record != "skip":
                raise
            skipped[error.reason] += 1
    if not parsed:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise DataError(f"{', '.join(_items(source))}: no usable record ({why}); give another source or correct it")
    return tuple(parsed), dict(skipped)


def read_records(source: Source, split: str = "train") -> Iterator[Record]:
    """Yields every record of a source, not yet parsed. Empty lines of a file are left out.

    source: a path or a name of a data set, several in one string with commas, or a sequence of them.
    split: the split of a data set. JSONL files have none.

    Raises DataError if the source cannot be read.
    """
    items = _items(source)
    names = Counter(Path(item).name for item in items)  # the short name must tell files of one name apart
    for item in items:
        path = Path(item).expanduser()
        if path.is_file():
            short = path.name if names[path.name] == 1 else item
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield Record(place=f"{item}, line {number}", name=f"{short}:{number}", raw=line.rstrip(b"\r\n"))
        else:
            for number, row in enumerate(_rows(item, path, split)):
                yield Record(place=f"{item} ({split}), row {number}", name=f"{item}:{number}", raw=row)


def is_here(source: Source) -> bool:
    """Whether all of a source is on this machine, or looks as if it should be: `read_records` then looks nowhere else."""
    return all(Path(item).expanduser().exists() or _looks_like_a_path(item) for item in _items(source))


def _looks_like_a_path(item: str) -> bool:
    return Path(item).suffix in (".jsonl", ".json", ".txt") or item.startswith(("/", ".", "~"))


def _items(source: Source) -> list[str]:
    """Returns the paths or names that a source consists of."""
    # An existing path comes first, because a comma may be part of a file's name.
    if isinstance(source, str) and "," in source and not Path(source).expanduser().exists():
        return [item.strip() for item in source.split(",") if item.strip()]
    return [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(item) for item in source]


def _rows(item: str, path: Path, split: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a data set: a directory, or a name of the Hugging Face hub. Raises DataError."""
    # What looks like a path and does not exist is a wrong path. Looked up on the hub, it would give a puzzling message.
    if not path.exists() and _looks_like_a_path(item):
        raise DataError(f"data source {item!r}: no such file or directory; correct the path (now in {Path.cwd()})")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data source {item!r}: not a file, and the package `datasets` that would look for a data set of that "
            "name is not installed; correct the path or `pip install datasets`"
        ) from None
    try:
        # `save_to_disk` leaves these marks. Any other directory is a folder of data files.
        if path.is_dir() and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(str(path) if path.is_dir() else item, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"data source {item!r}: neither a file nor a data set that can be read (split {split!r}, {reason}); "
            "correct the name or the split, or write the records to a JSONL file"
        ) from error
    yield from table


def _plain(value: Any) -> Any:
    """Returns the value of a field with dates and times as text in ISO 8601. Data sets have such values, JSON has not."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _excerpt(value: Any) -> str:
    """Returns at most 80 characters of the value's repr, for messages."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
