"""The schedule of the ring: it decides which group may be generated, trained or given up, and when.

It is pure Python, without Ray, torch or waiting. The controller and the simulator both drive this code. Every method is
a transition that happens at once, or raises RuntimeError because the caller broke the contract.

Groups are numbered 0, 1, 2, ... With B groups per step, group g is due in step d = g // B. Two clocks tick once per
step: the policy version v counts completed policy steps, and the head version u counts completed head updates. Both
clocks tick even if a step trains nothing.

The life of a group, and where it may leave that path:

    admitted -> in flight -> queued -> leased -> trained by the policy -> passed by the head -> freed
    in flight -> lost -> in flight again
    queued -> refilled -> in flight again, with another prompt
    queued -> its data is lost -> in flight again
    in flight, lost or queued -> voided (with a reason)

The *policy age* of a group is its due step minus the oldest policy version that sampled one of its tokens. The *head
age* of a step is the step minus the head version that scores it. Both have an upper bound. A group is admitted, and a
step is assembled, only within these bounds. Assembly then checks the ages that the groups really have.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of the schedule, which do not change during a run.

    Construction raises ValueError if the queue cannot hold one step.
    """

    num_steps: int
    """The number of policy steps in the run."""
    groups_per_step: int
    """B, the number of groups that one step trains."""
    max_policy_age: int
    """The largest policy age: due step minus the oldest policy version in the group."""
    max_head_age: int
    """The largest head age: step minus the head version that scores it."""
    lag: Literal["bounded", "exact"] = "bounded"
    """`bounded`: any age up to the bound. `exact`: always the bound itself, so that a run can be reproduced.

    In the first steps, where no version is that old, `exact` uses version 0.
    """
    overage: Literal["wait", "mask", "drop"] = "wait"
    """What happens to late groups.

    `wait`: the step waits for them. `mask`: a late group is aborted, and the step trains its finished responses.
    `drop`: a late group is aborted and given up.
    """
    overage_after: float = 60.0
    """Seconds. A group is late this long after the last arrival of its step, the beginning of the step, and its own
    admission, whichever comes last."""
    max_bytes: int
    """The bytes that all groups together may take in the queue."""
    group_bytes: int
    """The bytes of one group in the worst case. `max_bytes` holds at least B of them."""
    max_refills: int = 0
    """How many times a group that has arrived may be replaced by one of another prompt. Until then it keeps its reserved
    bytes, so that the new group has room for sure."""
    embedding_bytes: int = 0
    """The part of `group_bytes` that the reward model's embeddings add after the group has arrived."""

    def __post_init__(self) -> None:
        if self.max_bytes < self.groups_per_step * self.group_bytes:
            raise ValueError(
                f"max_bytes {self.max_bytes} does not hold one step of {self.groups_per_step} x {self.group_bytes} bytes"
            )

    def due_step(self, group_id: int) -> int:
        """The step that trains the group."""
        return group_id // self.groups_per_step

    def policy_version_for(self, step: int) -> int:
        """The oldest policy version that may generate for `step`. Under `lag: exact` it is the only one."""
        return max(0, step - self.max_policy_age)

    def head_version_for(self, step: int) -> int:
        """The oldest head version that may score `step`. Under `lag: exact` it is the only one."""
        return max(0, step - self.max_head_age)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The permission to generate one group with one policy version."""

    group_id: int
    due_step: int
    """The step that trains the group."""
    attempt: int
    """How often the group was admitted before: 0, 1, ..."""
    policy_version: int
    """The version that the worker must load before it starts the group."""
    refill: int = 0
    """How often the group was replaced by one of another prompt: 0, 1, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A step that can be trained: each of its groups has arrived or was voided."""

    step: int
    group_ids: tuple[int, ...]
    """The groups that arrived, in rising order. Voided ones are left out."""
    head_version: int
    """The head version that scores all of these groups."""
    policy_ages: tuple[int, ...]
    """For each of these groups its policy age: the step minus its oldest policy version."""


@dataclass
class Ledger:
    """The book of one learner, in groups: admitted = trained + in flight + queued + voided.

    Every group that was admitted is in exactly one of the four states, so a lost or doubled group shows up at once.
    """

    admitted: int = 0
    in_flight: int = 0
    """Groups that are being generated, or wait to be issued again."""
    queued: int = 0
    """Groups that have arrived and that this learner has not trained on yet."""
    trained: int = 0
    voided: Counter[str] = field(default_factory=Counter)
    """Groups that were given up, by reason."""

    def check(self) -> None:
        """Raises RuntimeError if the equation does not hold."""
        accounted = self.trained + self.in_flight + self.queued + self.voided.total()
        if self.admitted != accounted or min(self.in_flight, self.queued) < 0:
            raise RuntimeError(f"the ledger does not balance: {self}")


@dataclass
class _Group:
    """The state of one group, from its admission until it is freed or voided."""

    due_step: int
    attempt: int
    worker: str | None
    """The worker that generates the group. None after its arrival, and while it waits to be issued again."""
    policy_version: int
    admitted_at: float
    """The time of the last admission, in seconds on the caller's clock."""
    num_bytes: int
    """The bytes that are reserved for the group: the worst case until it arrives, and what it takes afterwards."""
    arrived: bool = False
    oldest_version: int = 0
    """The oldest policy version in the group. It is known once the group has arrived."""
    passed_policy: bool = False
    """Whether the policy has finished the group's step."""
    refills: int = 0
    """How often the group was replaced by one of another prompt."""
    failures: int = 0
    """How often an engine that lives could not generate it."""


