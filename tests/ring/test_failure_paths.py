"""What a user sees when something in the ring fails or hangs, and when: on the simulator's clock, where a minute is free."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, GenerationFailed, StageLost, StalledRun, StepFailed
from r2m_async.launch.loop_thread import LoopThread
from r2m_async.ring.calls import Calls
from r2m_async.ring.controller import Controller
from r2m_async.ring.delivery import Delivery
from r2m_async.ring.journal import Journal
from r2m_async.ring.queue import Queue
from r2m_async.ring.simulator import SimulatedStage, VirtualClockLoop, run_virtually, simulated_ticket
from r2m_async.ring.stages import QueueStage, Stages, local_bytes
from r2m_async.ring.tasks import STOP_TIMEOUT
from r2m_async.ring.waiting import Waits
from r2m_async.schedule import Plan

STALL_AFTER = 60.0


class Faulty(SimulatedStage):
    """Takes 0.01 s for a call; `hangs` and `fails` say at which methods, and from which of their calls on."""

    def __init__(self, name, hangs=(), fails=None, first=0, seconds=0.01, **options):
        super().__init__(name, lambda method: seconds, **options)
        self.hangs, self.fails, self.first = hangs, fails or {}, first
        self.calls = {}

    async def call(self, method, *args):
        self.calls[method.name] = number = self.calls.get(method.name, -1) + 1
        if number >= self.first and method.name in self.hangs:
            await asyncio.get_running_loop().create_future()
        if number >= self.first and method.name in self.fails:
            raise self.fails[method.name]
        return await super().call(method, *args)

    def result(self, method, args):
        return (None, {"optimizer": 1}) if method == "state" else super().result(method, args)


def stages_of(**others):
    stages = {
        "rollouts": (Faulty("rollout-0"),),
        "annotators": (Faulty("annotator-0"),),
        **{kind: Faulty(name) for kind, name in (("queue", "queue"), ("head", "head-learner"))},
        "policy": Faulty("policy-learner"),
    }
    return Stages.carried_by(**stages | others, **local_bytes())


def plan_of(**changes):
    sizes = dict(num_steps=3, groups_per_step=2, max_policy_age=0, max_head_age=0, max_bytes=1, group_bytes=0)
    return Plan(**sizes | changes)


CONFIG = R2MConfig().evaluation(every=None).scheduling(stall_after=STALL_AFTER)


def drive(stages, do, config=CONFIG, plan=None):
    """What `do(controller)` raised, when, and the controller, which has been stopped."""
    told = {}

    async def run():
        controller = told["controller"] = Controller(config, plan or plan_of(), stages, simulated_ticket)
        await controller.start()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await do(controller)
        except Exception as error:
            told["error"], told["after"] = error, loop.time() - began
        stopping = loop.time()
        await controller.stop()
        told["stopped_after"] = loop.time() - stopping
        await asyncio.sleep(4 * STALL_AFTER)  # what cannot be cancelled ends by itself

    loop = VirtualClockLoop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return told


async def train(controller):
    while not controller.finished:
        await controller.step()
    await controller.drain()


async def save(controller):
    await controller.step()
    await controller.checkpoint("nowhere")


@pytest.mark.parametrize("method", ["embed", "score"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_beside_a_hanging_proximal_pass_is_what_the_user_sees_at_once(method, at):
    cause = ZeroDivisionError("the real cause")
    stages = stages_of(
        annotators=(Faulty("annotator-0", fails={method: cause}, first=at),),
        policy=Faulty("policy-learner", hangs=("proximal",), first=at // (2 if method == "embed" else 1)),
    )
    told = drive(stages, train)
    assert told["error"] is cause and told["after"] < 1.0
    assert any(note.startswith("In step ") for note in cause.__notes__)
    assert "_score" in _functions(cause) or "_embed" in _functions(cause), "its own traceback"


def test_an_error_of_the_queue_beside_a_hanging_proximal_pass_is_seen_at_once():
    stages = stages_of(
        queue=Faulty("queue", fails={"get": KeyError("group 0 has no 'embeddings'")}, first=1),
        policy=Faulty("policy-learner", hangs=("proximal",)),
    )
    told = drive(stages, train)
    assert isinstance(told["error"], KeyError) and told["after"] < 1.0


def test_a_hanging_learner_does_not_hide_that_the_annotator_died():
    stages = stages_of(
        annotators=(Faulty("annotator-0", crashes=lambda method: method == "score"),),
        policy=Faulty("policy-learner", hangs=("proximal",)),
    )
    told = drive(stages, train)
    assert isinstance(told["error"], StageLost) and told["after"] < 1.0
    assert str(told["error"]) == "step 0 (groups [0, 1]): annotator-0 crashed in score"


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("policy", "proximal"),
        ("policy", "train"),
        ("policy", "weights"),
        ("head", "update"),
        ("annotators", "embed"),
        ("annotators", "score"),
        ("rollouts", "generate"),
        ("rollouts", "load_weights"),
        ("queue", "put"),
        ("queue", "get"),
        ("queue", "free"),
    ],
)
def test_whatever_hangs_is_named_within_the_deadline_and_the_ring_stops(kind, method):
    name = {"policy": "policy-learner", "head": "head-learner"}.get(kind, kind.removesuffix("s") + "-0")
    name = "queue" if kind == "queue" else name
    stage = Faulty(name, hangs=(method,), first=1)
    told = drive(stages_of(**{kind: (stage,) if kind.endswith("s") else stage}), train)
    assert isinstance(told["error"], StalledRun), told
    assert f"{name} {method} waits for its end" in str(told["error"])
    assert told["after"] <= 1.1 * STALL_AFTER and told["stopped_after"] <= STOP_TIMEOUT


def test_two_that_hang_at_once_are_both_named_and_do_not_keep_the_ring_from_stopping():
    stages = stages_of(
        annotators=(Faulty("annotator-0", hangs=("embed",)),), policy=Faulty("policy-learner", hangs=("proximal",))
    )
    told = drive(stages, train)
    for line in ("annotator-0 embed waits for its end: group 0", "policy-learner proximal waits for its end: step 0"):
        assert line in str(told["error"])
    assert told["stopped_after"] <= STOP_TIMEOUT


class Stubborn(Faulty):
    """A call that cannot be cancelled, as one inside of a library may be."""

    async def call(self, method, *args):
        if method.name != "train":
            return await super().call(method, *args)
        ends_at = asyncio.get_running_loop().time() + 3 * STALL_AFTER
        while asyncio.get_running_loop().time() < ends_at:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                pass
        return self.result(method.name, args)


def test_a_call_that_ignores_cancelling_does_not_keep_the_ring_from_stopping():
    told = drive(stages_of(policy=Stubborn("policy-learner")), train)
    assert "policy-learner train waits for its end" in str(told["error"])
    assert told["stopped_after"] == pytest.approx(STOP_TIMEOUT)


@pytest.mark.parametrize("kind", ["policy", "head"])
def test_a_learner_that_freezes_while_a_checkpoint_is_written_ends_the_run_by_its_name(kind):
    name = f"{kind}-learner"
    told = drive(stages_of(**{kind: Faulty(name, hangs=("state",))}), save)
    assert isinstance(told["error"], StalledRun)
    assert f"{name} state waits for its end" in str(told["error"]) and "driver waits for a checkpoint" in str(
        told["error"]
    )
    assert told["after"] <= 1.1 * STALL_AFTER


def test_a_payload_that_never_comes_is_named_as_what_the_checkpoint_waits_for():
    stages = stages_of()

    async def never(payload):
        await asyncio.get_running_loop().create_future()

    stages = Stages(
        **{name: getattr(stages, name) for name in ("rollouts", "queue", "annotators", "policy", "head", "from_bytes")},
        to_bytes=never,
    )
    told = drive(stages, save)
    assert isinstance(told["error"], StalledRun) and "policy_learner waits for its bytes" in str(told["error"])


def test_a_checkpoint_of_a_ring_that_has_failed_raises_the_failure():
    told = drive(stages_of(head=Faulty("head-learner", fails={"state": ZeroDivisionError("in the head")})), save)
    assert isinstance(told["error"], ZeroDivisionError) and told["after"] < 1.0


def test_every_group_that_hangs_is_named_with_its_engine():
    """The list once had one line per engine and method, which the first group to end took away."""

    class Third(Faulty):
        async def call(self, method, *args):
            if method.name == "generate" and args[0].group_id != 2:
                return self.result(method.name, args)
            return await super().call(method, *args)

    config = CONFIG.rollouts(engine="vllm", concurrent_groups=4)
    actor = Third("rollout-0", hangs=("generate",))
    told = drive(stages_of(rollouts=(actor,)), train, config, plan_of(groups_per_step=4))
    assert "rollout-0 generate waits for its end: group 2 (since" in str(told["error"])
    assert "groups in flight: 2 (rollout-0)" in str(told["error"])


def test_the_deadline_starts_anew_with_everything_that_ends():
    """Steps of most of the deadline each, one after the other, are no stall."""
    stages = stages_of(policy=SimulatedStage("policy-learner", lambda method: 0.9 * STALL_AFTER))
    results, _ = run_virtually(CONFIG, plan_of(), stages)
    assert len(results) == 3 and results[-1]["time/since_start"] > 3 * STALL_AFTER


def test_a_driver_that_does_not_ask_for_steps_is_no_stall():
    async def dawdle(controller):
        await controller.step()
        await asyncio.sleep(10 * STALL_AFTER)
        await controller.step()

    assert "error" not in drive(stages_of(), dawdle)


class DiesComingBack(Faulty):
    async def restart(self):
        raise StageLost(self.name, f"{self.name} did not come back: killed again")


def test_an_actor_killed_again_each_time_it_is_back_ends_the_run_by_max_restarts():
    dying = DiesComingBack("rollout-0", fails={"generate": StageLost("rollout-0", "killed")})
    told = drive(stages_of(rollouts=(dying,)), train, CONFIG.rollouts(max_restarts=5))
    assert isinstance(told["error"], StageLost) and told["after"] < 1.0
    assert "rollout-0 died 6 times in a row; rollouts.max_restarts is 5, and 0 actors are left" in str(told["error"])
    assert "killed again" in str(told["error"])


class DiesForAWhile(Faulty):
    """An actor that is killed in each group, and does not come back before `back_at` on the ring's clock."""

    back_at = 0.0
    killed = False

    async def call(self, method, *args):
        if method.name == "generate" and not self.killed and asyncio.get_running_loop().time() < self.back_at:
            self.killed = True
            raise StageLost(self.name, f"{self.name} was killed with its node")
        return await super().call(method, *args)

    async def restart(self):
        if asyncio.get_running_loop().time() < self.back_at:
            raise StageLost(self.name, f"{self.name} has no place")
        await super().restart()


