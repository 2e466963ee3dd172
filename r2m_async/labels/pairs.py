"""Which pairs of a step are shown to a labeller, in which order, and which labelled pairs are used once more.

Everything here is a function of its arguments and of the run's seed. So the ring and the reference choose alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from r2m_async.config import R2MConfig
from r2m_async.data.seeds import Stream, sampling_seed
from r2m_async.head_objectives import preference_doubt
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    Label,
    PolicyFeedback,
    RewardEmbeddings,
    TrajectoryGroup,
)


def chosen_pairs(
    step: int,
    groups: Sequence[TrajectoryGroup],
    embeddings: Sequence[RewardEmbeddings],
    rewards: Sequence[GroupRewards],
    config: R2MConfig,
) -> tuple[Label, ...]:
    """Returns the pairs of a step that a labeller is asked about: at most `labels.budget`, by the rule `labels.pairs`.

    No response is in two pairs. Every group gives one pair before any gives a second. Under `uncertain` the groups that
    are most in doubt come first, and otherwise the order is random. Two equal texts are no pair, and a group with a
    reward that is not finite gives none.
    """
    rng = random.Random(sampling_seed(config.run.seed, step, Stream.LABEL_PAIRS))
    offers: list[tuple[float, float, int, list[tuple[int, int]]]] = []
    for group, frozen, scored in zip(groups, embeddings, rewards, strict=True):
        texts = [trajectory.text for trajectory in group.trajectories]
        first = rng.random()  # drawn for every group, so that no group's rewards decide the order of the others
        ranked = list(_ranked(scored, frozen, config.labels.pairs, rng))
        pairs = [(doubt, pair) for doubt, pair in ranked if texts[pair[0]] != texts[pair[1]]]
        if pairs and scored.model_rewards.isfinite().all():
            offers.append((-pairs[0][0], first, group.ticket.group_id, [pair for _, pair in pairs]))
    offers.sort()
    rounds = max((len(pairs) for *_, pairs in offers), default=0)
    taken = [(group_id, pairs[at]) for at in range(rounds) for *_, group_id, pairs in offers if at < len(pairs)]
    # Nobody who always prefers the left one may teach the head that the best stands there.
    return tuple(
        Label(group_id=group_id, step=step, pair=pair if rng.random() < 0.5 else pair[::-1])
        for group_id, pair in sorted(taken[: config.labels.budget])
    )


def _ranked(
    rewards: GroupRewards, embeddings: RewardEmbeddings, rule: str, rng: random.Random
) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yields pairs of a group without a common response, the first choice first, each with its doubt.

    The doubt is 0 unless the rule is `uncertain`.
    """
    number = len(rewards.model_rewards)
    if rule == "uncertain":
        alone = torch.stack([rewards.model_rewards, embeddings.frozen_rewards])
        doubts = preference_doubt(alone if rewards.members is None else rewards.members).tolist()
        order = sorted(combinations(range(number), 2), key=lambda pair: (-doubts[pair[0]][pair[1]], rng.random()))
        left = set(range(number))
        for pair in order:
            if left.issuperset(pair):
                left.difference_update(pair)
                yield doubts[pair[0]][pair[1]], pair
        return
    order_K = list(range(number))
    if rule == "random":
        rng.shuffle(order_K)
    else:
        values = rewards.model_rewards.tolist()
        order_K.sort(key=lambda index: -values[index])
    for at in range(number // 2):
        yield 0.0, (order_K[at], order_K[-1 - at])


def pair_of(group: HeadGroup, pair: tuple[int, int]) -> HeadGroup:
    """Returns two responses of a group, in the order of `pair`, as a group of their own. Its tensors are copies."""
    rows = list(pair)
    own, feedback, annotated = group.embeddings, group.feedback, group.annotated
    embeddings = RewardEmbeddings(
        group_id=own.group_id,
        rte=own.rte[rows],
        greedy_rte=None,
        bonus=own.bonus[rows],
        greedy_bonus=None,
        frozen_rewards=own.frozen_rewards[rows],
        input_ids=None if own.input_ids is None else tuple(own.input_ids[row].clone() for row in rows),
    )
    states = None
    if feedback is not None:
        # Copies: the tensors of a decoded buffer keep all of it, the other responses' states too.
        hidden = tuple(feedback.hidden_states[row].clone() for row in rows)
        states = PolicyFeedback(
            group_id=feedback.group_id, hidden_states=hidden, greedy=None, policy_version=feedback.policy_version
        )
    rewards = GroupRewards(
        group_id=annotated.group_id,
        rewards=annotated.rewards[rows],
        model_rewards=annotated.model_rewards[rows],
        greedy_reward=None,
        head_version=annotated.head_version,
        omega=annotated.omega,
    )
    return HeadGroup(embeddings=embeddings, feedback=states, annotated=rewards)


def with_noise(label: Label, config: R2MConfig) -> Label:
    """Returns a label as a labeller gives it who errs: with probability `labels.noise` the other response is chosen.

    Which labels are turned round depends on the run's seed and on the pair alone.
    """
    if label.chosen is None or config.labels.noise == 0:
        return label
    first, second = label.pair
    rng = random.Random(f"{sampling_seed(config.run.seed, label.group_id, Stream.LABEL_NOISE)}/{min(label.pair)}")
    other = second if label.chosen == first else first
    return replace(label, chosen=other) if rng.random() < config.labels.noise else label


def replayed_indices(step: int, num_pairs: int, config: R2MConfig) -> list[int]:
    """Returns which of the `num_pairs` labelled pairs that are kept the update of a step sees once more, in their order.

    They are `labels.replay` of them, or all if there are fewer.
    """
    rng = random.Random(sampling_seed(config.run.seed, step, Stream.LABEL_REPLAY))
    return sorted(rng.sample(range(num_pairs), min(config.labels.replay, num_pairs)))


def offline_indices(step: int, num_pairs: int, config: R2MConfig) -> list[int]:
    """Returns which of the pairs of `labels.offline` the update of a step sees, in their order.

    They are `labels.offline_pairs` of the `num_pairs`, or all if there are fewer.
    """
    rng = random.Random(sampling_seed(config.run.seed, step, Stream.OFFLINE_PAIRS))
    return sorted(rng.sample(range(num_pairs), min(config.labels.offline_pairs, num_pairs)))
