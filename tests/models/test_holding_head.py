"""What holds the head (`head.hold`): each rule against hand-computed numbers or a literal form."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from learners.head_learner import HeadLearner
from r2m_async import R2MConfig
from r2m_async.config import HeadSection
from r2m_async.errors import ConfigError
from r2m_async.head_objectives import grebt, preference_divergence
from r2m_async.models import heads
from r2m_async.models.heads import HeldHead, build_head, head_losses
from r2m_async.trajectories import GroupRewards, HeadGroup, PolicyFeedback, RewardEmbeddings

RTE = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], [[0.5, 2.0], [1.0, -1.0], [0.0, 0.5]]])


def groups_of(frozen_rewards, sizes=(3, 3)):
    """Two groups whose RTEs are RTE's, cut to `sizes`; annotated rewards run backwards."""
    return [
        HeadGroup(
            embeddings=RewardEmbeddings(
                group_id=index,
                rte=rte[:size],
                greedy_rte=None,
                bonus=torch.zeros(size),
                greedy_bonus=None,
                frozen_rewards=torch.tensor(frozen[:size]),
            ),
            feedback=None,
            annotated=GroupRewards(
                group_id=index,
                rewards=torch.zeros(size),
                model_rewards=torch.tensor([3.0, 2.0, 1.0][:size]),
                greedy_reward=None,
                head_version=0,
                omega=1.0,
            ),
        )
        for index, (rte, frozen, size) in enumerate(zip(RTE, frozen_rewards, sizes, strict=True))
    ]


def head_and_rewards():
    head = torch.nn.Module()
    head.scoring_head = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        head.scoring_head.weight.copy_(torch.tensor([[0.5, 1.0]]))
    return head, head.scoring_head(RTE).squeeze(-1)


def terms_of(*args):
    """The terms of all groups, whatever groups the head computes together."""
    return [term for part in head_losses(*args) for term in part]


def config_with(**head):
    return R2MConfig.from_dict({"head": {"variant": "iterative_head", **head}})


def gradient(losses, head):
    head.zero_grad()
    (sum(losses) / 2).backward()
    return head.scoring_head.weight.grad.clone()


AGREEING = [[0.0, 0.1, 0.2], [0.2, 0.0, 0.1]]
"""The head's rewards are [0.5, 1, 2] and [2.25, -0.5, 0.5]."""


def test_the_divergence_is_kl_from_the_frozen_preferences_by_hand():
    rewards = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], requires_grad=True)
    divergence = preference_divergence(rewards, torch.tensor([[0.0, 0.0], [5.0, 5.0]]))
    assert divergence.item() == pytest.approx(0.5 * math.log(4 / 3) / 2)
    assert preference_divergence(rewards + 7, rewards).item() == pytest.approx(0, abs=1e-6)
    assert preference_divergence(2 * rewards, rewards) > 0  # the scale counts


def test_under_divergence_its_weight_times_it_joins_eq_7():
    head, rewards = head_and_rewards()
    frozen = torch.tensor(AGREEING)
    losses = [
        term.loss for term in terms_of(head, groups_of(AGREEING), 0, config_with(hold="divergence", hold_weight=0.5))
    ]
    ours = gradient(losses, head)
    assert torch.allclose(ours, gradient([2 * grebt(rewards, 0.3), preference_divergence(rewards, frozen)], head))


def test_the_head_computes_groups_together_and_learns_what_it_would_from_each_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    config = R2MConfig.from_dict({"head": {"width": 5}})
    head = build_head(torch.nn.Linear(2, 1, bias=False), 2, 4, config)
    groups = [
        replace(
            group,
            feedback=PolicyFeedback(
                group_id=group.embeddings.group_id,
                hidden_states=tuple(torch.randn(3 + row, 4, generator=generator) for row in range(size)),
                greedy=None,
                policy_version=0,
            ),
        )
        for group, size in zip(groups_of(AGREEING, (3, 2)) * 2, (3, 2, 3, 2), strict=True)
    ]
    passes, gradients = [], []
    for at_once in (1, 4, 100):
        monkeypatch.setattr(heads, "RESPONSES_AT_ONCE", at_once)
        parts = list(head_losses(head, groups, 0, config))
        passes.append([len(part) for part in parts])
        loss = sum(term.loss for part in parts for term in part)
        gradients.append(torch.autograd.grad(loss, [*head.parameters()]))
    assert passes == [[1, 1, 1, 1], [2, 2], [4]]
    for ours in gradients[1:]:
        for one, other in zip(ours, gradients[0], strict=True):
            assert other.any() and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2)])
def test_under_bsr_the_square_of_the_steps_mean_reward_joins_eq_7_with_its_gradient(sizes):
    head, rewards = head_and_rewards()
    terms = terms_of(head, groups_of(AGREEING, sizes), 0, config_with(hold="bsr", hold_weight=3.0))
    groups = [of_group[None, :size] for of_group, size in zip(rewards, sizes, strict=True)]
    penalty = 3.0 * torch.cat(groups, 1).mean().square()
    assert sum(term.hold for term in terms).item() / 2 == pytest.approx(penalty.item())
    ours = gradient([term.loss for term in terms], head)
    assert torch.allclose(ours, gradient([*(grebt(one, 0.3) for one in groups), 2 * penalty], head), atol=1e-6)


