"""What the controller's metrics keep of a run."""

from types import SimpleNamespace

import pytest

from r2m_async.ring import step_metrics
from r2m_async.ring.progress import Progress
from r2m_async.ring.step_metrics import StepMetrics


@pytest.fixture
def metrics() -> StepMetrics:
    stage = SimpleNamespace(name="stage")
    return StepMetrics(
        SimpleNamespace(rollouts=[stage], annotators=[stage], policy=stage, head=stage), now=0.0, progress=Progress()
    )


def work(metrics: StepMetrics, steps) -> None:
    for step in steps:
        metrics.worked("stage", "generate", step, asked=float(step), end=step + 0.5)


def test_of_a_trace_that_nobody_takes_the_newest_intervals_stay_and_the_others_are_counted(metrics, monkeypatch):
    monkeypatch.setattr(step_metrics, "MAX_INTERVALS", 100)
    for step in range(1000):
        work(metrics, [step])
        assert len(metrics.trace) <= 100
        assert [one.step for one in metrics.trace] == list(range(step + 1 - len(metrics.trace), step + 1))
        assert metrics.num_dropped == step + 1 - len(metrics.trace)
    assert len(metrics.trace) > 80


def test_a_trace_that_is_taken_in_time_is_whole(metrics, monkeypatch):
    monkeypatch.setattr(step_metrics, "MAX_INTERVALS", 100)
    taken = []
    for step in range(0, 1000, 100):
        work(metrics, range(step, step + 100))
        taken += [one.step for one in metrics.trace]
        metrics.trace = []
    assert taken == list(range(1000)) and metrics.num_dropped == 0
