"""Every family of models trains, its numbers are those of its own code, and what would change them is refused."""

import json
from pathlib import Path

import pytest
import torch
from families import benchmark
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from r2m_async.errors import ConfigError
from r2m_async.launch.workload import resolve
from r2m_async.models.critic import load_critic
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import logprobs_and_states
from r2m_async.models.reward import load_classifier
from r2m_async.trajectories import Trajectory

pytestmark = pytest.mark.models

OFTEN = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "GPT-NeoX", "GPT-2", "Phi", "BLOOM")
CAPPED = {"Gemma 2": benchmark.FAMILIES["Gemma 2"], "VaultGemma": ("vaultgemma", benchmark.FAMILIES["Gemma 2"][1])}
MIXED_IN_A_ROW = {
    "OPT": benchmark.FAMILIES["OPT"],
    "BLOOM": benchmark.FAMILIES["BLOOM"],
    "Falcon": ("falcon", {"alibi": False}),
    "Mamba": ("mamba", {}),
}
KEPT_APART = ["Llama", "Gemma 3", "GPT-2", "Phi"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """`family(name, tied, classifier)`: the directory of a tiny model, made once."""
    made = {}

    def make(name, tied=True, classifier=False):
        key = (name, tied, classifier)
        if key not in made:
            made[key] = benchmark.save_model(tmp_path_factory.mktemp("family"), *key)
        return made[key]

    return make


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return benchmark.save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def and_more(monkeypatch):
    for name, more in (CAPPED | MIXED_IN_A_ROW).items():
        monkeypatch.setitem(benchmark.FAMILIES, name, more)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "name", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.cross) for one in benchmark.FAMILIES]
)
def test_a_synchronous_step_of_every_family_trains_on_the_log_probabilities_that_it_sampled_with(
    family, inputs, name, tied
):
    config = benchmark.config_of(family(name, tied), *inputs, "transformers", benchmark.attention_of(name))
    config = config.run(num_steps=1).rollouts(max_new_tokens=12)
    result = benchmark.measure(config)
    assert result["mismatch"][0] < 1e-4
    assert result["still"] == []


def text(seed, length=24):
    return Trajectory(
        token_ids=torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)),
        prompt_len=4,
        behaviour_logprobs=torch.zeros(length),
        policy_versions=torch.zeros(length, dtype=torch.int32),
        finish_reason="stop",
        text="",
    )


@torch.no_grad()
@pytest.mark.parametrize("name", benchmark.FAMILIES)
def test_the_learner_computes_what_the_familys_own_code_computes_with_eager_attention(family, inputs, name):
    config = benchmark.config_of(family(name), *inputs, "transformers", benchmark.attention_of(name))
    texts = [text(0), text(1, 17)]
    ours, states = logprobs_and_states(load_policy(config.model.policy, config), texts, 1.0)
    own = AutoModelForCausalLM.from_pretrained(config.model.policy, attn_implementation="eager")
    head_input = []
    own.get_output_embeddings().register_forward_pre_hook(lambda _, given: head_input.append(given[0]))
    for row, (one, mine) in enumerate(zip(texts, states, strict=True)):
        logprobs = own(one.token_ids[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, one.token_ids[1:, None])[one.prompt_len - 1 :, 0]
        assert expected.std() > 0.1, "a test of nothing: all tokens are as likely"
        assert (ours[row, : len(expected)] - expected).abs().max() < 1e-4
        # The states are what the head reads. Granite and Cohere scale behind it.
        read = head_input[row][0, :-1]
        assert (mine - read).norm() < 1e-4 * read.norm()


@pytest.mark.parametrize("name", CAPPED)
def test_sdpa_which_leaves_out_a_cap_of_the_attention_is_refused(family, inputs, and_more, name):
    for key in ("policy", "reference"):
        config = benchmark.config_of(family(name), *inputs, "transformers", "eager")
        resolve(config)
        config = config.model(policy=family("Llama"), attention="sdpa").model(**{key: family(name)})
        with pytest.raises(ConfigError, match=rf"model.attention is 'sdpa' and model.{key} is .*use .* 'eager'"):
            resolve(config)


@torch.no_grad()
def test_a_reward_model_with_a_cap_computes_it(family):
    """Its attention has no key in the config. transformers itself would choose sdpa."""
    path = family("Gemma 2", classifier=True)
    given = {"input_ids": text(0).token_ids[None]}
    capped, without = (
        AutoModelForSequenceClassification.from_pretrained(path, attn_implementation=attention)(**given).logits
        for attention in ("eager", "sdpa")
    )
    assert (load_classifier(path)(**given).logits - capped).abs() < 1e-5 * capped.abs()
    assert (without - capped).abs() > 1e-3 * capped.abs(), "sdpa has learnt to cap: then the refusal can go"


def test_a_family_without_sdpa_is_told_what_to_use(family, inputs):
    with pytest.raises(ConfigError, match="model.attention is 'sdpa' .* use eager$"):
        resolve(benchmark.config_of(family("BLOOM"), *inputs, "transformers", "sdpa"))


@pytest.mark.parametrize("name", [*MIXED_IN_A_ROW, *KEPT_APART])
def test_packing_is_refused_where_texts_in_a_row_would_see_each_other(family, inputs, and_more, name):
    config = benchmark.config_of(family(name), *inputs, "transformers", "eager").learner(packing=True)
    for check in (resolve, lambda config: load_policy(config.model.policy, config)):
        check(config.learner(packing=False))
        if name in KEPT_APART:
            check(config)
            continue
        with pytest.raises(
            ConfigError, match="learner.packing is true and model.policy is .*use learner.packing false"
        ):
            check(config)


def test_packing_is_refused_for_a_critic_as_for_a_policy(family, inputs):
    config = benchmark.config_of(family("Llama"), *inputs, "transformers", "eager").learner(packing=True)
    with pytest.raises(ConfigError, match="learner.packing is true and critic.model is"):
        load_critic(family("OPT", classifier=True), config)
    load_critic(family("Llama", classifier=True), config)


def test_adapters_that_cannot_be_merged_are_refused_before_the_run(family, inputs):
    config = benchmark.config_of(family("Qwen3-MoE"), *inputs, "transformers", "sdpa")
    with pytest.raises(ConfigError, match="model.lora.targets is 'all-linear': it reaches .*experts.*name such layers"):
        resolve(config.model(lora={"rank": 2}))
    resolve(config.model(lora={"rank": 2, "targets": ["q_proj", "v_proj"]}))


def test_the_table_in_the_documents_is_that_of_the_measurement():
    docs = Path(__file__).resolve().parents[2] / "docs"
    results = json.loads((docs / "models.json").read_text())
    assert benchmark.table(results) in (docs / "models.md").read_text()
    measured = [result for result in results.values() if "error" not in result]
    assert max(number for result in measured for number in result["mismatch"] + result["states"]) < 1e-4
