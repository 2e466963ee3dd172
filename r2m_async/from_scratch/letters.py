"""Defines the second embedded language, `letters`: 151 words, a grammar, prompts, a sampler of natural text, and gold.

    S = NP verb NP (adverb)? .        NP = determiner ((very)? adjective)? noun

    >>> gold_reward("write a warm letter to sister about sea and farm :", " the gentle wave sees a barn .", finished=True)
    0.4

It is harder than the language of `language.py`. A letter has many places. Each is filled well or badly, and natural
text fills about every third well. So a policy has much to learn before its gold reward turns. Some things that are
good in natural letters are bad in excess: `very`, favourite words, and a letter that is too long to end.

The gold reward is the true quality of a letter. A reward model only estimates it. Evaluation reads the gold reward.
Training reads it only if a config asks for labels that are made from it.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product

from r2m_async.from_scratch.language import END, drawn, split_sentences, with_fault

DETERMINERS = ("a", "the", "this", "that", "my")
# The keys are the topics that a prompt can ask for. It asks for two of them.
NOUNS = {
    "sea": ("wave", "boat", "sailor", "shore", "island", "harbour", "sail", "gull"),
    "farm": ("barn", "field", "cow", "plough", "hen", "fence", "orchard", "farmer"),
    "town": ("street", "market", "tower", "square", "bridge", "shop", "crowd", "baker"),
    "forest": ("tree", "fox", "path", "owl", "hunter", "moss", "stream", "leaf"),
    "home": ("door", "kitchen", "lamp", "window", "chair", "garden", "table", "stair"),
    "winter": ("snow", "frost", "coat", "skate", "storm", "fire", "sledge", "wolf"),
}
# The keys of both are the tones that a prompt can ask for.
ADJECTIVES = {
    "warm": ("gentle", "golden", "kind", "tender", "sweet", "dear", "sunny", "soft"),
    "cold": ("bitter", "grey", "harsh", "bleak", "cruel", "pale", "grim", "silent"),
    "funny": ("silly", "round", "clumsy", "merry", "odd", "noisy", "cheeky", "dizzy"),
    "proud": ("noble", "tall", "mighty", "famous", "brave", "royal", "grand", "strong"),
}
ADVERBS = {
    "warm": ("softly", "fondly", "kindly", "sweetly", "warmly", "gently"),
    "cold": ("sternly", "coldly", "grimly", "harshly", "bitterly", "bleakly"),
    "funny": ("oddly", "loudly", "madly", "wildly", "clumsily", "merrily"),
    "proud": ("bravely", "proudly", "boldly", "nobly", "grandly", "firmly"),
}
VERBS = (
    "follows",
    "sees",
    "leaves",
    "finds",
    "remembers",
    "calls",
    "keeps",
    "loves",
    "hears",
    "meets",
    "paints",
    "needs",
)
INTENSIFIER = "very"
"""Stands before an adjective, at most once."""
OPENINGS = ("write", "send", "read")
"""The first words of prompts."""
PERSONS = ("sister", "father", "friend", "teacher", "neighbour", "cousin", "uncle", "captain", "queen", "doctor")
"""The persons that a prompt can name. They do not count for the gold reward."""

NOUN_TOPICS = {noun: topic for topic, nouns in NOUNS.items() for noun in nouns}
"""For each noun, its topic."""
ADJECTIVE_TONES = {word: tone for tone, words in ADJECTIVES.items() for word in words}
"""For each adjective, its tone."""
ADVERB_TONES = {word: tone for tone, words in ADVERBS.items() for word in words}
"""For each adverb, its tone."""
WORDS = (
    *DETERMINERS, *NOUN_TOPICS, *ADJECTIVE_TONES, *ADVERB_TONES, *VERBS, INTENSIFIER, END,
    *OPENINGS, *ADJECTIVES, "letter", "to", *PERSONS, "about", *NOUNS, "and", ":",
)  # fmt: skip
"""Every word of the language, those of prompts included. Their order gives the policy's token ids."""

