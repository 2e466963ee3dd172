"""What training records of the states of pairs is what one text at a time gives, and a run has it from before its first step."""

import json
import math
import shutil
import statistics

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from r2m_async.models.reward import two_layer_head
from r2m_async.reward_models.preferences import load_preference_data, tokenized
from r2m_async.reward_models.trainee import RewardTrainee
from r2m_async.reward_models.trainer import NUM_SAMPLED, RewardTrainer
from r2m_async.reward_models.training import train
from r2m_async.reward_models.training_states import head_norm, pair_states
from r2m_async.runs.records import read_metrics

pytestmark = pytest.mark.models


@pytest.fixture
def spread_config(reward_model_config, tmp_path):
    """Its start's last norm has weights that differ. A tiny model's are all 1, so are the norms of its states alike."""
    start = tmp_path / "start"
    shutil.copytree(reward_model_config.model.start, start)
    model = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.1, 3, model.config.hidden_size))
    model.save_pretrained(start)
    return reward_model_config.model(start=str(start))


@pytest.mark.parametrize("layers", [1, 2])
def test_pair_states_are_those_of_one_text_at_a_time(spread_config, layers):
    config = spread_config.head(layers=layers, width=24)
    model = RewardTrainee(config.model.start, config)
    texts = load_preference_data(config).held_out
    pairs = [tokenized(pair, model.tokenizer, config.data.max_tokens) for pair in texts]
    found = pair_states(model, pairs, max_tokens=80)
    backbone = AutoModelForCausalLM.from_pretrained(config.model.start).model
    norms, rewards, differences = [], [], []
    with torch.no_grad():
        for pair in pairs:
            states = [
                backbone(torch.tensor([text.token_ids])).last_hidden_state[0, -1]
                for text in (pair.chosen, pair.rejected)
            ]
            norms.append([math.sqrt(sum(x * x for x in state.tolist())) for state in states])
            rewards.append([model.classifier.score(state).item() for state in states])
            differences.append(math.dist(*(state.tolist() for state in states)))
    assert found.norms.T.tolist() == [pytest.approx(both, rel=1e-4) for both in norms]
    assert found.rewards.T.tolist() == [pytest.approx(both, abs=1e-4) for both in rewards]
    assert found.differences.tolist() == pytest.approx(differences, rel=1e-3)
    all_norms = [norm for both in norms for norm in both]
    assert statistics.pstdev(all_norms) > 0.03 * statistics.fmean(all_norms), "a spread far above rounding"
    assert found.record("seen") == pytest.approx(
        {
            "seen/accuracy": statistics.fmean(chosen > rejected for chosen, rejected in rewards),
            "seen/difference_norm": statistics.fmean(differences),
            "seen/difference_norm_std": statistics.pstdev(differences),
            "seen/norm_mean": statistics.fmean(all_norms),
            "seen/norm_std": statistics.pstdev(all_norms),
            "seen/norm_dispersion": statistics.pstdev(all_norms) / statistics.fmean(all_norms),
        },
        rel=1e-3,
    )


def test_the_norm_of_a_head_is_that_of_its_weights_without_biases():
    linear = nn.Linear(2, 1, bias=False)
    two = two_layer_head(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0]]))
        two[0].weight.copy_(torch.tensor([[1.0, 2.0], [2.0, 0.0]]))
        two[2].weight.copy_(torch.tensor([[4.0, 0.0]]))
        two[0].bias.fill_(7)
    assert head_norm(linear) == pytest.approx(5) and head_norm(two) == pytest.approx(5)


def test_a_run_evaluates_before_its_first_step_on_the_way_and_at_the_end(reward_model_config, monkeypatch):
    read = []
    once = RewardTrainee.rewards_and_states
    monkeypatch.setattr(
        RewardTrainee, "rewards_and_states", lambda self, texts: (read.append(len(texts)), once(self, texts))[1]
    )
    config = reward_model_config.evaluation(every=2).optimizer(epochs=1)
    run = train(config)
    data = load_preference_data(config)
    metrics, evaluations = (read_metrics(run / "seed-1" / f"{name}.jsonl") for name in ("metrics", "evaluation"))
    last = len(metrics)
    assert [one["step"] for one in evaluations] == sorted({0, *range(2, last, 2), last})
    assert sum(read) == len(evaluations) * 2 * (len(data.held_out) + min(NUM_SAMPLED, len(data.training)))
    for one in evaluations[1:]:
        assert metrics[one["step"] - 1]["held_out/accuracy"] == one["held_out/accuracy"]
    assert evaluations[-1]["held_out/difference_norm"] > 1.2 * evaluations[0]["held_out/difference_norm"]  # BSR Fig. 2
    start = RewardTrainee(config.model.start, config)
    assert evaluations[0]["head/weight_norm"] == head_norm(start.classifier.score)
    assert len({one["training/norm_mean"] for one in evaluations}) == len(evaluations)


def test_the_sample_of_training_pairs_is_the_runs_and_within_them(reward_model_config):
    data = load_preference_data(reward_model_config)
    samples = [RewardTrainer(reward_model_config, data, reward_model_config.model.start).sample for _ in range(2)]
    assert samples[0] == samples[1] and len(samples[0]) == len(data.training) < NUM_SAMPLED


def test_without_held_out_pairs_their_numbers_are_null(reward_model_config):
    run = train(reward_model_config.data(held_out=0.0).optimizer(epochs=0.2))
    for line in (run / "seed-1" / "evaluation.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["held_out/accuracy"] is None and record["held_out/norm_mean"] is None
        assert record["training/norm_mean"] > 0
