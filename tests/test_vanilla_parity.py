"""At omega = 1 the R2M head's reward is the logit of AutoModelForSequenceClassification itself."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, LlamaConfig, Qwen2Config

from r2m_async.errors import ConfigError
from r2m_async.models.reward import reward_token_embeddings, scoring_head
from r2m_async.reward_head import R2MHead

PAD = 3
LENGTHS = (7, 4, 1)


def make_model(family, **options):
    sizes = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    if family == "qwen2":
        sizes["num_key_value_heads"] = 1
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig}[family](
        **{**sizes, "pad_token_id": PAD, **options}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_tokens(side):
    input_ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        input_ids[row, at] = torch.randint(PAD + 1, 50, (length,), generator=torch.Generator().manual_seed(row))
        attention_mask[row, at] = 1
    return input_ids, attention_mask


@torch.no_grad()
def rewards_at_omega_one(model, input_ids, attention_mask):
    rte = reward_token_embeddings(model, input_ids, attention_mask)
    head = R2MHead(16, 8, 4, scoring_head(model))
    return head(rte, torch.randn(len(input_ids), 5, 8), torch.ones(len(input_ids), 5), 1.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_rewards_at_omega_one_are_the_models_own_logits(family, side):
    model = make_model(family)
    tokens = make_tokens(side)
    with torch.no_grad():
        logits = model(input_ids=tokens[0], attention_mask=tokens[1]).logits.squeeze(-1)
    assert logits.std() > 0.01, "logits too alike to tell the positions apart"
    assert torch.allclose(rewards_at_omega_one(model, *tokens), logits, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_response_that_ends_in_the_padding_token_is_scored_where_transformers_scores_it(side):
    model = make_model("qwen2")
    input_ids, attention_mask = make_tokens(side)
    last = max(LENGTHS) - 1 if side == "left" else LENGTHS[1] - 1
    input_ids[1, last] = PAD
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)
        states = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    assert torch.allclose(rewards_at_omega_one(model, input_ids, attention_mask), logits, atol=1e-5)
    assert torch.allclose(reward_token_embeddings(model, input_ids, attention_mask)[1], states[1, last - 1], atol=1e-6)


def test_without_a_padding_token_one_response_is_scored_at_its_last_token_and_several_are_refused():
    model = make_model("llama", pad_token_id=None)
    input_ids, attention_mask = torch.tensor([[5, 6, PAD]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)
    assert torch.allclose(rewards_at_omega_one(model, input_ids, attention_mask), logits, atol=1e-5)
    with pytest.raises(ConfigError, match="pad_token_id"):
        reward_token_embeddings(model, input_ids.repeat(2, 1), attention_mask.repeat(2, 1))


def test_a_model_with_several_labels_has_no_scoring_head():
    with pytest.raises(ConfigError, match="num_labels = 2"):
        scoring_head(make_model("llama", num_labels=2))
