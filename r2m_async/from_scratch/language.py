"""Defines the embedded language: 76 words, a grammar, prompts, a sampler of natural text, and the gold reward.

    S = NP verb NP (adverb)? .        NP = determiner (adjective)? noun

    >>> gold_reward("write something warm about the river :", " the gentle river follows a house .", finished=True)
    1.0

The gold reward is the true quality of a response. A reward model only estimates it. Evaluation reads the gold reward.
Training reads it only if a config asks for labels that are made from it.
"""

import random
from itertools import product

from r2m_async.errors import ConfigError


def _words(text: str) -> tuple[str, ...]:
    """Splits a text into its words."""
    return tuple(text.split())


DETERMINERS = _words("a the this that my")
NOUNS = _words(
    "river house garden mother sailor winter letter mountain child city "
    "forest horse window friend road bird door song field lamp"
)
# The keys are the two tones that a prompt can ask for.
ADJECTIVES = {
    "warm": _words("gentle golden kind bright soft tender sunny sweet merry dear"),
    "cold": _words("bitter grey harsh frozen dark bleak cruel silent pale grim"),
}
VERBS = _words("follows sees leaves finds remembers calls keeps loves hears holds meets paints touches")
ADVERBS = _words("slowly often again quietly now early softly always")
END = "."
"""The last word of every sentence."""
OPENINGS = ("write", "say", "tell", "sing")
"""The first words of prompts."""

ADJECTIVE_TONES = {adjective: tone for tone, adjectives in ADJECTIVES.items() for adjective in adjectives}
"""For each adjective, its tone."""
WORDS = (
    *DETERMINERS, *NOUNS, *ADJECTIVE_TONES, *VERBS, *ADVERBS, END,
    *OPENINGS, "something", *ADJECTIVES, "about", ":",
)  # fmt: skip
"""Every word of the language, those of prompts included. Their order gives the policy's token ids."""

_REPLACEMENTS = (*DETERMINERS, *NOUNS, *VERBS, *ADVERBS)
"""The words that may stand in a sentence by mistake."""
MAX_CREDITED_SENTENCES = 3
"""The number of sentences of a response that can add to its gold reward."""
NUM_TRAINING_PROMPTS = 600
"""The number of prompts to train on. With the held-out ones they are all prompts of the language."""
NUM_HELD_OUT_PROMPTS = 200
"""The number of prompts that are kept from training, for evaluation."""


