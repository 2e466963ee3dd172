"""`r2m resume` and `r2m train --resume-if-exists`: the same bits, no gap, no double, and nothing guessed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r2m_async import codec
from r2m_async.cli import main
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, DataError, NoRoom, StageLost, StalledRun
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.launch.training import resume, train
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.directory import newest_directory
from r2m_async.runs.records import read_records
from r2m_async.whole import only_writer

pytestmark = pytest.mark.ring

STEPS = 5
TIMED = (
    "time/",
    "idle/",
    "throughput/",
    "weights/",
    "queue/",
    "ledger/admitted",
    "restarts/",
    "journal/",
    "wait/",
    "length/trained_over_generated",
)
"""Metrics that a clock decides, or how far the rollouts are ahead."""


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    """Exact, with ages, evaluations and a checkpoint after every step."""
    config = tiny_config.run(num_steps=STEPS, output_dir=str(tmp_path_factory.mktemp("runs")))
    config = config.scheduling(max_policy_age=2, max_head_age=1, lag="exact")
    return config.checkpoint(every=1, keep=STEPS).evaluation(every=2, num_prompts=2)


@pytest.fixture(scope="module")
def finished(config):
    """A run that nothing disturbed."""
    with one_thread():
        return train(config, in_process=True)


@pytest.fixture
def ended_early(finished, tmp_path):
    """`ended_early(step)`: a copy of the run as if it had died after this checkpoint, with all that it had recorded."""

    def copy(step: int) -> Path:
        run = tmp_path / f"run-{step}"
        shutil.copytree(finished, run)
        for checkpoint in checkpoints(run)[step:]:
            shutil.rmtree(checkpoint)
        return run

    return copy


def resumed(run, *overrides):
    with one_thread():
        return resume(run, list(overrides), in_process=True)


def untimed(run, name):
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED)}
        for record in read_records(run / name)
    ]


def learners(run):
    """The bytes of both learners' states at the end."""
    end = checkpoint_path(run, STEPS)
    return [(end / f"{name}_learner.msgpack").read_bytes() for name in ("policy", "head")]


def damage(checkpoint):
    file = checkpoint / "head_learner.msgpack"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resumed_after_any_step_a_run_ends_with_the_bits_and_the_records_of_one_that_nothing_disturbed(
    finished, ended_early, step, capsys
):
    run = resumed(ended_early(step))
    assert learners(run) == learners(finished)
    for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl"):
        assert untimed(run, name) == untimed(finished, name), name
    said = capsys.readouterr().out
    assert f"groups: {2 * step} in {step} steps, each once: {2 * step} trained" in said
    assert f"prompts: epoch 1 has dealt {2 * step} of 40, each once; the other {40 - 2 * step} follow" in said


def test_times_in_metrics_and_trace_go_on_where_the_checkpoint_was_saved(finished, ended_early):
    run = resumed(ended_early(3))
    ends = [interval["end"] for interval in read_records(run / "trace.jsonl") if interval["method"] == "train"]
    assert len(ends) == STEPS and ends == sorted(ends)
    seconds = [record["time/since_start"] for record in read_records(run / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[:3] == [record["time/since_start"] for record in read_records(finished / "metrics.jsonl")][:3]


def test_tensorboard_shows_each_step_once(ended_early):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = resumed(ended_early(3))
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4, 5]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(finished, ended_early, capsys):
    run = ended_early(4)
    damage(checkpoint_path(run, 4))
    resumed(run)
    said = capsys.readouterr().out
    assert "a checkpoint is passed over: " in said and "step-000004/head_learner.msgpack: is damaged" in said
    assert "after step 3" in said
    assert learners(run) == learners(finished)
    damage(checkpoint_path(run, 4))


def test_behind_a_damaged_checkpoint_the_new_ones_are_kept(config, ended_early):
    run = ended_early(4)
    damage(checkpoint_path(run, 4))
    damage(checkpoint_path(run, 3))
    resumed(run, "run.num_steps=3", "head.omega_horizon=5", "checkpoint.keep=1")
    assert checkpoint_path(run, 3) in checkpoints(run)
    resumed(run, "run.num_steps=5", "head.omega_horizon=5")
    assert checkpoints(run) == [checkpoint_path(run, 5)]


def test_without_a_whole_checkpoint_every_damage_is_named(ended_early):
    run = ended_early(2)
    for step in (1, 2):
        damage(checkpoint_path(run, step))
    with pytest.raises(ConfigError, match=r"(?s)none of its checkpoints is whole.*step-000002/head.*step-000001/head"):
        resumed(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
        resumed(run)


def test_records_that_were_lost_are_missed_and_nothing_is_cut(ended_early):
    run = ended_early(2)
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "evaluation.jsonl").write_text("")
    with pytest.raises(DataError, match=r"evaluation\.jsonl: has 0 bytes, and had \d+ when the checkpoint of step 2"):
        resumed(run)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "trace.jsonl"):
        (run / name).unlink()
    resumed(run)
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [3, 4, 5]


