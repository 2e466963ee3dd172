"""The kernels of liger-kernel are asked for by `model.liger`; where they cannot run that is refused before anything is loaded.

No test runs the kernels, which need a GPU. A module of the same name stands in for the package.
"""

import json
import sys
import types

import pytest
import torch
from transformers import LlamaModel
from transformers.models.llama import modeling_llama

from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_code, resolve
from r2m_async.models.critic import load_critic
from r2m_async.models.liger import FAMILIES, check_family, check_liger
from r2m_async.models.loading import load_policy
from r2m_async.reward_models.frozen_states import _key as states_key
from r2m_async.reward_models.trainee import RewardTrainee

pytestmark = pytest.mark.models


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as these checks can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.fixture
def package(monkeypatch):
    """A stand-in that doubles the last norm, and puts a class of its own into transformers' module as the package does."""
    calls = []

    def apply(model, **how):
        calls.append((type(model), how))
        modeling_llama.LlamaRMSNorm = torch.nn.Identity
        own = model.norm.forward
        model.norm.forward = lambda states: 2 * own(states)

    one = types.ModuleType("liger_kernel.transformers")
    one.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", one)
    return calls


def test_without_the_package_or_a_gpu_it_is_refused_with_what_to_do(monkeypatch):
    with pytest.raises(ConfigError) as refused:
        check_liger("cpu")
    package, device = str(refused.value).splitlines()[-2:]
    assert "liger-kernel is not installed: pip install 'r2m-async[liger]', or use model.liger false" in package
    assert "whose kernels run on GPUs alone, and run.device is 'cpu': use one, or use" in device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no GPU on this machine"):
        check_liger("auto")


def test_runs_and_trainings_of_reward_models_refuse_it_before_anything_is_loaded(tiny_config, tmp_path, capsys):
    with pytest.raises(ConfigError, match="liger-kernel is not installed"):
        check_code(tiny_config.model(liger=True, policy="no/such-model"))
    path = tmp_path / "reward.yaml"
    path.write_text(json.dumps({"run": {"output_dir": str(tmp_path)}, "model": {"liger": True, "start": "no/such"}}))
    assert main(["reward-model", "train", str(path)]) == 2
    assert "r2m-async[liger]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_are_both_nothing_is_refused(on_a_gpu):
    check_liger("auto")
    check_liger("cuda")


@pytest.mark.parametrize("key", ["model.policy", "model.reference", "critic.model"])
def test_a_family_that_the_package_does_not_know_is_refused_before_weights_are_read(tiny_config, tiny, on_a_gpu, key):
    config = tiny_config.model(policy=tiny("llama", False), liger=True).run(device="auto")
    config = config.advantage(name="gae").objective(ratio="token")
    stranger = tiny("gpt_neox", False)
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=rf"{key} is '.*', which is of the family 'gpt_neox': there are kernels for"):
        resolve(getattr(config, section)(**{name: stranger}))


def test_a_model_that_computes_with_its_own_code_is_refused(tiny):
    own = type(
        "Own", (), {"__module__": "transformers_modules.own", "config": types.SimpleNamespace(model_type="llama")}
    )
    with pytest.raises(ConfigError, match="which computes with Python code of its own"):
        check_family("model.policy", "own", own())


def test_norms_and_gated_layers_of_the_decoder_alone_are_given_over(tiny, tiny_config, package):
    directory, norm = tiny("llama", False), modeling_llama.LlamaRMSNorm
    config = tiny_config.model(policy=directory, liger=True)
    ids = torch.arange(6)[None]
    plain = load_policy(directory, config.model(liger=False))
    assert package == []
    policy, critic = load_policy(directory, config), load_critic(directory, config)
    off = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert package == [(LlamaModel, off)] * 2
    assert torch.allclose(policy(ids).logits, 2 * plain(ids).logits, atol=1e-5), "logits are the model's own"
    assert torch.allclose(critic.classifier.base_model(ids).last_hidden_state, policy.model(ids).last_hidden_state)
    assert modeling_llama.LlamaRMSNorm is norm, "models that are made later are as they were"
    assert policy.state_dict().keys() == plain.state_dict().keys()


def test_a_reward_model_in_training_is_given_over(reward_model_config, package):
    start = reward_model_config.model.start
    given, plain = (RewardTrainee(start, reward_model_config.model(liger=liger)) for liger in (True, False))
    assert states_key(given, [], 8) != states_key(plain, [], 8), "cached states are of other kernels"
    assert [model for model, _ in package] == [LlamaModel]


def test_every_family_is_one_of_transformers():
    from transformers import CONFIG_MAPPING

    assert set(FAMILIES) <= set(CONFIG_MAPPING.keys())


def test_an_older_package_without_the_family_is_told(tiny, tiny_config, package):
    with pytest.raises(
        ConfigError, match="the liger-kernel that is installed has no kernels for the family 'qwen2': pip"
    ):
        load_policy(tiny("qwen2", False), tiny_config.model(liger=True))
