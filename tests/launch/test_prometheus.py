"""What a run measures is among Ray's own metrics: a real Prometheus finds it there, and answers what the dashboard asks."""

import json
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from r2m_async.errors import ConfigError
from r2m_async.launch.prometheus import RayGauges, gauge_name
from r2m_async.launch.training import train
from r2m_async.runs.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "r2m.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def once_there(look, what):
    """Returns what `look` returns, as soon as that is something."""
    deadline = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


@pytest.fixture
def gauges(ray_session, tmp_path):
    """The gauges of a run named demo."""
    run = tmp_path / "demo"
    run.mkdir()
    return RayGauges(run, print)


@pytest.fixture
def ask(gauges, tmp_path):
    """`ask(path, **parameters)`: what a Prometheus says that looks for runs in a folder, as the document shows it."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("there is no Prometheus: apt-get install prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    document = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^ +global: .*\n +scrape_configs:\n +- .*prometheus\.json.*$", document, re.M)
    config = textwrap.dedent(lines).replace("10s", "1s").replace("/home/me/runs", str(tmp_path))
    (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
    command = [binary, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)

    def ask(path, **parameters):
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except ConnectionError:
            return None  # it is still starting
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):
                return None
            raise

    try:
        yield ask
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.ring
def test_prometheus_finds_a_run_and_its_present_values_and_answers_all_that_the_dashboard_asks(
    gauges, ask, tmp_path, capsys
):
    names = sorted({name for expression in EXPRESSIONS for name in re.findall(r"\bray_r2m_\w+", expression)})
    for step in (1, 2):  # any metric of this name will do: other names are compared with those of a real run below
        gauges.log({name.removeprefix("ray_r2m_"): step / 4 for name in names}, step)
    targets = tmp_path / "demo.prometheus.json"
    assert len(names) > 20
    assert re.fullmatch(rf"for Prometheus: http://[\d.]+:\d+/metrics, or {targets}\n", capsys.readouterr().out)

    def values(expression):
        answer = ask("query", query=expression)
        return [(one["metric"]["run"], one["value"][1]) for one in answer["result"]] if answer else []

    once_there(lambda: values(f"{names[0]} == 0.5"), "Prometheus has no value")
    for expression in EXPRESSIONS:
        asked = expression.replace("$run", "demo|other")
        assert once_there(lambda: values(asked), expression) == [("demo", "0.5")]  # noqa: B023
    ((match, label),) = [
        re.fullmatch(r"label_values\((\w+), (\w+)\)", one["query"]["query"]).groups()
        for one in DASHBOARD["templating"]["list"]
        if one["type"] == "query"
    ]
    assert ask(f"label/{label}/values", **{"match[]": match}) == ["demo"]
    gauges.finish(done=True)
    assert not targets.exists()


@pytest.mark.ring
def test_two_metrics_of_one_gauge_are_refused(gauges):
    gauges.log({"reward/gold": 1.0}, 1)
    with pytest.raises(ValueError, match="'reward/gold' and 'reward_gold' would have the same gauge r2m_reward_gold"):
        gauges.log({"reward_gold": 1.0}, 2)


@pytest.mark.models
def test_the_dashboard_asks_for_metrics_that_a_run_has(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(gold=lambda prompt, response, finished: len(response)))
    config = tiny_config.run(num_steps=2, output_dir=str(tmp_path)).evaluation(every=1, num_prompts=2)
    config = config.evaluation(gold="mine:gold")
    run = train(config.logging(tensorboard=False, live=False), in_process=True)
    (_, step), evaluations = read_metrics(run / "metrics.jsonl"), read_metrics(run / "evaluation.jsonl")
    has = {f"ray_{gauge_name(key)}" for key in (*step, *(f"evaluation/{key}" for key in evaluations[-1]))}
    for expression in EXPRESSIONS:
        assert set(re.findall(r"\bray_\w+", expression)) <= has
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_a_run_without_ray_has_nothing_for_prometheus(tiny_config, tmp_path):
    config = tiny_config.run(output_dir=str(tmp_path)).logging(prometheus=True, live=False, tensorboard=False)
    with pytest.raises(ConfigError, match=r"logging\.prometheus is true and all stages run in one process"):
        train(config, in_process=True)