def test_what_may_not_change_is_refused_with_both_values_before_anything_starts(ended_early):
    run = ended_early(2)
    before = (run / "config.yaml").read_text()
    for key, value, complaint in (
        ("rollouts.temperature", 0.5, r"rollouts\.temperature = 1\.0, and the config has 0\.5"),
        ("run.name", "other", "run.name is 'other' and was 'r2m'"),
        ("run.output_dir", "elsewhere", "run.output_dir is 'elsewhere' and was "),
    ):
        with pytest.raises(ConfigError, match=complaint):
            resumed(run, f"{key}={value}")
    assert (run / "config.yaml").read_text() == before and not (run / "resumes.jsonl").exists()


def test_a_changed_key_is_kept_and_noted(ended_early):
    run = ended_early(2)
    resumed(run, "learner.lr=5e-4")
    assert "lr: 0.0005" in (run / "config.yaml").read_text()
    [record] = read_records(run / "resumes.jsonl")
    assert record["step"] == 2 and record["changed"] == {"learner.lr": [1e-3, 5e-4]}


def test_other_prompts_are_refused(config, prompts_file, ended_early, tmp_path):
    run, kept = ended_early(2), Path(prompts_file).read_text()
    lines = [f"{line}\n" for line in kept.splitlines()]
    for changed, complaint in (
        (lines[1:], r"there were 40 of them then and there are 39 now"),
        (lines[1:] + lines[:1], r"as many as then, 40, but others or in another order"),
    ):
        Path(prompts_file).write_text("".join(changed))
        try:
            with pytest.raises(ConfigError, match=complaint):
                resumed(run)
        finally:
            Path(prompts_file).write_text(kept)


@pytest.mark.parametrize("key", ["reward.model", "model.reference"])
def test_other_weights_of_a_frozen_model_are_refused(config, ended_early, key):
    """Only a byte of one weight is another: the file has the size and the header that it had."""
    run, name = ended_early(2), config.reward.model if key == "reward.model" else config.model.policy
    path = Path(name, "model.safetensors")
    kept = path.read_bytes()
    path.write_bytes(kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:])
    try:
        with pytest.raises(ConfigError, match=rf"was saved with other weights of {key} '{name}'"):
            resumed(run)
    finally:
        path.write_bytes(kept)


def test_a_finished_run_is_left_as_it_is_and_goes_on_when_its_end_is_moved(finished, ended_early, capsys):
    run = ended_early(STEPS)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".jsonl", ".yaml")}
    resumed(run)
    assert "is finished after 5 steps; to go on, raise run.num_steps" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".jsonl", ".yaml")}
    with pytest.raises(ConfigError, match=r"head\.omega_horizon"):
        resumed(run, "run.num_steps=6")
    resumed(run, "run.num_steps=6", "head.omega_horizon=5")
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_kl_stop_ended_stays_ended_until_it_is_raised(config, tmp_path):
    config = config.run(output_dir=str(tmp_path)).objective(kl_stop=1e-9).evaluation(every=None)
    with one_thread():
        run = train(config, in_process=True)
    stopped = len(read_records(run / "metrics.jsonl"))
    assert stopped < STEPS
    resumed(run)
    assert len(read_records(run / "metrics.jsonl")) == stopped
    resumed(run, "objective.kl_stop=1e9")
    assert len(read_records(run / "metrics.jsonl")) == STEPS


def test_two_processes_do_not_write_into_one_run(ended_early):
    run = ended_early(2)
    with only_writer(run) as alone:
        assert alone
        with pytest.raises(ConfigError, match="another process writes into this run"):
            resumed(run)


