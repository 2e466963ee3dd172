"""Which weights a vLLM engine computes with, and which it refuses."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from engines import assert_exact, config_of, logprob_error, perturbed, running, ticket_of, with_flipped_bit

from r2m_async.errors import WeightMismatch
from r2m_async.models.loading import load_policy
from r2m_async.models.weights import named_weights


@pytest.mark.ring
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(
            family, tied, marks=() if (family, tied) in (("qwen2", True), ("gpt_neox", False)) else pytest.mark.cross
        )
        for family in ("llama", "qwen2", "gpt_neox")
        for tied in (False, True)
    ],
)
def test_new_weights_are_what_every_family_computes_with(checkpoint, family, tied):
    config = config_of(checkpoint(family, tied))
    old = load_policy(config.model.policy, config)
    assert ("tied" if tied else "untied") == ("untied" if len(_heads(old)) == 2 else "tied")
    new = perturbed(old)
    with running(config, model=old, version=1) as engine:
        assert_exact(old, engine.generate(ticket_of(0)), config)
        for version, model in ((2, new), (3, old), (4, new)):
            engine.load(named_weights(model, version, probe=True))
            result = engine.generate(ticket_of(0, attempt=version))
            assert_exact(model, result, config)
            assert result[1].policy_version == version
            for one in (*result[0].trajectories, result[0].greedy):
                assert one.policy_versions.tolist() == [-1] * 5 + [version] * one.num_response_tokens
        assert logprob_error(old, result[0].trajectories, config) > 0.1, "the new weights are not new enough to tell"


def _heads(model):
    """Embedding and head, one where they are tied."""
    return {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}


@pytest.mark.ring
def test_before_any_weights_come_the_checkpoint_is_version_0(checkpoint):
    config = config_of(checkpoint())
    with running(config) as engine:
        result = engine.generate(ticket_of(0))
    assert_exact(load_policy(config.model.policy, config), result, config)
    assert result[1].policy_version == 0
    assert result[0].trajectories[0].policy_versions.tolist()[5:] == [0] * result[0].trajectories[0].num_response_tokens


@pytest.mark.ring
def test_one_flipped_bit_is_refused_by_the_name_of_its_parameter(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config) as engine:
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            with pytest.raises(WeightMismatch, match=rf"version 7\b.*{name} did not arrive"):
                engine.load(with_flipped_bit(named_weights(model, 7, probe=True), name))
        engine.load(named_weights(model, 8, probe=True))
        assert_exact(model, engine.generate(ticket_of(0)), config)


@pytest.mark.ring
def test_an_engine_that_computes_with_other_weights_than_it_was_sent_is_refused(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    weights = named_weights(model, 9, probe=True)
    with running(config) as engine:
        engine.load(weights)
        for tensors, logprobs in (
            (weights.tensors, weights.probe.logprobs * (1 + 2e-5)),
            (weights.tensors, weights.probe.logprobs * torch.nan),
            (named_weights(perturbed(model, 0.001), 9).tensors, weights.probe.logprobs),
        ):
            probe = dataclasses.replace(weights.probe, logprobs=logprobs, digests={})
            with pytest.raises(WeightMismatch, match="version 9: every parameter arrived"):
                engine.load(dataclasses.replace(weights, tensors=tensors, probe=probe))
        # Rounding grows with the size of a log-probability, and one unlikely token may be further off than the others.
        rounded = weights.probe.logprobs + torch.eye(11)[4] * 6e-6 * weights.probe.logprobs.sum()
        engine.load(dataclasses.replace(weights, probe=dataclasses.replace(weights.probe, logprobs=rounded)))
        assert_exact(model, engine.generate(ticket_of(0)), config)


@pytest.mark.ring
def test_a_parameter_that_was_not_sent_is_noticed(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        with running(config, model=model) as engine:
            weights = named_weights(perturbed(model), 2, probe=True)
            del weights.tensors[name]
            with pytest.raises(WeightMismatch, match=f"version 2: {name} did not arrive as it was sent: not at all"):
                engine.load(weights)


@pytest.mark.ring
def test_a_window_shorter_than_the_probe_still_loads(checkpoint):
    config = config_of(checkpoint(), max_prompt_tokens=4, max_new_tokens=4)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        assert_exact(model, engine.generate(ticket_of(0, prompt_tokens=4)), config)


def test_vllm_does_not_warn_of_what_is_meant():
    from actors.vllm_worker import NO_FAULT, register

    for _ in range(2):  # vLLM may call it more than once in a process
        register()
    told = []
    handler = SimpleNamespace(level=0, handle=lambda record: told.append(record.getMessage()))
    for name, warnings in {
        "vllm.model_executor.models.utils": [
            "Attempted to load weight a.b with dtype x into y",
            "Attempted to load nested",
        ],
        "vllm.model_executor.model_loader.reload.layerwise": [
            "RotaryEmbedding: Failed to load weights",
            "Llama3RotaryEmbedding: Failed to load weights",
            "RowParallelLinear: Failed to load weights",
        ],
    }.items():
        logger = logging.getLogger(name)
        assert name in NO_FAULT and len(logger.filters) == 1
        logger.addHandler(handler)
        for warning in warnings:
            logger.warning(warning)
        logger.removeHandler(handler)
    assert told == ["Attempted to load nested", "RowParallelLinear: Failed to load weights"]
