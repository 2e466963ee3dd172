"""A model's answers as judges read them, written and read back.

    alpaca_eval  a JSON list of {"dataset", "instruction", "output", "generator"}
    mt_bench     a line per question: {"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}
    tldr         a line per post: {"prompt", "response", "summary", "reference_summary", "generator"}

Answers carry one key more, `finish_reason` (in MT-Bench's choice one per turn): stop, or length for a text that was cut
off. A reward model as judge wants to know; the other judges do not look at it.

Sources: AlpacaEval, github.com/tatsu-lab/alpaca_eval: `PairwiseAnnotator.annotate_head2head` merges two files on
`instruction`, `main.evaluate` takes the name from `generator`. MT-Bench, github.com/lm-sys/FastChat, `fastchat/llm_judge`:
`gen_model_answer.py` writes the answers, `common.load_model_answers` reads each file of `model_answer/` under the file's
name. TL;DR has no fixed file; TRL's `examples/scripts/evals/judge_tldr.py` compares stripped summaries with the author's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m_async.data.records import Content, Record
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.questions import Format, Question, load_questions, question_id, read_file
from r2m_async.whole import write_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    texts: tuple[str, ...]
    """One per turn, as generated."""
    finish_reasons: tuple[str, ...]
    """One per turn, `stop` or `length`."""
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedText:
    """One answered turn as a judge finds it."""

    place: str
    """File and line."""
    key: Hashable
    """The same for one prompt in every file of a format."""
    turn: int
    prompt: Content
    """The conversation before the answer."""
    response: str
    """For a raw prompt with the space between the two."""
    output: str
    """The response as one shows it; lengths are its characters."""
    finished: bool
    reference: str | None
    """The author's summary (tldr)."""

    @property
    def instruction(self) -> str:
        """The prompt, or the last thing that the user said."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """An answer file."""

    format: Format
    generator: str
    texts: tuple[JudgedText, ...]


def answer_file(out: Path, form: Format, name: str | None, model_name: str) -> tuple[Path, str]:
    """(the file, the generator's name): OUT with a suffix is a file, else a folder that gets the file the judge expects.

    FastChat calls a model by its file's name, so that is the generator's where both are given.
    """
    is_file = out.suffix in (".json", ".jsonl") and not out.is_dir()
    if form == "mt_bench" and is_file:
        if name not in (None, out.stem):
            raise ConfigError(
                f"--name is {name!r} and --out {out}: FastChat takes the model's name from its file; name the file "
                f"{name}.jsonl, or leave --name out"
            )
        return out, out.stem
    name = (name or model_name).replace("/", "__")
    places = {"alpaca_eval": "model_outputs.json", "mt_bench": f"model_answer/{name}.jsonl", "tldr": "summaries.jsonl"}
    return out if is_file else out / places[form], name


def write_answers(
    path: Path, form: Format, questions: Sequence[Question], answers: Sequence[Answer], generator: str
) -> None:
    """Whole or not at all; raises DiskError."""
    record_of = {"alpaca_eval": _alpaca_record, "mt_bench": _mt_bench_record, "tldr": _tldr_record}[form]
    records = [record_of(*both, generator) for both in zip(questions, answers, strict=True)]
    if form == "alpaca_eval":
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(path, text)


def _alpaca_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    told = {"output": answer.texts[0].strip(), "generator": generator, "finish_reason": answer.finish_reasons[0]}
    return question.record | told


def _mt_bench_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    turns = [text.strip() for text in answer.texts]
    told = json.dumps([question.record["question_id"], generator, turns])
    return {
        "question_id": question.record["question_id"],
        "answer_id": hashlib.sha256(told.encode()).hexdigest()[:22],
        "model_id": generator,
        "choices": [{"index": 0, "turns": turns, "finish_reason": list(answer.finish_reasons)}],
        "tstamp": answer.time,
    }


def _tldr_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    text = answer.texts[0]
    told = {
        "response": text,
        "summary": text.strip(),
        "generator": generator,
        "finish_reason": answer.finish_reasons[0],
    }
    return question.record | told


def read_outputs(path: str | Path, prompts: str | Path | None = None) -> Outputs:
    """An answer file of any of the formats, told apart by its first record.

    prompts: MT-Bench's questions, which its answers do not repeat. An answer without `finish_reason` counts as finished.
    Raises `DataError`, ConfigError where MT-Bench's questions are not given.
    """
    records = list(read_file(path))
    if not records:
        raise DataError(f"{path}: no record; give a file of answers")
    first = records[0].fields()
    if "choices" in first:
        return _mt_bench_outputs(path, records, prompts)
    form: Format = "alpaca_eval" if "instruction" in first else "tldr"
    texts = tuple(map(_alpaca_text if form == "alpaca_eval" else _tldr_text, records))
    return Outputs(format=form, generator=str(first.get("generator", Path(path).stem)), texts=texts)


def _alpaca_text(record: Record) -> JudgedText:
    instruction, output = record.response("instruction"), _answer(record, "output", record.field("output"))
    return JudgedText(
        place=record.place,
        key=instruction,
        turn=1,
        prompt=(("user", instruction),),
        response=output,
        output=output,
        finished=_finished(record, record.fields().get("finish_reason")),
        reference=None,
    )


def _tldr_text(record: Record) -> JudgedText:
    fields, content = record.fields(), record.content("prompt")
    if "response" in fields:
        response = _answer(record, "response", fields["response"])
    else:
        response = _answer(record, "summary", record.field("summary"))
        response = f" {response}" if isinstance(content, str) else response
    return JudgedText(
        place=record.place,
        key=content,
        turn=1,
        prompt=content,
        response=response,
        output=response.strip(),
        finished=_finished(record, fields.get("finish_reason")),
        reference=record.response("reference_summary") if "reference_summary" in fields else None,
    )


def _mt_bench_outputs(path: str | Path, records: Sequence[Record], prompts: str | Path | None) -> Outputs:
    if prompts is None:
        raise ConfigError(f"{path}: MT-Bench's answers do not repeat the questions; give their file as --prompts")
    questions = {one.record["question_id"]: one for one in load_questions(prompts, "mt_bench")}
    texts: list[JudgedText] = []
    for record in records:
        number = question_id(record)
        if number not in questions:
            raise record.refusal(
                "unknown", "question_id", number, f"not in {prompts}", "give the file it was asked from"
            )
        texts += _mt_bench_texts(record, questions[number])
    generator = records[0].fields().get("model_id", Path(path).stem)
    return Outputs(format="mt_bench", generator=str(generator), texts=tuple(texts))


def _mt_bench_texts(record: Record, question: Question) -> list[JudgedText]:
    choices = record.field("choices")
    asked = [question.content[0][1], *question.later_turns]
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise record.refusal("wrong_type", "choices", choices, "not a list of answers", "write as FastChat does")
    answers = choices[0].get("turns")
    if not (isinstance(answers, list) and len(answers) == len(asked)):
        why = f"not {len(asked)} texts, one per turn of the question"
        raise record.refusal("wrong_type", "choices[0].turns", answers, why, "answer every turn")
    reasons = choices[0].get("finish_reason", [None] * len(asked))
    if not (isinstance(reasons, list) and len(reasons) == len(asked)):
        why = f"not {len(asked)} of stop or length, one per turn"
        raise record.refusal("wrong_type", "choices[0].finish_reason", reasons, why, "correct it, leave it out")
    conversation: tuple[tuple[str, str], ...] = ()
    texts = []
    for turn, (said, answer, reason) in enumerate(zip(asked, answers, reasons, strict=True), start=1):
        answer = _answer(record, f"choices[0].turns[{turn - 1}]", answer)
        conversation = (*conversation, ("user", said))
        texts.append(
            JudgedText(
                place=record.place,
                key=question.record["question_id"],
                turn=turn,
                prompt=conversation,
                response=answer,
                output=answer,
                finished=_finished(record, reason),
                reference=None,
            )
        )
        conversation = (*conversation, ("assistant", answer))
    return texts


def _answer(record: Record, key: str, value: Any) -> str:
    """May be empty: a model that says nothing has said that."""
    if not isinstance(value, str):
        why = f"{type(value).__name__}, not text"
        raise record.refusal("wrong_type", key, value, why, "write the answer as text")
    return value


def _finished(record: Record, value: Any) -> bool:
    if value not in (None, "stop", "length"):
        raise record.refusal(
            "wrong_type", "finish_reason", value, "neither stop nor length", "correct it, leave it out"
        )
    return value != "length"