def test_a_checkpoint_or_another_folder_in_place_of_a_run_is_told(ended_early, tmp_path):
    run = ended_early(2)
    with pytest.raises(ConfigError, match=f"is a checkpoint; name its run: {run}"):
        resume(checkpoint_path(run, 2))
    with pytest.raises(ConfigError, match="is no run directory: it has no config.yaml"):
        resume(tmp_path)


def test_a_checkpoint_without_counts_is_of_an_older_version(ended_early):
    run = ended_early(2)
    for checkpoint in checkpoints(run):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["files"]["progress.msgpack"]
        (checkpoint / "progress.msgpack").unlink()
        from r2m_async.runs.checkpoints import _manifest

        (checkpoint / "manifest.json").write_bytes(_manifest(manifest["files"]))
    with pytest.raises(ConfigError, match="has no progress.msgpack: an older version of r2m-async wrote it"):
        resumed(run)


# Stages that are lost, in the same job


@pytest.fixture
def struck(monkeypatch):
    """`struck(victims)`: rings that lose stages to kill -9: [(step, name of the stage), ...], once that step is taken."""

    def strike(victims: list[tuple[int, str]]) -> list[Ring]:
        rings, left = [], list(victims)

        class Struck(Ring):
            def step(self):
                if not rings or rings[-1] is not self:
                    rings.append(self)
                metrics = super().step()
                if left and left[0][0] == metrics["step"]:
                    os.kill(self.process_ids()[left.pop(0)[1]][0], signal.SIGKILL)
                return metrics

        monkeypatch.setattr(training, "Ring", Struck)
        return rings

    return strike


@pytest.mark.usefixtures("ray_session")
def test_whatever_stage_is_killed_the_ring_is_built_anew_and_ends_with_the_same_bits(
    config, finished, struck, tmp_path, capsys
):
    victims = [(2, "policy-learner"), (2, "head-learner"), (3, "queue"), (4, "annotator-0")]
    rings = struck(victims)
    run = train(config.run(output_dir=str(tmp_path)))
    assert learners(run) == learners(finished)
    assert untimed(run, "metrics.jsonl") == untimed(finished, "metrics.jsonl")
    assert untimed(run, "evaluation.jsonl") == untimed(finished, "evaluation.jsonl")
    assert len(rings) == 3, "queue and annotator are restarted by themselves"
    causes = [record["because"] for record in read_records(run / "resumes.jsonl")]
    assert all(f"{name} was lost" in cause for (_, name), cause in zip(victims[:2], causes, strict=True)), causes
    last = read_records(run / "metrics.jsonl")[-1]
    assert (last["restarts/ring"], last["restarts/queue"], last["restarts/annotators"]) == (2, 1, 1)
    assert "the ring is built anew from " in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_a_ring_that_comes_no_further_is_built_anew_max_restarts_times(config, struck, tmp_path, monkeypatch):
    config = config.run(output_dir=str(tmp_path), max_restarts=1).checkpoint(every=2)

    def lost(self):
        raise StageLost("queue", "queue was lost")

    rings = []
    step = Ring.step

    def steps_twice(self):
        if self not in rings:
            rings.append(self)
        return lost(self) if self.controller.schedule.policy_version == 2 else step(self)

    monkeypatch.setattr(Ring, "step", steps_twice)
    with one_thread(), pytest.raises(StageLost) as raised:
        train(config, in_process=True)
    assert len(rings) == 2
    assert "run.max_restarts is 1: the ring is not built anew." in raised.value.__notes__
    rings.clear()
    with one_thread(), pytest.raises(StageLost):
        train(config.checkpoint(every=None), in_process=True)
    assert len(rings) == 1, "there is nothing to go on from"


@pytest.mark.usefixtures("ray_session")
def test_the_ray_of_a_job_stays_unless_it_may_be_what_has_failed_and_so_does_the_number_of_gpus(
    ended_early, monkeypatch
):
    gpus, rays = [4.0, 2.0, 2.0], []

    class Connection(training.RayConnection):
        def __init__(self, config):
            super().__init__(config)
            self.num_gpus = gpus.pop(0)

    errors = [StageLost("queue", "queue was lost"), StageLost(None, "a payload was lost"), StalledRun("nothing moves")]

    def one_ring(self, start, restarts, ray, trackers):
        rays.append(ray)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(training, "RayConnection", Connection)
    monkeypatch.setattr(training._Run, "_one_ring", one_ring)
    resume(ended_early(2))
    assert rays[0] is rays[1] and len({id(ray) for ray in rays}) == 3 and not gpus
    assert {ray.num_gpus for ray in rays} == {4.0}


