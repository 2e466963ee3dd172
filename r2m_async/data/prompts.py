"""The prompts of a run: read and checked (`load_prompts`, `load_preferences`), then dealt to groups (`PromptStream`).

    loaded = load_prompts("posts.jsonl", tokenizer=tokenizer, max_prompt_tokens=512, on_bad_record="skip")
    stream = PromptStream(loaded.prompts, seed=0)
    stream.prompt_of(17), sampling_seed(0, 17)

A source is a JSONL file, several of them (a list, or one string with commas), a directory that `datasets` wrote, or
the name of a data set on the Hugging Face hub. A bad record is refused with its file and line, or skipped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from r2m_async.data.records import PROMPT_FIELD, Content, OnBadRecord, Record, Source, load_records
from r2m_async.data.seeds import prompt_order
from r2m_async.trajectories import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    prompts: tuple[Prompt, ...]
    skipped: dict[str, int]
    """Reason -> number of records left out; empty under `on_bad_record="error"`."""


class Preference(NamedTuple):
    prompt: Content
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPreferences:
    pairs: tuple[Preference, ...]
    skipped: dict[str, int]


def load_prompts(
    source: Source,
    *,
    tokenizer: Any,
    max_prompt_tokens: int,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    split: str = "train",
    limit: int | None = None,
) -> LoadedPrompts:
    """The first `limit` usable prompts of `source`, as text and tokens of the policy's `tokenizer`.

    A prompt is raw text, which goes to the policy as it is, or a list of {"role", "content"} turns that ends with a
    user turn. Raises `DataError` for a source that cannot be read, for a bad record unless `on_bad_record` is
    "skip", and where no prompt is left.
    """

    def parse(record: Record) -> Prompt:
        content = record.content(prompt_field, PROMPT_FIELD)
        text, token_ids = _as_policy_reads(content, record, tokenizer, prompt_field)
        if len(token_ids) > max_prompt_tokens:
            raise record.refusal(
                "too_long",
                prompt_field,
                text,
                f"{len(token_ids)} tokens where rollouts.max_prompt_tokens allows {max_prompt_tokens}",
                "raise that limit, shorten the prompt",
            )
        return Prompt(prompt_id=record.name, content=content, text=text, token_ids=tuple(token_ids))

    prompts, skipped = load_records(source, split, parse, on_bad_record, limit)
    return LoadedPrompts(prompts=prompts, skipped=skipped)


def load_preferences(
    source: Source,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    split: str = "train",
    limit: int | None = None,
) -> LoadedPreferences:
    """The first `limit` usable {prompt, chosen, rejected} records; errors as in `load_prompts`."""

    def parse(record: Record) -> Preference:
        prompt = record.content(prompt_field, PROMPT_FIELD)
        return Preference(prompt, record.response("chosen"), record.response("rejected"))

    pairs, skipped = load_records(source, split, parse, on_bad_record, limit)
    return LoadedPreferences(pairs=pairs, skipped=skipped)


def prompt_text(content: Content, tokenizer: Any) -> str:
    """What the policy reads: raw text as it is, turns through the tokenizer's chat template.

    Where the tokenizer has no chat template, the turns' contents, a newline after each.
    """
    if isinstance(content, str):
        return content
    if getattr(tokenizer, "chat_template", None) is None:
        return "".join(text + "\n" for _, text in content)
    messages = [{"role": role, "content": text} for role, text in content]
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


def policy_reads(content: Content, tokenizer: Any) -> tuple[str, list[int]]:
    """`prompt_text` and its token ids. Raises what a chat template raises, jinja2.TemplateError."""
    text = prompt_text(content, tokenizer)
    templated = not isinstance(content, str) and getattr(tokenizer, "chat_template", None) is not None
    # A chat template writes its own special tokens.
    return text, tokenizer(text, add_special_tokens=not templated)["input_ids"]


def response_ids(response: str, finished: bool, tokenizer: Any) -> list[int]:
    """A response given as text, as the policy reads it behind its prompt; `finished` adds the end of text."""
    return tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * finished


class PromptStream:
    """The prompt of every group, a pure function of (seed, group_id): each pass over the prompts is reshuffled."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        self._prompts = tuple(prompts)
        self._seed = seed

    def prompt_of(self, group_id: int) -> Prompt:
        epoch, place = divmod(group_id, len(self._prompts))
        return self._prompts[prompt_order(self._seed, epoch, len(self._prompts))[place]]


def _as_policy_reads(content: Content, record: Record, tokenizer: Any, key: str) -> tuple[str, list[int]]:
    import jinja2

    try:
        return policy_reads(content, tokenizer)
    except jinja2.TemplateError as error:
        why = f"the tokenizer's chat template refuses it ({error})"
        raise record.refusal("chat_template", key, content, why, "reorder the turns") from None
