"""The embedded language: every rule of the gold reward by hand, the grammar, and which prompts exist."""

import random

import pytest

from r2m_async.from_scratch.language import (
    NUM_HELD_OUT_PROMPTS,
    NUM_TRAINING_PROMPTS,
    WORDS,
    gold_reward,
    is_well_formed,
    prompts,
    sample_response,
    topic,
)

PROMPT = "write something warm about the river :"
PLAIN = "a house sees a lamp ."
NAMED = "the river sees a lamp ."
WARM = "a gentle house sees a lamp ."
BOTH = "the gentle river sees a lamp ."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        pytest.param("", 0.0, id="nothing at all"),
        pytest.param(PLAIN, 0.3, id="well-formed"),
        pytest.param(NAMED, 0.7, id="0.3 + 0.4 for the noun"),
        pytest.param("the river sees a river .", 0.7, id="the noun counts once per sentence"),
        pytest.param(WARM, 0.6, id="0.3 + 0.3 for the tone"),
        pytest.param("a gentle house sees a golden lamp .", 0.6, id="the tone counts once per sentence"),
        pytest.param(BOTH, 1.0, id="0.3 + 0.4 + 0.3"),
        pytest.param("a grim house sees a lamp .", 0.0, id="0.3 - 0.3 off tone"),
        pytest.param("a grim house sees a pale lamp .", -0.3, id="0.3 - 2 x 0.3 off tone"),
        pytest.param("a gentle house sees a pale lamp .", 0.3, id="0.3 + 0.3 for the tone - 0.3 off tone"),
        pytest.param("a house a lamp .", -0.5, id="ill-formed"),
        pytest.param("a house a grim lamp .", -0.5, id="an ill-formed sentence has no tone"),
        pytest.param(".", -0.5, id="an empty sentence is ill-formed"),
        pytest.param(f"{NAMED} {NAMED}", 0.2, id="0.7 - 0.5 for the repetition"),
        pytest.param("a house a lamp . a house a lamp .", -1.0, id="an ill-formed repetition costs 0.5, not 1"),
        pytest.param(f"{PLAIN} {NAMED} {WARM}", 1.6, id="0.3 + 0.7 + 0.6"),
        pytest.param(
            f"{PLAIN} {NAMED} {WARM} the golden river calls my bird .",
            1.3,
            id="1.6 - 0.3 for the fourth, which earns nothing",
        ),
        pytest.param(
            f"{PLAIN} {NAMED} {WARM} a grim bird sees a lamp .",
            1.3,
            id="1.6 - 0.3 for the fourth, whose tone does not count",
        ),
        pytest.param(f"{PLAIN} {NAMED} {WARM} {PLAIN} a .", 0.0, id="1.6 - 2 x 0.3 - 0.5 repeated - 0.5 ill-formed"),
        pytest.param(f"{PLAIN} {PLAIN} {NAMED} {BOTH}", 0.2, id="0.3 - 0.5 + 0.7 - 0.3: a repetition takes a place"),
        pytest.param(f"{NAMED} the river", 0.2, id="0.7 - 0.5 for the tail"),
        pytest.param(f"{WARM} a gentle bird sees a lamp .", 1.0, id="2 x 0.6 - 0.2 for the second gentle"),
        pytest.param(f"{WARM} gentle gentle", -0.3, id="0.6 - 0.5 for the tail - 2 x 0.2"),
        pytest.param("a gentle house sees a gentle lamp .", 0.4, id="0.6 - 0.2 within one sentence"),
    ],
)
def test_gold_follows_the_rules(response, expected):
    assert gold_reward(PROMPT, response, finished=True) == pytest.approx(expected)
    assert gold_reward(PROMPT, f" {response}\n", finished=False) == pytest.approx(expected - 0.5)


def test_gold_of_the_other_tone_swaps_reward_and_penalty():
    assert gold_reward("say something cold about my river :", BOTH, finished=True) == pytest.approx(0.3 + 0.4 - 0.3)


def test_three_perfect_sentences_reach_the_maximum():
    response = " ".join(f"the {adjective} river sees a lamp ." for adjective in ("gentle", "golden", "kind"))
    assert gold_reward(PROMPT, response, finished=True) == 3.0


@pytest.mark.parametrize("prompt", ["", "write about the river :", "write something lukewarm about the river :"])
def test_gold_refuses_a_prompt_of_another_language(prompt):
    with pytest.raises(ValueError, match="not a prompt"):
        gold_reward(prompt, PLAIN, finished=True)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("a house sees a lamp .", True),
        ("a kind house sees the pale lamp often .", True),
        ("a house sees a lamp", False),
        ("house sees a lamp .", False),
        ("a kind sees a lamp .", False),
        ("a kind kind house sees a lamp .", False),
        ("a house sees .", False),
        ("a house sees a .", False),
        ("a house often sees a lamp .", False),
        ("a house sees a lamp often often .", False),
        ("a house sees a lamp . .", False),
        ("", False),
    ],
)
def test_the_grammar_is_np_verb_np_adverb_end(sentence, expected):
    assert is_well_formed(sentence.split()) is expected


def test_text_sampled_without_noise_is_well_formed_and_on_topic():
    rng = random.Random(0)
    on_topic = 0
    for prompt in prompts(300, seed=1):
        response = sample_response(prompt, rng)
        sentences = [[*sentence.split(), "."] for sentence in response.removesuffix(" .").split(" . ")]
        assert 1 <= len(sentences) <= 4
        assert all(is_well_formed(sentence) for sentence in sentences), response
        on_topic += topic(prompt)[1] in response.split()
    assert on_topic > 250


def test_noise_makes_about_that_share_of_sentences_ill_formed_or_different():
    mean_gold = {
        noise: sum(gold_reward(p, sample_response(p, rng, noise), True) for p in prompts(600, seed=1)) / 600
        for noise, rng in ((0.0, random.Random(0)), (1.0, random.Random(0)))
    }
    assert mean_gold[0.0] > 1.5
    assert mean_gold[1.0] < 0.5


def test_sampled_text_and_prompts_use_only_the_vocabulary():
    rng = random.Random(0)
    words = {word for p in prompts(600, seed=0) for word in f"{p} {sample_response(p, rng, 0.3)}".split()}
    assert words == set(WORDS)


def test_training_and_held_out_prompts_are_distinct_and_disjoint_under_every_seed():
    training = prompts(NUM_TRAINING_PROMPTS, seed=0)
    held_out = prompts(NUM_HELD_OUT_PROMPTS, seed=7, held_out=True)
    assert len(set(training) | set(held_out)) == NUM_TRAINING_PROMPTS + NUM_HELD_OUT_PROMPTS == 800


def test_prompts_depend_on_the_seed_alone():
    assert prompts(50, seed=3) == prompts(50, seed=3)
    assert prompts(50, seed=3) != prompts(50, seed=4)
    with pytest.raises(ValueError, match="there are 200 held-out prompts"):
        prompts(201, seed=0, held_out=True)