class Schedule:
    """The state of one run's schedule: tickets, clocks, bytes and ledgers.

    Times are seconds on the caller's clock, which need not be the real one.
    """

    def __init__(self, plan: Plan, first_step: int = 0) -> None:
        """Starts at `first_step`: 0, or the number of steps that a resumed run has trained."""
        self.plan = plan
        self.policy_version = first_step
        self.head_version = first_step
        self.num_steps = plan.num_steps
        self.reserved_bytes = 0
        """The sum of the bytes that are reserved for the groups held."""
        self.policy_ledger = Ledger()
        self.head_ledger = Ledger()
        self.reissued: Counter[str] = Counter()
        """Groups that were taken back from a lost worker, or after their arrival, by reason."""
        self.fenced = 0
        """Results that arrived from attempts that were no longer expected."""
        self._groups: dict[int, _Group] = {}
        self._next_group = first_step * plan.groups_per_step
        # A heap of groups that wait to be issued again. Voided groups stay in it until they come to the front.
        self._lost: list[int] = []
        self._arrived_steps: Counter[int] = Counter()
        self._voided_steps: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._leased: Assembly | None = None
        self._last_arrival: dict[int, float] = {}
        self._step_began = 0.0

    # Counts, across the starts of a run

    def count_on(self, trained: int, voided: Mapping[str, int], reissued: Mapping[str, int], fenced: int) -> None:
        """Counts on from where the run was saved. Call it before the first admission.

        trained, voided: the groups of the steps before `first_step`. reissued, fenced: as the attributes.

        Raises ValueError if these are not the groups of those steps, each once.
        """
        expected = self.policy_version * self.plan.groups_per_step
        if trained + sum(voided.values()) != expected:
            raise ValueError(
                f"{self.policy_version} steps of {self.plan.groups_per_step} groups are {expected} groups; {trained} were "
                f"trained and {sum(voided.values())} voided"
            )
        for ledger in self._ledgers:
            ledger.admitted, ledger.trained, ledger.voided = expected, trained, Counter(voided)
        self.reissued, self.fenced = Counter(reissued), fenced

    def voided_so_far(self) -> Counter[str]:
        """The voided groups of the steps that the head has passed, by reason. Those of later steps are left out."""
        ahead: Counter[str] = sum(self._voided_steps.values(), Counter())
        return self.head_ledger.voided - ahead

    def readmit(
        self, group_id: int, attempt: int, refill: int, oldest_version: int, num_bytes: int, now: float
    ) -> str | None:
        """Takes a group that had arrived before the run was resumed, as if it arrived now.

        Call it before the first admission, with the groups in rising order.

        Args:
            attempt, refill: those of the group's last admission.
            oldest_version, num_bytes, now: as for `arrived`.

        Returns None if the group is taken. Otherwise nothing is changed, the group will be admitted as any other, and the
        result is the reason:

        - `trained`, `after_the_end`: the group is of no step that is still to come,
        - `too_old`, `other_version`: its policy age would break the bound,
        - `too_large`: it takes more bytes than a group may,
        - `no_room`: the groups before it could no longer be admitted.

        Raises RuntimeError if the group is held already.
        """
        step, oldest = self.plan.due_step(group_id), self.plan.policy_version_for(self.plan.due_step(group_id))
        if group_id in self._groups:
            raise RuntimeError(f"group {group_id} is readmitted twice")
        if step < self.policy_version:
            return "trained"
        if step >= self.num_steps:
            return "after_the_end"
        version = min(oldest_version, step)  # as in `arrived`
        if version < oldest:
            return "too_old"
        if self.plan.lag == "exact" and oldest_version <= step and version != oldest:
            return "other_version"
        num_bytes += self.plan.embedding_bytes
        if num_bytes > self.plan.group_bytes or refill > self.plan.max_refills:
            return "too_large"
        reserved = self.plan.group_bytes if refill < self.plan.max_refills else num_bytes
        before = sum(one not in self._groups for one in range(self._next_group, group_id))
        if self.reserved_bytes + before * self.plan.group_bytes + reserved > self.plan.max_bytes:
            return "no_room"
        self._groups[group_id] = _Group(
            step, attempt, None, version, now, reserved, arrived=True, oldest_version=version, refills=refill
        )
        self.reserved_bytes += reserved
        self._last_arrival[step] = now
        self._arrived_steps[step] += 1
        for ledger in self._ledgers:
            ledger.admitted += 1
            ledger.queued += 1
        return None

    # Tickets

    def admit(self, worker: str, latest: int, now: float) -> Admission | None:
        """Admits the oldest group that `worker` may start. Returns None if it may start none at present.

        Args:
            latest: the newest policy version that the worker has or can load. The admission says which one to use.
            now: the present time.

        The worst case of a new group's bytes is reserved here.
        """
        # Lost groups go first: they are the oldest, and their bytes are still reserved.
        if (lost := self._oldest_lost()) is not None:
            group_id = lost
            version = self._version_for(self._groups[group_id].due_step, latest)
            if version is None:
                return None
            heapq.heappop(self._lost)
        else:
            while self._next_group in self._groups:  # it was readmitted
                self._next_group += 1
            group_id = self._next_group
            step = self.plan.due_step(group_id)
            version = self._version_for(step, latest)
            if version is None or step >= self.num_steps:
                return None
            # Groups are admitted in order, and the queue holds at least one step. So a full queue cannot block for ever
            # a group that the next step waits for.
            if self.reserved_bytes + self.plan.group_bytes > self.plan.max_bytes:
                return None
            self._next_group += 1
            self.reserved_bytes += self.plan.group_bytes
            self._groups[group_id] = _Group(step, -1, None, version, now, self.plan.group_bytes)
            for ledger in self._ledgers:
                ledger.admitted += 1
                ledger.in_flight += 1
        group = self._groups[group_id]
        group.attempt += 1
        group.worker, group.policy_version, group.admitted_at = worker, version, now
        return Admission(
            group_id=group_id,
            due_step=group.due_step,
            attempt=group.attempt,
            policy_version=version,
            refill=group.refills,
        )

    def _oldest_lost(self) -> int | None:
        """The oldest group that waits to be issued again, or None. Drops what came or was voided meanwhile."""
        while self._lost and ((group := self._groups.get(self._lost[0])) is None or group.arrived):
            heapq.heappop(self._lost)
        return self._lost[0] if self._lost else None

    def _version_for(self, step: int, latest: int) -> int | None:
        """The policy version with which a group of `step` may be started, or None if `latest` is too old for it."""
        oldest = self.plan.policy_version_for(step)
        if latest < oldest:
            return None
        return oldest if self.plan.lag == "exact" else latest

    def expects(self, group_id: int, attempt: int) -> bool:
        """Whether the schedule waits for this attempt of the group.

        It does not if the group has arrived already, was voided, or was issued again. A result that is not expected is
        counted in `fenced`.
        """
        group = self._groups.get(group_id)
        expected = group is not None and not group.arrived and group.attempt == attempt
        self.fenced += not expected
        return expected

    def arrived(self, group_id: int, attempt: int, oldest_version: int, num_bytes: int, now: float) -> bool:
        """Takes a group that has been generated. Returns False, and changes nothing else, if `expects` does.

        Args:
            oldest_version: the oldest policy version that sampled one of its tokens.
            num_bytes: the bytes of the group in the queue, without the embeddings that are added later.
            now: the present time.

        The reservation shrinks from the worst case to what the group takes, unless the group may still be refilled.
        Raises RuntimeError if it takes more than was reserved.
        """
        if not self.expects(group_id, attempt):
            return False
        group = self._groups[group_id]
        num_bytes += self.plan.embedding_bytes
        if num_bytes > group.num_bytes:
            raise RuntimeError(f"group {group_id} takes {num_bytes} bytes and reserved {group.num_bytes}")
        if group.refills == self.plan.max_refills:
            self.reserved_bytes += num_bytes - group.num_bytes
            group.num_bytes = num_bytes
        group.arrived, group.worker = True, None
        # A group whose responses are all empty reports the largest int32 as its oldest version. Its age is then 0.
        group.oldest_version = min(oldest_version, group.due_step)
        self._last_arrival[group.due_step] = now
        self._arrived_steps[group.due_step] += 1
        for ledger in self._ledgers:
            ledger.in_flight -= 1
            ledger.queued += 1
        return True

    def lost(self, worker: str, reason: str) -> tuple[int, ...]:
        """Takes back the groups of a worker that has died, and returns them.

        They wait to be issued again, with the same group, prompt and seed, and keep their reserved bytes. `reason` is
        counted in `reissued`. The caller must first have made sure that nothing of this worker can still arrive: until
        a group is issued again, its old attempt would be accepted.
        """
        orphans = [group_id for group_id, group in self._groups.items() if group.worker == worker]
        for group_id in orphans:
            self._groups[group_id].worker = None
            heapq.heappush(self._lost, group_id)
            self.reissued[reason] += 1
        return tuple(orphans)

    def failed(self, group_id: int, attempt: int, reason: str, retries: int) -> bool:
        """Takes back a group that its worker, which lives, could not generate. Returns whether it will be issued again.

        It then waits as after `lost`, and `reason` is counted in `reissued`. It will not be if it has failed more than
        `retries` times: the caller must give it up. An attempt that is no longer expected changes nothing.
        """
        if not self.expects(group_id, attempt):
            return True
        group = self._groups[group_id]
        group.failures += 1
        if group.failures > retries:
            return False
        group.worker = None
        heapq.heappush(self._lost, group_id)
        self.reissued[reason] += 1
        return True

    def refills_of(self, group_id: int) -> int:
        """How often a group that is held was replaced by one of another prompt."""
        return self._groups[group_id].refills

    def may_refill(self, group_id: int) -> bool:
        """Whether `refill` would take the group back, if it has arrived."""
        group = self._groups.get(group_id)
        return group is not None and group.refills < self.plan.max_refills

    def refill(self, group_id: int, attempt: int, reason: str) -> bool:
        """Takes back a group that has arrived, so that it is generated anew with another prompt. Returns whether it did.

        It returns False, and changes nothing, if the group is no longer held, if its present attempt is not `attempt`, or
        if it was refilled `max_refills` times. The group keeps its number, its step and its reserved bytes. `reason` is
        counted in `reissued`.

        Raises RuntimeError if the group has not arrived, or if its step was already assembled.
        """
        if not self.may_refill(group_id) or self._groups[group_id].attempt != attempt:
            return False
        group = self._groups[group_id]
        if not group.arrived or group.passed_policy or (self._leased and group_id in self._leased.group_ids):
            raise RuntimeError(f"group {group_id} was refilled ({reason}) before its arrival, or after its step began")
        group.refills += 1
        self._issue_again(group_id, reason)
        return True

    def take_back(self, group_id: int, reason: str) -> bool:
        """Takes back a group whose data was lost after its arrival, so that it is generated again with the same prompt.

        It is voided instead if another policy version may generate it, and the queue has no room for what that may write.
        `reason` is counted in `reissued` or `voided`. Nothing is changed for a group that is not held, has not arrived, or
        has been trained by the policy.

        Returns whether nobody needs the lost data any more. If the group's step is leased, it is still needed, and nothing is
        changed.
        """
        group = self._groups.get(group_id)
        if group is None or not group.arrived or group.passed_policy:
            return True
        if self._leased and group_id in self._leased.group_ids:
            return False
        # Under `lag: exact` the same version writes the same again, and takes the bytes that are reserved.
        if self.plan.lag != "exact":
            more = self.plan.group_bytes - group.num_bytes
            if self.reserved_bytes + more > self.plan.max_bytes:
                return self.void(group_id, reason)
            self.reserved_bytes += more
            group.num_bytes += more
        self._issue_again(group_id, reason)
        return True

    def _issue_again(self, group_id: int, reason: str) -> None:
        """Puts a group that has arrived, and that no step has leased, among those that wait to be issued again."""
        group = self._groups[group_id]
        group.arrived = False
        self._arrived_steps[group.due_step] -= 1
        # It may be there still: a group that came after its worker was lost stays in the heap until its turn.
        if group_id not in self._lost:
            heapq.heappush(self._lost, group_id)
        self.reissued[reason] += 1
        for ledger in self._ledgers:
            ledger.queued -= 1
            ledger.in_flight += 1

    def holds(self, group_id: int) -> bool:
        """Whether the group was admitted, and was neither voided nor freed. Data of it may then still be kept."""
        return group_id in self._groups

    def void(self, group_id: int, reason: str, attempt: int | None = None) -> bool:
        """Gives up a group, for both learners, and frees its bytes. Returns whether it did.

        It returns False, and changes nothing, if the group is no longer held, or if its present attempt is not
        `attempt`. So a caller that has waited for something in between need not check first.

        Raises RuntimeError if the group's step was already assembled.
        """
        group = self._groups.get(group_id)
        if group is None or attempt not in (None, group.attempt):
            return False
        if group.passed_policy or (self._leased and group_id in self._leased.group_ids):
            raise RuntimeError(f"group {group_id} was voided ({reason}) after its step {group.due_step} was assembled")
        del self._groups[group_id]
        self.reserved_bytes -= group.num_bytes
        self._voided_steps[group.due_step][reason] += 1
        for ledger in self._ledgers:
            if group.arrived:
                ledger.queued -= 1
            else:
                ledger.in_flight -= 1
            ledger.voided[reason] += 1
        self._arrived_steps[group.due_step] -= group.arrived
        return True

    def late(self, now: float) -> tuple[tuple[int, int, str], ...]:
        """The late groups of the next step, which may be aborted: (group, attempt, worker).

        There are none under `overage: wait`.
        """
        return tuple(late for deadline, late in self._deadlines() if deadline <= now)

    def next_deadline(self, after: Container[tuple[int, int, str]] = ()) -> float | None:
        """The time at which `late` will return a group that is not in `after`.

        None means that this will not happen before another transition of the schedule.
        """
        return min((deadline for deadline, late in self._deadlines() if late not in after), default=None)

    def _deadlines(self) -> list[tuple[float, tuple[int, int, str]]]:
        """The deadlines of the next step's groups in flight: [(deadline, (group, attempt, worker)), ...].

        A deadline is `overage_after` seconds after the latest of three events: the last arrival of the step, the
        beginning of the step, and the admission of the group.
        """
        step, plan = self.policy_version, self.plan
        # A group is late only in comparison with the rest of its step. So all groups of the step must have been
        # admitted, and at least one must have arrived. A step of a single group has no rest to wait for.
        some_not_admitted_yet = plan.due_step(self._next_group) <= step < self.num_steps
        nothing_to_compare = step not in self._last_arrival and plan.groups_per_step > 1
        if plan.overage == "wait" or self._leased or some_not_admitted_yet or nothing_to_compare:
            return []
        since = max(self._last_arrival.get(step, 0.0), self._step_began)
        return [
            (max(since, group.admitted_at) + plan.overage_after, (group_id, group.attempt, group.worker))
            for group_id, group in self._of_step(step)
            if group.worker is not None
        ]

    def _of_step(self, step: int) -> list[tuple[int, _Group]]:
        """The groups of a step that are held, as (number, group) in rising order."""
        first = step * self.plan.groups_per_step
        numbers = range(first, first + self.plan.groups_per_step)
        return [(group_id, self._groups[group_id]) for group_id in numbers if group_id in self._groups]

    # Clocks

    def assemble(self) -> Assembly | None:
        """Leases the next policy step to the policy learner, or returns None if it cannot be trained yet.

        It can be trained once each of its groups has arrived or was voided, and the head is not too old. The lease ends
        with `policy_trained`; until then no further step is leased.
        """
        step = self.policy_version
        if self._leased or step >= self.num_steps or self.head_version < self.plan.head_version_for(step):
            return None
        if self._arrived_steps[step] + self._voided_steps[step].total() < self.plan.groups_per_step:
            return None
        ready = tuple(group_id for group_id, group in self._of_step(step) if group.arrived)
        ages = tuple(step - self._groups[group_id].oldest_version for group_id in ready)
        exact = self.plan.lag == "exact"
        head_version = self.plan.head_version_for(step) if exact else self.head_version
        self._assert_bounds(step, head_version, ages)
        self._leased = Assembly(step=step, group_ids=ready, head_version=head_version, policy_ages=ages)
        return self._leased

    def _assert_bounds(self, step: int, head_version: int, ages: tuple[int, ...]) -> None:
        """Raises RuntimeError if an age breaks its bound, or if under `lag: exact` a policy age is not the exact one.

        `admit` and `assemble` should make that impossible. The check is there for errors in them, and for engines that
        sampled with another version than they were told.
        """
        expected = step - self.plan.policy_version_for(step)
        broken = [
            age for age in ages if age > self.plan.max_policy_age or (self.plan.lag == "exact" and age != expected)
        ]
        if broken or not 0 <= step - head_version <= self.plan.max_head_age:
            raise RuntimeError(
                f"step {step} would break its bounds: policy ages {ages} against max_policy_age {self.plan.max_policy_age} "
                f"({self.plan.lag}), head version {head_version} against max_head_age {self.plan.max_head_age}"
            )

    def policy_trained(self, step: int, now: float) -> None:
        """Records that the policy has finished the leased step. The policy version grows by 1.

        This holds for a step that was trained, left out or empty. Its groups now wait for the head. Raises RuntimeError
        if another step is leased, or none.
        """
        if self._leased is None or self._leased.step != step:
            raise RuntimeError(f"policy step {step} was trained and {self._leased} is leased")
        group_ids = self._leased.group_ids
        self._leased, self._step_began = None, now
        self._last_arrival.pop(step, None)
        self.policy_version += 1
        self.policy_ledger.queued -= len(group_ids)
        self.policy_ledger.trained += len(group_ids)
        for group_id in group_ids:
            self._groups[group_id].passed_policy = True

    def head_trained(self, step: int) -> tuple[int, ...]:
        """Records that the head has finished a step. The head version grows by 1, even if the head is frozen.

        Returns the groups of the step, which are now freed. Raises RuntimeError unless it is the next step of the head
        and the policy has finished it.
        """
        if step != self.head_version or step >= self.policy_version:
            raise RuntimeError(
                f"head step {step} was trained at head {self.head_version}, policy {self.policy_version}"
            )
        self.head_version += 1
        passed = tuple(group_id for group_id, _ in self._of_step(step))
        for group_id in passed:
            self.reserved_bytes -= self._groups.pop(group_id).num_bytes
        self.head_ledger.queued -= len(passed)
        self.head_ledger.trained += len(passed)
        self._voided_steps.pop(step, None)
        self._arrived_steps.pop(step, None)
        return passed

    def end(self) -> tuple[int, ...]:
        """Ends the run after the steps that the policy has finished. No step may be leased.

        Returns the groups that were admitted for later steps, which are now voided.
        """
        self.num_steps = self.policy_version
        ahead = tuple(group_id for group_id, group in self._groups.items() if not group.passed_policy)
        for group_id in ahead:
            self.void(group_id, "run_ended")
        return ahead

    @property
    def finished(self) -> bool:
        """Whether policy and head have finished all steps."""
        return self.policy_version >= self.num_steps and self.head_version >= self.policy_version

    @property
    def oldest_policy_version_needed(self) -> int:
        """The oldest policy version that may still be needed to generate a group. Older ones can be deleted."""
        if self.plan.lag == "bounded":
            return self.policy_version
        # A lost group is generated again with its own version, so each group in flight keeps that version alive. So does
        # one that may be refilled.
        refills = self.plan.max_refills
        steps = [
            group.due_step
            for group in self._groups.values()
            if not group.arrived or (group.refills < refills and not group.passed_policy)
        ]
        return self.plan.policy_version_for(min(steps, default=self.plan.due_step(self._next_group)))

    @property
    def oldest_head_version_needed(self) -> int:
        """The oldest head version that may still be needed to score a step. Older ones can be deleted."""
        step = self.policy_version
        return self.plan.head_version_for(step) if self.plan.lag == "exact" else self.head_version

    # Ledger

    @property
    def _ledgers(self) -> tuple[Ledger, Ledger]:
        return self.policy_ledger, self.head_ledger

    def in_flight(self) -> dict[int, str]:
        """The worker of each group in flight, by group; `nobody` for a group that waits to be issued again."""
        return {group_id: group.worker or "nobody" for group_id, group in self._groups.items() if not group.arrived}

    def audit(self) -> None:
        """Checks the books: both ledgers must balance and agree with the groups and with the bytes reserved.

        Raises RuntimeError if they do not.
        """
        for ledger in self._ledgers:
            ledger.check()
        groups = self._groups.values()
        in_flight = sum(not group.arrived for group in groups)
        for_head = len(groups) - in_flight
        for_policy = sum(group.arrived and not group.passed_policy for group in groups)
        held = sum(group.num_bytes for group in groups)
        told = (
            self.policy_ledger.in_flight,
            self.head_ledger.in_flight,
            self.policy_ledger.queued,
            self.head_ledger.queued,
        )
        if told != (in_flight, in_flight, for_policy, for_head) or held != self.reserved_bytes:
            raise RuntimeError(
                f"the ledgers say {told}, {self.reserved_bytes} bytes; the groups are "
                f"{(in_flight, in_flight, for_policy, for_head)}, {held} bytes"
            )
        if self.reserved_bytes > self.plan.max_bytes:
            raise RuntimeError(f"{self.reserved_bytes} bytes are reserved; the limit is {self.plan.max_bytes}")
