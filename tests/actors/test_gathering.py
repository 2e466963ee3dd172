"""Calls of several threads become one batch, and each caller gets what is its own."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.aborts import Aborted
from actors.gathering import Gathered

LONG = 600.0
"""Seconds that no test takes: whoever waited for them would hang."""


class Batches:
    """Squares numbers, and waits within a batch until it is allowed to end."""

    def __init__(self):
        self.seen, self.may_end = [], threading.Semaphore(0)

    def __call__(self, numbers):
        self.seen.append(list(numbers))
        self.may_end.acquire()
        if -1 in numbers:
            raise ValueError("a negative number")
        return [number * number for number in numbers]


def until(condition):
    while not condition():
        time.sleep(0.001)


def in_line(pool, gathered, numbers):
    """Calls for numbers, each once the one before it is in the line."""
    calls = []
    for number in numbers:
        calls.append(pool.submit(gathered, number))
        until(lambda: len(gathered._line) == len(calls))
    return calls


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_what_arrives_during_a_batch_is_the_next_batch(pool):
    gathered = Gathered(batches := Batches(), at_once=3)
    calls = [pool.submit(gathered, 1)]
    until(lambda: batches.seen)
    calls += in_line(pool, gathered, (2, 3, 4, 5))
    batches.may_end.release(3)
    assert [call.result() for call in calls] == [1, 4, 9, 16, 25]
    assert batches.seen == [[1], [2, 3, 4], [5]]


def test_a_batch_waits_for_more_and_not_once_it_is_full(pool):
    gathered = Gathered(batches := Batches(), at_once=2, patience=LONG)
    calls = [pool.submit(gathered, 1)]
    until(lambda: gathered._busy)
    assert batches.seen == []
    calls.append(pool.submit(gathered, 2))
    batches.may_end.release()
    assert [call.result() for call in calls] == [1, 4] and batches.seen == [[1, 2]]
    few = Gathered(batches, at_once=2, patience=0.01)
    batches.may_end.release()
    assert few(3) == 9


def test_what_fails_is_raised_in_every_caller_of_the_batch_and_in_no_other(pool):
    gathered = Gathered(batches := Batches(), at_once=2)
    calls = [pool.submit(gathered, 1)]
    until(lambda: batches.seen)
    calls += in_line(pool, gathered, (-1, 2, 3))
    batches.may_end.release(3)
    assert calls[0].result() == 1 and calls[3].result() == 9
    for call in calls[1:3]:
        with pytest.raises(ValueError, match="a negative number"):
            call.result()


def test_who_waits_in_vain_is_answered_while_another_batch_runs(pool):
    given_up = set()
    gathered = Gathered(batches := Batches(), at_once=4, instead=lambda number: 0 if number in given_up else None)
    calls = [pool.submit(gathered, 1)]
    until(lambda: batches.seen)
    calls += in_line(pool, gathered, (2, 3))
    given_up.add(2)
    gathered.look()
    assert calls[1].result() == 0
    given_up.add(4)
    assert gathered(4) == 0, "given up before it came"
    assert not calls[0].done() and not calls[2].done()
    batches.may_end.release(2)
    assert [call.result() for call in calls] == [1, 0, 9] and batches.seen == [[1], [3]]


def test_of_aborts_whose_requests_never_come_the_newest_are_kept():
    aborted = Aborted()
    aborted.add(f"{number}.0" for number in range(Aborted.LIMIT + 3))
    assert len(aborted) == Aborted.LIMIT
    assert "2.0" not in aborted and "3.0" in aborted
    aborted.forget(["3.0", "never"])
    assert "3.0" not in aborted
