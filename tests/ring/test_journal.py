"""Finished groups between two checkpoints: which are kept, which are used again, and what damage costs."""

import os
import random
import shutil
import signal
import struct
from pathlib import Path
from typing import ClassVar

import pytest

from actors.group_journal import GroupJournal, read_journal
from actors.replay_queue import ReplayQueue
from r2m_async.cpu_threads import one_thread
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.launch.training import resume, train
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.directory import RECORDS
from r2m_async.runs.records import read_records
from r2m_async.schedule import Plan, Schedule

# The file


def entry(group_id, attempt=0):
    return {"group_id": group_id, "attempt": attempt}


def written(path, count=4):
    journal = GroupJournal(path, 10**6)
    for group_id in range(count):
        assert journal.append(entry(group_id), {"group": bytes([group_id]) * 50})
    return journal


def test_what_is_appended_is_read_back_in_order(tmp_path):
    journal = written(tmp_path / "a.groups")
    assert list(read_journal(tmp_path / "a.groups")) == [
        (entry(group_id), {"group": bytes([group_id]) * 50}) for group_id in range(4)
    ]
    assert journal.num_bytes == (tmp_path / "a.groups").stat().st_size


def test_a_journal_never_grows_beyond_its_bytes(tmp_path):
    room = written(tmp_path / "a.groups").num_bytes
    journal = GroupJournal(tmp_path / "b.groups", room - 1)
    assert [journal.append(entry(group_id), {"group": bytes(50)}) for group_id in range(4)] == [True] * 3 + [False]
    assert (tmp_path / "b.groups").stat().st_size == journal.num_bytes < room
    assert journal.append(entry(9), {}), "a smaller one still fits"


def test_cut_at_any_byte_a_journal_gives_every_record_before_the_cut(tmp_path):
    written(tmp_path / "a.groups")
    whole = (tmp_path / "a.groups").read_bytes()
    records = list(read_journal(tmp_path / "a.groups"))
    for length in range(len(whole)):
        (tmp_path / "cut.groups").write_bytes(whole[:length])
        read = [one for one in read_journal(tmp_path / "cut.groups") if not isinstance(one, str)]
        assert read == records[: len(read)]
        assert len(read) == max(0, length - 8) * 4 // (len(whole) - 8), "records of one size"


def test_a_flipped_byte_costs_at_most_what_it_is_in_and_is_told(tmp_path):
    written(tmp_path / "a.groups")
    whole = (tmp_path / "a.groups").read_bytes()
    records, rng = list(read_journal(tmp_path / "a.groups")), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.groups").write_bytes(data)
        read = list(read_journal(tmp_path / "flipped.groups"))
        told = [one for one in read if isinstance(one, str)]
        assert told and all(str(tmp_path / "flipped.groups") in one for one in told)
        assert [one for one in read if not isinstance(one, str)] == [one for one in records if one in read], (
            "none is invented"
        )


def test_cut_at_any_byte_a_journal_is_gone_on_with_and_loses_no_whole_record(tmp_path):
    written(tmp_path / "a.groups")
    whole, path = (tmp_path / "a.groups").read_bytes(), tmp_path / "cut.groups"
    for length in range(8, len(whole) + 1):
        path.write_bytes(whole[:length])
        before = [one for one in read_journal(path) if not isinstance(one, str)]
        journal = GroupJournal.reopened(path, len(whole) + 200)
        assert journal.append(entry(9), {})
        assert list(read_journal(path)) == [*before, (entry(9), {})]
        assert journal.num_bytes == path.stat().st_size <= len(whole) + 200
        assert not GroupJournal.reopened(path, journal.num_bytes).append(entry(9), {}), "it is full"


def test_a_journal_that_is_gone_is_made_anew(tmp_path):
    journal = GroupJournal.reopened(tmp_path / "journal" / "a.groups", 1000)
    assert journal.append(entry(1), {}) and len(list(read_journal(tmp_path / "journal" / "a.groups"))) == 1


