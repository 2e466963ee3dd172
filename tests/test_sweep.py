"""examples/sweep.py: ASHA stops a trial that lags behind, and PBT lets it go on from the better one's checkpoint."""

import sys
from pathlib import Path

import pytest
from ray import tune

from r2m_async import R2M

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RATE = "r2m/policy/lr"
"""The metric of these tests: which trial is better is then known."""


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import sweep

    yield sweep
    del sys.modules["sweep"]


def space(tiny_config, tmp_path, steps: int) -> dict:
    tree = tiny_config.run(num_steps=steps, output_dir=str(tmp_path)).to_dict()
    tree["learner"]["lr"] = tune.grid_search([1e-3, 1e-4])
    return tree


@pytest.mark.ring
def test_asha_stops_the_trial_that_lags_behind(example, tiny_config, ray_session, tmp_path):
    scheduler = example.scheduler_of("asha", every=1)
    place = tmp_path / "asha"
    results = example.sweep(scheduler, space(tiny_config, tmp_path, 3), place, RATE, trials=1, every=1, at_once=1)
    assert not results.errors
    assert {result.config["learner"]["lr"]: result.metrics["training_iteration"] for result in results} == {
        1e-3: 3,
        1e-4: 1,
    }
    best = results.get_best_result()
    algo = R2M.from_checkpoint(best.checkpoint)
    assert algo.training_iteration == 3
    algo.stop()


@pytest.mark.ring
def test_pbt_lets_the_worse_trial_go_on_from_the_better_ones_checkpoint_with_other_rates(
    example, tiny_config, ray_session, tmp_path
):
    scheduler = example.scheduler_of("pbt", every=2, share=0.5)  # of two trials one is the worse half
    results = example.sweep(
        scheduler, space(tiny_config, tmp_path, 4), tmp_path / "pbt", RATE, trials=1, every=2, at_once=2
    )
    assert not results.errors
    assert [result.metrics["training_iteration"] for result in results] == [4, 4]
    rates = [result.metrics["r2m"]["policy/lr"] for result in results]
    assert 1e-3 in rates and 1e-4 not in rates