def test_under_agreement_a_group_whose_pair_the_frozen_model_turns_round_teaches_nothing():
    head, rewards = head_and_rewards()
    turned = [AGREEING[0], [0.0, 0.2, 0.1]]
    terms = terms_of(head, groups_of(turned), 0, config_with(hold="agreement"))
    assert [bool(term.agrees) for term in terms] == [True, False]
    ours = gradient([term.loss for term in terms], head)
    assert torch.allclose(ours, gradient([grebt(rewards[:1], 0.3)], head))


@pytest.mark.parametrize(
    ("source", "agreeing"), [("refreshed", [True, True]), ("annotated", [False, True]), ("frozen", [True, True])]
)
def test_agreement_is_on_the_pair_that_is_taught(source, agreeing):
    """The head's best against its worst is, of the groups, (2, 0) and (0, 1); annotated rewards' is (0, 2) in both."""
    head, rewards = head_and_rewards()
    config = config_with(hold="agreement", pair_source=source)
    terms = terms_of(head, groups_of(AGREEING), 0, config)
    assert [bool(term.agrees) for term in terms] == [bool(term.teaches) for term in terms] == agreeing
    pairs = torch.tensor([[3.0, 2.0, 1.0]]) if source == "annotated" else torch.tensor(AGREEING)
    taught = [grebt(rewards[row : row + 1], 0.3, pairs[row % len(pairs)][None]) for row in (0, 1) if agreeing[row]]
    assert torch.allclose(gradient([term.loss for term in terms], head), gradient(taught, head))


def test_a_step_without_agreement_does_not_move_the_head_by_its_momentum():
    head, _ = head_and_rewards()
    learner = HeadLearner(head, config_with(hold="agreement", lr=0.1))
    weights = []
    for step, frozen in enumerate((AGREEING, [[0.2, 0.1, 0.0], [0.0, 0.0, 0.0]], AGREEING)):
        groups = groups_of(frozen)
        report, _ = learner.update(step, [one.embeddings for one in groups], None, [one.annotated for one in groups])
        weights.append(head.scoring_head.weight.detach().clone())
        assert report.metrics["head/agreement"] == (0.0 if step == 1 else 1.0)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(("source", "pair"), [("refreshed", (2, 0)), ("annotated", (0, 2)), ("frozen", (1, 2))])
def test_the_pair_is_chosen_by_the_rewards_that_the_config_names(source, pair):
    head, rewards = head_and_rewards()
    frozen = [[0.1, 0.5, 0.0], AGREEING[1]]
    first = terms_of(head, groups_of(frozen), 0, config_with(pair_source=source))[0]
    assert first.grebt.gap.item() == pytest.approx((rewards[0, pair[0]] - rewards[0, pair[1]]).item())


def test_the_average_scores_and_follows_the_trained_head_by_its_decay():
    head, _ = head_and_rewards()
    held = HeldHead(head, config_with(hold="average", hold_decay=0.75))
    held.start()
    for weight in (4.0, 8.0):
        with torch.no_grad():
            head.scoring_head.weight.fill_(weight)
        held.follow()
    first = 0.75 * torch.tensor([[0.5, 1.0]]) + 0.25 * 4
    assert torch.allclose(held.scoring.scoring_head.weight, 0.75 * first + 0.25 * 8)
    assert torch.equal(head.scoring_head.weight, torch.full((1, 2), 8.0))


def test_without_it_the_trained_head_itself_scores():
    head = SimpleNamespace()
    assert HeldHead(head, config_with()).scoring is head


@pytest.mark.parametrize("variant", ["vanilla", "r2m_no_train"])
def test_a_head_that_does_not_move_needs_no_hold(variant):
    for key, value in (("hold", "bsr"), ("pair_source", "frozen")):
        with pytest.raises(
            ConfigError, match=f"head.{key} is '{value}' and head.variant is '{variant}'.*leave head.{key} out"
        ):
            R2MConfig.from_dict({"head": {"variant": variant, key: value}})


@pytest.mark.parametrize("hold", get_args(HeadSection.model_fields["hold"].annotation))
def test_keys_of_another_hold_are_refused(hold):
    for key, value, of in (("hold_weight", 2.0, ("divergence", "bsr")), ("hold_decay", 0.5, ("average",))):
        if hold in of:
            assert getattr(config_with(hold=hold, **{key: value}).head, key) == value
            continue
        named = " or ".join(map(repr, of))
        message = (
            f"^head.{key} is {value} and head.hold is '{hold}': only hold {named} reads this key; use that hold, or leave "
            f"head.{key} out"
        )
        with pytest.raises(ConfigError, match=message):
            config_with(hold=hold, **{key: value})
