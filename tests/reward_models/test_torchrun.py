"""`torchrun ... r2m reward-model train | resume`: two gloo processes make the run that one process makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.reward_models.training import train
from r2m_async.runs.checkpoints import checkpoints
from r2m_async.runs.records import read_metrics

pytestmark = pytest.mark.models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(reward_model_config):
    config = reward_model_config.optimizer(epochs=2, tokens_per_microbatch=60).loss(bsr="squared_mean", bsr_weight=5.0)
    return config.checkpoint(every=2).evaluation(every=3).logging(live=False)


def by_two_processes(*arguments):
    """What `r2m reward-model` prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "r2m_async.cli", "reward-model", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def weights_of(model):
    tensors = load_file(model / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_training(run, alone, start):
    """The same files; weights, metrics and evaluations that differ by the order of sums and what comes of it."""
    assert sorted(path.name for path in run.rglob("*")) == sorted(path.name for path in alone.rglob("*"))
    trained, expected = (weights_of(path / "seed-1" / "model") for path in (run, alone))
    assert (trained - expected).norm() < 0.05 * (expected - start).norm()
    for name, keys in (
        ("metrics", ("loss", "loss/bsr", "gradient_norm", "held_out/accuracy")),
        ("evaluation", ("held_out/accuracy", "training/norm_mean", "held_out/difference_norm")),
    ):
        own, others = (read_metrics(path / "seed-1" / f"{name}.jsonl") for path in (run, alone))
        assert [one["step"] for one in own] == [one["step"] for one in others]
        for key in keys:
            values = [[one.get(key, 0.0) for one in records] for records in (own, others)]
            assert values[0] == pytest.approx(values[1], rel=0.05, abs=0.01), key


def test_two_processes_train_into_one_run_as_one_process_does(config, tmp_path):
    alone = train(config.run(name="alone"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    printed = by_two_processes("train", tmp_path / "config.yaml")
    [run] = alone.parent.glob("reward-model-*")
    assert [line for line in printed if line.startswith("run directory")] == [f"run directory: {run}"]
    assert sum(line.startswith("step 3/") for line in printed) == 1
    assert_same_training(run, alone, start_of(config))


def test_two_processes_go_on_with_what_one_left(config, monkeypatch):
    alone = train(config.run(name="alone"))
    step = RewardTrainer.step

    def killed(self):
        if self.steps_done == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(RewardTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    [run] = alone.parent.glob("reward-model-*")
    assert [path.name for path in checkpoints(run / "seed-1")] == ["step-000004"]
    assert by_two_processes("resume", run)[-1] == f"run directory: {run}"
    assert (
        len((run / "seed-1" / "metrics.jsonl").read_text().splitlines())
        == len(read_metrics(alone / "seed-1" / "metrics.jsonl")) + 1
    )
    assert_same_training(run, alone, start_of(config))


def start_of(config):
    from r2m_async.reward_models.trainee import RewardTrainee

    trainee = RewardTrainee(config.model.start, config)
    trainee.save(Path(config.run.output_dir) / ".start")
    return weights_of(Path(config.run.output_dir) / ".start")
