"""The embedded models: reproducible, imperfect, loadable; the text that crosses from policy to reward model."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import embedded
from r2m_async.from_scratch.embedded import EmbeddedSettings, embedded_models, sample_policy
from r2m_async.from_scratch.language import WORDS, prompts
from r2m_async.from_scratch.pretraining import reward_accuracy, train_language_model, train_reward_model

pytestmark = pytest.mark.ring

REDUCED = EmbeddedSettings(
    policy_width=64,
    policy_layers=2,
    policy_texts=2000,
    policy_steps=60,
    reward_width=32,
    reward_layers=1,
    reward_prompts=200,
    reward_comparisons=300,
    reward_label_scale=10.0,
)
TINY = EmbeddedSettings(
    policy_width=32,
    policy_layers=1,
    policy_texts=50,
    policy_steps=2,
    reward_width=16,
    reward_layers=1,
    reward_prompts=4,
    reward_epochs=1,
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def few_measured_prompts(monkeypatch):
    monkeypatch.setattr(embedded, "NUM_MEASURED_PROMPTS", 50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2M_CACHE", str(root))
        yield root


@pytest.fixture(scope="module")
def built(cache):
    stages = []
    models = embedded_models(settings=REDUCED, on_progress=lambda *stage: stages.append(stage))
    return models, stages


@pytest.fixture(scope="module")
def policy_tokenizer(built):
    return AutoTokenizer.from_pretrained(built[0].policy)


@pytest.fixture
def reward_tokenizer(built):
    return AutoTokenizer.from_pretrained(built[0].reward_model)


def test_even_a_reduced_reward_model_agrees_with_gold_more_often_than_not(built):
    measured = json.loads(built[0].measurements.read_text())
    assert 0.6 < measured["reward_accuracy"] < 0.95
    assert measured["policy_finished"] > 0.5


def test_every_stage_reports_its_end(built):
    ends = {stage for stage, done, total in built[1] if done == total}
    assert ends == {"policy", "comparisons", "reward model"}


def test_a_second_call_finds_the_models_without_building(built, monkeypatch):
    monkeypatch.setattr(embedded, "_build", lambda *_: pytest.fail("built again"))
    assert embedded_models(settings=REDUCED) == built[0]


def test_other_settings_are_other_models(built, monkeypatch):
    monkeypatch.setattr(embedded, "_build", lambda directory, *_: (directory / "policy").mkdir())
    assert embedded_models(settings=TINY).policy != built[0].policy


def test_a_builder_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embedded_models(settings=TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_threads():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


def test_a_build_is_the_same_bit_for_bit_and_leaves_random_state_and_threads_alone(tmp_path, monkeypatch, two_threads):
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    files = {}
    for name in ("first", "second"):
        monkeypatch.setenv("R2M_CACHE", str(tmp_path / name))
        torch.manual_seed(5)
        models = embedded_models(settings=TINY)
        assert torch.equal(torch.rand(3), undisturbed)
        assert torch.get_num_threads() == 2
        directory = models.policy.parent
        files[name] = {
            path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        }
    assert files["first"] == files["second"]


def test_policy_and_reward_model_read_the_same_text_in_different_tokens(built, policy_tokenizer, reward_tokenizer):
    text = prompts(1, seed=0)[0] + " " + " ".join(WORDS)
    policy_ids, reward_ids = policy_tokenizer(text)["input_ids"], reward_tokenizer(text)["input_ids"]
    assert policy_tokenizer.decode(policy_ids) == f" {text}"
    assert reward_tokenizer.decode(reward_ids) == text
    assert len(reward_ids) > len(policy_ids) == len(text.split())
    assert policy_tokenizer.unk_token_id not in policy_ids
    assert reward_tokenizer.unk_token_id not in reward_ids


def test_reloaded_models_answer_and_score_across_the_two_tokenizers(built, policy_tokenizer, reward_tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(built[0].policy)
    reward_model = AutoModelForSequenceClassification.from_pretrained(built[0].reward_model)
    (sample,) = sample_policy(policy, policy_tokenizer, prompts(1, seed=0), samples_per_prompt=1, seed=0)[0]
    again = policy_tokenizer(sample.response)["input_ids"]
    assert policy_tokenizer.decode(again) == sample.response
    assert len(again) == sample.num_tokens - sample.finished
    ids = reward_input_ids(reward_tokenizer, sample.prompt, sample.response, sample.finished)
    expected = f"{sample.prompt}{sample.response}" + "</s>" * sample.finished
    assert reward_tokenizer.decode(ids) == expected
    assert reward_tokenizer.unk_token_id not in ids
    assert reward_model(torch.tensor([ids])).logits.isfinite().all()


def test_raw_text_ends_with_end_of_text_only_if_the_response_is_finished(reward_tokenizer):
    finished = reward_input_ids(reward_tokenizer, "say :", " a bird .", True)
    cut = reward_input_ids(reward_tokenizer, "say :", " a bird .", False)
    assert finished == [*cut, reward_tokenizer.eos_token_id]
    assert reward_tokenizer.decode(cut) == "say : a bird ."


def test_an_unfinished_response_has_no_end_of_text_even_if_the_tokenizer_always_appends_one(reward_tokenizer):
    cut = reward_input_ids(reward_tokenizer, "say :", " a bird .", False)
    reward_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", reward_tokenizer.eos_token_id)]
    )
    assert reward_tokenizer("say")["input_ids"][-1] == reward_tokenizer.eos_token_id
    assert reward_input_ids(reward_tokenizer, "say :", " a bird .", False) == cut
    assert reward_input_ids(reward_tokenizer, "say :", " a bird .", True) == [*cut, reward_tokenizer.eos_token_id]


def test_messages_without_a_template_are_joined_by_newlines(reward_tokenizer):
    messages = [{"role": "system", "content": "a bird"}, {"role": "user", "content": "say"}]
    ids = reward_input_ids(reward_tokenizer, messages, "a lamp", True)
    assert ids == [*reward_tokenizer("a bird\nsay\na lamp")["input_ids"], reward_tokenizer.eos_token_id]
    assert ids == reward_input_ids(reward_tokenizer, [("system", "a bird"), ("user", "say")], "a lamp", True)


def test_a_template_closes_a_finished_turn_and_leaves_an_unfinished_one_open(reward_tokenizer):
    reward_tokenizer.chat_template = TEMPLATE
    reward_tokenizer.add_tokens(["<user>", "<assistant>"])
    for messages in ([{"role": "user", "content": "say"}], (("user", "say"),)):
        finished = reward_input_ids(reward_tokenizer, messages, "a lamp", True)
        cut = reward_input_ids(reward_tokenizer, messages, "a lamp", False)
        assert reward_tokenizer.decode(finished) == "<user>say</s><assistant>a lamp</s>"
        assert reward_tokenizer.decode(cut) == "<user>say</s><assistant>a lamp"


def test_too_long_a_text_loses_the_start_of_its_prompt_but_not_its_beginning_of_text(reward_tokenizer):
    ids = reward_input_ids(reward_tokenizer, "write something warm :", " a bird .", True)
    assert reward_input_ids(reward_tokenizer, "write something warm :", " a bird .", True, len(ids)) == ids
    assert reward_input_ids(reward_tokenizer, "write something warm :", " a bird .", True, 6) == ids[-6:]
    reward_tokenizer.bos_token = "write"
    bos = reward_tokenizer.bos_token_id
    with_bos = reward_input_ids(reward_tokenizer, "write something warm :", " a bird .", True, 6)
    assert with_bos == [bos, *ids[-5:]]
    with pytest.raises(ValueError, match="max_tokens=1"):
        reward_input_ids(reward_tokenizer, "say", "a", True, 1)


def test_training_only_the_head_leaves_the_backbone_and_its_gradients_as_they_were(built):
    model = AutoModelForSequenceClassification.from_pretrained(built[0].reward_model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train_reward_model(model, [([5, 6, 7], [8, 9])] * 20, epochs=1, batch_size=4, lr=1e-2, seed=0, trainable="head")
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"score.weight"}
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_reward_model_learns_pairs_that_a_single_token_decides(built):
    model = AutoModelForSequenceClassification.from_pretrained(built[0].reward_model)
    pairs = [([i % 40 + 10, 5], [i % 30 + 10, i % 7 + 10, 6]) for i in range(200)]
    accuracy = train_reward_model(model, pairs, epochs=3, batch_size=16, lr=3e-3, seed=0, held_out=0.2)
    assert accuracy == 1.0
    assert reward_accuracy(model, [(b, a) for a, b in pairs]) == 0.0


def test_a_language_model_learns_how_often_texts_of_each_length_end(built):
    """Clipped batches that hold one length each would make it 0.22."""
    model = AutoModelForCausalLM.from_pretrained(built[0].policy)
    eos = model.config.eos_token_id
    sequences = [[10, eos]] * 200 + [[10, 11, 11, 11, 11, 11, 11, eos]] * 400
    train_language_model(model, sequences, steps=150, batch_size=20, lr=3e-3, seed=0)
    with torch.no_grad():
        ended = model(torch.tensor([[10]])).logits[0, -1].softmax(-1)[eos].item()
    assert ended == pytest.approx(1 / 3, abs=0.05)


def gradients_and_losses(policy, sequences, microbatch_size):
    """Of three steps, as they are before each step's clip, at a learning rate of 0."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    summed, gradients, losses = {}, [], []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: summed.update({name: p.grad.clone()}))

    def ended(step, steps, loss):
        gradients.append(torch.cat([summed[name].flatten() for name in sorted(summed)]))
        losses.append(loss)

    how = dict(steps=3, batch_size=16, lr=0.0, seed=0, on_progress=ended)
    train_language_model(model, sequences, microbatch_size=microbatch_size, **how)
    return gradients, losses


def test_the_size_of_a_microbatch_decides_only_low_bits_of_gradients_and_losses(built):
    """AdamW makes of a rounding in a gradient near 0 a whole step, so no weights are compared."""
    sequences = [[10 + i % 40] * (2 + i % 9) for i in range(64)]
    (gradients, losses), (whole, whole_losses) = (
        gradients_and_losses(built[0].policy, sequences, size) for size in (3, 100)
    )
    assert losses == pytest.approx(whole_losses, rel=1e-5)
    for ours, theirs in zip(gradients, whole, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (whole[0] - whole[1]).norm() > 0.1 * whole[0].norm(), "each step has a batch of its own"


def test_prompt_tokens_are_read_but_not_learnt(built):
    model = AutoModelForCausalLM.from_pretrained(built[0].policy)

    def probability(context, token):
        with torch.no_grad():
            return model(torch.tensor([context])).logits[0, -1].softmax(-1)[token].item()

    before = probability([10], 20)
    train_language_model(model, [[10, 20, 30]] * 32, prompt_lens=[2] * 32, steps=30, batch_size=8, lr=3e-3, seed=0)
    assert probability([10, 20], 30) > 0.9
    assert probability([10], 20) < before + 0.1