def test_a_new_queue_goes_on_with_the_journal_of_the_one_that_was_lost(tmp_path):
    queues = [ReplayQueue(), ReplayQueue()]
    path = str(tmp_path / "a.groups")
    queues[0].begin_journal(path, 10**6, (), [])
    for group_id, queue in enumerate(queues):
        queue.put(group_id, ("group",), f"group {group_id}")
        if group_id:
            queue.reopen_journal(path, 10**6)
        assert queue.keep(group_id, ("group",), entry(group_id)) > (0,)
    assert ReplayQueue().recover(str(tmp_path))[0] == {"entries": {0: entry(0), 1: entry(1)}, "damages": []}


def test_a_length_that_is_absurd_allocates_nothing(tmp_path):
    (tmp_path / "a.groups").write_bytes(b"R2MJ\x01\0\0\0" + struct.pack("<Q16s", 2**63, b"") + b"rest")
    assert ["ends within the record" in one for one in read_journal(tmp_path / "a.groups")] == [True]


@pytest.mark.parametrize("buffers", [True, False])
def test_the_queue_takes_up_the_newest_record_of_each_group(tmp_path, buffers):
    queue = ReplayQueue(buffers)
    made = bytes if buffers else (lambda data: data.decode())
    queue.begin_journal(str(tmp_path / "step-000001.groups"), 10**6, (), [])
    for group_id, text, attempt in ((3, b"old", 0), (4, b"four", 0), (3, b"new", 1)):
        queue.put(group_id, ("group", "embeddings"), made(text), made(b"not kept"))
        assert queue.keep(group_id, ("group",), entry(group_id, attempt)) > (0,)
    queue.free((4,))
    again = ReplayQueue(buffers)
    (found,) = again.recover(str(tmp_path))
    assert found == {"entries": {3: entry(3, 1), 4: entry(4, 0)}, "damages": []}
    (_, new) = again.get((3,), "group")
    assert bytes(new) == b"new" if buffers else new == "new"
    with pytest.raises(KeyError):
        again.get((3,), "embeddings")
    again.begin_journal(str(tmp_path / "step-000002.groups"), 10**6, (), [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002.groups"]
    assert again.keep(9, ("group",), entry(9)) == (8,), "it was freed meanwhile, so nothing was appended"


@pytest.mark.parametrize("step", [2, 3])
def test_killed_while_a_journal_begins_the_groups_of_the_last_one_are_still_there(tmp_path, monkeypatch, step):
    """At every call of the system that writes, names or removes. The new journal may have the name of the old one."""
    path, last = tmp_path / f"step-{step:06d}.groups", tmp_path / "step-000002.groups"
    for killed_at in range(20):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        queue, calls = ReplayQueue(), 0
        queue.begin_journal(str(last), 10**6, (), [])
        for group_id in (4, 5):
            queue.put(group_id, ("group",), f"group {group_id}")
            queue.keep(group_id, ("group",), entry(group_id))

        def dies(do, killed_at=killed_at):
            def call(*args, **how):
                nonlocal calls
                calls += 1
                if calls > killed_at:
                    raise KeyboardInterrupt
                return do(*args, **how)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "touch")):
                patch.setattr(owner, name, dies(getattr(owner, name)))
            try:
                begun = queue.begin_journal(str(path), 10**6, ("group",), [entry(4), entry(5), entry(6)])
            except KeyboardInterrupt:
                begun = None
        again = ReplayQueue()
        assert again.recover(str(tmp_path))[0] == {"entries": {4: entry(4), 5: entry(5)}, "damages": []}, killed_at
        if begun:
            break
    assert begun == ({"bytes": path.stat().st_size, "without_room": 0},) and killed_at > 2
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_groups_for_which_a_new_journal_has_no_room_are_counted(tmp_path):
    queue = ReplayQueue()
    for group_id in range(3):
        queue.put(group_id, ("group",), "x" * 500)
    (begun,) = queue.begin_journal(str(tmp_path / "a.groups"), 1400, ("group",), [entry(one) for one in range(3)])
    assert begun == {"bytes": (tmp_path / "a.groups").stat().st_size, "without_room": 1}


