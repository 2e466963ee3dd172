"""Prompts whose responses have a known order: four splits of the embedded language, and the prompts of RM-Bench.

BSR (Sec. 2.2) asks what a reward model has learnt. It measures the model on prompts that it was not trained on, and on
responses by writers that it was not trained on:

                        the embedded policy writes      four other writers write
    training prompts    in_domain                       response_disjoint
    held-out prompts    prompt_disjoint                 mutual_disjoint

Each prompt has four responses, which the embedded language's gold reward ranks. The embedded preference pairs are
samples of the embedded policy on all training prompts. So `in_domain` takes new samples on those prompts, where BSR
keeps two of four responses back. The other writers are programs that stand in for BSR's four unseen models. Each of
them writes one response to every prompt, and now and then makes a fault of its own kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r2m_async.data.records import Content, Record, load_records, read_records
from r2m_async.data.sources import items_of
from r2m_async.errors import DataError
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
from r2m_async.models.pretrained import pretrained_model, pretrained_tokenizer

if TYPE_CHECKING:
    from r2m_async.from_scratch.word_models import EmbeddedModels

SPLITS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")
"""Names of the splits, as in the table above."""
NUM_RESPONSES = 4
"""Responses to each prompt of a split."""
NUM_STYLES = 3
"""Styles in which RM-Bench has every response."""
RM_BENCH_DOMAINS = ("chat", "math", "code", "safety-refuse", "safety-response")
"""RM-Bench's domains, as its files of a single domain are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A response as text."""

    text: str
    finished: bool
    """Whether the response ended by itself and was not cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPrompt:
    """A prompt with several responses and their gold rewards. In the splits there are NUM_RESPONSES."""

    prompt: Content
    responses: tuple[Response, ...]
    golds: tuple[float, ...]
    """The gold reward of each response; NaN where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StyledPrompt:
    """A prompt of RM-Bench: three chosen and three rejected responses, one in each style.

    The styles come in this order: concise, detailed, detailed with markdown.
    """

    prompt: Content
    domain: str
    """RM-Bench's domain of the prompt, such as `chat` or `safety-refuse`."""
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def embedded_splits(
    models: EmbeddedModels, seed: int, num_prompts: int = NUM_HELD_OUT_PROMPTS
) -> dict[str, tuple[RankedPrompt, ...]]:
    """The prompts of the four splits, by the name of the split. They are a function of the arguments alone.

    models: the embedded models, whose policy writes half of the responses.
    num_prompts: prompts per split, at most NUM_HELD_OUT_PROMPTS.
    """
    from r2m_async.from_scratch.embedded import sample_policy

    policy, tokenizer = (load("policy", models.policy) for load in (pretrained_model, pretrained_tokenizer))
    splits: dict[str, tuple[RankedPrompt, ...]] = {}
    for held_out, (by_policy, by_others) in ((False, SPLITS[0::2]), (True, SPLITS[1::2])):
        chosen = prompts(num_prompts, seed, held_out=held_out)
        # The preference pairs were sampled with small seeds. The same seed here could give the very same samples.
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
    """A prompt of the embedded language with its responses, and the gold reward of each."""
    golds = tuple(gold_reward(prompt, one.text, one.finished) for one in responses)
    return RankedPrompt(prompt=prompt, responses=tuple(responses), golds=golds)


def load_ranked(source: str, split: str = "train") -> dict[str, tuple[RankedPrompt, ...]]:
    """Reads prompts with ranked responses, as BSR publishes its validation sets.

    source: as in `sources.rows`; each file or data set becomes a split of its own.
    split: the split of a data set.

    A record has `instruction`, two responses or more in `response_1_text`, `response_2_text`, ..., and their gold
    rewards in `all_scores`. All records of a source have equally many. The instruction is the user's turn, as in BSR's
    script (scripts/run_kendall.py in github.com/LinkedIn-XFACT/RM-Robustness).

    Returns the prompts by the name of the file or the data set. Raises `DataError`.
    """
    splits: dict[str, tuple[RankedPrompt, ...]] = {}
    for item in items_of(source):
        name = Path(item).name if Path(item).name not in splits else item
        splits[name] = load_records([item], split, _ranked_record)[0]
        numbers = sorted({len(one.responses) for one in splits[name]})
        if len(numbers) > 1:
            raise DataError(
                f"{item}: prompts with {numbers[0]} and with {numbers[-1]} responses; give each number a file of its own"
            )
    return splits


