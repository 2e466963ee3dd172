"""Loads and checks the prompts and preference pairs of a run, and deals the prompts to groups.

    loaded = load_prompts("posts.jsonl", tokenizer=tokenizer, max_prompt_tokens=512, on_bad_record="skip")
    stream = PromptStream(loaded.prompts, seed=0)
    stream.prompt_of(17), sampling_seed(0, 17)

`sources.py` says what a source may be. A bad record raises an error that names its file and line. Under
`on_bad_record="skip"` it is left out and counted instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from r2m_async.config_records import Filters
from r2m_async.data.chat import TemplateRefusal, templated
from r2m_async.data.pairs import Preference, read_preference, read_prompt, read_response
from r2m_async.data.raw_text import raw_ids
from r2m_async.data.records import Content, FilteredRecord, OnBadRecord, Record, load_records
from r2m_async.data.seeds import prompt_order
from r2m_async.data.sources import Source
from r2m_async.data.special_tokens import token_ids
from r2m_async.trajectories import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """The prompts of a source, and how many records were left out."""

    prompts: tuple[Prompt, ...]
    """In the order of the source."""
    skipped: dict[str, int]
    """For each reason, the number of records left out. Under `on_bad_record="error"` only filters leave some out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPreferences:
    """The preference pairs of a source, and how many records were left out."""

    pairs: tuple[Preference, ...]
    """In the order of the source."""
    skipped: dict[str, int]
    """For each reason, the number of records left out. It is empty under `on_bad_record="error"`."""


def load_prompts(
    source: Source,
    *,
    tokenizer: Any,
    max_prompt_tokens: int,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    filters: Filters | None = None,
    split: str = "train",
    limit: int | None = None,
    problem: Callable[[Prompt], str | None] = lambda prompt: None,
) -> LoadedPrompts:
    """Returns the usable prompts of `source`, as text and as tokens of the policy.

    source: see `sources.py`.
    tokenizer: the policy's.
    max_prompt_tokens: the most tokens that a prompt may have. A longer one is a bad record.
    on_bad_record: "error" raises at the first bad record. "skip" leaves it out and counts it.
    prompt_field: the field of a record that holds the prompt. A prompt is raw text, which the policy reads as it is,
        or a list of {"role", "content"} turns that ends with a user turn. A record without it may be a pair of whole
        conversations (`pairs.py`), whose prompt is taken.
    columns: for each field, the name that it has in the source. None renames nothing.
    chat: whether a prompt that is a text is a turn of the user.
    filters: the lengths beyond which a record is left out. None leaves none out.
    split: the split of a data set. Single files have none.
    limit: stop after this many prompts. None takes all.
    problem: says why a model of the run cannot use a prompt, or returns None if all can. Such a prompt is a bad record.

    Every further field of a record goes into `Prompt.columns`. A record is bad if such a field cannot be sent to
    another process.

    Raises DataError if the source cannot be read, if a record is bad under "error", or if no prompt is left.
    """
    limits = (filters or Filters()).limits()

    def parse(record: Record) -> Prompt:
        content = read_prompt(record, chat)
        called = record.called("prompt")
        text, token_ids = _as_policy_reads(content, record, tokenizer, called)
        if not token_ids:
            raise record.refusal("empty", called, text, "the tokenizer makes no token of it", "change the prompt")
        check_lengths(record, limits, tokenizer, len(token_ids))
        if len(token_ids) > max_prompt_tokens:
            raise record.refusal(
                "too_long",
                called,
                text,
                f"{len(token_ids)} tokens where rollouts.max_prompt_tokens allows {max_prompt_tokens}",
                "raise that limit, shorten the prompt",
            )
        prompt = Prompt(
            prompt_id=record.name,
            content=content,
            text=text,
            token_ids=tuple(token_ids),
            columns=record.columns(without="prompt"),
        )
        if why := problem(prompt):
            raise record.refusal("unreadable", called, text, why, "change the prompt")
        return prompt

    names = {"prompt": prompt_field, **(columns or {})}
    prompts, skipped = load_records(source, split, parse, on_bad_record, limit, names)
    return LoadedPrompts(prompts=prompts, skipped=skipped)


