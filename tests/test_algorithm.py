"""R2M as an RLlib algorithm: training, checkpoints, callbacks, Tune. The examples of docs/rllib.md are these."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray import cloudpickle, tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback

from r2m_async import R2M
from r2m_async.codec import decode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, DataError
from r2m_async.launch.training import train
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.records import read_records


def test_importing_the_package_or_its_config_imports_neither_ray_nor_torch():
    script = "import r2m_async, r2m_async.config, sys; print([m for m in ('ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_key_that_tune_misspells_is_refused_with_the_nearest_one(tiny_config):
    space = tiny_config.to_dict()
    space["head"]["learning_rate"] = 1e-4
    with pytest.raises(ConfigError, match=r"head\.learning_rate: no such key"):
        R2M.default_resource_request(space)
    with pytest.raises(ConfigError, match=r"head\.alhpa: no such key; did you mean head\.alpha\?"):
        R2M(config={"head": {"alhpa": 1}})


def test_a_partial_dict_changes_only_what_it_names():
    config = R2M.get_default_config().update_from_dict({"head": {"lr": 0.5}, "__trial_info__": object()})
    config.update_from_dict({"head": {"alpha": 0.25}})
    assert config.r2m == R2MConfig().head(lr=0.5).head(alpha=0.25)
    assert R2M.get_default_config().update_from_dict(config.to_dict()).r2m == config.r2m


def test_what_only_the_data_can_tell_is_refused_when_the_algorithm_is_built(tiny_config, tmp_path):
    with pytest.raises((ConfigError, DataError), match=r"absent\.jsonl"):
        tiny_config.data(prompts=str(tmp_path / "absent.jsonl")).build_algo()


class Journal(RLlibCallback):
    """Writes what it is told into the result, and on loading into `run.output_dir`."""

    def on_algorithm_init(self, *, algorithm, metrics_logger=None, **kwargs):
        self.began_at = algorithm.training_iteration

    def on_train_result(self, *, algorithm, result, metrics_logger=None, **kwargs):
        result["journal"] = {"began_at": self.began_at, "iteration": algorithm.training_iteration}

    def on_checkpoint_loaded(self, *, algorithm, **kwargs):
        Path(algorithm.config.r2m.run.output_dir, "loaded").write_text(str(algorithm.training_iteration))


def trained_bits(algo, directory: Path) -> dict[str, bytes]:
    """Every tensor of both learners, weights and moments."""
    ring, bits = Path(algo.save_to_path(directory)) / "ring", {}
    for learner in ("policy_learner", "head_learner"):
        state = decode((ring / f"{learner}.msgpack").read_bytes())
        bits |= {f"{learner} {name}": tensor.numpy().tobytes() for name, tensor in state["weights"].tensors.items()}
        for index, moments in state["optimizer"].items():
            bits |= {f"{learner} {name} {index}": tensor.numpy().tobytes() for name, tensor in moments.items()}
    return bits


@pytest.mark.ring
def test_a_run_trains_reports_saves_and_goes_on_from_its_checkpoint_bit_for_bit(tiny_config, ray_session, tmp_path):
    config = tiny_config.run(num_steps=4).evaluation(every=2, num_prompts=2)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag="exact")

    algo = R2M(config=config, callbacks=Journal)
    try:
        assert isinstance(algo, Algorithm)
        results = [algo.train(), algo.train()]
        weights = algo.get_weights()
        checkpoint = algo.save_to_path(tmp_path / "after-2")
        saved = decode(Path(checkpoint, "ring", "policy_learner.msgpack").read_bytes())["weights"].tensors
        assert weights["policy"].keys() == saved.keys() and algo.get_weights(["head"]).keys() == {"head"}
        assert all(torch.equal(weights["policy"][name], tensor) for name, tensor in saved.items())
        results += [algo.train(), algo.train()]
        with pytest.raises(RuntimeError, match="ended at step 4"):
            algo.train()
        expected = trained_bits(algo, tmp_path / "uninterrupted")
    finally:
        algo.stop()

    assert [result["training_iteration"] for result in results] == [1, 2, 3, 4]
    assert [result["r2m"]["step"] for result in results] == [1, 2, 3, 4]
    assert [result["done"] for result in results] == [False, False, False, True]
    assert [result["journal"]["iteration"] for result in results] == [1, 2, 3, 4]
    for result in results:
        assert result["env_runners"]["episode_return_mean"] == result["r2m"]["reward/mean"]
        assert R2M.get_default_config().update_from_dict(result["config"]).r2m == config
    tokens = sum(result["r2m"]["length/trained_tokens"] for result in results)
    assert results[-1]["num_env_steps_sampled_lifetime"] == tokens
    assert results[-1]["env_runners"]["num_episodes_lifetime"] == 4 * 2 * 3
    assert results[-1]["evaluation"]["step"] == 4
    assert results[-1]["time_total_s"] >= sum(result["time_this_iter_s"] for result in results[1:])
    with pytest.raises(RuntimeError, match="was stopped"):
        algo.train()

    algo = R2M.from_checkpoint(tune.Checkpoint(checkpoint))  # or the path itself
    try:
        result = algo.train()
        assert result["training_iteration"] == 3 and result["r2m"]["step"] == 3
        assert result["journal"] == {"began_at": 0, "iteration": 3}
        assert result["num_env_steps_sampled_lifetime"] == results[2]["num_env_steps_sampled_lifetime"]
        assert algo.train()["done"]
        assert algo.evaluate() == results[-1]["evaluation"]
        assert trained_bits(algo, tmp_path / "resumed") == expected
    finally:
        algo.stop()


@pytest.mark.ring
def test_a_run_of_the_command_line_and_its_checkpoints_are_gone_on_with(tiny_config, ray_session, tmp_path):
    config = tiny_config.run(output_dir=str(tmp_path), num_steps=3).checkpoint(every=1, keep=3)
    run = train(config)
    shutil.rmtree(checkpoint_path(run, 3))
    records = read_records(run / "metrics.jsonl")
    for path, step in ((run, 2), (checkpoint_path(run, 1), 1)):
        algo = R2M.from_checkpoint(path)
        try:
            assert algo.training_iteration == step
            while not (result := algo.train())["done"]:
                pass
        finally:
            algo.stop()
        assert result["training_iteration"] == 3
        assert result["r2m"]["reward/mean"] == records[-1]["reward/mean"]
        assert result["env_runners"]["num_episodes_lifetime"] == 3 * 2 * 3
        assert result["num_env_steps_sampled_lifetime"] == sum(record["throughput/tokens"] for record in records)


@pytest.mark.ring
def test_a_checkpoint_is_replaced_as_a_whole_and_parts_of_two_are_refused(
    tiny_config, ray_session, tmp_path, monkeypatch
):
    place, before = tmp_path / "place", tmp_path / "before"
    algo = R2M(config=tiny_config)
    try:
        algo.train()
        algo.save_to_path(place)
        shutil.copytree(place, before)
        algo.train()
        with monkeypatch.context() as broken:  # after the ring's part, within RLlib's
            broken.setattr(R2M, "get_state", lambda self, **how: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                algo.save_to_path(place)
        assert digests(place) == digests(before) and sorted(path.name for path in tmp_path.iterdir()) == [
            "before",
            "place",
        ]
        algo.save_to_path(place)
        assert digests(place) != digests(before) and sorted(path.name for path in tmp_path.iterdir()) == [
            "before",
            "place",
        ]

        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        with pytest.raises(
            ConfigError, match=r"mine: holds thesis\.txt, which is no part of a checkpoint and would be lost"
        ):
            algo.save_to_path(tmp_path / "mine")
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

        mixed = shutil.copytree(place, tmp_path / "mixed")
        shutil.rmtree(mixed / "ring")
        shutil.copytree(before / "ring", mixed / "ring")
        (place / ".tune_metadata").write_text("as Tune does")
        for open_it in (R2M.from_checkpoint, algo.restore_from_path):
            with pytest.raises(
                ConfigError, match=rf"{mixed}/ring/manifest\.json: is damaged, or rather that of before"
            ):
                open_it(mixed)
        assert algo.training_iteration == 2
        (mixed / "class_and_ctor_args.pkl").write_bytes(b"nothing that may be unpickled")
        with pytest.raises(ConfigError, match=r"class_and_ctor_args\.pkl: is damaged"):
            R2M.from_checkpoint(mixed)
        algo.restore_from_path(place)
        assert algo.train()["r2m"]["step"] == 3
    finally:
        algo.stop()


@pytest.mark.ring
def test_finished_groups_are_taken_up_by_whoever_restores_their_checkpoint_and_by_nobody_else(
    tiny_config, ray_session, tmp_path
):
    config = tiny_config.run(num_steps=4).scheduling(lag="exact", max_policy_age=1, max_head_age=1)
    algo = R2M(config=config)
    kept = Path(algo.logdir) / "journals"
    try:
        algo.train()
        algo.save_to_path(tmp_path / "first")
        while not algo.train()["done"]:  # at the first of these steps its groups have arrived
            before = list(kept.iterdir())
        expected = trained_bits(algo, tmp_path / "undisturbed")
        assert len(before) == 1 and not kept.exists()
    finally:
        algo.stop()
    algo = R2M(config=config)
    kept = Path(algo.logdir) / "journals"
    try:
        algo.train()
        algo.save_to_path(tmp_path / "first")
        algo.train()
        other = R2M.from_checkpoint(tmp_path / "first")  # as PBT lets one trial go on from another's
        try:
            assert other.ring.controller.journal.recovered["taken"] >= 2
            while not other.train()["done"]:
                pass
            assert trained_bits(other, tmp_path / "others") == expected
        finally:
            other.stop()
        algo.restore_from_path(tmp_path / "first")
        assert algo.ring.controller.journal.recovered["taken"] >= 2
        algo.train()
        algo.save_to_path(tmp_path / "second")
        assert len(list(kept.iterdir())) == 1, "its first ring's are gone"
        algo.restore_from_path(tmp_path / "first")
        assert algo.ring.controller.journal.recovered == {"taken": 0, "left": {}, "damages": []}
        while not algo.train()["done"]:
            pass
        assert trained_bits(algo, tmp_path / "restored") == expected
    finally:
        algo.stop()


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.ring
def test_a_trial_needs_one_cpu_and_checkpoints_are_local_directories(tiny_config, ray_session):
    assert R2M.default_resource_request(tiny_config.to_dict()).bundles == [{"CPU": 1.0}]
    algo = tiny_config.build_algo()
    with pytest.raises(ConfigError, match="not local"):
        algo.save_to_path("s3://bucket/checkpoint")
    with pytest.raises(FileNotFoundError):
        algo.restore_from_path("absent")
    algo.stop()


class FailsOnce(Journal):
    """Lets the trial of the smaller learning rate die in its second step, the first time; notes that trial's steps."""

    def on_train_result(self, *, algorithm, result, **kwargs):
        super().on_train_result(algorithm=algorithm, result=result)
        if algorithm.config.r2m.head.lr != 1e-4:
            return
        steps = Path(algorithm.config.r2m.run.output_dir, "steps")
        before = steps.read_text().split() if steps.exists() else []
        steps.write_text(" ".join([*before, str(algorithm.training_iteration)]))
        if algorithm.training_iteration == 2 and "2" not in before:
            raise RuntimeError("as this test wants it")


