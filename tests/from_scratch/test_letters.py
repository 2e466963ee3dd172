"""The second embedded language: every rule of its gold reward by hand, its grammar, its prompts, and who may name it."""

import hashlib
import json
import random
from dataclasses import asdict

import pytest

from r2m_async.config import R2MConfig
from r2m_async.config_sections import EMBEDDED_GOLD
from r2m_async.errors import ConfigError
from r2m_async.from_scratch import language, letters
from r2m_async.from_scratch.languages import LANGUAGES, refuse_other_languages
from r2m_async.from_scratch.letters import (
    NUM_HELD_OUT_PROMPTS,
    NUM_TRAINING_PROMPTS,
    WORDS,
    gold_reward,
    is_well_formed,
    prompts,
    sample_response,
)
from r2m_async.plugins import named_function

PROMPT = "write a warm letter to sister about sea and farm :"
PLAIN = "a tree sees a fox ."
SEA = "a wave sees a boat ."
WARM = "a gentle wave sees a golden boat softly ."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        pytest.param("", 0.0, id="nothing at all"),
        pytest.param(PLAIN, -0.1, id="0.1 - 2 x 0.1 off topic"),
        pytest.param("a tree sees a wave .", 0.1, id="0.1 - 0.1 + 0.1"),
        pytest.param("a barn sees a wave .", 0.3, id="both topics count"),
        pytest.param(SEA, 0.3, id="0.1 + 2 x 0.1 on topic"),
        pytest.param(WARM, 0.6, id="0.3 + 2 x 0.1 + 0.1 for the tone"),
        pytest.param("a grim wave sees a boat coldly .", 0.1, id="0.3 - 2 x 0.1 off tone"),
        pytest.param("a very gentle wave sees a boat .", 0.5, id="0.3 + 0.1 for the tone + 0.1 for very"),
        pytest.param("a very very gentle wave sees a boat .", -0.3, id="-0.5 ill-formed + 2 x 0.1 for very"),
        pytest.param("a very wave sees a boat .", -0.4, id="-0.5 ill-formed + 0.1 for very"),
        pytest.param("very very very very", -0.4, id="3 x 0.1 - 0.2 - 0.5 for the tail"),
        pytest.param("a wave sees a wave .", 0.3, id="two uses cost nothing"),
        pytest.param("a wave sees a wave . the wave sees a wave .", 0.4, id="0.6 - 2 x 0.1 beyond the second use"),
        pytest.param(f"{SEA} {SEA}", -0.2, id="0.3 - 0.5 for the repetition"),
        pytest.param(f"{SEA} a wave", -0.2, id="0.3 - 0.5 for the tail"),
        pytest.param(".", -0.5, id="an empty sentence is ill-formed"),
    ],
)
def test_gold_follows_the_rules(response, expected):
    assert gold_reward(PROMPT, response, finished=True) == expected
    assert gold_reward(PROMPT, f" {response}\n", finished=False) == pytest.approx(expected - 0.5)


def test_sentences_after_the_fifth_earn_nothing_and_cost():
    nouns = ("wave boat", "shore gull", "sail barn", "cow hen", "field fence", "sailor island")
    sentences = [f"the {pair.replace(' ', ' sees the ')} ." for pair in nouns]
    golds = [gold_reward(PROMPT, " ".join(sentences[:num]), finished=True) for num in range(7)]
    assert golds == [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.2]


def test_a_perfect_letter_reaches_the_maximum():
    nouns = iter(["wave", "boat", "sailor", "shore", "island", "harbour", "barn", "field", "cow", "plough"])
    adjectives = iter(["gentle", "golden", "kind", "tender", "sweet", "dear", "sunny", "soft", "gentle", "golden"])
    adverbs = iter(["softly", "fondly", "kindly", "sweetly", "warmly"])
    very = iter(("very ", "very ", "very ", *[""] * 7))
    response = " ".join(
        f"the {next(very)}{next(adjectives)} {next(nouns)} sees the {next(very)}{next(adjectives)} {next(nouns)} {next(adverbs)} ."
        for _ in range(5)
    )
    assert gold_reward(PROMPT, response, finished=True) == 3.3


@pytest.mark.parametrize(
    "prompt",
    ["", "write something warm about the river :", PROMPT.replace("warm", "lukewarm"), PROMPT.replace("sea", "farm")],
)
def test_gold_refuses_a_prompt_of_another_language(prompt):
    with pytest.raises(ValueError, match="not a prompt of the embedded language 'letters'"):
        gold_reward(prompt, PLAIN, finished=True)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (WARM, True),
        ("a very gentle wave sees a very grim boat .", True),
        ("a wave sees a boat", False),
        ("wave sees a boat .", False),
        ("a gentle sees a boat .", False),
        ("a gentle kind wave sees a boat .", False),
        ("a wave sees .", False),
        ("a wave softly sees a boat .", False),
        ("a wave sees a boat . .", False),
        ("", False),
    ],
)
def test_the_grammar_is_np_verb_np_adverb_end(sentence, expected):
    assert is_well_formed(sentence.split()) is expected


