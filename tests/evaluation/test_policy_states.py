"""`r2m policy-states`: similarity, correlation and drift are what one text at a time, and a loop over pairs, gives."""

import itertools
import json
import math
import random
import shutil
import statistics

import pytest
import torch
from tiny import WORDS, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.evaluation.policy_states import PolicySources, policy_states
from r2m_async.evaluation.text_states import compared_texts
from r2m_async.export import export
from r2m_async.launch.ring import Ring
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.preferences import given_pairs
from r2m_async.runs.checkpoints import checkpoint_path

pytestmark = pytest.mark.models


def moved(source, directory, by):
    """A copy of the policy with noise on its weights."""
    shutil.copytree(source, directory)
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    model.save_pretrained(directory)
    return str(directory)


def texts_of(pairs_file, seed=0):
    return compared_texts(given_pairs(str(pairs_file), RewardModelConfig()), random.Random(f"{seed}/similarity"))


def states_of(policy, text, layer=slice(None)):
    """[L, D], of one text by itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    prompt, response, finished = text
    ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * finished
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, 0].mean(1)[layer]


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_similarity_and_correlation_are_those_of_a_loop_over_pairs_of_texts(tiny, pairs_file):
    policy, reward_model = tiny("qwen2", False), tiny("llama", True)
    results = policy_states(PolicySources(policy=policy, pairs=str(pairs_file), reward_model=reward_model))
    texts = texts_of(pairs_file)
    states = [states_of(policy, text) for text in texts]
    rewards = [RewardEnsemble(reward_model).score(prompt, [text], ended).item() for prompt, text, ended in texts]
    similarity, num = results["similarity"], len(texts) // 2
    assert (similarity["num_chosen"], len(similarity["same"]), results["num_texts_cut"]) == (num, 3, 0) and num == 48
    for layer in range(3):
        values = {True: [], False: []}
        for a, b in itertools.combinations(range(2 * num), 2):
            values[(a < num) == (b < num)].append((1 + cosine(states[a][layer], states[b][layer])) / 2)
        assert similarity["same"][layer] == pytest.approx(statistics.fmean(values[True]), abs=1e-5)
        assert similarity["cross"][layer] == pytest.approx(statistics.fmean(values[False]), abs=1e-5)
    pairs = list(itertools.combinations(range(2 * num), 2))
    alike = [(1 + cosine(states[a][2], states[b][2])) / 2 for a, b in pairs]  # 2 = round(30 / 32 x 2 layers)
    apart = [abs(rewards[a] - rewards[b]) for a, b in pairs]
    assert similarity["layer"] == 2
    assert similarity["correlation"] == pytest.approx(statistics.correlation(alike, apart), abs=1e-3)


def test_drift_is_of_the_same_texts_states_in_the_last_layer(tiny, pairs_file, tmp_path):
    policy = tiny("qwen2", False)
    later = [moved(policy, tmp_path / "a", 0.01), moved(policy, tmp_path / "b", 0.1), policy + "/."]
    drift = policy_states(PolicySources(policy=policy, pairs=str(pairs_file), later=tuple(later)))["drift"]
    assert drift["policies"] == [policy, *later]
    texts = texts_of(pairs_file)
    before, after = ([states_of(one, text, -1) for text in texts] for one in (policy, later[1]))
    assert drift["cosine"][0][2] == pytest.approx(statistics.fmean(map(cosine, before, after)), abs=1e-4)
    distances = [math.dist(a.tolist(), b.tolist()) / a.norm().item() for a, b in zip(before, after, strict=True)]
    assert drift["distance"][2] == pytest.approx(statistics.fmean(distances), rel=1e-3)
    assert drift["distance"][0] == drift["distance"][3] == 0 < drift["distance"][1] < drift["distance"][2]
    assert drift["cosine"][0][0] == pytest.approx(1) and drift["cosine"][1][2] == drift["cosine"][2][1]


def test_texts_that_are_too_long_keep_their_end_and_are_counted(tiny, pairs_file):
    policy = tiny("qwen2", False)
    lengths = sorted(
        len(AutoTokenizer.from_pretrained(policy)("".join(text[:2]))["input_ids"]) + text[2]
        for text in texts_of(pairs_file)
    )
    limit = lengths[len(lengths) // 2]
    results = policy_states(PolicySources(policy=policy, pairs=str(pairs_file), max_tokens=limit))
    assert results["num_texts_cut"] == sum(length > limit for length in lengths) > 0
    assert results["similarity"]["correlation"] is None and results["drift"] is None


def test_texts_that_are_longer_than_the_policys_positions_are_counted_and_compared_with_none(
    tiny, pairs_file, tmp_path
):
    policy, short = tiny("qwen2", False), tmp_path / "short"
    shutil.copytree(policy, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 6}
    (short / "config.json").write_text(json.dumps(config))
    results = policy_states(PolicySources(policy=str(short), pairs=str(pairs_file)))
    assert results["max_tokens"] == 6
    cut = policy_states(PolicySources(policy=policy, pairs=str(pairs_file), max_tokens=6))
    assert results["num_texts_cut"] == cut["num_texts_cut"] > 0
    assert results["similarity"]["same"] == cut["similarity"]["same"]
    with pytest.raises(ConfigError, match="has other tokens of the same texts"):
        policy_states(PolicySources(policy=policy, pairs=str(pairs_file), later=(str(short),)))


def test_an_export_is_read_with_its_own_reward_model_by_the_command(
    tiny_config, pairs_file, tmp_path, monkeypatch, capsys
):
    config = tiny_config.run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        ring.step()
        ring.save(checkpoint_path(tmp_path / "run", 1))
    export(tmp_path / "run", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    start = config.model.policy
    assert main(["policy-states", "out", "--pairs", str(pairs_file), "--later", start, "--seed", "2"]) == 0
    results = json.loads((tmp_path / "policy_states" / "out" / "results.json").read_text())
    sources = PolicySources(policy=str(tmp_path / "out" / "policy"), pairs=str(pairs_file), later=(start,), seed=2)
    by_parts = policy_states(sources)
    assert results["similarity"]["same"] == by_parts["similarity"]["same"] and results["reward_model"] == "out"
    assert results["drift"]["distance"] == by_parts["drift"]["distance"] and results["drift"]["distance"][1] > 0
    assert -1 <= results["similarity"]["correlation"] <= 1
    table = (tmp_path / "policy_states" / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out and f"| {start} |" in table
    assert (tmp_path / "policy_states" / "out" / "states.png").stat().st_size > 5000


def test_what_cannot_be_compared_is_refused(tiny, pairs_file, tmp_path):
    policy, pairs = tiny("qwen2", False), str(pairs_file)
    with pytest.raises(ConfigError, match="no pairs to read; give --pairs"):
        policy_states(PolicySources(policy=policy))
    with pytest.raises(ConfigError, match="policy: 'no/such-policy' cannot be loaded"):
        policy_states(PolicySources(policy="no/such-policy", pairs=pairs))
    wide = shutil.copytree(policy, tmp_path / "wide")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy, hidden_size=64)).save_pretrained(wide)
    with pytest.raises(ConfigError, match=r"--later .*: has states of another size than .*; name a policy that"):
        policy_states(PolicySources(policy=policy, pairs=pairs, later=(str(wide),)))
    other = save_tiny_model(tmp_path / "other", "llama", False, WORDS[:6], seed=5)
    with pytest.raises(ConfigError, match="has other tokens of the same texts than"):
        policy_states(PolicySources(policy=policy, pairs=pairs, later=(other,)))