@pytest.mark.ring
def test_tune_searches_a_section_and_a_failed_trial_goes_on_from_its_checkpoint(tiny_config, ray_session, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    space = tiny_config.run(output_dir=str(tmp_path)).to_dict()
    space["head"]["lr"] = tune.grid_search([1e-4, 1e-3])
    space["callbacks"] = FailsOnce
    tuner = tune.Tuner(
        R2M,
        param_space=space,
        tune_config=tune.TuneConfig(metric="env_runners/episode_return_mean", mode="max"),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    assert not results.errors
    assert [result.metrics["training_iteration"] for result in results] == [3, 3]
    assert {result.metrics["config"]["head"]["lr"] for result in results} == {1e-4, 1e-3}
    died = next(result for result in results if result.metrics["config"]["head"]["lr"] == 1e-4)
    assert (tmp_path / "steps").read_text() == "1 2 2 3"  # Tune's own table may lack rows from before the failure
    assert died.metrics["iterations_since_restore"] == 2
    assert (tmp_path / "loaded").read_text() == "1"
    best = results.get_best_result()
    returns = [result.metrics["env_runners"]["episode_return_mean"] for result in results]
    assert best.metrics["r2m"]["reward/mean"] == max(returns)
    assert (Path(best.checkpoint.path) / "ring" / "policy_learner.msgpack").is_file()