def test_natural_letters_are_well_formed_and_leave_much_to_learn():
    rng = random.Random(0)
    written = [(prompt, sample_response(prompt, rng)) for prompt in prompts(300, seed=1)]
    assert all(
        is_well_formed([*one.split(), "."]) for _, text in written for one in text.removesuffix(" .").split(" . ")
    )
    natural = [gold_reward(prompt, text, finished=True) for prompt, text in written]
    careful = [gold_reward(prompt, sample_response(prompt, rng, 0.0, letters.CAREFUL), True) for prompt, _ in written]
    assert 0.1 < sum(natural) / 300 < 0.6 < sum(careful) / 300 < 3.3


def test_every_word_is_used_and_none_twice():
    rng = random.Random(0)
    used = {word for p in prompts(2000, seed=0) for word in f"{p} {sample_response(p, rng, 0.3)}".split()}
    assert used == set(WORDS) and len(WORDS) == len(set(WORDS))


def test_training_and_held_out_prompts_are_distinct_and_disjoint_under_every_seed():
    training, held_out = prompts(NUM_TRAINING_PROMPTS, seed=0), prompts(NUM_HELD_OUT_PROMPTS, seed=7, held_out=True)
    assert len({*training, *held_out}) == NUM_TRAINING_PROMPTS + NUM_HELD_OUT_PROMPTS == 3600
    assert prompts(50, seed=3) == prompts(50, seed=3) != prompts(50, seed=4)
    with pytest.raises(ValueError, match="there are 400 held-out prompts"):
        prompts(401, seed=0, held_out=True)


def test_each_language_of_a_config_has_a_gold_reward_that_reads_its_prompts():
    assert LANGUAGES.keys() == EMBEDDED_GOLD.keys()
    for name, one in LANGUAGES.items():
        gold = named_function(EMBEDDED_GOLD[name], "evaluation.gold")
        assert gold(one.prompts(1, 0)[0], "", True) == 0.0
        assert len(one.prompts(one.num_training_prompts, 0)) == one.num_training_prompts
        assert len(one.prompts(one.num_held_out_prompts, 0, held_out=True)) == one.num_held_out_prompts


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"policy": "embedded:lettres"}}, "model.policy is 'embedded:lettres': there is no such"),
        ({"reward": {"model": "embedded"}}, "reward.model is 'embedded' and data.prompts is 'embedded:letters'"),
        ({"labels": {"offline": "embedded"}}, "labels.offline is 'embedded' and data.prompts is 'embedded:letters'"),
        (
            {"labels": {"offline": "embedded:letters"}},
            "labels.offline is 'embedded:letters': of the embedded languages",
        ),
        ({"evaluation": {"gold": EMBEDDED_GOLD["embedded"]}}, f"use '{EMBEDDED_GOLD['embedded:letters']}'"),
    ],
)
def test_a_config_with_two_languages_or_an_unknown_one_is_refused(changes, told):
    tree = {
        name: {key: "embedded:letters"} for name, key in (("model", "policy"), ("reward", "model"), ("data", "prompts"))
    }
    R2MConfig.from_dict(tree)
    with pytest.raises(ConfigError, match="embedded") as caught:
        R2MConfig.from_dict(tree | changes)
    assert told in str(caught.value)


def test_commands_that_know_the_quickstarts_language_alone_say_so():
    refuse_other_languages("data.preferences", "embedded_golden")
    with pytest.raises(ConfigError, match="data.preferences is 'embedded:letters': only the quickstart's language"):
        refuse_other_languages("data.preferences", "embedded:letters")


def test_the_quickstarts_language_says_what_it_said_before_there_was_a_second():
    """Whoever changes it changes every quickstart and all studies: the digest is of its prompts, texts and golds."""
    rng, digest = random.Random(0), hashlib.sha256()
    for prompt in language.prompts(600, 0):
        text = language.sample_response(prompt, rng, 0.1)
        digest.update(f"{prompt}{text}{language.gold_reward(prompt, text, True)}".encode())
    assert digest.hexdigest()[:16] == "ce80acd6671c3d83"


@pytest.mark.models
def test_both_languages_models_are_made_from_their_own_files_and_settings(monkeypatch, tmp_path):
    from r2m_async.data import reward_text
    from r2m_async.from_scratch import embedded, embedded_letters, letters, pretraining, word_models
    from r2m_async.from_scratch.cache import made_by
    from r2m_async.models import batches

    asked = []
    for module in (embedded, embedded_letters):
        monkeypatch.setattr(module, "cached_directory", lambda name, key, build: asked.append((name, key)) or tmp_path)
    embedded.embedded_models()
    embedded_letters.embedded_letters()
    parts = (pretraining, batches, reward_text, word_models)
    of_letters = made_by(*(file.__file__ for file in (letters, language, *parts, embedded_letters)))
    settings = json.dumps(asdict(embedded.EmbeddedSettings()))
    assert asked == [
        ("embedded", [*made_by(*(file.__file__ for file in (language, *parts, embedded))), settings]),
        ("embedded-letters", [*of_letters, json.dumps(asdict(embedded_letters.LettersSettings()))]),
    ]
    assert hashlib.sha256(settings.encode()).hexdigest()[:16] == "47cdfee659095a18"