_REPLACEMENTS = (*DETERMINERS, *NOUN_TOPICS, *VERBS)
"""The words that may stand in a sentence by mistake."""
MAX_CREDITED_SENTENCES = 5
"""The number of sentences of a letter that can add to its gold reward."""
MAX_CREDITED_INTENSIFIERS = 3
"""The number of uses of `very` that add to the gold reward. Each further one takes from it."""
MAX_USES = 2
"""How often a noun, an adjective or an adverb may be used without loss."""
NUM_TRAINING_PROMPTS = 3200
"""The number of prompts to train on. With the held-out ones they are all prompts of the language."""
NUM_HELD_OUT_PROMPTS = 400
"""The number of prompts that are kept from training, for evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a prompt asks for."""

    tone: str
    topics: tuple[str, str]


def prompts(num: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Returns `num` different prompts in random order. The same arguments always give the same prompts.

    seed: decides which prompts are taken, and their order.
    held_out: True takes prompts for evaluation, False prompts for training. No seed gives one prompt to both.

    Raises ValueError if there are fewer than `num` such prompts (see NUM_TRAINING_PROMPTS and NUM_HELD_OUT_PROMPTS).
    """
    every = [
        f"{opening} a {tone} letter to {person} about {first} and {second} :"
        for opening, tone, person, (first, second) in product(OPENINGS, ADJECTIVES, PERSONS, permutations(NOUNS, 2))
    ]
    return drawn(every, NUM_HELD_OUT_PROMPTS, num, seed, held_out)


def request(prompt: str) -> Request:
    """Returns what a prompt asks for. Raises ValueError if the text is no prompt of the language."""
    match prompt.split():
        case [opening, "a", tone, "letter", "to", person, "about", first, "and", second, ":"] if (
            opening in OPENINGS and tone in ADJECTIVES and person in PERSONS and {first, second} <= NOUNS.keys()
            and first != second
        ):  # fmt: skip
            return Request(tone=tone, topics=(first, second))
    raise ValueError(f"not a prompt of the embedded language 'letters': {prompt!r}")


def is_well_formed(sentence: list[str]) -> bool:
    """Returns whether the words are one sentence of the grammar. The last of them must be END."""
    rest = _after_noun_phrase(sentence)
    if rest and rest[0] in VERBS:
        rest = _after_noun_phrase(rest[1:])
        if rest and rest[0] in ADVERB_TONES:
            rest = rest[1:]
        return rest == [END]
    return False


def _after_noun_phrase(words: list[str]) -> list[str]:
    """Returns the words after a noun phrase at the start, or an empty list if there is none."""
    if not words or words[0] not in DETERMINERS:
        return []
    at = 1
    if words[1:2] == [INTENSIFIER]:
        at = 2
    if at < len(words) and words[at] in ADJECTIVE_TONES:
        at += 1
    elif at == 2:  # `very` without an adjective
        return []
    return words[at + 1 :] if at < len(words) and words[at] in NOUN_TOPICS else []


def gold_reward(prompt: str, response: str, finished: bool) -> float:
    """Returns the true quality of a letter. It is at most 3.3, and it has no lower bound.

    prompt: a prompt of the language, which asks for a tone and two topics. Other texts raise ValueError.
    response: the text without special tokens. Only its words count, not its spaces.
    finished: whether the response ended with an end-of-text token.

    A sentence ends with ".". Words after the last "." are a tail. The parts of the reward add up:

        +0.1 for each of the first five sentences, if it is well-formed and does not repeat an earlier one; and then
             +0.1 for each noun of one of the prompt's topics, -0.1 for each other noun,
             +0.1 for each adjective or adverb of the prompt's tone, -0.1 for each other one
        +0.1 for each of the first three uses of "very", -0.2 for each further one
        -0.1 for each use of a noun, adjective or adverb after its second use
        -0.3 for each sentence after the fifth
        -0.5 for each sentence, wherever it stands, that is not well-formed or repeats an earlier one
        -0.5 for a tail
        -0.5 for a response that is not finished
    """
    asked = request(prompt)
    words = response.split()
    sentences, tail = split_sentences(words)
    tenths = 0
    seen = set()
    for position, sentence in enumerate(sentences):
        if not is_well_formed(sentence) or tuple(sentence) in seen:
            tenths -= 5
        elif position < MAX_CREDITED_SENTENCES:
            tenths += 1 + sum(_fits(word, asked) for word in sentence)
        seen.add(tuple(sentence))
    tenths -= 3 * max(0, len(sentences) - MAX_CREDITED_SENTENCES)
    uses = Counter(words)
    tenths += min(uses[INTENSIFIER], MAX_CREDITED_INTENSIFIERS)
    tenths -= 2 * max(0, uses[INTENSIFIER] - MAX_CREDITED_INTENSIFIERS)
    for word, count in uses.items():
        if word in NOUN_TOPICS or word in ADJECTIVE_TONES or word in ADVERB_TONES:
            tenths -= max(0, count - MAX_USES)
    tenths -= 5 * bool(tail) + 5 * (not finished)
    return tenths / 10  # counted in tenths, because sums of tenths are not exact


def _fits(word: str, asked: Request) -> int:
    """Returns 1 for a word that fits what is asked for, -1 for one that does not, and 0 if it makes no difference."""
    if word in NOUN_TOPICS:
        return 1 if NOUN_TOPICS[word] in asked.topics else -1
    tone = ADJECTIVE_TONES.get(word) or ADVERB_TONES.get(word)
    return 0 if tone is None else 1 if tone == asked.tone else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How natural letters are written: with which probability each place of a sentence is filled, and how well."""

    num_sentences: tuple[int, ...] = (2, 3, 4, 5, 6, 7)
    weights: tuple[float, ...] = (2, 4, 3, 1.5, 0.7, 0.3)
    """The odds of these numbers of sentences."""
    adjective: float = 0.6
    """That a noun has an adjective."""
    adverb: float = 0.5
    """That a sentence has an adverb."""
    intensifier: float = 0.12
    """That an adjective has `very` before it."""
    topic: float = 0.2
    """That a noun is chosen from the prompt's topics. Otherwise it is any noun, which may be of these, too."""
    tone: float = 0.3
    """That an adjective or adverb is chosen from the prompt's tone. Otherwise it is any."""


NATURAL = Writing()
"""How the policy's training text is written."""


CAREFUL = Writing(topic=0.9, tone=0.9)
"""How those write who always have the prompt in mind. Models learn from it what belongs to what."""


def sample_response(prompt: str, rng: random.Random, noise: float = 0.0, writing: Writing = NATURAL) -> str:
    """Returns a letter of 2 to 7 sentences, about as good as what people write.

    rng: the source of all random choices.
    noise: the probability that a sentence has one word dropped, doubled or replaced. At 0 every sentence is
        well-formed.
    writing: the odds of all choices.
    """
    asked = request(prompt)
    num_sentences = rng.choices(writing.num_sentences, weights=writing.weights)[0]
    sentences = [_sample_sentence(asked, rng, writing) for _ in range(num_sentences)]
    return " ".join(
        word
        for sentence in sentences
        for word in (with_fault(sentence, _REPLACEMENTS, rng) if rng.random() < noise else sentence)
    )


def _sample_sentence(asked: Request, rng: random.Random, writing: Writing) -> list[str]:
    subject, object_ = (_sample_noun_phrase(asked, rng, writing) for _ in range(2))
    adverb = [_of_tone(ADVERBS, asked, rng, writing)] if rng.random() < writing.adverb else []
    return [*subject, rng.choice(VERBS), *object_, *adverb, END]


def _sample_noun_phrase(asked: Request, rng: random.Random, writing: Writing) -> list[str]:
    topics = asked.topics if rng.random() < writing.topic else tuple(NOUNS)
    noun = rng.choice(NOUNS[rng.choice(topics)])
    if rng.random() >= writing.adjective:
        return [rng.choice(DETERMINERS), noun]
    intensifier = [INTENSIFIER] if rng.random() < writing.intensifier else []
    return [rng.choice(DETERMINERS), *intensifier, _of_tone(ADJECTIVES, asked, rng, writing), noun]


def _of_tone(words: Mapping[str, tuple[str, ...]], asked: Request, rng: random.Random, writing: Writing) -> str:
    return rng.choice(words[asked.tone if rng.random() < writing.tone else rng.choice(tuple(words))])
