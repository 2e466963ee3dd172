"""What the training of a reward model prints where there is no terminal: never nothing for long."""

import pytest

from r2m_async.runs.progress import QUIET_AFTER, TrainingProgress


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_work_that_takes_long_says_how_far_it_is_and_short_work_says_nothing(clock, capsys):
    with TrainingProgress(live=False, time_of=clock) as progress:
        for done in range(1, 6):
            progress.work("evaluation", done, 5)
        assert capsys.readouterr().out == ""
        for done in range(1, 6):
            clock.now += QUIET_AFTER / 2
            progress.work("evaluation", done, 5)
    assert capsys.readouterr().out == "evaluation: 2/5\nevaluation: 4/5\n"


def test_a_tenth_of_the_steps_has_a_line_and_so_has_a_slow_step(clock, capsys):
    with TrainingProgress(live=False, time_of=clock) as progress:
        for step in range(1, 21):
            clock.now += QUIET_AFTER if step == 5 else 0
            progress.update(3, {"step": step, "loss": 0.5, "accuracy": 0.75}, 20)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/20" for step in (2, 4, 5, *range(6, 21, 2))]
    assert lines[0] == "step 2/20  seed 3  loss 0.5000  accuracy 0.750"
