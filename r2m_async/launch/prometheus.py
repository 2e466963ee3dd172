"""Publishes what a run measures among Ray's own metrics, which Prometheus scrapes from the nodes of the cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r2m_async.whole import write_file


class RayGauges:
    """A tracker (`runs.trackers.Tracker`): one gauge for each metric, with the label `run`.

    Ray must have been started when `log` is called. It puts `ray_` before the names. While the run goes on, a file beside its
    directory names the nodes of the cluster, for Prometheus's `file_sd_configs`, which finds files in one folder only.
    """

    def __init__(self, run: Path, tell: Callable[[str], None]) -> None:
        """run: the run directory. tell: is told the addresses at which Prometheus finds the metrics, once."""
        self._targets = run.with_name(f"{run.name}.prometheus.json")
        self._run, self._tell = run.name, tell
        self._gauges: dict[str, tuple[str, Any]] = {}
        """For each name of a gauge, the metric that it shows, and the gauge."""

    def last(self) -> None:
        """See `Tracker`: gauges keep no history."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sets the gauges. Raises ValueError if two metrics would have the same gauge."""
        import ray
        from ray.util.metrics import Gauge

        if not self._gauges:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            places = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
            write_file(self._targets, json.dumps([{"targets": places, "labels": {"job": "ray"}}]))
            self._tell(
                f"for Prometheus: {', '.join(f'http://{place}/metrics' for place in places)}, or {self._targets}"
            )
        for key, value in metrics.items():
            name = gauge_name(key)
            if name not in self._gauges:
                gauge = Gauge(name, description=key, tag_keys=("run",)).set_default_tags({"run": self._run})
                self._gauges[name] = key, gauge
            shown, gauge = self._gauges[name]
            if shown != key:
                raise ValueError(f"the metrics {shown!r} and {key!r} would have the same gauge {name}; rename a reward")
            gauge.set(value)

    def finish(self, done: bool) -> None:
        """Removes the file that names the targets. The last values stay until the process of the run is gone."""
        self._targets.unlink(missing_ok=True)


def gauge_name(key: str) -> str:
    """Returns the name of a metric's gauge: Prometheus allows letters, digits and underscores alone."""
    return f"r2m_{re.sub('[^a-zA-Z0-9]', '_', key)}"
