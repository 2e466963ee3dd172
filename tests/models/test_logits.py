"""Log-probabilities come from the model's own forward pass, and never from all logits at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r2m_async.models import policy
from r2m_async.models.policy import policy_pass
from r2m_async.trajectories import Trajectory

pytestmark = pytest.mark.models

VOCABULARY = 400
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 16},
    "gemma3_text": {"final_logit_softcapping": 5.0, "head_dim": 16},
    "cohere": {"logit_scale": 0.1},
    "granite": {"logits_scaling": 8.0},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "bloom": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
}
MULTI_HEAD = ("gpt2", "gpt_neox", "bloom", "opt")


def model_of(family: str):
    heads = {} if family in MULTI_HEAD else {"num_key_value_heads": 1, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **(sizes | heads | FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def trajectory(prompt: int, response: int, seed: int) -> Trajectory:
    length = prompt + response
    return Trajectory(
        token_ids=torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)),
        prompt_len=prompt,
        behaviour_logprobs=torch.zeros(length),
        policy_versions=torch.zeros(length, dtype=torch.int32),
        finish_reason="stop",
        text="",
    )


BATCH = [trajectory(5, 7, 0), trajectory(3, 11, 1), trajectory(6, 2, 2)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_probabilities_and_entropies_are_those_of_the_models_own_logits(family):
    model = model_of(family)
    logprobs, _, entropies = policy_pass(model, BATCH, 0.7, entropy=True)
    for row, one in enumerate(BATCH):
        logits = model(one.token_ids[None]).logits[0, one.prompt_len - 1 : -1].double() / 0.7
        own = torch.distributions.Categorical(logits=logits)
        response = one.token_ids[one.prompt_len :]
        assert torch.allclose(logprobs[row, : len(response)].double(), own.log_prob(response), atol=1e-4)
        assert torch.allclose(entropies[row, : len(response)].double(), own.entropy(), atol=1e-4)
        assert not logprobs[row, len(response) :].any() and not entropies[row, len(response) :].any()


def values_and_gradient(model):
    model.zero_grad()
    logprobs, _, entropies = policy_pass(model, BATCH, 0.7, entropy=True)
    (logprobs.sum() + entropies.square().sum()).backward()
    return logprobs, entropies, torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_chunks_of_tokens_give_the_same_values_and_gradients(family, monkeypatch):
    model = model_of(family)
    whole = values_and_gradient(model)
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 3 * VOCABULARY)  # seven chunks
    chunked = values_and_gradient(model)
    for one, other in zip(whole, chunked, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_of_all_tokens_and_the_whole_vocabulary_is_made(with_gradient, monkeypatch):
    model, rows = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[1]))
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 3 * VOCABULARY)
    with torch.set_grad_enabled(with_gradient):
        logprobs, *_ = policy_pass(model, BATCH, 0.7)
        if with_gradient:
            logprobs.sum().backward()
    # Twenty response tokens. With a gradient each chunk is computed a second time, in the backward pass.
    assert max(rows) == 3 and sum(rows) == (40 if with_gradient else 20)


def test_while_logits_are_computed_the_model_is_whole_for_other_threads():
    """A version is probed and copied out in another thread, beside a pass."""
    model, seen = model_of("llama"), []
    base_model, names = model.base_model, [name for name, _ in model.named_parameters()]

    def look(*_):
        seen.append((model.base_model is base_model, [name for name, _ in model.named_parameters()] == names))

    model.lm_head.register_forward_hook(look)
    policy_pass(model, BATCH, 0.7)[0].sum().backward()
    assert seen == [(True, True)]


def test_two_threads_compute_with_one_model_what_each_computes_alone():
    model = model_of("gemma2")
    batches = [BATCH, [trajectory(4, 9, 7), trajectory(6, 3, 8)]]
    with torch.no_grad():
        alone = [policy_pass(model, batch, 0.7)[0] for batch in batches]

        def run(batch):
            with torch.no_grad():
                return [policy_pass(model, batch, 0.7)[0] for _ in range(40)]

        with ThreadPoolExecutor(2) as threads:
            for own, together in zip(alone, threads.map(run, batches), strict=True):
                assert all(torch.allclose(own, one, atol=1e-4) for one in together)
