"""`rollouts.max_refills`: groups whose responses all have the same reward are replaced, as DAPO's dynamic sampling does.

`tests/test_schedule.py` has what this means for the schedule and its ledger.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from rings import assert_same_bits, record_groups

from r2m_async import reference
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import TicketOffice, check_code
from r2m_async.models.heads import reward_spread
from r2m_async.schedule import Admission
from r2m_async.trajectories import Prompt, RewardEmbeddings


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"head": {"variant": "r2m"}}, r"rollouts\.max_refills is 2 and head\.variant is 'r2m'.*use variant 'vanilla'"),
        ({"advantage": {"name": "remax"}}, r"max_refills is 2 and advantage\.name is 'remax', which does not compare"),
    ],
)
def test_refills_need_rewards_that_are_known_and_an_estimator_that_compares(sections, told):
    tree = {"rollouts": {"max_refills": 2}, "head": {"variant": "vanilla"}}
    check_code(R2MConfig.from_dict(tree))
    with pytest.raises(ConfigError, match=told):
        check_code(R2MConfig.from_dict(tree | sections))


def test_a_refill_has_a_prompt_and_a_seed_of_its_own_whatever_the_attempt():
    prompts = [Prompt(prompt_id=f"p:{n}", content="x", text="x", token_ids=(1,)) for n in range(50)]
    workload = SimpleNamespace(prompts=prompts, eval_prompts=())
    config = R2MConfig(head={"variant": "vanilla"})
    office, plain = (TicketOffice(one, workload) for one in (config.rollouts(max_refills=3), config))
    assert [office.group(n, 0) for n in range(9)] == [plain.group(n, 0) for n in range(9)]
    tickets = [office.group(n, 0, refill) for n in range(50) for refill in (1, 2, 3)]
    assert len({ticket.seed for ticket in tickets} | {plain.group(n, 0).seed for n in range(50)}) == 200
    dealt = [ticket.prompt.prompt_id for ticket in tickets]
    assert all(dealt.count(prompt.prompt_id) == 3 for prompt in prompts), "a pass deals every prompt once"
    again = office.ticket(Admission(group_id=7, due_step=0, attempt=5, policy_version=1, refill=2))
    assert (again.seed, again.prompt) == (office.group(7, 0, 2).seed, office.group(7, 0, 2).prompt)


def test_the_spread_is_of_clipped_rewards_with_their_bonuses():
    embeddings = RewardEmbeddings(
        group_id=0, rte=torch.zeros(3, 0), greedy_rte=None, bonus=torch.tensor([0.0, 0.0, 0.5]), greedy_bonus=None,
        frozen_rewards=torch.tensor([2.0, 9.0, 1.5]),
    )  # fmt: skip
    config = R2MConfig(head={"variant": "vanilla"})
    assert reward_spread(embeddings, config) == 7.0
    assert reward_spread(embeddings, config.reward(clip=2.0)) == 0.0
    assert reward_spread(embeddings, config.reward(clip=1.0)) == 0.5


@pytest.mark.models
@pytest.mark.parametrize("age", [0, 1])
def test_groups_without_spread_are_refilled_as_in_the_reference_bit_for_bit(tiny_config, monkeypatch, age):
    """The reward is coarse, so that many groups have no spread, some of them every time."""
    mine = type(sys)("mine")
    mine.long = lambda prompt, response: float(len(response) > 10)
    monkeypatch.setitem(sys.modules, "mine", mine)
    tree = tiny_config.to_dict()
    tree["head"] = {"variant": "vanilla"}
    tree["reward"] |= {"model": None, "functions": ["mine:long"]}
    config = R2MConfig.from_dict(tree).run(num_steps=4).scheduling(max_policy_age=age, lag="exact")
    refilling = config.rollouts(max_refills=2)
    expected = reference.train(refilling)
    with Ring.of(refilling, in_process=True) as ring:
        seen, steps = record_groups(ring), []
        while not ring.finished:
            steps.append(ring.step())
        ring.drain()
        assert_same_bits(ring, expected, seen)
        ring.controller.schedule.audit()
    assert 0 < steps[-1]["ledger/reissued/no_spread"] <= 2 * 8
    assert (steps[-1]["ledger/trained"], steps[-1]["ledger/voided"]) == (8.0, 0.0)

    def with_spread(run):
        return sum(len(set(step[row : row + 3])) > 1 for step in run.rewards for row in (0, 3))

    assert with_spread(expected) > with_spread(reference.train(config))
