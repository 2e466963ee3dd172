"""LoRA: adapters train, the base stays, engines and checkpoints see merged weights under the base model's names."""

import copy
import sys

import pytest
import torch
from groups import groups_of

from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async import reference
from r2m_async.advantages import get_advantage
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.models.adapters import TrainedPart, add_adapters, publications
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import token_logprobs
from r2m_async.models.weights import load_weights, named_weights

pytestmark = pytest.mark.models

FAMILIES = ["llama", "qwen2", "gpt_neox"]
SIZES = [[(3, 4), (3, 2)], [(2, 5), (2, 1), (2, 6)]]


@pytest.fixture(params=FAMILIES)
def config(request, tiny, tiny_config) -> R2MConfig:
    return tiny_config.model(policy=tiny(request.param, False), lora={"rank": 4, "alpha": 8}).learner(lr=1e-2)


def base_of(config: R2MConfig):
    return load_policy(config.model.policy, config)


def learner_of(config: R2MConfig) -> PolicyLearner:
    return PolicyLearner(TorchBackend(base_of(config), None, config), get_advantage(config.advantage.name), config)


def take(learner: PolicyLearner, steps: range) -> None:
    groups, rewards = groups_of(SIZES)
    for step in steps:
        learner.proximal(step, groups)
        learner.train(step, rewards)


def test_at_first_the_policy_is_its_base_and_after_training_only_adapters_have_moved(config):
    base, learner = named_weights(base_of(config), 0).tensors, learner_of(config)
    policy = learner.backend.policy
    first = learner.weights()[1].tensors
    assert list(first) == list(base) and all(torch.equal(first[name], tensor) for name, tensor in base.items())
    take(learner, range(2))
    moved = {name for name, tensor in learner.weights()[1].tensors.items() if not torch.equal(tensor, base[name])}
    assert moved and all(
        name.endswith("weight") and ("attn" in name or "attention" in name or "mlp" in name) for name in moved
    )
    held = {name.replace(".base_layer", ""): p for name, p in policy.named_parameters() if "lora_" not in name}
    assert held.keys() == base.keys() and all(torch.equal(held[name], tensor) for name, tensor in base.items())
    assert {name.split(".")[-3] for name, _ in TrainedPart(policy).named_parameters()} == {"lora_A", "lora_B"}


def test_merged_weights_are_pefts_own_and_compute_what_the_learner_does(config):
    learner = learner_of(config)
    take(learner, range(2))
    merged, policy = learner.weights()[1], learner.backend.policy
    theirs = copy.deepcopy(policy)
    for module in theirs.modules():
        if hasattr(module, "base_layer"):
            module.merge()
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            assert torch.allclose(merged.tensors[name.replace(".base_layer", "")], parameter, atol=1e-7), name
    engine = base_of(config)
    load_weights(engine, merged)
    batch = [one for group in groups_of(SIZES)[0] for one in group.trajectories]
    own, their = token_logprobs(policy, batch, config), token_logprobs(engine, batch, config)
    assert (own - their).abs().max() < 1e-5
    assert (own - token_logprobs(base_of(config), batch, config)).abs().max() > 1e-3


def test_the_reference_is_the_base(config):
    learner = learner_of(config)
    take(learner, range(1))
    groups, _ = groups_of(SIZES)
    learner.proximal(1, groups)
    batch = learner._batch
    assert (batch.reference - token_logprobs(base_of(config), batch.trajectories, config)).abs().max() < 1e-6
    assert (batch.reference - batch.old).abs().max() > 1e-3
    assert all(parameter.requires_grad for parameter in learner.backend._masters.tensors)


def test_a_checkpoint_holds_the_adapters_alone_and_goes_on_bit_for_bit(config):
    whole, first, second = learner_of(config), learner_of(config), learner_of(config.run(seed=9))
    take(whole, range(4))
    take(first, range(2))
    state = first.state()[1]
    assert all("lora_" in name for name in state["weights"].tensors)
    second.restore(state)
    take(second, range(2, 4))
    expected, resumed = (one.weights()[1].tensors for one in (whole, second))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_in_bfloat16_adapters_have_float32_masters(tiny_config):
    config = tiny_config.model(lora={"rank": 4}, dtype="bfloat16").learner(lr=1e-6)
    learner = learner_of(config)
    before = [master.clone() for master in learner.backend._masters.copies]
    take(learner, range(1))
    masters = learner.backend._masters.copies
    assert before and all(master.dtype == torch.float32 for master in masters)
    assert any(not torch.equal(master, one) for master, one in zip(masters, before, strict=True))
    assert {tensor.dtype for tensor in learner.weights()[1].tensors.values()} == {torch.bfloat16}


def test_a_ring_with_adapters_samples_from_the_merged_policy(tiny_config):
    config = tiny_config.model(lora={"rank": 4}).learner(lr=1e-2)
    with Ring.of(config, in_process=True) as ring:
        steps = []
        while not ring.finished:
            steps.append(ring.step())
    assert [metrics["policy/mismatch_max"] < 1e-5 for metrics in steps] == [True] * 3
    assert steps[0]["kl/k3"] < 1e-9 < 1e-6 < steps[-1]["kl/k3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "model.lora.rank: input should be greater than 0; got 0"),
        ({"lora": {"rang": 4}}, r"model.lora.rang: no such key; did you mean model.lora.rank\?"),
        ({"lora": {}, "reference": "other"}, "model.reference is 'other' and model.lora is set"),
    ],
)
def test_what_the_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        R2MConfig(model=changes)


def test_a_target_that_no_module_has_and_a_missing_peft_are_refused(tiny_config, monkeypatch):
    config = tiny_config.model(lora={"targets": ["q_prj"]})
    with pytest.raises(ConfigError, match=r"model.lora.targets is \('q_prj',\): Target modules .*q_prj.* not found"):
        add_adapters(base_of(config), config.model.lora, config.run.seed)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft is not installed: pip install 'r2m-async\[lora\]'"):
        add_adapters(base_of(config), config.model.lora, config.run.seed)


def test_the_reference_implementation_does_without(tiny_config):
    with pytest.raises(ConfigError, match="model.lora is set: Algorithm 1 .* trains all weights of the policy"):
        reference.train(tiny_config.model(lora={}))


def test_without_adapters_every_parameter_is_published_as_it_is(tiny_config):
    model = base_of(tiny_config)
    assert [(one.name, one.whole().data_ptr()) for one in publications(model)] == [
        (name, parameter.data_ptr()) for name, parameter in model.named_parameters()
    ]
