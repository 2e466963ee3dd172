"""The models of the second embedded language: found by the name in a config, reproducible, loadable."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.config import R2MConfig
from r2m_async.from_scratch import embedded_letters as module
from r2m_async.from_scratch.embedded_letters import LettersSettings, embedded_letters, sample_letters
from r2m_async.from_scratch.letters import WORDS, prompts
from r2m_async.launch.workload import built_models

pytestmark = pytest.mark.ring

TINY = LettersSettings(
    policy_width=32,
    policy_layers=1,
    policy_texts=50,
    policy_careful_steps=2,
    policy_steps=2,
    reward_width=16,
    reward_layers=1,
    reward_texts=50,
    reward_language_steps=2,
    reward_careful_pairs=8,
    reward_prompts=4,
    reward_epochs=1,
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the tiny models in a cache of their own, and returns them and the stages that were reported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_MEASURED_PROMPTS", 4)

        def built(name):
            patch.setenv("R2M_CACHE", str(tmp_path_factory.mktemp(name)))
            stages = []
            return embedded_letters(settings=TINY, on_progress=lambda *stage: stages.append(stage)), stages

        yield built


@pytest.fixture(scope="module")
def little_letters(build):
    return build("first")


def test_a_build_is_the_same_bit_for_bit_and_every_stage_reports_its_end(build, little_letters):
    (models, stages), (again, _) = little_letters, build("second")
    for path in models.policy.parent.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again.policy.parent / path.relative_to(models.policy.parent)).read_bytes()
    assert {stage for stage, done, total in stages if done == total} == {stage for stage, _, _ in stages}
    assert json.loads(models.measurements.read_text()).keys() >= {"reward_accuracy", "policy_gold"}


def test_the_models_answer_and_score_across_their_two_tokenizers(little_letters):
    models, _ = little_letters
    policy, tokenizer = (kind.from_pretrained(models.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    reader = AutoTokenizer.from_pretrained(models.reward_model)
    ((letter, *others),) = sample_letters(policy, tokenizer, prompts(1, seed=0), samples_per_prompt=3, seed=0)
    assert len(others) == 2
    ids = tokenizer(letter.response)["input_ids"]
    assert len(ids) <= letter.num_tokens - letter.finished  # it has hardly learnt, and may have drawn padding
    assert tokenizer.decode(ids) == letter.response
    text = f"{letter.prompt} {' '.join(WORDS)}"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert reader.decode(reader(text)["input_ids"]) == text
    reward_model = AutoModelForSequenceClassification.from_pretrained(models.reward_model)
    assert reward_model(torch.tensor([reader(text)["input_ids"]])).logits.isfinite().all()


def test_a_config_finds_them_by_name_and_the_defaults_have_a_million_parameters(little_letters, monkeypatch):
    models, _ = little_letters
    monkeypatch.setattr(module, "embedded_letters", lambda on_progress: models)
    tree = {"model": {"policy": "embedded:letters"}, "data": {"prompts": "embedded:letters"}}
    config = R2MConfig.from_dict(tree | {"reward": {"model": "embedded:letters"}})
    assert built_models(config) == {"model.policy": str(models.policy), "reward.model": str(models.reward_model)}
    of_no_training = {"policy_careful_steps": 0, "policy_steps": 0, "policy_texts": 1}
    policy, _ = module._train_policy(LettersSettings(**of_no_training), lambda *_: None)
    assert 1e6 < policy.num_parameters() < 5e6
