"""What a ring says it is doing, on a virtual clock: a listener hears every second what each stage is at."""

from r2m_async.config import R2MConfig
from r2m_async.ring.controller import STATUS_EVERY, Controller
from r2m_async.ring.simulator import SimulatedStage, VirtualClockLoop, plan_without_models, simulated_ticket
from r2m_async.ring.stages import Stages, local_bytes
from r2m_async.schedule import Admission
from r2m_async.trajectories import EvaluationReport

SECONDS = {"generate": 10.0, "embed": 1.0, "train": 5.0, "evaluate": 3.0}


class Annotator(SimulatedStage):
    """It also answers what an evaluation asks of it."""

    def result(self, method, args):
        if method == "evaluate":
            return (EvaluationReport(version=args[0], metrics={}, samples=()),)
        return super().result(method, args)


def told_by(config, num_prompts):
    """(seconds since the start, status) of every call of the listener, until two steps are trained."""

    def stage(name, kind=SimulatedStage):
        return kind(name, lambda method: SECONDS.get(method, 0.0))

    tickets = tuple(
        simulated_ticket(Admission(group_id=-1 - number, due_step=0, attempt=0, policy_version=0))
        for number in range(num_prompts)
    )
    stages = Stages.carried_by(
        rollouts=(stage("rollout-0"), stage("rollout-1")),
        queue=stage("queue"),
        annotators=(stage("annotator-0", Annotator),),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        **local_bytes(),
    )
    told = []

    async def run():
        controller = Controller(config, plan_without_models(config), stages, simulated_ticket, tickets)
        began = loop.time()
        await controller.tell(lambda status: told.append((round(loop.time() - began, 3), status)))
        await controller.start()
        while not controller.finished:
            await controller.step()
        await controller.drain()
        await controller.stop()

    loop = VirtualClockLoop()
    loop.run_until_complete(run())
    loop.close()
    return told


def test_a_listener_hears_every_second_what_each_stage_does_and_for_how_long():
    config = R2MConfig().run(num_steps=2).rollouts(num_actors=2, prompts_per_step=2)
    told = dict(told_by(config.scheduling(max_policy_age=0, stall_after=1e6), num_prompts=0))
    assert all(second + STATUS_EVERY in told for second in range(14))
    status = told[4]
    does = {stage.name: (stage.does, stage.working, round(stage.seconds, 2)) for stage in status.stages}
    assert does == {
        "rollout-0": ("generate: group 0", True, 4),
        "rollout-1": ("generate: group 1", True, 4),
        "annotator-0": ("has no work", False, 0),
        "policy-learner": ("waits for its next step", False, 4),
        "head-learner": ("waits for refreshed feedback", False, 4),
        "queue": ("has no work", False, 0),
    }
    assert (status.step, status.actors, status.groups_in_flight) == (0, 2, 2)
    assert (status.driver, round(status.driver_seconds, 2), status.evaluating) == ("a step's result", 4, None)
    # Two groups arrived at 10 s and were embedded one after the other, so the step was trained from 12 s to 17 s.
    training = {stage.name: stage.does for stage in told[14].stages}
    assert training["policy-learner"] == "train: step 0" and training["rollout-0"] == "waits for a ticket"
    assert told[18].step == 1


def test_an_evaluation_says_how_far_it_is():
    config = R2MConfig().run(num_steps=1).rollouts(num_actors=2, prompts_per_step=2)
    config = config.scheduling(stall_after=1e6).evaluation(every=1)
    told = dict(told_by(config, num_prompts=2))
    seen = {second: (one.evaluating, one.answered, one.to_answer) for second, one in told.items()}
    # An actor answers one prompt in 10 s; its embedding takes a second, and the judgement three at the end.
    assert (seen[5], seen[15], seen[24]) == ((0, 0, 2), (0, 1, 2), (0, 2, 2))
    assert "generate: evaluation prompt 1" in [stage.does for stage in told[15].stages]
