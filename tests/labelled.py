"""Small groups with texts, embeddings, rewards and states, and a source of labels, for tests of labels."""

import torch

from r2m_async.trajectories import (
    GroupRewards,
    PolicyFeedback,
    Prompt,
    RewardEmbeddings,
    Ticket,
    Trajectory,
    TrajectoryGroup,
)


def longer(first, second):
    """Prefers the text of more words."""
    lengths = len(first.split()), len(second.split())
    return "tie" if lengths[0] == lengths[1] else "first" if lengths[0] > lengths[1] else "second"


def groups_of_texts(step, prompts, size, first=None):
    """Groups of `size` responses to these prompts; the first response of each was cut."""
    made = []
    for group_id, text in enumerate(prompts, len(prompts) * step if first is None else first):
        prompt = Prompt(prompt_id=text, content=text, text=text, token_ids=(0,))
        ticket = Ticket(group_id=group_id, due_step=step, seed=0, attempt=0, prompt=prompt)
        members = tuple(
            Trajectory(
                token_ids=torch.zeros(2, dtype=torch.int64),
                prompt_len=1,
                behaviour_logprobs=torch.zeros(2),
                policy_versions=torch.zeros(2, dtype=torch.int32),
                finish_reason="stop" if index else "length",
                text=f"{text} answer {index}",
            )
            for index in range(size)
        )
        made.append(TrajectoryGroup(ticket=ticket, trajectories=members, greedy=None))
    return made


def _random(group_id, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(group_id))


def embeddings_of(group_ids, size, width=2):
    return [
        RewardEmbeddings(
            group_id=group_id,
            rte=_random(group_id, size, width),
            greedy_rte=None,
            bonus=torch.zeros(size),
            greedy_bonus=None,
            frozen_rewards=_random(group_id + 1000, size),
        )
        for group_id in group_ids
    ]


def rewards_of(group_ids, size):
    return [
        GroupRewards(
            group_id=group_id,
            rewards=torch.zeros(size),
            model_rewards=_random(group_id + 2000, size),
            greedy_reward=None,
            head_version=0,
            omega=1.0,
        )
        for group_id in group_ids
    ]


def states_of(group_ids, size, width=3):
    return tuple(
        PolicyFeedback(
            group_id=group_id,
            hidden_states=tuple(_random(10 * group_id + index, 2 + index, width) for index in range(size)),
            greedy=None,
            policy_version=0,
        )
        for group_id in group_ids
    )
