"""What reward models are evaluated on beside pairs: ranked responses of the embedded language, and RM-Bench's styles.

BSR (Sec. 2.2) asks what a reward model learnt by taking it to prompts, and to writers, that it was not trained on:

                        the embedded policy writes      four other writers write
    training prompts    in_domain                       response_disjoint
    held-out prompts    prompt_disjoint                 mutual_disjoint

Four responses to a prompt each, ranked by the language's gold reward. The embedded preferences pair the policy's samples
on all training prompts; `in_domain` has new ones of those, where BSR keeps two of four responses back. The other
writers stand in for its four unseen models: each writes one response to every prompt, now and then with a fault of its kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r2m_async.data.records import Content, Record, read_records
from r2m_async.errors import DataError
from r2m_async.evaluation.questions import read_file
from r2m_async.from_scratch.language import (
    ADJECTIVES,
    ADVERBS,
    DETERMINERS,
    END,
    NOUNS,
    NUM_HELD_OUT_PROMPTS,
    VERBS,
    gold_reward,
    prompts,
    sample_response,
    topic,
)

if TYPE_CHECKING:
    from r2m_async.from_scratch.embedded import EmbeddedModels

SPLITS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")
NUM_RESPONSES = 4
NUM_STYLES = 3
RM_BENCH_DOMAINS = ("chat", "math", "code", "safety-refuse", "safety-response")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    text: str
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPrompt:
    """A prompt with responses to it (NUM_RESPONSES in the splits) and the gold reward of each."""

    prompt: Content
    responses: tuple[Response, ...]
    golds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StyledPrompt:
    """A record of RM-Bench; responses by rising style: concise, detailed, detailed with markdown."""

    prompt: Content
    domain: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def embedded_splits(
    models: EmbeddedModels, seed: int, num_prompts: int = NUM_HELD_OUT_PROMPTS
) -> dict[str, tuple[RankedPrompt, ...]]:
    """SPLITS by name with `num_prompts` (at most NUM_HELD_OUT_PROMPTS) prompts each, a function of the arguments alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r2m_async.from_scratch.embedded import sample_policy

    policy, tokenizer = (kind.from_pretrained(models.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    splits: dict[str, tuple[RankedPrompt, ...]] = {}
    for held_out, (by_policy, by_others) in ((False, SPLITS[0::2]), (True, SPLITS[1::2])):
        chosen = prompts(num_prompts, seed, held_out=held_out)
        # The preferences were sampled with small seeds: with one of those, these could be the very same samples.
        samples = sample_policy(
            policy, tokenizer, chosen, samples_per_prompt=NUM_RESPONSES, seed=1_000_000 + 2 * seed + held_out
        )
        splits[by_policy] = tuple(
            ranked(prompt, [Response(text=one.response, finished=one.finished) for one in of_prompt])
            for prompt, of_prompt in zip(chosen, samples, strict=True)
        )
        rng = random.Random(f"{seed}/{by_others}")
        splits[by_others] = tuple(ranked(prompt, [write(prompt, rng) for write in OTHER_WRITERS]) for prompt in chosen)
    return {name: splits[name] for name in SPLITS}


def ranked(prompt: str, responses: Sequence[Response]) -> RankedPrompt:
    """Responses to a prompt of the embedded language, with their gold rewards."""
    golds = tuple(gold_reward(prompt, one.text, one.finished) for one in responses)
    return RankedPrompt(prompt=prompt, responses=tuple(responses), golds=golds)


def load_rm_bench(path: str | Path) -> tuple[StyledPrompt, ...]:
    """RM-Bench's files as they are published, JSON lists, or JSONL: one path, or several with commas between them.

    A record has `prompt`, `domain`, and three styles each in `chosen` and `rejected`, or in `chosen_styles` and
    `rejected_styles`. The published files of one domain have it in their name alone (`safety-refuse_filtered.json`).
    Raises `DataError` for anything else.
    """
    items = [str(path)] if Path(path).is_file() else [item.strip() for item in str(path).split(",")]
    styled = []
    for item in items:
        named = Path(item).stem.removesuffix("_filtered")
        for record in read_file(item) if Path(item).is_file() else read_records(item):
            prompt = record.content("prompt")
            in_name = named in RM_BENCH_DOMAINS and "domain" not in record.fields()
            one = StyledPrompt(
                prompt=(("user", prompt),) if isinstance(prompt, str) else prompt,
                domain=named if in_name else str(record.field("domain")),
                chosen=_styles(record, "chosen"),
                rejected=_styles(record, "rejected"),
            )
            styled.append(one)
    if not styled:
        raise DataError(f"{path}: no record of RM-Bench in it; give its data/total_dataset.json")
    return tuple(styled)


def _styles(record: Record, side: str) -> tuple[str, ...]:
    key = f"{side}_styles" if f"{side}_styles" in record.fields() else side
    styles = record.field(key)
    if not (isinstance(styles, list) and len(styles) == NUM_STYLES and all(isinstance(one, str) for one in styles)):
        why = f"not {NUM_STYLES} texts, one per style"
        raise record.refusal("wrong_type", key, styles, why, "write [concise, detailed, detailed markdown]")
    return tuple(styles)


# The other writers: natural text, in which some sentences have a fault of the writer's kind. Style alone gives no rank away.

FAULTY = 0.2
"""Of the sentences. With faults in most of them every reward model's tau is about 0, and none can be told from another."""


def _careless(prompt: str, rng: random.Random) -> Response:
    """Words dropped, doubled or replaced."""
    return Response(text=f" {sample_response(prompt, rng, noise=FAULTY)}", finished=True)


def _ornate(prompt: str, rng: random.Random) -> Response:
    """An adjective for every noun and an adverb for the verb, of either tone."""
    return _joined(_ornate_sentence(prompt, rng) if rng.random() < FAULTY else one for one in _natural(prompt, rng))


def _repeating(prompt: str, rng: random.Random) -> Response:
    """Says its sentences again."""
    return _joined(again for one in _natural(prompt, rng) for again in [one] * (1 + (rng.random() < FAULTY)))


def _wandering(prompt: str, rng: random.Random) -> Response:
    """Now and then on another prompt's topic, or cut off."""
    about = rng.choice(prompts(NUM_HELD_OUT_PROMPTS, 0, held_out=True)) if rng.random() < FAULTY else prompt
    words = sample_response(about, rng).split()
    kept = rng.randint(1, len(words)) if rng.random() < FAULTY else len(words)
    return Response(text=f" {' '.join(words[:kept])}", finished=kept == len(words))


def _natural(prompt: str, rng: random.Random) -> list[str]:
    """Sentences."""
    return [f"{one.strip()} {END}" for one in sample_response(prompt, rng).split(END) if one.strip()]


def _ornate_sentence(prompt: str, rng: random.Random) -> str:
    tone, noun = topic(prompt)
    words: list[str] = []
    for named in (noun if rng.random() < 0.6 else rng.choice(NOUNS), rng.choice(NOUNS)):
        adjectives = ADJECTIVES[tone if rng.random() < 0.7 else rng.choice(tuple(ADJECTIVES))]
        words += [rng.choice(DETERMINERS), rng.choice(adjectives), named, rng.choice(VERBS)]
    return " ".join([*words[:-1], rng.choice(ADVERBS), END])


def _joined(sentences: Iterable[str]) -> Response:
    return Response(text=f" {' '.join(sentences)}", finished=True)


OTHER_WRITERS: tuple[Callable[[str, random.Random], Response], ...] = (_careless, _ornate, _repeating, _wandering)