def _ranked_record(record: Record) -> RankedPrompt:
    """The prompt of a record with its responses and their gold rewards."""
    keys: list[str] = []
    while record.has(key := f"response_{len(keys) + 1}_text"):
        keys.append(key)
    golds = record.field("all_scores")
    numbers = isinstance(golds, list) and all(type(one) in (int, float) and abs(one) < float("inf") for one in golds)
    if not numbers or len(golds) != len(keys) or len(keys) < 2:
        why = f"not a finite number for each of the responses, of which there are {len(keys)}"
        raise record.refusal("wrong_type", "all_scores", golds, why, "write one per response, of two or more")
    return RankedPrompt(
        prompt=(("user", record.response("instruction")),),
        responses=tuple(Response(text=record.response(key), finished=True) for key in keys),
        golds=tuple(map(float, golds)),
    )


def load_rm_bench(path: str | Path) -> tuple[StyledPrompt, ...]:
    """Reads the prompts of RM-Bench.

    path: a file as RM-Bench publishes it (a JSON list), a JSONL file, or several files with commas between them.

    A record has `prompt` and `domain`, and three responses each in `chosen` and `rejected` (or in `chosen_styles` and
    `rejected_styles`). The published files of a single domain have no `domain`: their name says it, as in
    `safety-refuse_filtered.json`. Raises `DataError` for anything else.
    """
    items = [str(path)] if Path(path).is_file() else [item.strip() for item in str(path).split(",")]
    styled = []
    for item in items:
        named = Path(item).stem.removesuffix("_filtered")
        for record in read_records([item]):
            prompt = record.content("prompt")
            # A published file of a single domain has the domain in its name alone.
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
    """The three responses of one side, `chosen` or `rejected`, of a record."""
    key = f"{side}_styles" if f"{side}_styles" in record.fields() else side
    styles = record.field(key)
    if not (isinstance(styles, list) and len(styles) == NUM_STYLES and all(isinstance(one, str) for one in styles)):
        why = f"not {NUM_STYLES} texts, one per style"
        raise record.refusal("wrong_type", key, styles, why, "write [concise, detailed, detailed markdown]")
    return tuple(styles)


# The other writers: all write natural text, and some of their sentences have a fault of the writer's kind. As most
# sentences of every writer are natural, a writer's style alone does not give the rank of its response away.

FAULTY = 0.2
"""Share of the sentences that have a fault. If most had one, the tau of every reward model would be near 0, and no two
reward models could be told apart."""


def _careless(prompt: str, rng: random.Random) -> Response:
    """In some sentences a word is dropped, doubled or replaced."""
    return Response(text=f" {sample_response(prompt, rng, noise=FAULTY)}", finished=True)


def _ornate(prompt: str, rng: random.Random) -> Response:
    """Some sentences have an adjective before every noun, perhaps of the wrong tone, and end with an adverb."""
    return _joined(_ornate_sentence(prompt, rng) if rng.random() < FAULTY else one for one in _natural(prompt, rng))


def _repeating(prompt: str, rng: random.Random) -> Response:
    """Some sentences are said twice."""
    return _joined(again for one in _natural(prompt, rng) for again in [one] * (1 + (rng.random() < FAULTY)))


def _wandering(prompt: str, rng: random.Random) -> Response:
    """Some responses are about the topic of another prompt, and some are cut off."""
    about = rng.choice(prompts(NUM_HELD_OUT_PROMPTS, 0, held_out=True)) if rng.random() < FAULTY else prompt
    words = sample_response(about, rng).split()
    kept = rng.randint(1, len(words)) if rng.random() < FAULTY else len(words)
    return Response(text=f" {' '.join(words[:kept])}", finished=kept == len(words))


def _natural(prompt: str, rng: random.Random) -> list[str]:
    """Natural sentences on the topic of a prompt, as a list."""
    return [f"{one.strip()} {END}" for one in sample_response(prompt, rng).split(END) if one.strip()]


def _ornate_sentence(prompt: str, rng: random.Random) -> str:
    """A sentence of `_ornate`: its adjectives may have the wrong tone, and its nouns may be off the topic."""
    tone, noun = topic(prompt)
    words: list[str] = []
    for named in (noun if rng.random() < 0.6 else rng.choice(NOUNS), rng.choice(NOUNS)):
        adjectives = ADJECTIVES[tone if rng.random() < 0.7 else rng.choice(tuple(ADJECTIVES))]
        words += [rng.choice(DETERMINERS), rng.choice(adjectives), named, rng.choice(VERBS)]
    return " ".join([*words[:-1], rng.choice(ADVERBS), END])


def _joined(sentences: Iterable[str]) -> Response:
    """A finished response that consists of these sentences."""
    return Response(text=f" {' '.join(sentences)}", finished=True)


OTHER_WRITERS: tuple[Callable[[str, random.Random], Response], ...] = (_careless, _ornate, _repeating, _wandering)
"""Each takes a prompt and a random generator, and writes a response."""
