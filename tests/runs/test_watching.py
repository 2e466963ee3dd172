"""What a run shows of itself while it goes on, and what `r2m watch` shows of it: the same, read from its directory."""

import io
import json
import sys

import pytest
from rich.console import Console
from run_records import EVALUATIONS, step_metrics

from r2m_async.cli import main
from r2m_async.launch.training import train
from r2m_async.ring.status import RingStatus, StageStatus
from r2m_async.runs.directory import RunDirectory
from r2m_async.runs.live import QUIET_AFTER, LiveTable
from r2m_async.runs.progress import TrainingProgress
from r2m_async.runs.status import Status, read_status, write_status
from r2m_async.runs.view import NUM_STAGES, View, rendered
from r2m_async.runs.watching import SILENT_AFTER, Watched


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


def stage(name, does, seconds=0.0, others=0):
    return StageStatus(name=name, does=does, working=not does.startswith("wait"), seconds=seconds, others=others)


def ring(num_actors=2, **changes):
    stages = [stage(f"rollout-{number}", f"generate: group {number}", 7.25, 3) for number in range(num_actors)]
    stages += [stage("policy-learner", "waits for its next step", 1.5), stage("head-learner", "update: step 1", 0.5)]
    given = {"step": 2, "stages": tuple(stages), "driver": "a step's result", "driver_seconds": 12.0}
    return RingStatus(**given | {"actors": num_actors, "groups_in_flight": 5, "queue_bytes": 2**29} | changes)


def shown(view, height=60, width=80):
    output = io.StringIO()
    Console(file=output, width=width).print(rendered(view, height))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_a_view_says_what_each_stage_does_and_what_is_waited_for_in_80_columns(config):
    last = step_metrics(2, **{"wait/rollouts": 0.62, "wait/slowest_rollout": 1.0, "time/publish_stall": 0.0})
    last |= {"reward/model_mean": 0.5, "reward/brief": 0.25, "ledger/reissued": 3.0, "length/mean": 36.4}
    status = Status(seconds=61.0, ring=ring(evaluating=1, answered=3, to_answer=16))
    view = View(config=config.queue(max_bytes=2**30), steps=[last], evaluation=EVALUATIONS[1], status=status)
    text = "\n".join(shown(view))
    for expected in (
        "step 2/4",
        "elapsed 0:01:01  left 0:00:04",
        "rollout-0       generate: group 0 and 3 more",
        "7.2 s",
        "policy-learner  waits for its next step",
        "model 0.500  brief 0.250",
        "groups 0.62 s  publication 0.00 s  slowest: rollout 1",
        "issued again 3",
        "50% of 1024 MiB  5 groups in flight",
        "policy 1: 3 of 16 prompts answered",
        "2 of 1 rollout actors",
        "a step's result (12 s)",
        "evaluation of policy 2",
    ):
        assert expected in text, expected
    assert "given up" not in text and "nan" not in text, "what was not measured is left out"


def test_work_before_the_first_step_says_what_it_is_and_how_far(config):
    status = Status(busy_with="building: reward model", done=3, total=8, seconds=5.0)
    _, line = shown(View(config=config, steps=[], evaluation=None, status=status))
    assert line.startswith("building: reward model ") and line.rstrip().endswith("3 of 8")


def test_of_many_actors_the_first_are_listed_and_the_others_counted(config):
    view = View(config=config, steps=[], evaluation=None, status=Status(ring=ring(num_actors=64)))
    lines = [line.split() for line in shown(view)]
    listed = [line[0] for line in lines if line and line[0].startswith("rollout-")]
    assert listed == [f"rollout-{number}" for number in range(NUM_STAGES - 2)]
    assert ["54", "more", "54", "generate"] in lines
    assert any(line[:1] == ["head-learner"] for line in lines)


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_number(config, width):
    numbers = {"throughput/responses_per_s": 121.84, "idle/annotators": 1.0, "idle/policy_learner": 0.03}
    last = step_metrics(80, **numbers, **{"idle/head_learner": 0.95, "kl/sequence": 10.48})
    lines = shown(View(config=config, steps=[last], evaluation=None, status=Status()), width=width)
    whole = ["80", "10.000", "-18.000", "10.48", "0.5", "1", "0", "121.8", "37%", "100%", "3%", "95%"]
    row = lines[-1].split()
    assert row == whole[: len(row)] and len(row) == (12 if width >= 80 else len(row)) >= 6
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)


