"""A step's metrics as the controller sees them: who was at work when, tokens, gold, ages and the ledger.

What stages measure themselves (losses, rewards) passes through.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from r2m_async.ring.stages import Stages
from r2m_async.schedule import Assembly, Schedule
from r2m_async.trajectories import GroupReport

MAX_INTERVALS = 100_000
"""Of a trace that nobody takes, the newest are kept: about 15 MB, some twenty steps of the largest preset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A stage was at work; seconds since the run began."""

    stage: str
    method: str
    step: int
    start: float
    end: float


class StepMetrics:
    """Is told of everything that happens in a ring; times are those of one clock."""

    def __init__(self, stages: Stages, now: float) -> None:
        self.trace: list[Interval] = []
        """Since somebody took it, by putting an empty one in its place; at most `MAX_INTERVALS`."""
        self.num_dropped = 0
        """Intervals, the oldest of their time, that nobody took before there were too many."""
        self.standing: dict[str, dict[str, float]] = {}
        """By their source, metrics that stay until it is heard of again: a head update, a publication."""
        self._kinds = {
            "rollouts": [stage.name for stage in stages.rollouts],
            "annotators": [stage.name for stage in stages.annotators],
            "policy_learner": [stages.policy.name],
            "head_learner": [stages.head.name],
        }
        self._reports: dict[int, GroupReport] = {}
        self._gold: dict[int, float] = {}
        self._tokens: Counter[str] = Counter()
        self._busy: dict[str, float] = defaultdict(float)
        self._free_at: dict[str, float] = defaultdict(float)
        self._began = self._reported = now

    def worked(self, stage: str, method: str, step: int, asked: float, end: float, beside: bool = False) -> None:
        """A call has ended; `beside`: the stage may have been at other work, which is what it counts as busy with."""
        start = asked
        if not beside:  # it does one thing at a time: before, the call stood in line
            start = max(asked, self._free_at[stage])
            self._free_at[stage] = end
            self._busy[stage] += end - start
        if len(self.trace) >= MAX_INTERVALS:
            too_old = MAX_INTERVALS // 10  # in parts, because each time all others move up
            del self.trace[:too_old]
            self.num_dropped += too_old
        self.trace.append(
            Interval(stage=stage, method=method, step=step, start=start - self._began, end=end - self._began)
        )

    def generated(self, num_tokens: int) -> None:
        """Whether or not they are ever trained on."""
        self._tokens["generated"] += num_tokens

    def arrived(self, group_id: int, report: GroupReport) -> None:
        self._reports[group_id] = report

    def annotated(self, group_id: int, gold: float) -> None:
        """gold: NaN where the prompt has none."""
        self._gold[group_id] = gold

    def forget(self, group_ids: Iterable[int]) -> None:
        """These groups will be in no step."""
        for group_id in group_ids:
            self._reports.pop(group_id, None)
            self._gold.pop(group_id, None)

    def of_step(
        self, assembly: Assembly, schedule: Schedule, measured: Mapping[str, float], now: float
    ) -> dict[str, float]:
        """All metrics of the step that has just been trained; `measured` are the stages' own."""
        reports = [self._reports.pop(group_id) for group_id in assembly.group_ids]
        gold = [self._gold.pop(group_id) for group_id in assembly.group_ids]
        self._tokens["trained"] += int(measured.get("length/trained_tokens", 0))
        elapsed = max(now - self._reported, 1e-9)
        metrics = {
            "step": float(schedule.policy_version),
            "time/since_start": now - self._began,
            "time/step": elapsed,
            "throughput/responses_per_s": sum(report.num_responses for report in reports) / elapsed,
            "throughput/responses": float(sum(report.num_responses for report in reports)),
            "throughput/tokens": float(sum(report.num_tokens for report in reports)),
            "throughput/tokens_per_s": sum(report.num_tokens for report in reports) / elapsed,
            "age/policy_max": float(max(assembly.policy_ages, default=0)),
            "age/policy_mean": statistics.fmean(assembly.policy_ages) if assembly.policy_ages else 0.0,
            "age/head": float(assembly.step - assembly.head_version),
            "length/trained_over_generated": self._tokens["trained"] / max(1, self._tokens["generated"]),
            "queue/bytes": float(schedule.reserved_bytes),
            "ledger/admitted": float(schedule.policy_ledger.admitted),
            "ledger/trained": float(schedule.policy_ledger.trained),
            "ledger/voided": float(schedule.policy_ledger.voided.total()),
            "ledger/reissued": float(schedule.reissued.total()),
            "ledger/fenced": float(schedule.fenced),
        }
        if gold and not any(map(math.isnan, gold)):
            metrics["reward/gold"] = statistics.fmean(gold)
        for kind, members in self._kinds.items():
            busy = sum(self._busy[name] for name in members) / elapsed / len(members)
            metrics[f"idle/{kind}"] = 1 - min(1.0, busy)
        metrics |= measured
        for ones in self.standing.values():
            metrics |= ones
        self._reported = now
        self._busy.clear()
        return metrics
