"""Questions to sources of labels."""

import pytest
from labelled import groups_of_texts

from r2m_async.labels.questions import Question
from r2m_async.trajectories import Label


@pytest.fixture
def questions():
    """`questions(3)`: as many pairs, of the responses 0 (cut) and 1 to prompts `prompt 0`, `prompt 1`, ..."""

    def make(number):
        groups = groups_of_texts(7, [f"prompt {index}" for index in range(number)], 2, first=0)
        return [
            Question(
                label=Label(group_id=group.ticket.group_id, step=7, pair=(0, 1)),
                prompt=group.ticket.prompt,
                responses=group.trajectories,
            )
            for group in groups
        ]

    return make
