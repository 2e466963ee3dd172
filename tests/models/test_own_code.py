"""Python code that comes with a model is run where the user trusts it, and nowhere else."""

import json

import pytest
import torch
from own_code import with_own_code
from tiny import WORDS, save_tiny_model

from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.export import RewardScorer, export
from r2m_async.launch.training import train
from r2m_async.launch.workload import resolve
from r2m_async.runs.records import read_records

pytestmark = pytest.mark.ring


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(policy, the same as a plain Llama, reward model): the first and the last need their own code."""
    directory = tmp_path_factory.mktemp("own")
    plain = save_tiny_model(directory / "plain", "llama", False, WORDS, 2, width=64)
    reward = save_tiny_model(directory / "reward-plain", "llama", True, WORDS[::2], 1)
    return (
        with_own_code(plain, directory / "policy", tokenizer=True),
        plain,
        with_own_code(reward, directory / "reward"),
    )


@pytest.fixture
def config(own, tiny_config, tmp_path):
    """A ring with a critic, all of whose models bring code."""
    policy, _, reward = own
    return (
        tiny_config.run(output_dir=str(tmp_path / "runs"), num_steps=1)
        .model(policy=policy, trust_remote_code=True)
        .reward(model=reward, trust_remote_code=True)
        .advantage(name="gae")
        .objective(ratio="token")
        .learner(packing=True)
    )


@pytest.mark.parametrize(
    ("section", "key", "model"),
    [("model", "model.policy", "policy"), ("reward", "reward.model", "reward")],
)
def test_a_model_that_needs_its_code_is_refused_until_its_section_trusts_it(config, section, key, model, own):
    untrusting = getattr(config, section)(trust_remote_code=False)
    with pytest.raises(ConfigError, match=rf"{key}: .*{model}' .*auto_map.*set {section}.trust_remote_code true"):
        resolve(untrusting)
    assert resolve(config).notes == ()


def test_a_ring_of_models_with_code_trains_to_the_bits_of_the_same_models_without(config, own, tmp_path):
    runs = [train(one, in_process=True) for one in (config, config.model(policy=own[1]))]
    metrics = [read_records(run / "metrics.jsonl")[0] for run in runs]
    assert metrics[0]["policy/loss"] == metrics[1]["policy/loss"]
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        export(runs[0], tmp_path / "out")  # the config of a run may be somebody else's
    export(runs[0], tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out" / "policy" / "own.py").is_file()
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        RewardScorer(tmp_path / "out", "cpu")
    ours, theirs = (["the river :", [" warm", " cold"]] for _ in range(2))
    ours = RewardScorer(tmp_path / "out", "cpu", trust_remote_code=True).score(*ours)
    export(runs[1], tmp_path / "plain", trust_remote_code=True)
    theirs = RewardScorer(tmp_path / "plain", "cpu", trust_remote_code=True).score(*theirs)
    assert torch.equal(ours, theirs)


def test_every_command_that_takes_a_model_refuses_code_without_the_option(own, tmp_path, pairs_file, capsys):
    policy, _, reward = own
    prompts, pool, answers = tmp_path / "prompts.jsonl", tmp_path / "pool.jsonl", tmp_path / "answers.json"
    answers.write_text(json.dumps([{"instruction": "the river :", "output": " warm", "generator": "x"}]))
    prompts.write_text(json.dumps({"prompt": "the river :"}) + "\n")
    record = {"prompt": "the river :", "responses": [" warm", " cold"], "golds": [1.0, 0.0]}
    pool.write_text(json.dumps(record) + "\n")
    commands = {
        "generate": ["eval", "generate", policy, "--prompts", prompts, "--format", "pool", "--out", tmp_path / "new.jsonl",
                     "--engine", "transformers", "--max-new-tokens", 2],
        "bon": ["bon", reward, "--pool", pool, "--n", 2, "--out", tmp_path / "bon"],
        "states": ["policy-states", policy, "--pairs", pairs_file, "--out", tmp_path / "states"],
        "of rewards": ["policy-states", policy, "--pairs", pairs_file, "--reward-model", reward, "--out", tmp_path / "by"],
        "reward": ["reward-model", "eval", reward, "--pairs", pairs_file, "--out", tmp_path / "reward"],
        "judge": ["eval", "judge", answers, "--judge", reward, "--out", tmp_path / "judged"],
    }  # fmt: skip
    for name, command in commands.items():
        command = list(map(str, command))
        assert main(command) == 2, name
        assert "--trust-remote-code" in capsys.readouterr().err
        assert main([*command, "--trust-remote-code"]) == 0, (name, capsys.readouterr().err)


def test_a_reward_model_trains_from_a_model_with_code(own, reward_model_config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(reward_model_config.model(start=own[0]).loss(regularizer="sft").to_dict()))
    assert main(["reward-model", "train", str(path)]) == 2
    assert "model.start" in (told := capsys.readouterr().err) and "set model.trust_remote_code true" in told
    assert main(["reward-model", "train", str(path), "model.trust_remote_code=true"]) == 0


def test_code_that_is_not_run_because_transformers_has_the_architecture_is_told(config, own, tmp_path, tiny_config):
    copied = with_own_code(own[1], tmp_path / "copied")
    path = tmp_path / "copied" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    (note,) = resolve(tiny_config.model(policy=copied)).notes
    assert note.startswith("model.policy: the Python code") and "is not run" in note


def test_vllm_runs_a_policy_with_code_and_computes_what_the_learner_does(config, tmp_path):
    on_vllm = config.advantage(name="rloo").learner(packing=False).run(num_steps=2).rollouts(engine="vllm")
    records = read_records(train(on_vllm, in_process=True) / "metrics.jsonl")
    assert max(one["policy/mismatch_max"] for one in records) < 1e-4
