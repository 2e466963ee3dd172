"""Layers that are computed again in the backward pass compute what they compute without that, and drop nothing out."""

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from r2m_async.errors import ConfigError
from r2m_async.launch.workload import resolve
from r2m_async.models.loading import checkpoint_activations
from r2m_async.models.policy import policy_pass
from r2m_async.trajectories import Trajectory

pytestmark = pytest.mark.models

FAMILIES = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    # The layers of these ask themselves whether they are in training mode.
    "opt": {"dropout": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "biogpt": {"hidden_dropout_prob": 0.5},
    "xglm": {"dropout": 0.5, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64},
}


def values_and_gradient(family: str, checkpointed: bool):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=50, **(sizes | FAMILIES[family])))
    model.eval()
    calls = []
    if checkpointed:
        checkpoint_activations(model)
    layer = next(one for one in model.modules() if isinstance(one, GradientCheckpointingLayer))
    part = next(one for one in layer.modules() if list(one.parameters(recurse=False)))
    part.register_forward_hook(lambda *_: calls.append(1))
    text = Trajectory(
        token_ids=torch.arange(3, 23),
        prompt_len=4,
        behaviour_logprobs=torch.zeros(20),
        policy_versions=torch.zeros(20, dtype=torch.int32),
        finish_reason="stop",
        text="",
    )
    logprobs = policy_pass(model, [text], 1.0)[0]
    logprobs.sum().backward()
    gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
    return logprobs.detach(), gradient, len(calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_are_in_eval_mode_both_times(family):
    plain, checkpointed = (values_and_gradient(family, on) for on in (False, True))
    assert torch.equal(checkpointed[0], plain[0]) and torch.equal(checkpointed[1], plain[1])
    assert (plain[2], checkpointed[2]) == (1, 2)


def test_a_model_whose_layers_cannot_be_computed_again_is_refused_before_anything_starts(tiny_config, tmp_path):
    """transformers raises once the model is loaded, in the process of the learner."""
    policy = save_tiny_model(tmp_path, "openai-gpt", False, ["the", "river"], seed=0)
    config = tiny_config.model(policy=policy, attention="eager")
    resolve(config)
    with pytest.raises(ConfigError, match=r"learner.activation_checkpointing is true and model.policy is .*OpenAIGPT"):
        resolve(config.learner(activation_checkpointing=True))
