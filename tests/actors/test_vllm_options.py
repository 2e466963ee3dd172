"""Options that reach vLLM, and options that are refused."""

import pytest
import torch
from engines import config_of, engine_of, running, vllm_of

import actors.state_slab
from actors import vllm_worker
from r2m_async.errors import ConfigError


@pytest.mark.ring
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 99}, "rollouts.engine_options: max_model_len"),
        ({"block_size": 16, "dtype": "float16"}, "rollouts.engine_options: dtype"),
        ({"logprobs_mode": "raw_logprobs"}, "rollouts.engine_options: logprobs_mode"),
        ({"trust_remote_code": True}, "rollouts.engine_options: trust_remote_code"),
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilisation"),
        ({"gpu_memory_utilization": "0.5"}, "is '0.5', and vLLM takes float there; write it without quotes"),
        ({"enforce_eager": "no"}, "is 'no', and vLLM takes bool there"),
    ],
)
def test_an_option_that_the_config_owns_or_that_does_not_exist_is_refused(
    checkpoint, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        engine_of(config_of(checkpoint(), engine_options=options))


@pytest.mark.ring
@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"nonsense": 1}, {"max_num_batched_tokens": 1}])
def test_an_engine_that_did_not_start_leaves_no_file(checkpoint, tmp_path, monkeypatch, options):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    with pytest.raises(ValueError):
        engine_of(config_of(checkpoint(), engine_options=options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ring
def test_an_option_that_nothing_else_sets_reaches_vllm_over_our_default(checkpoint):
    config = config_of(checkpoint(), engine_options={"block_size": 64, "enable_prefix_caching": False})
    with running(config) as engine:
        options = vllm_of(engine).vllm_config
        assert (options.cache_config.block_size, options.cache_config.enable_prefix_caching) == (64, False)
        assert not options.load_config.use_tqdm_on_load, "its bar would be drawn into a run's log"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM's helpers are compiled")
def test_without_a_gpu_nothing_is_compiled_in_a_process_of_vllm(monkeypatch):
    """Whatever was imported first: a process that was forked has had no chance to read the environment."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)

    def compiler(*_):
        raise AssertionError("compiled")

    vllm_worker.register()
    assert torch.compile(lambda x: x + 1, backend=compiler)(torch.zeros(1)) == 1