def test_a_column_that_nothing_was_measured_for_is_left_out(config):
    steps = [{"step": 1.0, "reward/mean": 0.5}, {"step": 2.0, "reward/mean": 0.5, "kl/sequence": 1.0}]
    *_, head, first, last = shown(View(config=config, steps=steps, evaluation=None, status=Status()))
    assert (head.split(), first.split(), last.split()) == (
        ["step", "proxy", "KL"],
        ["1", "0.500"],
        ["2", "0.500", "1.00"],
    )


def test_a_time_that_is_no_number_is_not_known(config):
    view = View(config=config, steps=[step_metrics(1, **{"time/step": float("nan")})], evaluation=None, status=Status())
    assert "left ?" in "\n".join(shown(view))


def test_a_low_terminal_shows_fewer_steps_and_never_none(config):
    steps = [step_metrics(step) for step in range(1, 13)]
    view = View(config=config, steps=steps, evaluation=None, status=Status(ring=ring()))
    assert len(shown(view, height=24)) <= 24
    assert [line.split()[0] for line in shown(view, height=5)[-3:]] == ["10", "11", "12"]


def test_a_run_leaves_its_status_while_it_goes_on_and_how_it_ended(config, tmp_path):
    with pytest.raises(ValueError), LiveTable(config.logging(live=False), clock := Clock()) as table:
        table.follow(tmp_path)
        table.message("building the policy", 1, 3)
        table.ring(ring())
        clock.now += 5
        table.tick()
        status = read_status(tmp_path)
        assert (status.busy_with, status.done, status.total, status.seconds) == ("building the policy", 1, 3, 5)
        assert status.ring == ring() and status.ended == ""
        raise ValueError("no such prompt")
    assert read_status(tmp_path).ended == "ValueError: no such prompt"


def test_plain_output_says_what_goes_on_after_a_minute_without_a_line(config, capsys):
    table = LiveTable(config.logging(live=False), clock := Clock())
    table.message("building the policy", 1, 3)
    clock.now += QUIET_AFTER - 1
    table.tick()
    assert capsys.readouterr().out == "building the policy\n"
    clock.now += 1
    table.tick()
    table.tick()
    assert capsys.readouterr().out == "after 0:01:00: building the policy (1 of 3)\n"
    table.update(step_metrics(1), [])
    table.ring(ring())
    clock.now += QUIET_AFTER
    table.tick()
    out = capsys.readouterr().out.splitlines()[-1]
    assert out == (
        "after 0:02:00: rollout-0 generate: group 0 and 3 more (7 s); rollout-1 generate: group 1 and 3 more (7 s); "
        "head-learner update: step 1 (0 s)"
    )


