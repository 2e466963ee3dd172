"""`r2m report`: one HTML file of a run or of several compared, offline, in which nothing that a model wrote is a program."""

import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import plotly.graph_objects as go
import pytest
from run_records import EVALUATIONS, SAMPLES, interval, step_metrics, trace

from r2m_async.cli import main
from r2m_async.runs.directory import RunDirectory
from r2m_async.runs.panels import MAX_BARS, MAX_POINTS, Run, sections
from r2m_async.runs.report import write_report
from r2m_async.runs.samples import read_samples

EVIL = "</script></pre><script>document.title = 'pwned'</script><img src='{url}' onerror=\"document.title = 'pwned'\">"


def records(intervals):
    return [{name: getattr(one, name) for name in one.__slots__} for one in intervals]


def run_of(config, label="demo", steps=None, **given):
    steps = [step_metrics(step) for step in range(1, 5)] if steps is None else steps
    return Run(
        path=None,
        label=label,
        config=config,
        steps=steps,
        evaluations=given.get("evaluations", EVALUATIONS),
        samples=given.get("samples", SAMPLES),
        trace=given.get("trace", records(trace(4))),
        resumes=[],
    )


def panels_of(*runs):
    """All panels of a report by title. plotly itself has checked every figure: it refuses what it does not know."""
    panels = {panel.title: panel for _, ones in sections(runs) for panel in ones}
    for panel in panels.values():
        if panel.figure is not None:
            go.Figure(json.loads(json.dumps(panel.figure, allow_nan=False)))
    return panels


def drawn(panel):
    """(x, y) of what a panel shows, by name."""
    return {one["name"]: (one["x"], one["y"]) for one in panel.figure["data"] if "meta" in one}


# Panels


def test_what_was_measured_is_drawn_as_it_was(config):
    panels = panels_of(run_of(config))
    assert drawn(panels["Gold reward"]) == {
        "training rollouts": ([1, 2, 3, 4], [1.75, 1.5, 1.25, 1.0]),
        "held-out": ([0, 2], [1.5, 1.25]),
    }
    proxy = panels["Proxy reward"].figure["data"][1]
    assert proxy["y"] == [-1.0, 0.25] and proxy["error_y"]["array"] == [0.1, 0.2]
    against_kl = drawn(panels["Gold reward against KL"])
    assert against_kl["training rollouts"] == ([3, 6, 9, 12], [1.75, 1.5, 1.25, 1.0])
    assert against_kl["held-out"] == ([3, 9], [1.5, 1.25]), "at the KL of the version that was evaluated"
    head = drawn(panels["Head against the frozen reward model, on held-out prompts"])
    assert head == {"present head": ([0, 2], [-1.0, 0.25]), "reward model as it came": ([0, 2], [-1.0, -0.5])}
    age = drawn(panels["Age of the policy"])
    assert age["scheduling.max_policy_age"] == ([1, 4], [2, 2]) and age["oldest group"][1] == [1] * 4


def test_a_metric_that_was_not_measured_is_named_and_not_drawn(config):
    steps = [{"step": float(step), "reward/mean": 0.5, "policy/loss": float("nan")} for step in (1, 2)]
    panels = panels_of(run_of(config, steps=steps, evaluations=[], trace=[]))
    assert drawn(panels["Proxy reward"]) == {"training rollouts": ([1, 2], [0.5, 0.5])}
    gold = panels["Gold reward"]
    assert gold.figure is None
    assert gold.notes == (
        "not measured: reward/gold (metrics.jsonl)",
        "not measured: gold (evaluation.jsonl)",
        "needs evaluation.gold",
    )
    assert panels["Policy loss"].figure is None, "NaN alone is no measurement"
    assert "trace.jsonl has no training step" in panels["Stages over the last steps of demo"].notes[0]
    shown = {title for title, panel in panels.items() if panel.figure is not None}
    assert shown == {"Proxy reward", "Age of the policy", "Age of the head"}
    assert not {"oldest group", "head that scored"} & (drawn(panels["Age of the policy"]).keys())


def test_held_out_rewards_are_joined_in_the_order_of_their_kl(config):
    steps = [step_metrics(step, **{"kl/sequence": 10.0 - step}) for step in range(1, 5)]
    gold = drawn(panels_of(run_of(config, steps=steps))["Gold reward against KL"])
    assert gold["held-out"] == ([7, 9], [1.25, 1.5])


@pytest.mark.parametrize(("value", "axis"), [(1.0, [0, 1.1]), (-2.0, [-2.2, 0]), (0.0, [-0.05, 1])])
def test_what_stays_the_same_is_drawn_between_zero_and_itself(config, value, axis):
    panel = panels_of(run_of(config, steps=[step_metrics(step, **{"policy/loss": value}) for step in (1, 2)]))
    assert panel["Policy loss"].figure["layout"]["yaxis"]["range"] == pytest.approx(axis)
    assert "range" not in panel["Gold reward"].figure["layout"]["yaxis"]


