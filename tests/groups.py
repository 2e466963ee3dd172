"""Groups of random trajectories of given sizes, and the gradients that a learner finds on them."""

import torch

from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.advantages import get_advantage
from r2m_async.models.loading import load_policy
from r2m_async.trajectories import GroupRewards, Prompt, Ticket, Trajectory, TrajectoryGroup

SIZES = [(4, 3), (1, 1), (2, 7), (5, 0), (3, 2)]
"""(prompt, response) tokens."""


def trajectory(prompt: int, response: int, seed: int) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 250, (prompt + response,), generator=generator)
    logprobs = torch.zeros(prompt + response)
    logprobs[prompt:] = -5.5 + 0.3 * torch.randn(response, generator=generator)
    return Trajectory(
        token_ids=tokens,
        prompt_len=prompt,
        behaviour_logprobs=logprobs,
        # Of no version that the learner has: it would compare its log-probabilities with these random ones.
        policy_versions=torch.full((prompt + response,), 1000, dtype=torch.int32),
        finish_reason="stop",
        text="",
    )


def trajectories(sizes=SIZES) -> list[Trajectory]:
    return [trajectory(*size, seed) for seed, size in enumerate(sizes)]


def groups_of(sizes: list[list[tuple[int, int]]]) -> tuple[list[TrajectoryGroup], list[GroupRewards]]:
    groups, rewards, seed = [], [], 0
    for group_id, own in enumerate(sizes):
        members = []
        for size in own:
            members.append(trajectory(*size, seed))
            seed += 1
        prompt = Prompt(prompt_id="", content="", text="", token_ids=(2,))
        ticket = Ticket(group_id=group_id, due_step=0, seed=0, attempt=0, prompt=prompt)
        groups.append(TrajectoryGroup(ticket=ticket, trajectories=tuple(members), greedy=None))
        own_rewards = torch.randn(len(own), generator=torch.Generator().manual_seed(group_id))
        rewards.append(
            GroupRewards(
                group_id=group_id,
                rewards=own_rewards,
                model_rewards=own_rewards,
                greedy_reward=None,
                head_version=0,
                omega=1.0,
            )
        )
    return groups, rewards


class GradientsOnly(TorchBackend):
    """Keeps an update's gradient instead of moving the weights."""

    def step(self, lr: float) -> float:
        self.gradients = {name: p.grad.clone() for name, p in self.policy.named_parameters() if p.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        return 1.0


def learned(config, groups, rewards):
    """(gradients, metrics, refreshed states) of one update on the groups."""
    model, reference = (load_policy(config.model.policy, config) for _ in range(2))
    backend = GradientsOnly(model, reference, config)
    learner = PolicyLearner(backend, get_advantage(config.advantage.name), config)
    learner.proximal(0, groups)
    report, refreshed = learner.train(0, rewards)
    return backend.gradients, report.metrics, refreshed
