"""Answer files: a model's answers as judges read them, written and read back.

    alpaca_eval  a JSON list of {"dataset", "instruction", "output", "generator"}
    mt_bench     a line per question:
                 {"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}
    tldr         a line per post: {"prompt", "response", "summary", "reference_summary", "generator"}
    pool         a line per prompt: {"prompt", "responses", "finished", "generator"}, for `r2m bon`

Here answers have one more key, `finish_reason`, which for MT-Bench is a list with one value per turn, in the choice. It
is `stop`, or `length` for a text that was cut off. A reward model as a judge reads it; other judges ignore it.

Sources. AlpacaEval, github.com/tatsu-lab/alpaca_eval: `PairwiseAnnotator.annotate_head2head` merges two files on
`instruction`, and `main.evaluate` takes the model's name from `generator`. MT-Bench, github.com/lm-sys/FastChat,
`fastchat/llm_judge`: `gen_model_answer.py` writes answers, and `common.load_model_answers` reads each file of
`model_answer/` under the name of the file. TL;DR has no fixed file; TRL's `examples/scripts/evals/judge_tldr.py`
compares stripped summaries with the author's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m_async.data.records import Content, Record, read_file
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.questions import Format, Question, load_questions, question_id
from r2m_async.whole import write_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer to one question, in all its turns."""

    texts: tuple[str, ...]
    """One text per turn, as generated."""
    finish_reasons: tuple[str, ...]
    """One per turn: `stop`, or `length` for a text that was cut off."""
    time: float
    """When it was generated, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedText:
    """The answer to one turn, as a judge reads it from a file."""

    place: str
    """Where the answer is, for error messages: file and line."""
    key: Hashable
    """What identifies the prompt. It is the same in every file of a format."""
    turn: int
    """The number of the turn, from 1 on."""
    prompt: Content
    """The conversation before the answer: messages, or raw text."""
    response: str
    """The answer as it continues the prompt. After a raw prompt it begins with the space between the two."""
    output: str
    """The answer as it is shown. Lengths are counted in characters of it."""
    finished: bool
    """Whether the answer ended by itself and was not cut off."""
    reference: str | None
    """The author's summary, in TL;DR files; None elsewhere."""

    @property
    def instruction(self) -> str:
        """The raw prompt, or the user's last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The contents of an answer file."""

    format: Format
    generator: str
    """The name of the model that answered."""
    texts: tuple[JudgedText, ...]


def answer_file(out: Path, form: Format, name: str | None, model_name: str) -> tuple[Path, str]:
    """(the file to write, the name of the model that answers).

    out: a path that ends in .json or .jsonl is the file itself. Any other path is a folder, in which the file gets the
        name that its judge expects.
    name: the name that the user chose; None means `model_name`.

    FastChat takes a model's name from the name of its file. So for MT-Bench, if `out` is a file, the name is that of
    the file, and ConfigError is raised if `name` is another one.
    """
    is_file = out.suffix in (".json", ".jsonl") and not out.is_dir()
    if form == "mt_bench" and is_file:
        if name not in (None, out.stem):
            raise ConfigError(
                f"--name is {name!r} and --out {out}: FastChat takes the model's name from its file; name the file "
                f"{name}.jsonl, or leave --name out"
            )
        return out, out.stem
    # The name of a model at Hugging Face has a slash, which cannot be in the name of a file.
    name = (name or model_name).replace("/", "__")
    places = {
        "alpaca_eval": "model_outputs.json",
        "mt_bench": f"model_answer/{name}.jsonl",
        "tldr": "summaries.jsonl",
    } | {"pool": "pool.jsonl"}
    return out if is_file else out / places[form], name


def write_answers(
    path: Path,
    form: Format,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    generator: str,
    samples: int = 1,
) -> None:
    """Writes an answer file, whole or not at all. Raises DiskError.

    questions, answers: equally many, in the same order.
    generator: the name of the model that answered.
    samples: for a pool, how many questions one after the other are the same prompt.
    """
    if form == "pool":
        together = [(questions[at], answers[at : at + samples]) for at in range(0, len(answers), samples)]
        records = [_pool_record(*both, generator) for both in together]
        write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return
    record_of = {"alpaca_eval": _alpaca_record, "mt_bench": _mt_bench_record, "tldr": _tldr_record}[form]
    records = [record_of(*both, generator) for both in zip(questions, answers, strict=True)]
    if form == "alpaca_eval":
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(path, text)


def _alpaca_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """An answer as AlpacaEval's file has it."""
    told = {"output": answer.texts[0].strip(), "generator": generator, "finish_reason": answer.finish_reasons[0]}
    return question.record | told


def _mt_bench_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """An answer as FastChat's file has it.

    `answer_id` is a digest of the answer, so that equal answers have equal ids.
    """
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
    """A summary as a line of TL;DR's file.

    `response` is the text as generated, `summary` the same without space around it.
    """
    text = answer.texts[0]
    told = {
        "response": text,
        "summary": text.strip(),
        "generator": generator,
        "finish_reason": answer.finish_reasons[0],
    }
    return question.record | told


def _pool_record(question: Question, answers: Sequence[Answer], generator: str) -> dict[str, Any]:
    """All samples of a prompt, as `best_of_n.load_pool` reads them."""
    told = {
        "responses": [answer.texts[0] for answer in answers],
        "finished": [answer.finish_reasons[0] == "stop" for answer in answers],
        "generator": generator,
    }
    return question.record | told


def read_outputs(path: str | Path, prompts: str | Path | None = None) -> Outputs:
    """Reads an answer file. Its format is recognised by its first record.

    prompts: the file of MT-Bench's questions, which MT-Bench's answers do not repeat.

    An answer without `finish_reason` counts as finished. Raises `DataError`, and ConfigError if the file is MT-Bench's
    and `prompts` is None.
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
    """An answer of AlpacaEval's file, to be judged.

    The file does not say how the prompt was given; here it is a user's turn.
    """
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
    """A summary of TL;DR's file, to be judged."""
    fields, content = record.fields(), record.content("prompt")
    if "response" in fields:
        response = _answer(record, "response", fields["response"])
    else:
        response = _answer(record, "summary", record.field("summary"))
        # A summary was stripped. After a raw prompt the space between the two has to come back.
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
    """The answers of MT-Bench's file, turn by turn. Raises ConfigError if `prompts` is None."""
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
    """The answers to all turns of one question, each with the conversation before it."""
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
        # The next turn was asked after this answer.
        conversation = (*conversation, ("assistant", answer))
    return texts


def _answer(record: Record, key: str, value: Any) -> str:
    """Checks that an answer is a text, and returns it. An empty text is an answer, too. Raises `DataError`."""
    if not isinstance(value, str):
        why = f"{type(value).__name__}, not text"
        raise record.refusal("wrong_type", key, value, why, "write the answer as text")
    return value


def _finished(record: Record, value: Any) -> bool:
    """Whether a `finish_reason` stands for a finished answer; None does. Raises `DataError` for unknown values."""
    if value not in (None, "stop", "length"):
        raise record.refusal(
            "wrong_type", "finish_reason", value, "neither stop nor length", "correct it, leave it out"
        )
    return value != "length"