def prompts(num: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Returns `num` different prompts in random order. The same arguments always give the same prompts.

    seed: decides which prompts are taken, and their order.
    held_out: True takes prompts for evaluation, False prompts for training. No seed gives one prompt to both.

    Raises ValueError if there are fewer than `num` such prompts (see NUM_TRAINING_PROMPTS and NUM_HELD_OUT_PROMPTS).
    """
    every = [
        f"{opening} something {tone} about {determiner} {noun} :"
        for opening, tone, determiner, noun in product(OPENINGS, ADJECTIVES, DETERMINERS, NOUNS)
    ]
    return drawn(every, NUM_HELD_OUT_PROMPTS, num, seed, held_out)


def drawn(every: list[str], num_held_out: int, num: int, seed: int, held_out: bool) -> list[str]:
    """Returns `num` of a language's prompts, as its `prompts` says.

    every: all prompts of the language. num_held_out: how many of them are kept from training.
    """
    random.Random("held-out prompts").shuffle(every)  # a fixed seed: the held-out prompts are always the same
    pool = every[:num_held_out] if held_out else every[num_held_out:]
    if not 0 <= num <= len(pool):
        kind = "held-out" if held_out else "training"
        raise ValueError(f"prompts(num={num}): there are {len(pool)} {kind} prompts; ask for 0 to {len(pool)}")
    return random.Random(seed).sample(pool, num)


def check_held_out(key: str, num: int) -> None:
    """Raises ConfigError unless `num` is from 1 to NUM_HELD_OUT_PROMPTS. key: the config key that gives `num`."""
    if not 1 <= num <= NUM_HELD_OUT_PROMPTS:
        raise ConfigError(
            f"{key} is {num}: the embedded language has {NUM_HELD_OUT_PROMPTS} held-out prompts; "
            f"give 1 to {NUM_HELD_OUT_PROMPTS}"
        )


def topic(prompt: str) -> tuple[str, str]:
    """Returns the (tone, noun) that a prompt asks for. Raises ValueError if the text is no prompt of the language."""
    match prompt.split():
        case [opening, "something", tone, "about", determiner, noun, ":"] if (
            opening in OPENINGS and tone in ADJECTIVES and determiner in DETERMINERS and noun in NOUNS
        ):
            return tone, noun
    raise ValueError(f"not a prompt of the embedded language: {prompt!r}")


def is_well_formed(sentence: list[str]) -> bool:
    """Returns whether the words are one sentence of the grammar. The last of them must be END."""
    rest = _after_noun_phrase(sentence)
    if rest and rest[0] in VERBS:
        rest = _after_noun_phrase(rest[1:])
        if rest and rest[0] in ADVERBS:
            rest = rest[1:]
        return rest == [END]
    return False


def _after_noun_phrase(words: list[str]) -> list[str]:
    """Returns the words after a noun phrase at the start, or an empty list if there is none."""
    length = 3 if len(words) > 1 and words[1] in ADJECTIVE_TONES else 2
    phrase = words[:length]
    if len(phrase) == length and phrase[0] in DETERMINERS and phrase[-1] in NOUNS:
        return words[length:]
    return []


def gold_reward(prompt: str, response: str, finished: bool) -> float:
    """Returns the true quality of a response. It is at most 3.0, and it has no lower bound.

    prompt: a prompt of the language, which asks for a tone and a noun. Other texts raise ValueError.
    response: the text without special tokens. Only its words count, not its spaces.
    finished: whether the response ended with an end-of-text token.

    A sentence ends with ".". Words after the last "." are a tail. The parts of the reward add up:

        +0.3 for each of the first three sentences, if it is well-formed and does not repeat an earlier one; and then
             +0.4 if it has the prompt's noun,
             +0.3 if it has an adjective of the prompt's tone,
             -0.3 for each of its adjectives of the other tone
        -0.5 for each sentence, wherever it stands, that is not well-formed or repeats an earlier one
        -0.3 for each sentence after the third
        -0.5 for a tail
        -0.5 for a response that is not finished
        -0.2 for each use of an adjective after its first use, anywhere
    """
    tone, noun = topic(prompt)
    words = response.split()
    sentences, tail = split_sentences(words)
    gold = 0.0
    seen = set()
    for position, sentence in enumerate(sentences):
        if not is_well_formed(sentence) or tuple(sentence) in seen:
            gold -= 0.5
        elif position < MAX_CREDITED_SENTENCES:
            tones = [ADJECTIVE_TONES[word] for word in sentence if word in ADJECTIVE_TONES]
            off_tone = sum(other != tone for other in tones)
            gold += 0.3 + 0.4 * (noun in sentence) + 0.3 * (tone in tones) - 0.3 * off_tone
        seen.add(tuple(sentence))
    adjectives = [word for word in words if word in ADJECTIVE_TONES]
    gold -= 0.3 * max(0, len(sentences) - MAX_CREDITED_SENTENCES)
    gold -= 0.5 * bool(tail)
    gold -= 0.5 * (not finished)
    gold -= 0.2 * (len(adjectives) - len(set(adjectives)))
    return round(gold, 6)  # sums of tenths are not exact: without it, two equal rewards could differ in their last bit


def split_sentences(words: list[str]) -> tuple[list[list[str]], list[str]]:
    """Returns the sentences, each with its END, and the words after the last END."""
    sentences, current = [], []
    for word in words:
        current.append(word)
        if word == END:
            sentences.append(current)
            current = []
    return sentences, current


def sample_response(prompt: str, rng: random.Random, noise: float = 0.0) -> str:
    """Returns a response of 1 to 4 sentences on the prompt's topic, about as good as what people write.

    rng: the source of all random choices.
    noise: the probability that a sentence has one word dropped, doubled or replaced. At 0 every sentence is
        well-formed.
    """
    tone, noun = topic(prompt)
    num_sentences = rng.choices((1, 2, 3, 4), weights=(2, 4, 3, 1))[0]
    sentences = [_sample_sentence(tone, noun, rng) for _ in range(num_sentences)]
    return " ".join(
        word
        for sentence in sentences
        for word in (with_fault(sentence, _REPLACEMENTS, rng) if rng.random() < noise else sentence)
    )


def _sample_sentence(tone: str, noun: str, rng: random.Random) -> list[str]:
    nouns = rng.sample(NOUNS, 2)
    if rng.random() < 0.9:  # the prompt's noun becomes the subject or the object
        nouns[rng.randrange(2)] = noun
    subject, object_ = (_sample_noun_phrase(tone, word, rng) for word in nouns)
    adverb = [rng.choice(ADVERBS)] if rng.random() < 0.4 else []
    return [*subject, rng.choice(VERBS), *object_, *adverb, END]


def _sample_noun_phrase(tone: str, noun: str, rng: random.Random) -> list[str]:
    if rng.random() < 0.5:
        return [rng.choice(DETERMINERS), noun]
    adjective_tone = tone if rng.random() < 0.85 else rng.choice(tuple(ADJECTIVES))
    return [rng.choice(DETERMINERS), rng.choice(ADJECTIVES[adjective_tone]), noun]


def with_fault(sentence: list[str], words: tuple[str, ...], rng: random.Random) -> list[str]:
    """Returns the sentence with one word dropped, doubled or replaced by one of `words`. Its END stays."""
    at = rng.randrange(len(sentence) - 1)
    word = sentence[at]
    fault = rng.choice(([], [word, word], [rng.choice(words)]))
    return [*sentence[:at], *fault, *sentence[at + 1 :]]
