"""trace.json: the trace in the Trace Event Format, which Perfetto opens."""

import itertools
import json

import jsonschema
from run_records import interval, trace

from r2m_async.runs import trace as traces
from r2m_async.runs.trace import write_trace_events

SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object"},
        "traceEvents": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["ph", "name", "pid"],
                "oneOf": [
                    {
                        "properties": {
                            "ph": {"const": "X"},
                            "ts": {"type": "integer", "minimum": 0},
                            "dur": {"type": "integer", "minimum": 0},
                        },
                        "required": ["ts", "dur", "tid"],
                    },
                    {
                        "properties": {
                            "ph": {"const": "M"},
                            "name": {"enum": ["process_name", "thread_name", "thread_sort_index"]},
                        },
                        "required": ["args"],
                    },
                ],
                "properties": {
                    "pid": {"type": "integer"},
                    "tid": {"type": "integer"},
                    "cat": {"type": "string"},
                    "args": {"type": "object"},
                },
            },
        },
    },
}
"""What the format's description asks of complete events and of metadata events; and whole numbers, which round to no overlap."""


def written(intervals, path):
    records = [{name: getattr(one, name) for name in one.__slots__} for one in intervals]
    write_trace_events(records, path)
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    rows = {}
    for one in content["traceEvents"]:
        if one["ph"] == "X":
            rows.setdefault(one["tid"], []).append((one["ts"], one["ts"] + one["dur"]))
    for calls in map(sorted, rows.values()):
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(calls)), "Perfetto drops calls that overlap"
    return content


def test_every_call_is_an_event_in_the_row_of_its_stage(tmp_path):
    events = written(trace(2), tmp_path / "trace.json")["traceEvents"]
    names = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert list(names.values()) == [
        "rollout-2",
        "rollout-10",
        "annotator-0: embed",
        "policy-learner: train",
        "annotator-0: evaluate",
    ]
    calls = [(names[one["tid"]], one["name"], one["ts"], one["dur"]) for one in events if one["ph"] == "X"]
    assert len(calls) == 9
    assert ("policy-learner: train", "train 1", 4e6, 2e6) in calls
    assert ("annotator-0: evaluate", "evaluate (evaluation)", 4e6, 1e6) in calls


def test_calls_of_a_stage_that_overlap_lie_side_by_side(tmp_path):
    """As of an engine that generates several groups, and takes new weights meanwhile. The times have no exact float."""
    calls = [interval("rollout-0", "generate", step, 0.1 * step, 0.1 * step + 0.3) for step in range(4)]
    calls.append(interval("rollout-0", "load_weights", 5, 0.31, 0.32))
    events = written(calls, tmp_path / "trace.json")["traceEvents"]
    names = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    rows = [(one["name"], names[one["tid"]]) for one in events if one["ph"] == "X"]
    assert rows == [
        ("generate 0", "rollout-0"),
        ("generate 1", "rollout-0 (2)"),
        ("generate 2", "rollout-0 (3)"),
        ("generate 3", "rollout-0"),
        ("load_weights 5", "rollout-0 (4)"),
    ]


def test_of_a_long_trace_the_end_is_kept_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "MAX_EVENTS", 2)
    content = written([interval("queue", "put", step, step, step + 0.5) for step in range(5)], tmp_path / "trace.json")
    assert [one["name"] for one in content["traceEvents"] if one["ph"] == "X"] == ["put 3", "put 4"]
    assert content["otherData"] == {"calls left out": 3}
