"""Every model is loaded whole or refused, by the names of its weights, in every command."""

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_exactness_in_process import assert_same_bits
from tiny import WORDS, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from r2m_async.errors import ConfigError
from r2m_async.launch.workload import resolve
from r2m_async.models.critic import load_critic
from r2m_async.models.loading import check_causal, check_packing, load_policy
from r2m_async.models.pretrained import pretrained_model
from r2m_async.models.reward import load_classifier, load_reward_model

pytestmark = pytest.mark.models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy_of(tiny, tmp_path):
    """`copy_of(family, classifier, change)`: a copy of a tiny model, whose weights `change` may change in place."""

    def make(family: str, classifier: bool, change=lambda weights: None) -> str:
        directory = tmp_path / f"{family}-{classifier}"
        shutil.copytree(tiny(family, classifier), directory)
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return str(directory)

    return make


def without(name):
    return lambda weights: weights.pop(name)


def renamed(old, new):
    def change(weights):
        weights[new] = weights.pop(old)

    return change


def reshaped(name):
    def change(weights):
        weights[name] = weights[name][:-1].clone()

    return change


LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("weightless", [False, True])
@pytest.mark.parametrize(
    ("classifier", "change", "named"),
    [
        (False, without("lm_head.weight"), "lack lm_head.weight"),
        (False, without(LAYER), f"lack {LAYER}"),
        (False, renamed(LAYER, "model.layers.1.self_attn.query.weight"), "model.layers.1.self_attn.query.weight"),
        (False, reshaped("model.norm.weight"), "in another shape model.norm.weight"),
        (False, renamed("model.norm.weight", "model.final_norm.weight"), "lack model.norm.weight"),
        (True, without("score.weight"), "lack score.weight"),
        (True, renamed("score.weight", "value_head.weight"), "value_head.weight"),
        (True, without(LAYER), f"lack {LAYER}"),
    ],
)
def test_weights_that_files_lack_or_have_besides_are_named(copy_of, classifier, change, named, weightless):
    kind = "classifier" if classifier else "language model"
    with pytest.raises(ConfigError, match="is loaded as a Llama") as told:
        pretrained_model("the key", copy_of("llama", classifier, change), kind, weightless=weightless)
    assert named in str(told.value) and "the key" in str(told.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(tiny, family):
    with pytest.raises(ConfigError, match="these are the files of a reward model: name a causal language model"):
        pretrained_model("model.policy", tiny(family, True))
    with pytest.raises(ConfigError, match="without its trained head it is no reward model"):
        load_classifier(tiny(family, False))


def test_a_reward_model_is_no_policy_with_tied_embeddings_either(tiny, tmp_path):
    """Then no weight is lacking: only the spare head tells."""
    config = AutoConfig.from_pretrained(tiny("llama", True), tie_word_embeddings=True)
    shutil.copytree(tiny("llama", True), tmp_path / "tied")
    config.save_pretrained(tmp_path / "tied")
    with pytest.raises(ConfigError, match="score.weight; these are the files of a reward model"):
        pretrained_model("model.policy", tmp_path / "tied")


@pytest.mark.parametrize("weightless", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_a_head_that_the_config_ties_to_other_embeddings_is_refused_and_an_equal_one_is_not(
    copy_of, family, weightless
):
    """transformers would leave the two apart without a word, and vLLM would tie them."""
    embeddings, head = {
        "qwen2": ("model.embed_tokens.weight", "lm_head.weight"),
        "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    }[family]
    different = changed_config(copy_of(family, False), tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=f"ties {head} to {embeddings} .*two different tensors"):
        pretrained_model("model.policy", different, weightless=weightless)
    weights = load_file(Path(different, "model.safetensors"))
    weights[head] = weights[embeddings].clone()
    save_file(weights, Path(different, "model.safetensors"), metadata={"format": "pt"})
    model = pretrained_model("model.policy", different, weightless=weightless)
    if not weightless:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("key", ["model.policy", "model.reference", "reward.model", "critic.model"])
def test_every_model_of_a_run_is_refused_before_anything_starts(tiny_config, copy_of, key):
    broken = copy_of("qwen2", key == "reward.model", without("model.norm.weight"))
    section, _, name = key.partition(".")
    config = tiny_config.advantage(name="gae").objective(ratio="token") if key == "critic.model" else tiny_config
    with pytest.raises(ConfigError, match="lack model.norm.weight") as told:
        resolve(getattr(config, section)(**{name: broken}))
    assert key in str(told.value)


def test_the_stages_refuse_the_same_models(tiny_config, copy_of):
    policy = copy_of("qwen2", False, without("model.norm.weight"))
    for load in (load_policy, load_critic):
        with pytest.raises(ConfigError, match="lack model.norm.weight"):
            load(policy, tiny_config)
    with pytest.raises(ConfigError, match="lack score.weight"):
        load_reward_model(copy_of("llama", True, without("score.weight")), tiny_config)


def test_a_head_that_is_to_be_new_may_be_lacking_and_nothing_else(copy_of, tiny_config):
    assert not pretrained_model("k", copy_of("llama", False), "classifier", head="either", num_labels=1).has_head
    assert pretrained_model("k", copy_of("llama", True), "classifier", head="either", num_labels=1).has_head
    with pytest.raises(ConfigError, match=f"lack {LAYER}"):
        pretrained_model("k", copy_of("qwen2", True, without(LAYER)), "classifier", head="new", num_labels=1)


def changed_config(directory: str, **keys) -> str:
    path = Path(directory, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return directory


def test_what_cannot_be_trained_is_refused_by_what_it_is(copy_of, tmp_path):
    quantised = changed_config(copy_of("llama", False), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="has quantised weights"):
        pretrained_model("model.policy", quantised)
    adapters = Path(copy_of("qwen2", False))
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds adapters"):
        pretrained_model("model.policy", adapters)
    AutoConfig.for_model("t5", d_model=16, num_layers=1, num_heads=2, d_ff=16).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        pretrained_model("model.policy", tmp_path / "t5")


def test_a_model_that_reads_a_text_in_both_directions_is_no_policy(tiny, tiny_config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama", False))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="reads a text in both directions"):
        load_policy(str(tmp_path / "bert"), tiny_config)


def test_a_package_that_a_model_lacks_is_neither_its_name_nor_its_attention(tiny, monkeypatch):
    def lacking(*_, **__):
        raise ImportError("Using `low_memory` requires `weights-shrinker`: `pip install weights-shrinker`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacking)
    with pytest.raises(ConfigError, match="requires `weights-shrinker`.*; install it in this environment$"):
        pretrained_model("model.policy", tiny("qwen2", False), attention="sdpa")


def test_however_coarsely_a_model_rounds_it_reads_what_it_reads(tiny, tiny_config):
    """In bfloat16 two roundings of one text of a real model are a tenth of the states apart, and more."""
    model = load_policy(tiny("qwen2", False), tiny_config.model(dtype="bfloat16"))

    def rounded(module, inputs, states):
        return states + 0.3 * states.detach().abs().mean() * torch.randn_like(states)

    def scaled_in_place(module, inputs):  # as CTRL does with its embeddings
        inputs[0].mul_(2)

    model.base_model.layers[0].register_forward_pre_hook(scaled_in_place)
    model.base_model.layers[0].register_forward_hook(rounded)
    check_causal(model, "model.policy", "coarse")
    check_packing(model, "model.policy", "coarse")
    for layer in model.base_model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "both_ways"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "both_ways", both_ways)
        for check, told in ((check_causal, "both directions"), (check_packing, "not kept apart")):
            with pytest.raises(ConfigError, match=told):
                check(model, "model.policy", "coarse")


def test_a_model_that_cannot_be_tried_is_refused_with_the_reason(tiny):
    def uncalled(model):  # as code of its own may look its weights up itself
        table = model.get_input_embeddings()
        model.base_model.forward = lambda input_ids, **_: SimpleNamespace(last_hidden_state=table.weight[input_ids])

    def unused(model):
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.detach(), prepend=False
        )
        model.base_model.layers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))

    def without_gradients(model):
        inner = model.base_model.forward
        model.base_model.forward = torch.no_grad()(inner)

    for spoil in (uncalled, unused, without_gradients):
        model = AutoModelForCausalLM.from_pretrained(tiny("llama", False))
        spoil(model)
        for check in (check_causal, check_packing):
            with pytest.raises(
                ConfigError, match=r"model\.policy: the states of 'mine' \(LlamaForCausalLM\) have no gradient"
            ):
                check(model, "model.policy", "mine")


def both_ways(module, query, key, value, attention_mask, **kwargs):
    """Attention without any mask, as transformers calls it."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


@pytest.mark.parametrize("key", ["policy", "reference"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_such_a_model_is_refused_before_its_weights_are_read(tiny, tiny_config, tmp_path, family, key):
    """So `r2m check` says it, too."""
    shutil.copytree(tiny("qwen2", False), tmp_path / family)
    tokens = AutoConfig.from_pretrained(tiny("qwen2", False)).vocab_size
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(family, vocab_size=tokens, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    with pytest.raises(ConfigError, match=rf"model.{key}: .* reads a text in both directions"):
        resolve(tiny_config.model(**{key: str(tmp_path / family)}))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"vocab_size": "400"}, "vocab_size.*expected int, got str"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*expected bool"),
        ({"layer_types": ["a", "b"]}, "layer_types"),
    ],
)
def test_a_config_json_with_a_wrong_value_is_told_with_the_value(tiny_config, copy_of, keys, told):
    policy = changed_config(copy_of("qwen2", False), **keys)
    with pytest.raises(ConfigError, match=rf"model.policy: .*{told}"):
        resolve(tiny_config.model(policy=policy))


@pytest.mark.parametrize("classifier", [False, True])
def test_a_config_json_that_asks_for_tuples_changes_nothing(copy_of, tiny_config, classifier):
    path = changed_config(copy_of("llama", classifier), return_dict=False)
    model = load_reward_model(path, tiny_config) if classifier else load_policy(path, tiny_config)
    assert model.base_model(input_ids=torch.tensor([[2, 3]])).last_hidden_state.shape[:2] == (1, 2)


@pytest.mark.parametrize("key", ["model.reference", "critic.model"])
def test_reference_and_critic_must_read_whatever_the_policy_may_write(tiny_config, copy_of, key):
    """A policy may write longer texts than they have positions, and tokens of its padding."""
    config = tiny_config.advantage(name="gae").objective(ratio="token") if key == "critic.model" else tiny_config
    section, _, name = key.partition(".")
    config = getattr(config, section)(**{name: copy_of("qwen2", False)})
    resolve(config)
    short = changed_config(getattr(getattr(config, section), name), max_position_embeddings=21)
    with pytest.raises(ConfigError, match=rf"a text may then have 22 tokens, and {key} .* has 21 positions"):
        resolve(config)
    policy = changed_config(short, max_position_embeddings=256)
    shutil.copytree(policy, f"{policy}-padded")
    model, rows = AutoModelForCausalLM.from_pretrained(policy), len(AutoTokenizer.from_pretrained(policy))
    for directory, number in ((policy, rows), (f"{policy}-padded", rows + 7)):
        model.resize_token_embeddings(number)
        model.save_pretrained(directory)
    resolve(config)
    with pytest.raises(ConfigError, match=rf"{key} .* embeddings for {rows} tokens, and .* one of {rows + 7}: resize"):
        resolve(config.model(policy=f"{policy}-padded"))


def test_a_policy_that_cannot_be_its_own_critic_is_refused_before_anything_starts(tiny_config, tmp_path):
    """critic.model is the policy by default, and transformers has no classifier of Cohere's."""
    policy = save_tiny_model(tmp_path, "cohere", False, WORDS, seed=0)
    resolve(tiny_config.model(policy=policy))
    with pytest.raises(ConfigError, match=r"critic.model: .* cannot be loaded"):
        resolve(tiny_config.model(policy=policy).advantage(name="gae").objective(ratio="token"))


@pytest.mark.parametrize("variant", ["r2m", "iterative_head"])
def test_a_reward_model_that_projects_its_states_has_a_head_that_reads_them(tiny_config, tmp_path, variant):
    """OPT-350m: 1024 numbers inside, and 512 in the states that its head reads."""
    shutil.copytree(tiny_config.reward.model, tmp_path / "opt")
    rows = AutoConfig.from_pretrained(tmp_path / "opt").vocab_size
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "num_labels": 1}
    config = AutoConfig.for_model("opt", vocab_size=rows, word_embed_proj_dim=16, **sizes, **ends)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "opt")
    assert_same_bits(tiny_config.reward(model=str(tmp_path / "opt")).head(variant=variant).run(num_steps=2))