def test_an_actor_whose_process_never_comes_is_named_and_the_other_goes_on():
    class NeverMade(Faulty):
        async def pids(self):
            await asyncio.get_running_loop().create_future()

    lines = []

    async def run(controller):
        while not controller.finished:
            await controller.step()
        lines.append(controller.waits())

    config = CONFIG.rollouts(num_actors=2)
    told = drive(stages_of(rollouts=(Faulty("rollout-0"), NeverMade("rollout-1"))), run, config)
    assert "error" not in told and "rollout-1 waits for its process" in lines[0]


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (StageLost("policy-learner", "policy-learner was lost during send"), "policy-learner was lost during send"),
        ({"failed": "no such channel"}, "the learner could not send rollout-0 its weights: no such channel"),
    ],
)
def test_a_learner_that_fails_to_send_is_told_at_once_although_the_engine_waits_for_it(sent, told):
    async def sends():
        if isinstance(sent, Exception):
            raise sent
        return sent

    async def meet():
        delivery = Delivery(CONFIG, stages_of(), Waits(), None)
        waits_in_vain = asyncio.get_running_loop().create_future()
        with pytest.raises(StageLost, match=told):
            await delivery._meet(stages_of().rollouts[0], waits_in_vain, sends())
        assert waits_in_vain.cancelled()

    asyncio.run(asyncio.wait_for(meet(), 60))


