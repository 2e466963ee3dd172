"""Every family of models on vLLM, before and after an update of its weights: the learner's numbers, or a refusal."""

import json

import pytest
from families import benchmark

from r2m_async.cli import main
from r2m_async.errors import ConfigError

pytestmark = pytest.mark.ring

REFUSED = {
    ("Qwen2 with windows", True): "Sliding window for some but all layers",
    ("Qwen2 with windows", False): "Sliding window for some but all layers",
    ("Qwen3 with biases", True): "computes another model than transformers",
    ("Qwen3 with biases", False): "computes another model than transformers",
    ("Qwen3-MoE", True): "computes another model than transformers",
    ("Qwen3-MoE", False): "computes another model than transformers",
    ("Gemma 2", False): "no module or parameter named 'lm_head'",
    ("BLOOM", False): "no module or parameter named 'lm_head'",
    ("Cohere", False): "computes another model than transformers",
}
"""What vLLM 0.32 does not compute, by (name, tied)."""
OFTEN = [("Gemma 2", True), ("Cohere", False), ("Phi", True), ("BLOOM", True), ("Qwen2 with windows", False)]
ALL = [(name, tied) for name in benchmark.FAMILIES for tied in (True, False)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return benchmark.save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("name", "tied"), [one if one in OFTEN else pytest.param(*one, marks=pytest.mark.cross) for one in ALL]
)
def test_vllm_computes_what_the_learner_does_with_the_files_weights_and_with_those_sent(tmp_path, inputs, name, tied):
    policy = benchmark.save_model(tmp_path, name, tied)
    config = benchmark.config_of(policy, *inputs, "vllm", benchmark.attention_of(name))
    if (name, tied) in REFUSED:
        with pytest.raises(ConfigError, match=f"{REFUSED[name, tied]}.*use rollouts.engine 'transformers'"):
            benchmark.measure(config)
        return
    result = benchmark.measure(config)
    assert len(result["mismatch"]) == len(result["states"]) == 2
    assert max(result["mismatch"] + result["states"]) < 1e-4
    assert result["still"] == []


def test_a_refusal_without_words_tells_the_line(tmp_path, inputs, monkeypatch):
    monkeypatch.setitem(
        benchmark.FAMILIES, "GPT-2 of another kind", ("gpt2", {"scale_attn_by_inverse_layer_idx": True})
    )
    policy = benchmark.save_model(tmp_path, "GPT-2 of another kind", True)
    with pytest.raises(ConfigError, match="assert not config.scale_attn_by_inverse_layer_idx.*'transformers'"):
        benchmark.measure(benchmark.config_of(policy, *inputs, "vllm", "sdpa"))


def test_check_refuses_an_architecture_or_an_option_that_vllm_does_not_have(tmp_path, inputs, monkeypatch, capsys):
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    monkeypatch.setitem(benchmark.FAMILIES, "GPT-Neo", ("gpt_neo", local))

    def check(name, *overrides):
        policy = benchmark.save_model(tmp_path / name, name, True)
        config = benchmark.config_of(policy, *inputs, "vllm", "eager")
        (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()))
        return main(["check", str(tmp_path / "config.yaml"), *overrides]), capsys.readouterr()

    status, told = check("GPT-Neo")
    assert status != 0 and "GPTNeoForCausalLM" in told.err and "use rollouts.engine 'transformers'" in told.err
    assert check("GPT-Neo", "rollouts.engine=transformers")[0] == 0
    assert check("Llama")[0] == 0
    status, told = check("Llama", "rollouts.engine_options={gpu_memory_utilisation: 0.5}")
    assert status != 0 and "gpu_memory_utilisation" in told.err
