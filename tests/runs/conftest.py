"""A small finished run on disk."""

import pytest
from run_records import EVALUATIONS, SAMPLES, step_metrics, trace

from r2m_async.config import R2MConfig
from r2m_async.runs.directory import RunDirectory


@pytest.fixture
def config(tmp_path):
    config = R2MConfig().run(name="demo", num_steps=4, output_dir=str(tmp_path))
    return config.scheduling(max_policy_age=2, max_head_age=1).logging(tensorboard=False)


@pytest.fixture
def finished_run(config):
    with RunDirectory.create(config) as run:
        for step in range(1, 5):
            run.write_step(step_metrics(step))
        run.write_evaluations(EVALUATIONS, SAMPLES)
        run.write_trace(trace(4))
    return run.path
