"""The prompt files of three benchmarks, and of best-of-n, read and checked.

    alpaca_eval  `instruction`, or `prompt` (a text or one user turn); `dataset` is copied into the answer
    mt_bench     `turns`, `category`, and `question_id` or an `id` that ends with it
    tldr         `prompt` (a text or one user turn), and the author's summary as `reference_summary` or `completion`
    pool         `prompt`, a text or turns, as in training; for the samples that `r2m bon` takes the best of

A file is a JSON list, as AlpacaEval's own file is, JSONL, CSV or Parquet. Sources: github.com/tatsu-lab/alpaca_eval; FastChat's
`llm_judge/data/mt_bench/question.jsonl`, github.com/lm-sys/FastChat; huggingface.co/datasets/trl-lib/tldr.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from r2m_async.data.pairs import read_prompt
from r2m_async.data.records import Content, Record, read_file
from r2m_async.errors import ConfigError, DataError

Format: TypeAlias = Literal["alpaca_eval", "mt_bench", "tldr", "pool"]
"""The forms of files that can be read: three benchmarks, and pools of samples."""

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of each category, as in FastChat's `temperature_config`."""
DEFAULT_TEMPERATURE = {"alpaca_eval": 0.7, "mt_bench": 0.7, "tldr": 0.0, "pool": 1.0}
"""Sampling temperature of each format. MT-Bench's counts for categories that FastChat does not know. TL;DR's is that of
TRL. A pool is of the policy's own distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked, in one turn or in several."""

    place: str
    """Where the question is, for error messages: file and line."""
    content: Content
    """The first prompt: messages, or raw text."""
    later_turns: tuple[str, ...]
    """What the user says after the first answer, after the second, and so on."""
    temperature: float
    """The sampling temperature that the benchmark prescribes."""
    record: dict[str, Any]
    """Fields that are copied into the record of the answer."""


def default_chat(form: Format) -> bool:
    """Whether a format's prompts are turns for the chat template.

    A TL;DR post is raw text, which ends with `TL;DR:`.
    """
    return form != "tldr"


def load_questions(
    path: str | Path, form: Format, *, chat: bool | None = None, limit: int | None = None
) -> tuple[Question, ...]:
    """Reads the questions of a prompt file.

    form: the format of the file.
    chat: whether a prompt is a turn of the user (True) or raw text (False); None means `default_chat`.
    limit: the number of questions to read; None means all.

    Raises `DataError` for a record that lacks what the format needs and for a file without a record, and ConfigError if
    MT-Bench's turns are to be raw text.
    """
    chat = default_chat(form) if chat is None else chat
    parse = {
        "alpaca_eval": _alpaca_question,
        "mt_bench": _mt_bench_question,
        "tldr": _tldr_question,
        "pool": _pool_question,
    }[form]
    questions: list[Question] = []
    for record in read_file(path):
        if limit is not None and len(questions) >= limit:
            break
        questions.append(parse(record, chat))
    if not questions:
        raise DataError(f"{path}: no record; give another file or a --num above 0")
    return tuple(questions)


def _alpaca_question(record: Record, chat: bool) -> Question:
    """The question of a record of AlpacaEval."""
    fields = record.fields()
    instruction = record.response("instruction") if "instruction" in fields else _one_text(record, "prompt")
    taken = {key: fields[key] for key in ("dataset",) if key in fields}
    return Question(
        place=record.place,
        content=(("user", instruction),) if chat else instruction,
        later_turns=(),
        temperature=DEFAULT_TEMPERATURE["alpaca_eval"],
        record=taken | {"instruction": instruction},
    )


def _mt_bench_question(record: Record, chat: bool) -> Question:
    """The question of a record of MT-Bench, which mostly has two turns."""
    if not chat:
        raise ConfigError("--no-chat: MT-Bench has a second turn, which raw text has no place for; leave it out")
    turns = _texts(record, "turns", record.field("turns"))
    category = record.fields().get("category")
    return Question(
        place=record.place,
        content=(("user", turns[0]),),
        later_turns=tuple(turns[1:]),
        temperature=MT_BENCH_TEMPERATURES.get(str(category), DEFAULT_TEMPERATURE["mt_bench"]),
        record={"question_id": question_id(record)},
    )


def _tldr_question(record: Record, chat: bool) -> Question:
    """The question of a TL;DR post. The author's summary is stripped, as judges compare stripped summaries."""
    content: Content = record.content("prompt") if chat else _one_text(record, "prompt")
    taken: dict[str, Any] = {"prompt": content if isinstance(content, str) else turns_of(content)}
    fields = record.fields()
    for key in ("reference_summary", "completion"):
        if key in fields:
            taken["reference_summary"] = record.response(key).strip()
            break
    return Question(
        place=record.place,
        content=content,
        later_turns=(),
        temperature=DEFAULT_TEMPERATURE["tldr"],
        record=({"id": fields["id"]} if "id" in fields else {}) | taken,
    )


def _pool_question(record: Record, chat: bool) -> Question:
    """The prompt of a pool, as training reads it."""
    content = read_prompt(record, chat)
    prompt = content if isinstance(content, str) else turns_of(content)
    return Question(
        place=record.place,
        content=content,
        later_turns=(),
        temperature=DEFAULT_TEMPERATURE["pool"],
        record={"prompt": prompt},
    )


def _one_text(record: Record, key: str) -> str:
    """The text of a prompt that is a text or a single turn. Raises `DataError` for several turns."""
    content = record.content(key)
    if isinstance(content, str):
        return content
    if len(content) > 1:
        why = f"{len(content)} turns, and this format takes one text"
        raise record.refusal("wrong_type", key, turns_of(content), why, "write the one text that is asked")
    return content[0][1]


def question_id(record: Record) -> int:
    """FastChat's number of a question: `question_id`, or else the number at the end of `id`. Raises `DataError`."""
    fields = record.fields()
    if "question_id" in fields:
        value = fields["question_id"]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        why = "not a whole number, by which FastChat finds the question"
        raise record.refusal("wrong_type", "question_id", value, why, "take it from FastChat's question.jsonl")
    number = re.search(r"\d+$", str(record.field("id")))
    if number is None:
        why = "does not end with the number that FastChat has for the question"
        raise record.refusal("wrong_type", "id", fields["id"], why, "add `question_id`")
    return int(number.group())


def _texts(record: Record, key: str, value: Any) -> list[str]:
    """Checks that `value` is a list of one or more texts, and returns it. Raises `DataError`."""
    if not (isinstance(value, list) and value and all(isinstance(one, str) and one.strip() for one in value)):
        raise record.refusal("wrong_type", key, value, "not a list of one or more texts", "write one per turn")
    return value


def turns_of(content: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    """Messages as the list of {"role", "content"} that files have."""
    return [{"role": role, "content": text} for role, text in content]
