"""The embedded language: 76 words, a grammar, prompts, a sampler of natural text and the gold reward.

    S = NP verb NP (adverb)? .        NP = determiner (adjective)? noun

    >>> gold_reward("write something warm about the river :", " the gentle river follows a house .", finished=True)
    1.0

Pure Python. Gold is what a reward model stands in for: evaluation reads it, training only where a config asks for its labels.
"""

import random
from itertools import product

from r2m_async.errors import ConfigError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DETERMINERS = _words("a the this that my")
NOUNS = _words(
    "river house garden mother sailor winter letter mountain child city "
    "forest horse window friend road bird door song field lamp"
)
ADJECTIVES = {
    "warm": _words("gentle golden kind bright soft tender sunny sweet merry dear"),
    "cold": _words("bitter grey harsh frozen dark bleak cruel silent pale grim"),
}
VERBS = _words("follows sees leaves finds remembers calls keeps loves hears holds meets paints touches")
ADVERBS = _words("slowly often again quietly now early softly always")
END = "."
OPENINGS = ("write", "say", "tell", "sing")

ADJECTIVE_TONES = {adjective: tone for tone, adjectives in ADJECTIVES.items() for adjective in adjectives}
WORDS = (
    *DETERMINERS, *NOUNS, *ADJECTIVE_TONES, *VERBS, *ADVERBS, END,
    *OPENINGS, "something", *ADJECTIVES, "about", ":",
)  # fmt: skip

MAX_CREDITED_SENTENCES = 3
NUM_TRAINING_PROMPTS = 600
NUM_HELD_OUT_PROMPTS = 200


def prompts(num: int, seed: int, *, held_out: bool = False) -> list[str]:
    """`num` distinct prompts, a function of the arguments alone.

    Which prompts are held out is fixed: no seed ever puts one of them among the training prompts.
    Raises ValueError if `num` exceeds NUM_TRAINING_PROMPTS or, `held_out`, NUM_HELD_OUT_PROMPTS.
    """
    every = [
        f"{opening} something {tone} about {determiner} {noun} :"
        for opening, tone, determiner, noun in product(OPENINGS, ADJECTIVES, DETERMINERS, NOUNS)
    ]
    random.Random("held-out prompts").shuffle(every)
    pool = every[:NUM_HELD_OUT_PROMPTS] if held_out else every[NUM_HELD_OUT_PROMPTS:]
    if not 0 <= num <= len(pool):
        kind = "held-out" if held_out else "training"
        raise ValueError(f"prompts(num={num}): there are {len(pool)} {kind} prompts; ask for 0 to {len(pool)}")
    return random.Random(seed).sample(pool, num)


def check_held_out(key: str, num: int) -> None:
    """Raises ConfigError unless `num`, the user's `key`, is 1 to NUM_HELD_OUT_PROMPTS."""
    if not 1 <= num <= NUM_HELD_OUT_PROMPTS:
        raise ConfigError(
            f"{key} is {num}: the embedded language has {NUM_HELD_OUT_PROMPTS} held-out prompts; "
            f"give 1 to {NUM_HELD_OUT_PROMPTS}"
        )


def topic(prompt: str) -> tuple[str, str]:
    """The (tone, noun) that a prompt names; ValueError for any other text."""
    match prompt.split():
        case [opening, "something", tone, "about", determiner, noun, ":"] if (
            opening in OPENINGS and tone in ADJECTIVES and determiner in DETERMINERS and noun in NOUNS
        ):
            return tone, noun
    raise ValueError(f"not a prompt of the embedded language: {prompt!r}")


def is_well_formed(sentence: list[str]) -> bool:
    """Whether the words, END included, are one sentence of the grammar."""
    rest = _after_noun_phrase(sentence)
    if rest and rest[0] in VERBS:
        rest = _after_noun_phrase(rest[1:])
        if rest and rest[0] in ADVERBS:
            rest = rest[1:]
        return rest == [END]
    return False


def _after_noun_phrase(words: list[str]) -> list[str]:
    """What follows a leading noun phrase; nothing where there is none."""
    length = 3 if len(words) > 1 and words[1] in ADJECTIVE_TONES else 2
    phrase = words[:length]
    if len(phrase) == length and phrase[0] in DETERMINERS and phrase[-1] in NOUNS:
        return words[length:]
    return []


def gold_reward(prompt: str, response: str, finished: bool) -> float:
    """The true quality of a response; at most 3.0, no lower bound.

    prompt: one of `prompts()`, naming a tone and a noun.
    response: the decoded text without special tokens; only its words matter, not its spacing.
    finished: whether it ended with end of text.

    A sentence ends with "."; words after the last "." are an unfinished tail.
    Each of the first three sentences that is well-formed and new: +0.3; +0.4 if it has the prompt's noun; +0.3 if it
    has an adjective of the prompt's tone; -0.3 per adjective of the other tone.
    Each ill-formed sentence, or one that repeats an earlier one, wherever it stands: -0.5. Each sentence beyond
    three: -0.3. A tail: -0.5. Not finished: -0.5. Each use of an adjective after its first, anywhere: -0.2.
    """
    tone, noun = topic(prompt)
    words = response.split()
    sentences, tail = _split_sentences(words)
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
    return round(gold, 6)


def _split_sentences(words: list[str]) -> tuple[list[list[str]], list[str]]:
    """Sentences, each with its END, and the unfinished tail."""
    sentences, current = [], []
    for word in words:
        current.append(word)
        if word == END:
            sentences.append(current)
            current = []
    return sentences, current


def sample_response(prompt: str, rng: random.Random, noise: float = 0.0) -> str:
    """Natural text on the prompt's topic: 1 to 4 sentences, about as good as people write.

    noise: probability that a sentence has one word dropped, doubled or replaced; at 0 every sentence is well-formed.
    """
    tone, noun = topic(prompt)
    num_sentences = rng.choices((1, 2, 3, 4), weights=(2, 4, 3, 1))[0]
    sentences = [_sample_sentence(tone, noun, rng) for _ in range(num_sentences)]
    return " ".join(
        word for sentence in sentences for word in (_with_fault(sentence, rng) if rng.random() < noise else sentence)
    )


def _sample_sentence(tone: str, noun: str, rng: random.Random) -> list[str]:
    nouns = rng.sample(NOUNS, 2)
    if rng.random() < 0.9:
        nouns[rng.randrange(2)] = noun
    subject, object_ = (_sample_noun_phrase(tone, word, rng) for word in nouns)
    adverb = [rng.choice(ADVERBS)] if rng.random() < 0.4 else []
    return [*subject, rng.choice(VERBS), *object_, *adverb, END]


def _sample_noun_phrase(tone: str, noun: str, rng: random.Random) -> list[str]:
    if rng.random() < 0.5:
        return [rng.choice(DETERMINERS), noun]
    adjective_tone = tone if rng.random() < 0.85 else rng.choice(tuple(ADJECTIVES))
    return [rng.choice(DETERMINERS), rng.choice(ADJECTIVES[adjective_tone]), noun]


def _with_fault(sentence: list[str], rng: random.Random) -> list[str]:
    """One word of the sentence, never its END, dropped, doubled or replaced."""
    at = rng.randrange(len(sentence) - 1)
    word = sentence[at]
    fault = rng.choice(([], [word, word], [rng.choice((*DETERMINERS, *NOUNS, *VERBS, *ADVERBS))]))
    return [*sentence[:at], *fault, *sentence[at + 1 :]]
