"""What a run leaves on disk and shows while it goes: files, TensorBoard events, plots, terminal output."""

import errno
import io
import json
import math
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from rich.console import Console
from run_records import EVALUATIONS, SAMPLES, step_metrics, trace

from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.errors import DataError, DiskError
from r2m_async.runs.directory import RunDirectory, new_directory, newest_directory
from r2m_async.runs.live import LiveTable
from r2m_async.runs.plots import (
    ages_figure,
    compare_runs,
    comparison_figure,
    loss_figure,
    plot_run,
    reward_figure,
    stages_figure,
)
from r2m_async.runs.records import append_records, binned, mean_curve, read_metrics, read_records, read_trace


def without_gold(metrics):
    return {key: value for key, value in metrics.items() if key != "reward/gold"}


# Files


def test_a_new_run_gets_its_own_directory_with_its_resolved_config(config, tmp_path):
    paths = {RunDirectory.create(config).path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == tmp_path and path.name.startswith("demo-") for path in paths)
    assert all(R2MConfig.from_yaml(path / "config.yaml") == config for path in paths)


@pytest.mark.parametrize("number", ["", "-3"])
def test_a_run_is_newer_than_those_before_it_also_if_the_clock_was_set_back_since(config, tmp_path, number):
    before = tmp_path / f"demo-29990101-000000{number}"
    before.mkdir()
    path = new_directory(str(tmp_path), "demo", config)
    assert newest_directory(str(tmp_path), "demo") == path != before


def test_each_step_is_on_disk_before_the_next_and_read_back_as_it_was(config):
    run = RunDirectory.create(config)
    for step in (1, 2):
        run.write_step(step_metrics(step))
        assert read_metrics(run.path / "metrics.jsonl") == [step_metrics(done) for done in range(1, step + 1)]


def test_nan_and_infinity_are_written_as_null_and_read_back_as_nan(config):
    run = RunDirectory.create(config)
    run.write_step({"step": 1.0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})
    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1.0, "a": None, "b": None, "c": None, "d": 0.5}
    [metrics] = read_metrics(run.path / "metrics.jsonl")
    assert math.isnan(metrics["a"]) and math.isnan(metrics["b"]) and metrics["d"] == 0.5


def test_evaluations_and_trace_are_given_whole_and_only_what_is_new_is_appended(config):
    run = RunDirectory.create(config)
    for known in (0, 1, 1, 2):
        run.write_evaluations(EVALUATIONS[:known], SAMPLES[: 2 * known])
    for first in (0, 3):
        run.write_trace(trace(2)[first : first + 3])
    assert read_records(run.path / "evaluation.jsonl") == EVALUATIONS
    assert read_records(run.path / "samples.jsonl") == SAMPLES
    records = read_records(run.path / "trace.jsonl")
    assert [record["method"] for record in records] == [one.method for one in trace(2)[:6]]
    assert records[0] == {"stage": "rollout-10", "method": "generate", "step": 0, "start": 0.0, "end": 1.9}


