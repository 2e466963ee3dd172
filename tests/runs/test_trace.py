"""trace.json: the trace in the Trace Event Format, which Perfetto opens."""

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
                            "ts": {"type": "number", "minimum": 0},
                            "dur": {"type": "number", "minimum": 0},
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
"""What the format's description asks of complete events and of metadata events."""


def written(intervals, path):
    records = [{name: getattr(one, name) for name in one.__slots__} for one in intervals]
    write_trace_events(records, path)
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
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


def test_of_a_long_trace_the_end_is_kept_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "MAX_EVENTS", 2)
    content = written([interval("queue", "put", step, step, step + 0.5) for step in range(5)], tmp_path / "trace.json")
    assert [one["name"] for one in content["traceEvents"] if one["ph"] == "X"] == ["put 3", "put 4"]
    assert content["otherData"] == {"calls left out": 3}