class Terminal(io.StringIO):
    """A file that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize(
    ("terminal", "kind", "plain"), [(True, "dumb", True), (False, "xterm", True), (True, "xterm", False)]
)
def test_where_nothing_can_be_redrawn_lines_are_plain(config, monkeypatch, terminal, kind, plain):
    """A terminal without a cursor, and a log that is to be coloured: rich draws on both as on any terminal."""
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", Terminal(terminal))
    table = LiveTable(config, Clock())
    table.message("building the policy")
    assert (sys.stdout.getvalue() == "building the policy\n") == plain
    assert (TrainingProgress(live=True)._progress is None) == plain


@pytest.fixture
def run(config):
    with RunDirectory.create(config) as run:
        for step in (1, 2):
            run.write_step(step_metrics(step))
        run.write_evaluations(EVALUATIONS, [])
    write_status(run.path, Status(ring=ring()))
    return run.path


def test_what_is_appended_is_seen_once_it_is_whole_and_what_is_cut_off_is_forgotten(run):
    watched = Watched(run)
    steps, evaluations = watched.look()
    assert [one["step"] for one in steps] == [1, 2] and len(evaluations) == 2
    assert watched.view().status.ring == ring() and not watched.ended and watched.life() == ""
    metrics = run / "metrics.jsonl"
    before = metrics.read_bytes()
    with metrics.open("a") as file:
        file.write('{"step": 3.0, "rew')
    assert watched.look() == ([], [])
    with metrics.open("a") as file:
        file.write('ard/mean": null}\n')
    assert [one["step"] for one in watched.look()[0]] == [3]
    assert [one["step"] for one in watched.view().steps] == [1, 2, 3]
    metrics.write_bytes(before)  # as a resumed run does
    watched.look()
    assert [one["step"] for one in watched.view().steps] == [1, 2]


def test_of_a_long_run_only_the_end_is_read(run, monkeypatch, capfd):
    monkeypatch.setattr("r2m_async.runs.watching._LAST_BYTES", 1000)
    (run / "metrics.jsonl").write_text("not JSON\n" + "".join(f'{{"step": {step}}}\n' for step in range(1, 1000)))
    steps, _ = (watched := Watched(run)).look()
    assert main(["watch", str(run), "--once", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["result"] == {
        "run_directory": str(run),
        "steps": 999,
        "metrics": {"step": 999},
    }
    assert 50 < len(steps) < 100 and steps[-1]["step"] == 999 and len(watched.view().steps) == 12


def test_a_run_that_says_nothing_more_is_told(run):
    watched = Watched(run, clock := Clock())
    watched.look()
    clock.now += SILENT_AFTER
    watched.look()
    assert "no sign of life for 15 s; the last was at 2" in watched.life()
    write_status(run, Status(ring=ring(step=3)))
    watched.look()
    assert watched.life() == ""


def test_the_command_shows_a_run_and_leaves_when_it_has_ended(run, capsys):
    assert main(["watch", str(run), "--once"]) == 0
    assert "rollout-0" in capsys.readouterr().out
    write_status(run, Status(ended="StageLost: the queue is gone"))
    assert main(["watch", str(run)]) == 0
    step, evaluation, end = capsys.readouterr().out.splitlines()
    assert step.startswith("step 2/4  proxy 0.250") and evaluation.startswith("evaluation of policy 2")
    assert end.startswith("ended at ") and end.endswith("StageLost: the queue is gone")
    (run / "status.json").unlink()
    assert main(["watch", str(run), "--once"]) == 0
    assert "has no status.json" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [('{"step": null}', "has None as 'step'"), ('{"step": 3, "reward/mean": "high"}', "has 'high' as 'reward/mean'")],
)
def test_a_metric_that_is_no_number_is_told_with_its_line(run, capsys, line, complaint):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert main(["watch", str(run), "--once"]) == 2
    assert f"metrics.jsonl, from byte 0:3: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["watch"], ["report"], ["resume"]])
def test_a_run_of_another_version_a_checkpoint_and_what_is_not_there_are_told(run, command, capsys):
    def told(path):
        assert main([*command, str(path)]) == 2
        return capsys.readouterr().err

    assert "nowhere: is not there" in told(run / "nowhere")
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert f"is a checkpoint; name its run: {run}" in told(checkpoint)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("run:\n", "run:\n  of_old: 3\n"))
    assert "run.of_old: no such key" in (said := told(run)) and "another version of r2m-async" in said


def test_a_damaged_status_and_a_directory_of_no_run_are_refused(run, tmp_path, capsys):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"seconds": "many"}))
    assert main(["watch", str(run)]) == 2
    assert "status.json: is no status of a run (seconds:" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is not there" in capsys.readouterr().err


@pytest.mark.models
def test_a_finished_run_has_a_status_and_a_report(tiny_config, tmp_path):
    config = tiny_config.run(num_steps=1, output_dir=str(tmp_path)).logging(tensorboard=False, live=False)
    run = train(config, in_process=True)
    status = read_status(run)
    assert status.ended == "finished" and status.ring is None
    assert (run / "report.html").stat().st_size > 1e6