def load_preferences(
    source: Source,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    limit: int | None = None,
    problem: Callable[[Preference], str | None] = lambda pair: None,
) -> LoadedPreferences:
    """Returns the usable preference pairs of `source`, in any of the forms of `pairs.py`.

    problem: says why a pair cannot be used, or returns None if it can. It is asked about the pairs in their order.

    Other arguments and errors are those of `load_prompts`.
    """

    def parse(record: Record) -> Preference:
        pair = read_preference(record, chat)
        if why := problem(pair):
            raise record.refusal("unreadable", record.called("prompt"), pair.prompt, why, "take the pair out")
        return pair

    names = {"prompt": prompt_field, **(columns or {})}
    pairs, skipped = load_records(source, split, parse, on_bad_record, limit, names)
    return LoadedPreferences(pairs=pairs, skipped=skipped)


def check_lengths(record: Record, limits: Mapping[str, int], tokenizer: Any, num_prompt_tokens: int) -> None:
    """Raises FilteredRecord for a record with a text beyond its limit, and BadRecord if it lacks such a text.

    limits: the most tokens of `prompt`, `chosen` and `rejected`, each if it is there (`Filters.limits`).
    num_prompt_tokens: the number of tokens of the prompt. A response is counted by itself, without special tokens.
    """
    for key, limit in limits.items():
        if key == "prompt":
            num = num_prompt_tokens
        else:
            num = len(tokenizer(read_response(record, key), add_special_tokens=False)["input_ids"])
        if num > limit:
            raise FilteredRecord(f"beyond data.filters.max_{key}_tokens", f"{record.place}: {key} has {num} tokens")


def prompt_text(content: Content, tokenizer: Any) -> str:
    """Returns the text that the policy reads for a prompt.

    content: raw text, which is returned as it is, or (role, content) turns. Turns go through the tokenizer's chat
        template. If it has none, the contents of the turns are joined, with a newline after each.

    Raises TemplateRefusal if the chat template refuses the turns.
    """
    if isinstance(content, str):
        return content
    if getattr(tokenizer, "chat_template", None) is None:
        return "".join(text + "\n" for _, text in content)
    messages = [{"role": role, "content": text} for role, text in content]
    return templated(tokenizer, messages, add_generation_prompt=True)


def policy_reads(content: Content, tokenizer: Any) -> tuple[str, list[int]]:
    """Returns what the policy reads for a prompt, as text and as token ids.

    content: raw text, or (role, content) turns, see `prompt_text`.

    Raises TemplateRefusal if the chat template refuses the turns.
    """
    text = prompt_text(content, tokenizer)
    through_template = not isinstance(content, str) and getattr(tokenizer, "chat_template", None) is not None
    if not through_template:
        return text, raw_ids(tokenizer, text)
    # A chat template writes its own special tokens. The tokenizer must not add them a second time.
    return text, token_ids(tokenizer, text)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of what the prompts are and of their order, as text.

    Their names, which say where a file lies, do not count.
    """
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(
            json.dumps([prompt.text, prompt.token_ids, prompt.columns], sort_keys=True, default=repr).encode()
        )
    return digest.hexdigest()


class PromptStream:
    """Deals prompts to groups, in a new random order for each pass over the prompts.

    The prompt of a group depends on the seed and the group's number alone. So a resumed run deals as the first one did.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """prompts: all prompts of the run, at least one, else ValueError is raised. seed: the run's seed."""
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        self._prompts = tuple(prompts)
        self._seed = seed

    def prompt_of(self, group_id: int) -> Prompt:
        """Returns the prompt of a group. group_id: counted from 0."""
        epoch, place = divmod(group_id, len(self._prompts))
        return self._prompts[prompt_order(self._seed, epoch, len(self._prompts))[place]]


def _as_policy_reads(content: Content, record: Record, tokenizer: Any, key: str) -> tuple[str, list[int]]:
    """Does what `policy_reads` does, but raises BadRecord if the chat template refuses the turns."""
    try:
        return policy_reads(content, tokenizer)
    except TemplateRefusal as error:
        why = f"the tokenizer's chat template refuses it ({error.reason})"
        raise record.refusal("chat_template", key, content, why, "reorder the turns") from None