def test_a_gap_stays_a_gap(config):
    steps = [step_metrics(1), step_metrics(2, **{"reward/mean": float("inf")}), step_metrics(3)]
    assert drawn(panels_of(run_of(config, steps=steps))["Proxy reward"])["training rollouts"][1] == [1 / 8, None, 3 / 8]


def test_a_run_without_a_step_has_a_report(config):
    panels = panels_of(run_of(config, steps=[], evaluations=[], trace=[], samples=[]))
    assert all(panel.figure is None and panel.notes for panel in panels.values())


def test_a_long_run_is_thinned_and_says_so(config):
    steps = [step_metrics(step, **{"reward/mean": float(step % 2)}) for step in range(1, 2 * MAX_POINTS + 2)]
    proxy = panels_of(run_of(config, steps=steps))["Proxy reward"]
    step, rewards = drawn(proxy)["training rollouts"]
    assert (
        len(step) <= MAX_POINTS
        and step[:2] == [2.0, 5.0]
        and rewards[:2] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    )
    assert "each point is the mean of 3 steps" in proxy.notes


def test_each_policy_age_and_each_reward_function_has_a_curve(config):
    sizes = {f"policy_age_{age}/effective_sample_size": 1 - age / 16 for age in (10, 2)}
    panels = panels_of(run_of(config, steps=[step_metrics(1, **sizes, **{"reward/brief": 0.25})]))
    assert list(drawn(panels["Effective sample size, by policy age"])) == ["age 2", "age 10"]
    assert drawn(panels["Reward function brief"]) == {"training rollouts": ([1], [0.25])}


def test_throughput_is_drawn_below_the_bound_of_the_busiest_stage(config):
    """Of the trace: a group takes 1.9 s to generate, and a step 2 s to train."""
    config = config.rollouts(prompts_per_step=2, group_size=4, num_actors=2)
    speeds = {"throughput/responses_per_s": 3.0, "throughput/responses": 8.0}
    panel = panels_of(run_of(config, steps=[step_metrics(step, **speeds) for step in (1, 2)]))[
        "Throughput against its bound"
    ]
    assert drawn(panel)["bound of the busiest stage"] == ([1, 2], [pytest.approx(4.0)] * 2)
    assert "4 of at most 4 responses/s were reached: 100%" in panel.notes
    no_trace = panels_of(run_of(config, steps=[step_metrics(1, **speeds)], trace=[]))["Throughput against its bound"]
    assert (
        list(drawn(no_trace)) == ["responses"]
        and "no bound: its trace has no rollouts or no training" in no_trace.notes
    )


def test_the_timeline_has_a_row_for_each_stage_and_a_colour_for_each_step(config):
    data = panels_of(run_of(config))["Stages over the last steps of demo"].figure
    assert data["layout"]["yaxis"]["categoryarray"][::-1] == [
        "rollout-2",
        "rollout-10",
        "annotator-0: embed",
        "policy-learner: train",
        "annotator-0: evaluate",
    ]
    (bars,) = (one for one in data["data"] if "policy-learner train, step 3, 2 s" in one["hovertext"])
    place = bars["hovertext"].index("policy-learner train, step 3, 2 s")
    assert (bars["base"][place], bars["x"][place]) == (8, 2)
    crowd = [interval("annotator-0", "embed", 9, 9.0, 9.5)] * (MAX_BARS + 1)
    many = panels_of(run_of(config, trace=records([*trace(4), *crowd])))["Stages over the last steps of demo"]
    assert sum(len(one["x"]) for one in many.figure["data"]) == MAX_BARS
    assert any(f"the first {MAX_BARS} of" in note for note in many.notes)


def test_runs_are_told_apart_by_colour_and_their_series_by_dashes(config):
    without = [{key: value for key, value in step_metrics(1).items() if key != "reward/gold"}]
    panels = panels_of(run_of(config, "R2M"), run_of(config, "vanilla", steps=without, evaluations=[]))
    gold = panels["Gold reward"]
    assert list(drawn(gold)) == ["R2M: training rollouts", "R2M: held-out"]
    assert "not measured by vanilla: reward/gold (metrics.jsonl)" in gold.notes
    curves = [one for one in panels["Age of the policy"].figure["data"] if "meta" in one]
    colors, dashes = ({(one["meta"]["run"], one["line"][what]) for one in curves} for what in ("color", "dash"))
    assert len(colors) == 2 and len(dashes) == 6
    legend = [one["name"] for one in panels["Age of the policy"].figure["data"] if one.get("showlegend", True)]
    assert legend == ["oldest group", "mean over groups", "scheduling.max_policy_age"]


# The file


def text_of(page):
    """What a reader sees of the body, but for the figures."""
    body = page[page.index("<body>") : page.index("<noscript>")]
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_a_report_lies_in_the_directory_of_its_run_and_has_answers_and_config(finished_run, capsys):
    assert main(["report", str(finished_run)]) == 0
    assert capsys.readouterr().out == f"report: {finished_run / 'report.html'}\n"
    page = (finished_run / "report.html").read_text()
    text = text_of(page)
    assert f"<title>{finished_run.name}</title>" in page and "say b :" in text and "max_policy_age: 2" in text
    assert [answer in text for answer in ("a 0.0", "a 2.0", "b 0.0", "b 2.0")] == [True] * 4
    assert "4 of 4" in text and "cut off" in text
    assert not re.search(r"(src|href)\s*=|@import|url\(", page[: page.index("<noscript>")])
    assert len(page) < 2.5e6