def test_no_room_is_a_mistake_at_first_and_a_loss_when_the_ring_is_built_anew(config, tmp_path, monkeypatch):
    config = config.run(output_dir=str(tmp_path), max_restarts=1)
    begin, step, told = Ring.__init__, Ring.step, []

    def begins(self, *arguments, **how):
        told.append("began")
        if len(told) != 2:
            raise NoRoom("cluster.stable has no room")
        begin(self, *arguments, **how)

    def loses(self):
        if self.controller.schedule.policy_version == 2:
            raise StageLost("queue", "queue was lost")
        return step(self)

    monkeypatch.setattr(Ring, "__init__", begins)
    monkeypatch.setattr(Ring, "step", loses)
    with one_thread():
        with pytest.raises(ConfigError, match="no room"):
            train(config, in_process=True)
        with pytest.raises(StageLost, match="no room") as raised:
            train(config, in_process=True)
    assert len(told) == 3 and "run.max_restarts is 1: the ring is not built anew." in raised.value.__notes__


def test_a_retried_job_goes_on_with_the_run_of_its_name_or_begins_one(config, tmp_path, capsys):
    config = config.run(name="job", output_dir=str(tmp_path), num_steps=2).evaluation(every=None)
    with one_thread():
        first = train(config, in_process=True, resume_if_exists=True)
        assert train(config, in_process=True, resume_if_exists=True) == first
        assert "is finished after 2 steps" in capsys.readouterr().out
        longer = config.run(num_steps=3).head(omega_horizon=2)
        assert train(longer, in_process=True, resume_if_exists=True) == first
        assert len(read_records(first / "metrics.jsonl")) == 3
        shutil.rmtree(first / "checkpoints")
        second = train(config, in_process=True, resume_if_exists=True)
    assert second != first and "has no checkpoint: a new run begins" in capsys.readouterr().out
    assert newest_directory(str(tmp_path), "job") == second
    assert newest_directory(str(tmp_path), "jo") is None


def test_from_the_command_line_a_killed_run_is_resumed_to_the_bits_of_an_undisturbed_one(config, finished, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config.run(output_dir=str(tmp_path)).to_yaml())
    command = [sys.executable, "-m", "r2m_async.cli", "train", str(path), "--in-process", "--resume-if-exists"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (runs := list(tmp_path.glob("r2m-*/checkpoints/step-000002"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = {one.parent.parent for one in runs}
    assert main(["resume", str(run), "--in-process"]) == 0
    assert untimed(run, "metrics.jsonl") == untimed(finished, "metrics.jsonl")
    for name in ("policy", "head"):
        mine, theirs = (
            codec.decode((checkpoint_path(one, STEPS) / f"{name}_weights_5.msgpack").read_bytes())
            for one in (run, finished)
        )
        assert all(bool((mine.tensors[key] == theirs.tensors[key]).all()) for key in theirs.tensors)


def test_in_the_same_job_too_a_damaged_checkpoint_is_named_and_without_a_whole_one_the_loss_is_what_is_told(
    config, tmp_path, monkeypatch, capsys
):
    config = config.run(output_dir=str(tmp_path), max_restarts=1)
    step, hurt = Ring.step, []

    def loses_the_queue(self):
        at = self.controller.schedule.policy_version
        if at == 3 and len(hurt) < 2:
            (run,) = tmp_path.iterdir()
            for checkpoint in checkpoints(run)[2:] if not hurt else checkpoints(run):
                damage(checkpoint)
            hurt.append(at)
            raise StageLost("queue", "queue was lost")
        return step(self)

    monkeypatch.setattr(Ring, "step", loses_the_queue)
    with one_thread(), pytest.raises(StageLost, match="queue was lost") as raised:
        train(config, in_process=True)
    said = capsys.readouterr().out
    assert "a checkpoint is passed over: " in said and "step-000003/head_learner.msgpack: is damaged" in said
    assert "the ring is built anew from " in said and "step-000002" in said
    assert any("none of its checkpoints is whole" in note for note in raised.value.__notes__)