# Which groups are used again


def plan(**changes):
    defaults = dict(num_steps=10, groups_per_step=2, max_policy_age=1, max_head_age=0, max_bytes=400, group_bytes=100)
    return Plan(**defaults | changes)


@pytest.mark.parametrize(
    ("group_id", "version", "changes", "reason"),
    [
        (6, 3, {}, None),
        (6, 2, {}, None),
        (5, 2, {}, "trained"),
        (20, 3, {}, "after_the_end"),
        (6, 1, {}, "too_old"),
        (6, 3, {"lag": "exact"}, "other_version"),
        (6, 2, {"lag": "exact"}, None),
        (8, 3, {"lag": "exact"}, None),
        (6, 2**31 - 1, {"lag": "exact"}, None),
        (9, 3, {}, None),
        (9, 3, {"max_bytes": 300}, "no_room"),
    ],
)
def test_a_group_of_a_journal_is_used_again_within_the_bounds_alone(group_id, version, changes, reason):
    schedule = Schedule(plan(**changes), first_step=3)
    assert schedule.readmit(group_id, 0, 0, version, 60, 0.0) == reason
    assert schedule.holds(group_id) == (reason is None)
    schedule.audit()


def test_what_is_missing_between_groups_of_a_journal_is_admitted_in_order():
    schedule = Schedule(plan(), first_step=3)
    assert schedule.readmit(6, 2, 0, 3, 60, 0.0) is None and schedule.readmit(8, 0, 0, 3, 60, 0.0) is None
    with pytest.raises(RuntimeError, match="group 8 is readmitted twice"):
        schedule.readmit(8, 0, 0, 3, 60, 0.0)
    admitted = [schedule.admit("w", 3, 0.0).group_id for _ in range(2)]
    assert admitted == [7, 9]
    schedule.audit()
    assert schedule.arrived(7, 0, 3, 60, 1.0)
    assembly = schedule.assemble()
    assert assembly.group_ids == (6, 7) and assembly.policy_ages == (0, 0)


# In a run

STEPS = 5


@pytest.fixture
def config(tiny_config, tmp_path):
    """Bounded, with groups generated ahead, and a checkpoint after every second step."""
    config = tiny_config.run(num_steps=STEPS, output_dir=str(tmp_path / "runs")).checkpoint(every=2, keep=9)
    return config.scheduling(max_policy_age=2, max_head_age=1).evaluation(every=None)


class Watched(Ring):
    """A ring of which a test sees what was generated, and which dies when it is told to."""

    generated: ClassVar[list[int]] = []
    die_at = None

    def step(self):
        for actor in self.controller.stages.rollouts:
            if not hasattr(actor.carrier, "watched"):
                actor.carrier.watched = call = actor.carrier.call

                async def listen(method, *args, call=call):
                    if method.name == "generate":
                        self.generated.append(args[0].group_id)
                    return await call(method, *args)

                actor.carrier.call = listen
        if self.controller.schedule.policy_version == self.die_at:
            raise KeyboardInterrupt
        return super().step()


@pytest.fixture
def watched(monkeypatch):
    Watched.generated, Watched.die_at = [], None
    monkeypatch.setattr(training, "Ring", Watched)
    return Watched