def test_a_comparison_names_what_differs_in_the_configs(finished_run, config, tmp_path, capsys):
    with RunDirectory.create(config.run(name="other").scheduling(max_policy_age=3)) as other:
        other.write_step(step_metrics(1))
    out = tmp_path / "compared.html"
    assert main(["report", str(finished_run), str(other.path), "--out", str(out)]) == 0
    text = text_of(out.read_text())
    differing = re.findall(r"^ *(\w+\.\w+) +(\S+) +(\S+)", text[text.index("What differs") :], re.M)
    assert differing == [("run.name", '"demo"', '"other"'), ("scheduling.max_policy_age", "2", "3")]
    assert f"not recorded by {other.path.name}: samples.jsonl" in text


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("config.yaml", "is no run directory: it has no config.yaml"), ("metrics.jsonl", "is no run of `r2m train`")],
)
def test_what_is_no_run_is_refused(finished_run, capsys, name, complaint):
    (finished_run / name).unlink()
    assert main(["report", str(finished_run)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_and_no_run_has_ended(finished_run, capsys, tmp_path):
    out = tmp_path / "absent" / "report.html"
    assert main(["report", str(finished_run), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"r2m: {out}: cannot be written: No such file or directory")


def test_a_run_named_twice_and_a_metric_that_is_no_number_are_refused(finished_run, capsys):
    assert main(["report", str(finished_run), str(finished_run)]) == 2
    assert "stands twice" in capsys.readouterr().err
    (finished_run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": "high"}\n')
    assert main(["report", str(finished_run)]) == 2
    assert "metrics.jsonl:1: has 'high' as 'reward/mean', which is no number" in capsys.readouterr().err


def test_a_prompt_that_was_changed_is_named(finished_run):
    (finished_run / "samples.jsonl").write_text(json.dumps(SAMPLES[0] | {"prompt": [["user"]]}) + "\n")
    with pytest.raises(Exception, match=r"samples\.jsonl: step 0 has .* as 'prompt'"):
        read_samples(finished_run / "samples.jsonl")


# In a browser


@pytest.fixture
def chromium():
    """The browser, which `.ci/run` installs where it can."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return found


@pytest.fixture
def asked():
    """(address, requests so far) of a server on this machine, which nobody should ask for anything."""
    paths = []

    class Notes(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", paths
        server.shutdown()


OUTER = """<!DOCTYPE html><body>
<iframe src="report.html" width="420" height="900"></iframe><iframe src="report.html" width="1500" height="900"></iframe>
<pre id="found"></pre><script>
const told = [];
const look = () => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
  if (!pages.every((page) => page.body?.dataset.drawn || page.body?.dataset.failed)) return setTimeout(look, 50);
  for (const page of pages) {
    const box = page.querySelector("nav input");
    const lines = () => page.querySelectorAll(".panel .figure")[0].querySelectorAll(".scatterlayer .trace").length;
    told.push({
      title: page.title, drawn: page.body.dataset.drawn, failed: page.body.dataset.failed,
      figures: page.querySelectorAll(".figure").length, plots: page.querySelectorAll(".figure .plot-container").length,
      wider: page.documentElement.scrollWidth - page.defaultView.innerWidth, images: page.querySelectorAll("img").length,
      before: lines(),
    });
    box.click();
    told.at(-1).after = lines();
  }
  document.getElementById("found").textContent = JSON.stringify(told);
};
look();
</script>"""


def test_a_browser_draws_all_figures_at_two_widths_and_runs_nothing_that_a_model_wrote(
    config, tmp_path, chromium, asked
):
    url, requests = asked
    evil = EVIL.format(url=url)
    samples = [one | {"response": evil, "prompt": evil, "prompt_id": evil} for one in SAMPLES]
    runs = []
    for name in ("one", "two"):
        with RunDirectory.create(config.run(name=name)) as run:
            for step in range(1, 5):
                run.write_step(step_metrics(step) | {f"reward/{evil}": 1.0})
            run.write_evaluations(EVALUATIONS, samples)
            run.write_trace(trace(4))
        runs.append(run.path)
    write_report(runs, tmp_path / "report.html")
    (tmp_path / "outer.html").write_text(OUTER)
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # The virtual clock stands still while scripts are at work, so the page has the time it takes.
    command += [
        "--allow-file-access-from-files",
        "--virtual-time-budget=600000",
        "--dump-dom",
        f"file://{tmp_path}/outer.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    pages = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))
    assert len(pages) == 2 and requests == []
    for page in pages:
        assert page["title"] == "2 runs of r2m-async" and page.get("failed") is None and page["images"] == 0
        assert page["drawn"] == str(page["figures"]) and page["plots"] == page["figures"] > 10
        assert page["wider"] <= 0, "the page needs no sideways scrolling"
        assert page["before"] - page["after"] == 2, "a run's two curves are hidden by its box"