def test_an_engine_that_fails_to_receive_is_told_when_the_learner_is_free_again():
    async def meet():
        delivery = Delivery(CONFIG, stages_of(), Waits(), None)
        received, sent = (asyncio.get_running_loop().create_future() for _ in range(2))
        meeting = asyncio.create_task(delivery._meet(stages_of().rollouts[0], received, sent))
        received.set_exception(StageLost("rollout-0", "rollout-0 was lost during load_weights"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not meeting.done()
        sent.set_result({})
        with pytest.raises(StageLost, match="rollout-0 was lost during load_weights"):
            await meeting

    asyncio.run(meet())


class DiesBeforeItIsAsked(Faulty):
    """An actor whose process is killed `times` times between the moment when it is there and its first call."""

    times = 1

    async def pids(self):
        if self.times > 0:
            self.times -= 1
            raise StageLost(self.name, f"{self.name} was lost: killed at the start")
        return await super().pids()


@pytest.mark.parametrize("times", [1, 3])
def test_an_actor_that_is_killed_before_its_first_call_is_replaced_like_any_other(times):
    actors = Faulty("rollout-0"), DiesBeforeItIsAsked("rollout-1")
    actors[1].times = times

    async def run(controller):
        while not controller.finished:
            await controller.step()

    told = drive(stages_of(rollouts=actors), run, CONFIG.rollouts(num_actors=2, max_restarts=3))
    assert "error" not in told, told


def test_an_actor_that_is_killed_at_every_start_ends_the_run_by_max_restarts():
    dying = DiesBeforeItIsAsked("rollout-0")
    dying.times = 1000
    told = drive(stages_of(rollouts=(dying,)), train, CONFIG.rollouts(max_restarts=5))
    assert isinstance(told["error"], StageLost)
    assert "rollout-0 died 6 times in a row; rollouts.max_restarts is 5" in str(told["error"])


@pytest.mark.parametrize("gone", [0, 1])
def test_an_actor_that_leaves_and_joins_again_costs_no_step(gone):
    """The other one does its groups, and the evaluations if it was the last. Each call of `generate` takes a second."""
    actors = tuple((DiesForAWhile if index == gone else Faulty)(f"rollout-{index}", seconds=1.0) for index in range(2))
    actors[gone].back_at = 25.0
    fleet = []

    async def run(controller):
        while not controller.finished:
            fleet.append((await controller.step())["rollouts/actors"])
        await controller.drain()

    config = CONFIG.run(num_steps=40).rollouts(num_actors=2, max_restarts=1, min_actors=1).scheduling(stall_after=60.0)
    told = drive(stages_of(rollouts=actors), run, config, plan=plan_of(num_steps=40))
    assert "error" not in told, told
    assert fleet[0] == 1 and fleet[-1] == 2 and len(fleet) == 40
    schedule = told["controller"].schedule
    assert schedule.policy_ledger.trained == schedule.policy_ledger.admitted == 80
    assert schedule.reissued["actor_died"] == 1


def test_with_fewer_actors_than_min_actors_the_run_ends():
    actors = tuple(DiesForAWhile(f"rollout-{index}") for index in range(2))
    for actor in actors:
        actor.back_at = 1e9
    config = CONFIG.rollouts(num_actors=2, max_restarts=0, min_actors=1)
    told = drive(stages_of(rollouts=actors), train, config)
    assert isinstance(told["error"], StageLost)
    assert "0 actors are left, where rollouts.min_actors is 1" in str(told["error"])


class DiesOnce(Faulty):
    """A stage whose process dies in the `first`-th call of a method, and is as before when it is restarted."""

    restarts = 0

    async def call(self, method, *args):
        if method.name in self.fails:
            await asyncio.sleep(0.5)
            raise StageLost(self.name, f"{self.name} was killed")
        return await super().call(method, *args)

    async def restart(self):
        self.restarts, self.fails = self.restarts + 1, {}
        await super().restart()


@pytest.mark.parametrize("method", ["embed", "score", "initial_head"])
def test_an_annotator_that_dies_is_restarted_once_and_its_calls_are_made_again(method):
    annotator = DiesOnce("annotator-0", fails={method: None})
    told = drive(stages_of(annotators=(annotator,)), train)
    assert "error" not in told, told
    assert annotator.restarts == 1, "several groups were being embedded, and one process had died"
    schedule = told["controller"].schedule
    assert schedule.policy_ledger.trained == schedule.policy_ledger.admitted > 0


def test_an_annotator_that_dies_again_and_again_ends_the_run_with_its_own_error():
    annotator = Faulty("annotator-0", crashes=lambda method: method == "embed")
    told = drive(stages_of(annotators=(annotator,)), train, CONFIG.run(max_restarts=2))
    assert isinstance(told["error"], StageLost) and "annotator-0 crashed in embed" in str(told["error"])


def test_a_call_that_kills_its_stage_each_time_ends_the_run_although_other_calls_end_in_between():
    """Here that of the journal for one group, which no step waits for."""

    class Queue(Store):
        async def call(self, method, *args):
            if method.name == "keep" and args[0] == 3:
                await asyncio.sleep(0.05)
                raise StageLost(self.name, "killed by group 3")
            return await super().call(method, *args)

    queue = Queue("queue")

    async def run(controller):
        await controller.journal.begin("nowhere")
        await train(controller)

    plan = plan_of(num_steps=30, max_policy_age=2)
    told = drive(stages_of(queue=queue), run, CONFIG.run(max_restarts=2), plan)
    assert isinstance(told["error"], StageLost) and "killed by group 3" in str(told["error"])
    assert queue.restarts == 2


class Store(Faulty):
    """A queue that keeps what it is given. Its first processes die in the call with the number that is in `at` for each.

    done: whether that call is done first. loses: a payload that no process but the first can get.
    """

    def __init__(self, name, at=(), done=False, loses="nothing"):
        super().__init__(name)
        self.at, self.done, self.loses = list(at), done, loses
        self.number, self.restarts, self.dead = 0, 0, False
        self.parts, self.journal = {}, None

    async def call(self, method, *args):
        process = self.restarts
        if not self.dead and self.at and self.number == self.at[0]:
            self.at.pop(0)
            self.dead = True
            if self.done:
                self.result(method.name, args)
        self.number += 1
        await asyncio.sleep(0.01)
        if self.dead or process != self.restarts:
            if method.name == "begin_journal":  # calls hear of the loss in any order
                await asyncio.sleep(0.05)
            raise StageLost(self.name, f"{self.name} was lost during {method.name}")
        if self.restarts and method.name == "put" and self.loses in args[2:]:
            raise StageLost(None, "a payload was lost with its node")
        return self.result(method.name, args)

    async def restart(self):
        self.restarts += 1
        self.parts, self.journal = {}, None
        await asyncio.sleep(0.2)
        self.number, self.dead = 0, False

    def result(self, method, args):
        if method == "put":
            self.parts.setdefault(args[0], {}).update(zip(args[1], args[2:], strict=True))
        elif method == "free":
            for group_id in args[0]:
                self.parts.pop(group_id, None)
        elif method == "get":
            return None, *(self.parts[group_id][args[1]] for group_id in args[0])
        elif method == "begin_journal":
            self.journal = args[0]
            return ({"bytes": 1, "without_room": 0},)
        elif method == "reopen_journal":
            self.journal = args[0]
        elif method == "keep":
            assert self.journal is not None
        return (1,)


class Attempts(Faulty):
    """A rollout actor whose payloads say in which attempt they were made."""

    def result(self, method, args):
        if method != "generate":
            return super().result(method, args)
        report, _, _ = super().result(method, args)
        return report, f"group {args[0].group_id}, attempt {args[0].attempt}", None


STEPS = 6


def queue_dies(queue, lag="exact", max_bytes=10**6):
    """What became of a ring that trains with this queue, and the metrics of its steps."""
    metrics = []

    async def run(controller):
        while not controller.finished:
            metrics.append(await controller.step())
            if len(metrics) == 1:
                await controller.journal.begin("nowhere")
        await controller.drain()
        await asyncio.sleep(10)  # the last groups are freed

    sizes = {"max_bytes": max_bytes, "group_bytes": 10}
    plan = plan_of(num_steps=STEPS, max_policy_age=2, max_head_age=1, lag=lag, **sizes)
    config = CONFIG.scheduling(lag=lag, max_policy_age=2, max_head_age=1).run(max_restarts=2)
    return drive(stages_of(queue=queue, rollouts=(Attempts("rollout-0"),)), run, config, plan), metrics


def assert_balanced(controller, queue, trained=2 * STEPS):
    ledger = controller.schedule.policy_ledger
    assert ledger.admitted == 2 * STEPS == ledger.trained + ledger.voided.total() and ledger.trained == trained
    assert not queue.parts and not controller._queue._held
    assert queue.journal == "nowhere/step-000001.groups"


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("lag", ["exact", "bounded"])
def test_a_queue_that_dies_at_any_of_its_calls_is_given_again_what_it_held(lag, done):
    for at in range(1000):
        queue = Store("queue", [at], done)
        told, metrics = queue_dies(queue, lag)
        assert "error" not in told, (at, told["error"])
        if not queue.restarts:
            break
        assert queue.restarts == 1, "every call that was under way has failed, and one process had died"
        assert metrics[-1].get("restarts/queue", 1.0) == 1.0 and metrics[-1]["age/policy_max"] <= 2
        assert not told["controller"].schedule.reissued, "nothing was generated again"
        assert_balanced(told["controller"], queue)
    assert at > 5 * STEPS, "it was killed at each of its calls"


def test_a_queue_that_dies_again_while_it_is_given_what_it_held_is_given_it_once_more():
    for at in range(10):
        queue = Store("queue", [30, at])
        told, _ = queue_dies(queue)
        assert "error" not in told and queue.restarts == 2
        assert_balanced(told["controller"], queue)


def test_a_queue_that_dies_each_time_while_it_is_given_what_it_held_ends_the_run_by_max_restarts():
    told, _ = queue_dies(Store("queue", [30, 0, 0]))
    assert isinstance(told["error"], StageLost) and "queue was lost during put" in str(told["error"])


@pytest.mark.parametrize(
    ("lag", "max_bytes", "becomes"),
    [("exact", 20, "again"), ("bounded", 10**6, "again"), ("bounded", 20, "voided")],
)
def test_a_group_whose_payload_is_lost_with_the_queue_is_generated_again_or_voided(lag, max_bytes, becomes):
    """While its step is trained it is needed, and the ring must be built anew."""
    ends = set()
    for at in range(20, 60):
        queue = Store("queue", [at], loses="group 7, attempt 0")
        told, _ = queue_dies(queue, lag, max_bytes)
        schedule = told["controller"].schedule
        if "error" in told:
            assert isinstance(told["error"], StageLost) and told["error"].stage == "queue", told["error"]
            assert "queue was lost, and group 7 with it: a payload was lost with its node" in str(told["error"])
            ends.add("ended")
            continue
        voided = schedule.policy_ledger.voided["payload_lost"]
        assert_balanced(told["controller"], queue, 2 * STEPS - voided)
        ends |= {"again"} if schedule.reissued["payload_lost"] else {"voided"} if voided else {"not there"}
        assert voided <= (becomes == "voided")
    assert ends >= {"not there", becomes, "ended"}


@pytest.mark.parametrize(("names", "is_lost"), [(("embeddings",), True), (("group", "feedback"), False)])
def test_a_lost_part_is_lost_although_others_come_while_the_queue_is_given_what_it_held(names, is_lost):
    """Unless others of the same names have taken their place."""

    async def run():
        carrier, waits = Faulty("queue"), Waits()
        queue = Queue(QueueStage(carrier), Calls(waits, None, 2), waits)
        await queue.put(7, ("group", "feedback"), "old", "old", about="")
        carrier.fails = {"put": StageLost(None, "lost with its node")}
        again = asyncio.create_task(queue.put_again())
        await asyncio.sleep(0)
        later = asyncio.create_task(queue.put(7, names, *["new"] * len(names), about=""))
        assert set(await again) == ({7} if is_lost else set())
        with pytest.raises(StageLost):
            await later

    asyncio.run(run())


def test_calls_for_the_journal_wait_for_each_other_because_a_restart_may_turn_their_order():
    async def run():
        carrier, waits = Faulty("queue", hangs=("begin_journal",)), Waits()
        state = SimpleNamespace(
            config=CONFIG,
            stages=SimpleNamespace(queue=QueueStage(carrier)),
            schedule=SimpleNamespace(policy_version=1, holds=lambda group_id: True),
            calls=Calls(waits, None, 2),
        )
        journal = Journal(state, simulated_ticket)
        begins = asyncio.create_task(journal.begin("nowhere"))
        await asyncio.sleep(0)
        keeps = asyncio.create_task(
            journal.arrived(SimpleNamespace(group_id=3, attempt=0), 0, SimpleNamespace(newest_version=1))
        )
        for _ in range(10):
            await asyncio.sleep(0)
        assert not keeps.done() and set(carrier.calls) == {"begin_journal"}
        for task in (begins, keeps):
            task.cancel()

    asyncio.run(run())


class CannotFinish(Faulty):
    """An engine that lives and does not finish some groups, so many times."""

    def __init__(self, name, times):
        super().__init__(name)
        self.times = times

    async def call(self, method, *args):
        if method.name == "generate" and self.times.get(args[0].group_id, 0):
            self.times[args[0].group_id] -= 1
            raise GenerationFailed(f"vLLM ended request {args[0].group_id} by itself")
        return await super().call(method, *args)


@pytest.mark.parametrize(("times", "again", "given_up"), [({1: 2}, 2, 0), ({1: 3}, 2, 1), ({1: 9, 4: 1}, 3, 1)])
def test_a_group_that_an_engine_does_not_finish_is_tried_again_and_then_given_up_by_its_reason(times, again, given_up):
    told = drive(stages_of(rollouts=(CannotFinish("rollout-0", times),)), train, CONFIG.rollouts(retries=2))
    assert "error" not in told, told
    schedule = told["controller"].schedule
    assert schedule.reissued["generation_failed"] == again
    assert schedule.policy_ledger.voided["generation_failed"] == given_up
    assert schedule.policy_ledger.trained == 6 - given_up


def test_an_engine_that_finishes_no_group_ends_the_run_with_its_own_error():
    broken = CannotFinish("rollout-0", dict.fromkeys(range(6), 99))
    told = drive(stages_of(rollouts=(broken,)), train, CONFIG.rollouts(retries=0).reward(max_voided=2))
    assert isinstance(told["error"], StepFailed) and "vLLM ended request" in str(told["error"])
    assert "3 groups in a row were lost in this way, and reward.max_voided is 2" in str(told["error"])


def test_a_frozen_actor_does_not_keep_others_from_being_aborted():
    frozen = Faulty("frozen", hangs=("generate", "abort"))
    slow = SimulatedStage("slow", lambda method: 500.0 if method == "generate" else 0.0)
    plan = plan_of(num_steps=1, groups_per_step=3, overage="drop", overage_after=3.0)
    stages = stages_of(rollouts=(frozen, slow, Faulty("fast")))
    told = drive(stages, train, plan=plan)
    assert "error" not in told
    assert told["controller"].schedule.policy_ledger.voided["overage"] == 2
    assert slow.aborted, "the abort of the frozen actor's group was asked for first, and never ends"


@pytest.mark.parametrize("seconds", [0.01, 5.0])
def test_nothing_of_the_groups_ahead_is_left_when_a_run_ends_early(seconds):
    """Also of those whose embeddings come after the end."""
    stored = set()

    class Queue(Faulty):
        async def call(self, method, *args):
            if method.name == "put":
                stored.add(args[0])
            if method.name == "free":
                stored.difference_update(args[0])
            return await super().call(method, *args)

    class Learner(Faulty):
        def result(self, method, args):
            report, *payloads = super().result(method, args)
            if method == "train":
                report.metrics["kl/sequence"] = 2.0
            return report, *payloads

    stages = stages_of(
        queue=Queue("queue"), policy=Learner("policy-learner"), annotators=(Faulty("annotator-0", seconds=seconds),)
    )
    plan = plan_of(num_steps=9, max_policy_age=3)

    async def to_the_end(controller):
        await train(controller)
        await asyncio.sleep(100)  # whatever is still on its way

    told = drive(stages, to_the_end, CONFIG.objective(kl_stop=1.0), plan)
    assert "error" not in told and told["controller"].schedule.policy_version == 1
    assert not stored


def test_a_step_that_was_finished_is_returned_although_another_loop_has_failed_since():
    """Its metrics would be lost."""
    told = {"steps": []}

    async def late(controller):
        controller._steps_wanted = 1
        await asyncio.sleep(30)  # the first step ends, and a group of the second fails
        for _ in range(3):
            told["steps"].append((await controller.step())["step"])

    failing = Faulty("annotator-0", fails={"embed": ZeroDivisionError("of the second step")}, first=3)
    told |= drive(stages_of(annotators=(failing,)), late, plan=plan_of(max_policy_age=1))
    assert told["steps"] == [1.0] and isinstance(told["error"], ZeroDivisionError)


def test_a_carrier_that_is_gone_ends_the_run():
    async def gone():
        await asyncio.sleep(5)
        raise StageLost(None, "the head of the Ray cluster is gone")

    stages = stages_of(policy=Faulty("policy-learner", hangs=("train",)))
    names = ("rollouts", "queue", "annotators", "policy", "head", "from_bytes", "to_bytes")
    told = drive(Stages(**{name: getattr(stages, name) for name in names}, watch=gone), train)
    assert isinstance(told["error"], StageLost) and 4.9 < told["after"] < 6


def test_a_thread_that_stands_still_is_noticed_from_outside_with_what_it_is_at():
    """No deadline on the loop itself could go off."""
    thread = LoopThread("blocked")

    async def block():
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(StalledRun, match=r"has stood still for 0\.4 s:(.|\n)*time\.sleep\(30\)"):
        thread.run(block(), 0.4)
    assert time.monotonic() - began < 20


def test_a_coroutines_own_timeout_is_its_own():
    thread = LoopThread("timed-out")

    async def times_out():
        raise TimeoutError("the user's sandbox")

    with pytest.raises(TimeoutError, match="the user's sandbox"):
        thread.run(times_out(), 60)
    thread.stop()


def test_a_mistake_of_the_users_passes_as_it_is():
    told = drive(stages_of(annotators=(Faulty("annotator-0", fails={"score": ConfigError("yours")}),)), train)
    assert isinstance(told["error"], ConfigError)


def _functions(error):
    traceback, names = error.__traceback__, []
    while traceback:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


# Who is waited for


def test_metrics_say_for_whom_the_learner_waits():
    def waits_of(**others):
        waits = []

        async def run(controller):
            while not controller.finished:
                metrics = await controller.step()
                waits.append({key: value for key, value in metrics.items() if key.startswith("wait/")})

        config = CONFIG.rollouts(num_actors=2).scheduling(max_policy_age=1, max_head_age=1, stall_after=STALL_AFTER)
        plan = plan_of(num_steps=6, max_policy_age=1, max_head_age=1)
        actors = (Faulty("rollout-0"), Faulty("rollout-1"))
        assert "error" not in drive(stages_of(**{"rollouts": actors} | others), run, config, plan)
        return waits

    slow = waits_of(rollouts=(Faulty("rollout-0"), Faulty("rollout-1", seconds=3.0)))
    long = [one for one in slow if one["wait/rollouts"] > 1]
    assert len(long) >= 2 and all(one["wait/slowest_rollout"] == 1 for one in long), (
        "it holds what the other cannot give"
    )
    assert all(one["wait/head"] < 0.1 and one["wait/annotators"] < 0.1 for one in slow)
    head = waits_of(head=Faulty("head-learner", seconds=3.0))
    assert head[-1]["wait/head"] > 2 and head[-1]["wait/rollouts"] < 0.1
    annotator = waits_of(annotators=(Faulty("annotator-0", seconds=3.0),))
    assert max(one["wait/annotators"] for one in annotator) > 2