@pytest.mark.ring
@pytest.mark.parametrize("lag", ["bounded", "exact"])
def test_groups_that_were_finished_are_not_generated_again_and_are_trained_once(config, watched, capsys, lag):
    config = config.scheduling(lag=lag, max_policy_age=2, max_head_age=1)
    with one_thread():
        undisturbed = train(config, in_process=True)
        watched.die_at = 3
        with pytest.raises(KeyboardInterrupt):
            train(config.run(name="killed"), in_process=True)
        (run,) = undisturbed.parent.glob("killed-*")
        [journal] = (run / "journal").iterdir()
        kept = [record[0] for record in read_journal(journal)]
        assert journal.name == "step-000002.groups" and kept
        assert all(one["report"].newest_version <= 2 and one["group_id"] >= 4 for one in kept)
        watched.generated, watched.die_at = [], None
        resume(run, in_process=True)
    again = {one["group_id"] for one in kept}
    assert f"journal: {len(again)} finished groups taken up again\n" in capsys.readouterr().out
    assert sorted([*again, *watched.generated]) == list(range(4, 2 * STEPS)), "each once"
    assert not (run / "journal").exists(), "a finished run needs none"
    last = read_records(run / "metrics.jsonl")[-1]
    assert last["ledger/trained"] == last["ledger/admitted"] == 2 * STEPS
    assert all(record["age/policy_max"] <= 2 for record in read_records(run / "metrics.jsonl"))
    if lag == "exact":
        one, other = (
            (checkpoint_path(path, STEPS) / "policy_learner.msgpack").read_bytes() for path in (undisturbed, run)
        )
        assert one == other


@pytest.mark.ring
def test_damaged_and_useless_groups_are_left_out_by_reason_and_generated_anew(config, watched, capsys):
    """The journal of step 2 beside a checkpoint of step 1, as after damage to that of step 2."""
    watched.die_at = 3
    with one_thread(), pytest.raises(KeyboardInterrupt):
        train(config, in_process=True)
    (run,) = Path(config.run.output_dir).iterdir()
    [journal] = (run / "journal").iterdir()
    data = bytearray(journal.read_bytes())
    data[-1] ^= 1
    journal.write_bytes(data)
    kept = [one for one in read_journal(journal) if not isinstance(one, str)]
    shutil.rmtree(checkpoint_path(run, 2))
    for name in RECORDS:
        (run / name).unlink()
    watched.generated, watched.die_at = [], None
    with one_thread():
        with Ring.of(config, in_process=True) as ring:
            ring.step()
            ring.save(checkpoint_path(run, 1))
        resume(run, in_process=True)
    said = capsys.readouterr().out
    newer = sum(one[0]["report"].newest_version > 1 for one in kept)
    assert newer and f"{newer} left out (newer_version)" in said
    assert "1 left out (damaged)" in said and "is damaged: it does not have its digest" in said
    assert read_records(run / "metrics.jsonl")[-1]["ledger/trained"] == 2 * STEPS


@pytest.mark.ring
def test_a_long_run_without_checkpoints_remembers_only_the_groups_under_way(config):
    config = config.run(num_steps=12).head(omega_horizon=12)
    with Ring.of(config, in_process=True) as ring:
        while not ring.finished:
            ring.step()
            assert len(ring.controller.journal._entries) <= 2 * (2 + 2), "two steps ahead, the present one and the last"


@pytest.mark.ring
def test_without_room_groups_are_counted_and_without_a_journal_none_is_kept(config, watched):
    with one_thread():
        run = train(config.queue(journal=100), in_process=True)
        assert read_records(run / "metrics.jsonl")[-1]["journal/groups_without_room"] > 0
        run = train(config.queue(journal=0).run(name="none"), in_process=True)
    assert not (run / "journal").exists()


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_on_ray_a_lost_learner_costs_no_finished_group(config, watched, monkeypatch):
    struck = []

    def step(self, real=Watched.step):
        metrics = real(self)
        if metrics["step"] == 3 and not struck:
            struck.append(True)
            os.kill(self.process_ids()["policy-learner"][0], signal.SIGKILL)
        return metrics

    monkeypatch.setattr(Watched, "step", step)
    run = train(config)
    assert struck
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["ledger/trained"] == 2 * STEPS
    twice = len(watched.generated) - len(set(watched.generated))
    assert twice < 4, "only what was sampled with versions that were lost with the learner"