def test_a_partial_last_line_is_left_out_and_a_bad_line_elsewhere_is_named(config):
    path = RunDirectory.create(config).path / "metrics.jsonl"
    path.write_text('{"step": 1.0}\n{"step": 2.0, "rew')
    assert read_metrics(path) == [{"step": 1.0}]
    path.write_text('{"step": 1.0}\n{"step": 2.0, "rew\n{"step": 3.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is not JSON"):
        read_metrics(path)


def test_records_are_never_appended_to_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "resumes.jsonl"
    append_records(path, [{"step": 1.0}])
    with path.open("a") as file:
        file.write('{"step": 2.0, "at": "20')
    append_records(path, [{"step": 3.0}])
    append_records(path, [])
    assert read_records(path) == [{"step": 1.0}, {"step": 3.0}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json"])
def test_a_file_that_may_not_be_read_is_named_and_has_no_traceback(config, tmp_path, capsys, name, monkeypatch):
    run = RunDirectory.create(config).path
    (run / "status.json").write_text("{}")
    opens = Path.open

    def refused(path, *how, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(path, *how, **options)

    monkeypatch.setattr(Path, "open", refused)
    assert main(["watch", str(run), "--once"]) == 2
    assert f"{name}: cannot be read: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"step": 2.0, "a": "\xff"}', r"metrics\.jsonl:2: is not JSON \('utf-8' codec can't decode byte 0xff"),
        (b'{"steps": 2.0}', r"metrics\.jsonl:2: has None as 'step': it was changed"),
        (b'{"step": "two"}', r"metrics\.jsonl:2: has 'two' as 'step'"),
        (b'{"step": null}', r"metrics\.jsonl:2: has None as 'step'"),
        (b'{"step": 1e999}', r"metrics\.jsonl:2: has inf as 'step'"),
        (b"[" * 100_000, r"metrics\.jsonl:2: is not JSON"),
    ],
)
def test_a_line_of_metrics_that_was_damaged_is_named(tmp_path, line, complaint):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1.0}\n' + line + b'\n{"step": 3.0}\n')
    with pytest.raises(DataError, match=complaint):
        read_metrics(path)


def test_an_interval_without_its_end_is_named(tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"stage": "queue", "method": "put", "step": 1, "start": 0.5}\n')
    with pytest.raises(DataError, match=r"trace\.jsonl:1: has None as 'end'"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_resumed_run_cuts_off_a_partial_line_and_replaces_the_steps_it_repeats(config):
    run = RunDirectory.create(config)
    for step in (1, 2, 3, 4):
        run.write_step(step_metrics(step))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5.0, "rew')
    resumed = RunDirectory(run.path, config)
    resumed.write_step(step_metrics(3, **{"reward/mean": 9.0}))
    metrics = read_metrics(run.path / "metrics.jsonl")
    assert [(record["step"], record["reward/mean"]) for record in metrics] == [(1, 1 / 8), (2, 2 / 8), (3, 9.0)]


def test_tensorboard_reads_every_metric_at_its_step(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDirectory.create(config.logging(tensorboard=True)) as run:
        for step in (1, 2):
            run.write_step(step_metrics(step))
        events = EventAccumulator(str(run.path)).Reload()  # while the run still writes
    assert set(events.Tags()["scalars"]) == set(step_metrics(1))
    for key in step_metrics(1):
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert read == [(step, pytest.approx(step_metrics(step)[key])) for step in (1, 2)]


def test_without_tensorboard_no_event_file_is_written(finished_run):
    assert sorted(path.name for path in finished_run.iterdir()) == [
        "config.yaml",
        "evaluation.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "trace.jsonl",
    ]


# Plots


def assert_drawn(path):
    pixels = imread(path)[:, :, :3]
    height, width = pixels.shape[:2]
    assert width == 1200 and height > 250
    assert 0.01 < (pixels < 0.95).any(axis=2).mean() < 0.6


def lines(axes):
    """(x, y) by label of what is drawn in a panel."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_a_finished_run_gives_four_pictures(finished_run):
    paths = plot_run(finished_run)
    assert [path.name for path in paths] == ["reward.png", "ages.png", "loss.png", "stages.png"]
    for path in paths:
        assert_drawn(path)


@pytest.mark.parametrize(("metrics", "pictures"), [([], 0), ([{"step": 1.0}], 3)])
def test_a_run_that_has_hardly_begun_is_plotted_as_far_as_it_got(config, metrics, pictures):
    run = RunDirectory.create(config)
    for one in metrics:
        run.write_step(one)
    assert len(plot_run(run.path)) == pictures


def test_reward_is_drawn_against_step_and_kl_and_evaluations_at_the_kl_of_their_version():
    figure = reward_figure([step_metrics(step) for step in (1, 2, 3)], EVALUATIONS)
    proxy_by_step, proxy_by_kl, gold_by_step, gold_by_kl = figure.axes
    assert lines(proxy_by_step)["training rollouts"] == ([1, 2, 3], [1 / 8, 2 / 8, 3 / 8])
    assert lines(gold_by_step)["training rollouts"] == ([1, 2, 3], [1.75, 1.5, 1.25])
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in gold_by_kl.get_lines()]
    assert ([3, 6, 9], [1.75, 1.5, 1.25]) in drawn
    assert ([3, 9], [1.5, 1.25]) in drawn
    proxy, frozen = proxy_by_step.containers
    assert list(proxy.lines[0].get_ydata()) == [-1.0, 0.25] and list(frozen.lines[0].get_ydata()) == [-1.0, -0.5]
    low, high = proxy.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.45))
    assert "nats" in gold_by_kl.get_xlabel() and len(proxy_by_kl.containers) == 2


def test_without_gold_only_the_proxy_is_drawn():
    steps = [without_gold(step_metrics(step)) for step in (1, 2)]
    assert len(reward_figure(steps, []).axes) == 2
    assert len(comparison_figure({"a": [steps]}).axes) == 2


def test_each_reward_function_has_panels_of_its_own():
    steps = [{"step": 1.0, "reward/mean": 1.0, "reward/std": 0.0, "reward/right": 0.25, "reward/brief": 3.0}]
    panels = reward_figure(steps, [{"step": 0.0, "reward/right": 0.5}]).axes
    assert [panel.get_ylabel() for panel in panels[::2]] == ["proxy reward", "right", "brief"]
    assert [panel.lines[0].get_ydata().tolist() for panel in panels[::2]] == [[1.0], [0.25], [3.0]]
    assert len(panels[2].containers) == 1, "the evaluation's"


def test_ages_are_drawn_under_the_bounds_of_the_config(config):
    policy, head = ages_figure([step_metrics(step) for step in (1, 2)], config).axes
    assert lines(policy)["oldest group"] == ([1, 2], [1, 1]) and lines(policy)["mean over groups"] == (
        [1, 2],
        [0.5] * 2,
    )
    assert lines(policy)["scheduling.max_policy_age = 2"][1] == [2, 2]
    assert lines(head)["scheduling.max_head_age = 1"][1] == [1, 1] and policy.get_ylim()[1] > 2


def test_a_frozen_head_has_no_loss_panel_and_a_critic_has_two():
    steps = [step_metrics(step) for step in (1, 2)]
    frozen = [{key: value for key, value in step.items() if key != "head/loss"} for step in steps]
    assert [axes.get_ylabel() for axes in loss_figure(steps).axes] == [
        "policy loss",
        "head loss",
        "KL (nats per response)",
    ]
    with_critic = [step | {"critic/loss": 0.5, "critic/explained_variance": 0.1} for step in frozen]
    labels = [axes.get_ylabel() for axes in loss_figure(with_critic).axes]
    assert labels == ["policy loss", "critic loss", "explained variance", "KL (nats per response)"]
    policy, kl = loss_figure(frozen).axes
    assert list(policy.get_lines()[0].get_ydata()) == [-0.5, -1.0] and list(kl.get_lines()[0].get_ydata()) == [3, 6]


def test_the_gantt_chart_shows_the_last_steps_with_one_row_per_stage_in_the_order_of_the_flow():
    records = [
        {"stage": one.stage, "method": one.method, "step": one.step, "start": one.start, "end": one.end}
        for one in trace(6)
    ]
    [axes] = stages_figure(records, num_steps=2).axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["rollout-2", "rollout-10", "annotator-0: embed", "policy-learner: train", "annotator-0: evaluate"]
    assert axes.get_xlim() == (0, 4)  # steps 4 and 5 were trained from 10 s to 14 s

    def bars(row):
        drawn = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == rows.index(row)]
        return [(bar.get_x(), pytest.approx(bar.get_width()), to_hex(bar.get_facecolor())) for bar in drawn]

    (first_start, first_width, first), (second_start, second_width, second) = bars("policy-learner: train")
    assert (first_start, first_width, second_start, second_width) == (0, 2, 2, 2) and first != second
    assert bars("rollout-10") == [(0, 1.9, second)]  # generated step 5 while step 4 was trained
    assert [bar[2] for bar in bars("annotator-0: evaluate")] == ["#c8c8c8"]


def test_the_comparison_draws_every_seed_and_their_mean_over_the_steps_they_share():
    def seed(rewards):
        return [step_metrics(step, **{"reward/mean": reward}) for step, reward in enumerate(rewards, 1)]

    figure = comparison_figure({"vanilla": [seed([0, 2, 4]), seed([2, 4])], "R2M": [seed([5])]})
    by_step = figure.axes[0]
    assert lines(by_step)["vanilla"] == ([1, 2], [1, 3]) and lines(by_step)["R2M"] == ([1], [5])
    thin = [list(line.get_ydata()) for line in by_step.get_lines() if line.get_label().startswith("_")]
    assert thin == [[0, 2, 4], [2, 4], [5]]
    assert lines(figure.axes[1])["vanilla (2 seeds)"] == ([3, 3, 6, 6, 9], [0, 2, 2, 4, 4])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla (2 seeds)", "R2M (1 seed)"]


def test_curves_give_a_label_a_band_in_the_place_of_its_seeds_lines():
    seeds = [[step_metrics(step, **{"reward/mean": reward + step}) for step in (1, 2)] for reward in (0, 2)]
    known = {"step": [1, 2], "proxy": [2.0, 3.0], "proxy_half_width": [0.5, None], "gold": [1.0, 1.0]}
    curves = {"vanilla": known | {"gold_half_width": [0.25, 0.5]}}
    figure = comparison_figure({"vanilla": seeds, "R2M": seeds}, curves)
    proxy, gold = figure.axes[0], figure.axes[2]
    assert len([line for line in proxy.get_lines() if line.get_label().startswith("_")]) == len(seeds)
    for axes, (low, high) in ((proxy, (1.5, 2.5)), (gold, (0.5, 1.5))):
        (band,) = axes.collections
        drawn = band.get_paths()[0].vertices[:, 1]
        assert (drawn.min(), drawn.max()) == (low, high)
    many = {str(number): seeds for number in range(7)}
    assert not any(axes.collections for axes in comparison_figure(many, dict.fromkeys(many, curves["vanilla"])).axes)


def test_runs_are_compared_in_one_picture(finished_run, tmp_path):
    out = compare_runs({"vanilla": [finished_run], "R2M": [finished_run]}, tmp_path / "comparison.png")
    assert_drawn(out)


def test_bins_hold_equally_many_points_by_rising_x_without_nan():
    x, y = binned(np.array([4.0, 1, 3, 2, np.nan, 5]), np.array([40.0, 10, 30, 20, 0, np.nan]), num_bins=2)
    assert (x.tolist(), y.tolist()) == ([1.5, 3.5], [15, 35])
    assert binned(np.array([np.nan]), np.array([1.0]))[0].size == 0


def test_the_mean_of_curves_is_taken_where_all_of_them_are():
    x, y = mean_curve([(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])), (np.array([2.0, 3, 4]), np.array([4.0, 7, 0]))])
    assert (x.tolist(), y.tolist()) == ([2, 3], [3, 5])


# The terminal


def test_plain_output_is_one_line_per_step_notice_and_evaluation(config, capsys):
    with LiveTable(config) as table:
        for done in (1, 2, 3):
            table.message("building the policy", done, 3)
        table.update(step_metrics(1), EVALUATIONS[:1])
        table.update(step_metrics(2, **{"reward/mean": math.nan}), EVALUATIONS[:1])
        table.update({"step": 3.0}, EVALUATIONS[:1])
        table.update({}, EVALUATIONS)
    notice, first, evaluation, second, third, last = capsys.readouterr().out.splitlines()
    assert notice == "building the policy"
    expected = [
        "step 1/4",
        "proxy 0.125",
        "gold 1.750",
        "KL 3.00",
        "policy age mean 0.5",
        "rollouts 37%",
        "left 0:00:06",
    ]
    assert [part for part in expected if part not in first] == []
    assert evaluation == "evaluation of policy 0  proxy -1.000 ± 0.100  frozen -1.000 ± 0.100  gold 1.500 ± 0.000"
    assert second.startswith("step 2/4  proxy nan") and third == "step 3/4  left 0:00:02"
    assert last.startswith("evaluation of policy 2  proxy 0.250 ± 0.200")


def test_the_table_keeps_the_last_twelve_steps_and_cuts_no_number_in_80_columns(config):
    table = LiveTable(config.run(num_steps=40))
    for step in range(1, 21):
        idle = {f"idle/{kind}": 1.0 for kind in ("rollouts", "annotators", "policy_learner", "head_learner")}
        wide = {"reward/mean": -step - 0.125, "reward/gold": -step - 0.25, "throughput/responses_per_s": 1234.5}
        table.update(step_metrics(step, **idle, **wide), EVALUATIONS)
    output = io.StringIO()
    Console(file=output, width=80).print(table.render())
    shown = output.getvalue()
    assert "demo  step 20/40" in shown and "left 0:00:40" in shown and "evaluation of policy 2" in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == [str(step) for step in range(9, 21)]
    assert rows[-1] == ["20", "-20.125", "-20.250", "60.00", "0.5", "1", "0", "1234.5", "100%", "100%", "100%", "100%"]


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_gets_the_table_unless_logging_live_is_off(config, live, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reading, writing = os.openpty()
    received = bytearray()

    def drain():
        try:
            while data := os.read(reading, 4096):
                received.extend(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(writing, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with LiveTable(config.logging(live=live)) as table:
            table.message("building the policy", 1, 3)
            table.update(step_metrics(1), EVALUATIONS)
    reader.join(timeout=10)
    os.close(reading)
    shown = received.decode()
    assert ("\x1b[" in shown) == live and ("elapsed" in shown) == live
    assert "1.750" in shown and "37%" in shown and "evaluation of policy 2" in shown


@pytest.mark.models
@pytest.mark.parametrize("where", ["_draw", "remove_directory"])
def test_whatever_ends_a_run_after_its_ring_names_what_is_left(tiny_config, tmp_path, monkeypatch, where):
    from r2m_async.launch import training

    def fails(*_):
        raise DiskError("the disk is full")

    config = tiny_config.run(output_dir=str(tmp_path)).checkpoint(every=1, keep=1).logging(live=False)
    monkeypatch.setattr(training, where, fails)
    with pytest.raises(DiskError) as raised:
        training.train(config, in_process=True)
    (run,) = tmp_path.iterdir()
    assert raised.value.__notes__[0] == f"What was measured is in {run}."
    assert raised.value.__notes__[1].startswith(f"The last whole checkpoint is {run}/checkpoints/step-")
    assert len(raised.value.__notes__) == 2
