"""Which pairs are asked about: by the head's extremes, by doubt or at random, within the budget, and no response twice."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.config import R2MConfig
from r2m_async.head_objectives import preference_doubt
from r2m_async.labels.pairs import chosen_pairs, replayed_indices, with_noise
from r2m_async.trajectories import (
    GroupRewards,
    Label,
    Prompt,
    RewardEmbeddings,
    Ticket,
    Trajectory,
    TrajectoryGroup,
)


def step_of(rewards, frozen=None, texts=None, first=0):
    """The groups, embeddings and rewards of a step in which these are the rewards."""
    frozen = frozen or rewards
    texts = texts or [[f"text {index}" for index in range(len(row))] for row in rewards]
    prompt = Prompt(prompt_id="p", content="ask", text="ask", token_ids=(0,))
    made = ([], [], [])
    for group_id, (row, own, said) in enumerate(zip(rewards, frozen, texts, strict=True), first):
        ticket = Ticket(group_id=group_id, due_step=0, seed=0, attempt=0, prompt=prompt)
        tokens = {
            "token_ids": torch.zeros(2, dtype=torch.int64),
            "prompt_len": 1,
            "behaviour_logprobs": torch.zeros(2),
            "policy_versions": torch.zeros(2, dtype=torch.int32),
            "finish_reason": "stop",
        }
        trajectories = tuple(Trajectory(text=text, **tokens) for text in said)
        zeros = torch.zeros(len(row))
        scored = {"rewards": zeros, "greedy_reward": None, "head_version": 0, "omega": 1.0}
        embedded = {"rte": torch.zeros(len(row), 2), "greedy_rte": None, "bonus": zeros, "greedy_bonus": None}
        made[0].append(TrajectoryGroup(ticket=ticket, trajectories=trajectories, greedy=None))
        made[1].append(RewardEmbeddings(group_id=group_id, frozen_rewards=torch.tensor(own), **embedded))
        made[2].append(GroupRewards(group_id=group_id, model_rewards=torch.tensor(row), **scored))
    return made


def config_with(seed=0, **labels):
    config = R2MConfig().run(seed=seed).rollouts(prompts_per_step=50, group_size=8)
    return config.labels(**{"source": "any:function"} | labels)


def unordered(labels):
    return [(label.group_id, *sorted(label.pair)) for label in labels]


REWARDS = [[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 7.0, 0.0]]


def test_extremes_are_best_against_worst_then_second_best_against_second_worst():
    chosen = chosen_pairs(0, *step_of(REWARDS), config_with(budget=4))
    assert unordered(chosen) == [(0, 0, 1), (0, 2, 3), (1, 0, 3), (1, 1, 2)]
    assert unordered(chosen_pairs(0, *step_of(REWARDS), config_with(budget=2))) == [(0, 0, 1), (1, 1, 2)]


def test_every_group_gives_a_pair_before_any_gives_a_second_and_chance_says_which_are_left_out():
    for budget in (1, 3):
        first = Counter()
        for seed in range(200):
            chosen = chosen_pairs(0, *step_of(REWARDS), config_with(seed, budget=budget))
            groups = Counter(label.group_id for label in chosen)
            assert groups.total() == budget and max(groups.values()) <= math.ceil(budget / 2)
            first[max(groups, key=groups.get)] += 1
        assert min(first.values()) > 60


def test_the_better_response_stands_first_as_often_as_second():
    sides = Counter(chosen_pairs(0, *step_of(REWARDS[:1]), config_with(seed, budget=1))[0].pair for seed in range(200))
    assert sides.keys() == {(0, 1), (1, 0)} and min(sides.values()) > 60


def test_uncertain_takes_the_groups_and_the_pairs_on_which_head_and_frozen_model_differ_most():
    frozen = [[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, -2.0, 0.0]]  # of group 1 they differ on response 2 alone
    chosen = chosen_pairs(0, *step_of(REWARDS, frozen), config_with(budget=1, pairs="uncertain"))
    assert unordered(chosen) in ([(1, 0, 2)], [(1, 1, 2)], [(1, 2, 3)])
    doubts = preference_doubt(torch.tensor([REWARDS[1], frozen[1]]))
    assert doubts[chosen[0].pair].item() == pytest.approx(doubts.max().item())


def test_uncertain_asks_the_heads_of_an_ensemble_if_there_are_several():
    groups, embeddings, rewards = step_of(REWARDS)
    members = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 2.0, 1.0]])  # they differ on 2 and 3 alone
    rewards = [replace(rewards[0], members=members), replace(rewards[1], members=members[:1].expand(2, 4))]
    chosen = chosen_pairs(0, groups, embeddings, rewards, config_with(budget=1, pairs="uncertain"))
    assert unordered(chosen) == [(0, 2, 3)]


def test_random_pairs_are_any_two():
    found = {
        unordered(chosen_pairs(0, *step_of(REWARDS), config_with(seed, budget=1, pairs="random")))[0]
        for seed in range(200)
    }
    assert len(found) == 12


def test_equal_texts_and_groups_that_are_not_finite_are_not_asked_about():
    texts = [["same", "same", "same", "same"], ["a", "b", "c", "c"]]
    for rule in ("extremes", "uncertain", "random"):
        config = config_with(budget=4, pairs=rule)
        assert {label.group_id for label in chosen_pairs(0, *step_of(REWARDS, texts=texts), config)} == {1}
        bad = [REWARDS[0], [math.nan, 0.0, 1.0, 2.0]]
        assert {label.group_id for label in chosen_pairs(0, *step_of(bad), config)} == {0}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from(["extremes", "uncertain", "random"]), st.integers(1, 20), st.integers(0, 9)
)
def test_no_response_is_in_two_pairs_the_budget_holds_and_the_same_seed_chooses_alike(seed, rule, budget, step):
    source = random.Random(seed)
    rewards = [[source.gauss(0, 1) for _ in range(source.randint(2, 5))] for _ in range(source.randint(0, 6))]
    frozen = [[source.gauss(0, 1) for _ in row] for row in rewards]
    config = config_with(seed, budget=budget, pairs=rule)
    chosen = chosen_pairs(step, *step_of(rewards, frozen), config)
    responses = [(label.group_id, index) for label in chosen for index in label.pair]
    assert len(set(responses)) == len(responses)
    assert len(chosen) == min(budget, sum(len(row) // 2 for row in rewards))
    assert all(label.step == step and label.chosen is None and label.reason is None for label in chosen)
    assert chosen == chosen_pairs(step, *step_of(rewards, frozen), config)


def test_noise_turns_its_share_of_labels_round_and_always_the_same_ones():
    labels = [Label(group_id=index, step=0, pair=(2, 5), chosen=5) for index in range(2000)]
    config, without = config_with(noise=0.25), config_with()
    noisy = [with_noise(label, config) for label in labels]
    turned = [one.group_id for one in noisy if one.chosen == 2]
    assert 400 < len(turned) < 600
    assert [with_noise(label, config) for label in labels] == noisy
    assert [with_noise(label, without) for label in labels] == labels
    other = [Label(group_id=one.group_id, step=0, pair=(5, 2), chosen=5) for one in labels]
    assert [one.group_id for one in other if with_noise(one, config).chosen == 2] == turned, "whichever stands first"


def test_a_replay_draws_that_many_of_the_pairs_that_are_kept():
    config = config_with(replay=3)
    drawn = [replayed_indices(step, 10, config) for step in range(200)]
    assert all(len(set(one)) == 3 and one == sorted(one) for one in drawn)
    assert {index for one in drawn for index in one} == set(range(10))
    assert replayed_indices(0, 2, config) == [0, 1] and replayed_indices(0, 10, config_with()) == []
