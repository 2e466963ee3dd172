"""`reward.model: null`: a run that trains on reward functions alone."""

import sys

import pytest
import torch
from rings import assert_same_bits, record_groups

from r2m_async import reference
from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.export import RewardScorer
from r2m_async.launch.gpus import gpu_share
from r2m_async.launch.ring import Ring


@pytest.fixture
def functions_only(tiny_config, monkeypatch):
    mine = type(sys)("mine")
    mine.words = lambda prompt, response: len(response.split())
    monkeypatch.setitem(sys.modules, "mine", mine)
    changes = {"model": None, "functions": {"words": {"function": "mine:words", "weight": 0.5}}}
    tree = tiny_config.to_dict()
    tree["head"] = {"variant": "vanilla"}
    return R2MConfig.from_dict(tree | {"reward": tree["reward"] | changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"head": {"variant": "r2m"}},
            r"reward\.model is null and head\.variant is 'r2m'.*use head\.variant 'vanilla'",
        ),
        ({"head": {"variant": "iterative_head"}}, r"head\.variant is 'iterative_head'"),
        ({"reward": {"functions": []}}, r"reward\.model is null and reward\.functions is empty"),
        ({"reward": {"clip": 2.0}}, r"reward\.clip is 2\.0 and reward\.model is null"),
        ({"reward": {"dtype": "bfloat16"}}, r"reward\.dtype is 'bfloat16' and reward\.model is null"),
    ],
)
def test_what_needs_a_reward_model_is_refused(changes, told):
    tree = {"reward": {"model": None, "functions": ["m:f"]}, "head": {"variant": "vanilla"}}
    R2MConfig.from_dict(tree)
    with pytest.raises(ConfigError, match=told):
        R2MConfig.from_dict({name: section | changes.get(name, {}) for name, section in tree.items()})


def test_an_annotator_without_a_model_needs_no_gpu():
    config = R2MConfig.from_dict({"reward": {"model": None, "functions": ["m:f"]}, "head": {"variant": "vanilla"}})
    assert gpu_share(config.run(device="cuda"), 2) == 1.0
    assert gpu_share(R2MConfig().run(device="cuda"), 2) == 0.5


@pytest.mark.models
def test_the_ring_is_the_reference_bit_for_bit_and_evaluates_by_the_functions(functions_only):
    config = functions_only.evaluation(every=2, num_prompts=2).run(num_steps=2)
    with Ring.of(config, in_process=True) as ring:
        seen, steps = record_groups(ring), []
        before = ring.policy_weights()
        while not ring.finished:
            steps.append(ring.step())
        first, _ = ring.drain()
        assert_same_bits(ring, reference.train(config), seen)
        after = ring.policy_weights()
    assert any(not torch.equal(before.tensors[name], tensor) for name, tensor in after.tensors.items())
    for step in steps:
        assert step["reward/mean"] == pytest.approx(0.5 * step["reward/words"])
        assert "reward/model_mean" not in step and "head/omega" not in step
    assert first["proxy"] == pytest.approx(0.5 * first["reward/words"])
    assert "frozen" not in first and first["proxy_se"] >= 0


@pytest.mark.models
def test_the_command_line_checks_trains_and_exports_the_policy_alone(functions_only, tmp_path, capsys):
    config = functions_only.run(num_steps=1, output_dir=str(tmp_path / "runs")).logging(tensorboard=False, live=False)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["check", str(tmp_path / "config.yaml")]) == 0
    assert "# queue: at most" in capsys.readouterr().out, "nothing was left unchecked"
    assert main(["train", str(tmp_path / "config.yaml"), "--in-process"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "reward.png").is_file()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "policy"]
    with pytest.raises(ConfigError, match="of a run without a reward model"):
        RewardScorer(tmp_path / "out", device="cpu")
