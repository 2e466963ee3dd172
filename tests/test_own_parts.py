"""examples/own_parts.py: every part that a user may bring takes part in a run."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def own_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_parts

    yield own_parts
    del sys.modules["own_parts"]


@pytest.mark.ring
def test_all_parts_of_the_example_take_part_in_a_run(own_parts, tiny_config, tmp_path):
    called = set()
    for name in ("brevity", "median_baseline", "unclipped"):
        function = getattr(own_parts, name)

        def noted(*given, _function=function, _name=name, **named):
            called.add(_name)
            return _function(*given, **named)

        noted.__wrapped__ = function  # the parameters that it names are those of the function
        setattr(own_parts, name, noted)
    steps = own_parts.run(tiny_config, tmp_path / "out")
    assert len(steps) == 3
    assert called == {"brevity", "median_baseline", "unclipped"}
    journal = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert [one["step"] for one in journal] == [one["step"] for one in steps]
    assert all("reward/brevity" in one for one in journal)


@pytest.mark.ring
def test_the_callback_of_the_example_ends_the_run(own_parts, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(own_parts, "stops_at", lambda kl: lambda metrics: True)
    assert len(own_parts.run(tiny_config, tmp_path / "out")) == 1
