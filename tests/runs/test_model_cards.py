"""The model cards of an export say what the run knows, and no more."""

import math

import pytest
from huggingface_hub import ModelCard

from r2m_async.runs.model_cards import model_card

EVALUATION = {"step": 2.0, "reward": 1.25, "reward_se": 0.125, "gold": math.nan, "length": 19.5}


@pytest.mark.parametrize(("what", "task"), [("policy", "text-generation"), ("reward model", "text-classification")])
def test_the_hub_reads_the_card_and_it_has_what_was_measured(config, what, task):
    card = ModelCard(model_card(what, config, 3, "org/model", EVALUATION))
    assert (card.data.base_model, card.data.pipeline_tag, card.data.library_name) == ("org/model", task, "transformers")
    assert "policy of step 2" in card.text and "| the whole reward | 1.250 ± 0.125 |" in card.text
    assert "| tokens of a response | 19.500 |" in card.text and "gold" not in card.text and "nan" not in card.text
    assert card.data.license is None and "licence" in card.text


@pytest.mark.parametrize("base", [None, "embedded"])
def test_a_model_that_the_hub_does_not_know_is_no_base_model(config, base):
    card = ModelCard(model_card("policy", config, 3, base, None))
    assert card.data.base_model is None and "Held-out" not in card.text