@pytest.mark.parametrize("attention", ["no_such_attention", "flash_attention_2", "kernels-community/none"])
def test_an_attention_that_is_not_there_is_refused_by_its_key(tiny_config, attention):
    with pytest.raises(ConfigError, match="model.attention is"):
        resolve(tiny_config.model(attention=attention))


def test_a_model_without_a_tokenizer_is_refused(copy_of, tiny_config):
    directory = copy_of("qwen2", False)
    for file in Path(directory).glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded"):
        resolve(tiny_config.model(policy=directory))


def test_a_reference_that_reads_other_tokens_is_refused(tiny_config, tmp_path):
    other = save_tiny_model(tmp_path / "other", "qwen2", False, WORDS[:6], seed=3)
    with pytest.raises(ConfigError, match="model.reference is .* both must read the same tokens"):
        resolve(tiny_config.model(reference=other))


def test_loading_says_nothing_to_the_user(copy_of, capfd):
    pretrained_model("k", copy_of("llama", False), "classifier", head="new", num_labels=1)
    out, err = capfd.readouterr()
    assert "LOAD REPORT" not in out + err and "Loading weights" not in out + err


def test_no_other_file_loads_a_model_or_a_tokenizer():
    """`from_scratch` makes its own, and loads none but those."""
    loaders = set()
    for package in ("r2m_async", "actors", "learners"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if any(ast.unparse(call.func).endswith(".from_pretrained") for call in calls):
                loaders.add(path.relative_to(ROOT).as_posix())
    assert "r2m_async/models/pretrained.py" in loaders
    assert {one for one in loaders if "/from_scratch/" not in one} == {"r2m_async/models/pretrained.py"}
