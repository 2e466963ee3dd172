"""The variants' heads (method.md section 7): how each is built, scores a group, and what its update minimises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from r2m_async.config import R2MConfig
from r2m_async.head_objectives import GrebtTerms, grebt_terms, preference_divergence
from r2m_async.policy_model import load_weights
from r2m_async.prompts import sampling_seed
from r2m_async.reward_head import R2MHead, mixing_weight, noise_like
from r2m_async.trajectories import GroupRewards, HeadGroup, PolicyFeedback, RewardEmbeddings, Weights

_HEAD_STREAM, _SAMPLED_NOISE_STREAM, _REFRESHED_NOISE_STREAM = 1, 2, 3
"""Tags that keep the head's random numbers apart from the rollouts' (stream 0) under one run seed."""


def build_head(phi: nn.Module, rm_hidden_size: int, policy_hidden_size: int, config: R2MConfig) -> nn.Module:
    """A module with `.scoring_head`, a copy of phi; an `R2MHead` where the variant reads feedback. Float32."""
    phi = copy.deepcopy(phi).float().cpu().requires_grad_(True)
    if config.reads_feedback:
        generator = torch.Generator().manual_seed(sampling_seed(config.run.seed, 0, _HEAD_STREAM))
        return R2MHead(rm_hidden_size, policy_hidden_size, config.head.width, phi, generator=generator)
    head = nn.Module()
    head.scoring_head = phi
    return head


def omega_of(step: int, config: R2MConfig) -> float:
    """Eq. 4 at t = step + 1; 1 where the variant reads no feedback."""
    if not config.reads_feedback:
        return 1.0
    return mixing_weight(step + 1, config.omega_horizon, config.head.omega_floor)


def head_rewards(head: nn.Module, rte: Tensor, states: Sequence[Tensor] | None, omega: float) -> Tensor:
    """[K] rewards of one group: `rte` [K, D_m], `states` K tensors [S - 1, D_p] or None."""
    if states is None:
        return head.scoring_head(rte.to(next(head.parameters()).device)).squeeze(-1)
    device = next(head.parameters()).device
    offsets = torch.tensor([0, *(len(rows) for rows in states)]).cumsum(0)
    return head(rte.to(device), torch.cat(list(states)).to(device), None, omega, offsets=offsets)


@torch.no_grad()
def score_group(
    head: nn.Module,
    embeddings: RewardEmbeddings,
    feedback: PolicyFeedback | None,
    step: int,
    head_version: int,
    config: R2MConfig,
) -> GroupRewards:
    """Binds a group's rewards: the head's, clipped, plus bonuses."""
    omega = omega_of(step, config)
    states, greedy_states = _states(feedback, _SAMPLED_NOISE_STREAM, config)
    model_rewards = head_rewards(head, embeddings.rte, states, omega).cpu()
    greedy = None
    if embeddings.greedy_rte is not None:
        rewards = head_rewards(head, embeddings.greedy_rte[None], greedy_states, omega).cpu()
        greedy = _clipped(rewards[0], config) + embeddings.greedy_bonus
    return GroupRewards(
        group_id=embeddings.group_id,
        rewards=_clipped(model_rewards, config) + embeddings.bonus,
        model_rewards=model_rewards,
        greedy_reward=greedy,
        head_version=head_version,
        omega=omega,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTerms:
    """Of one group; scalars. Only `loss` carries a gradient."""

    loss: Tensor
    """What the update minimises, in the mean over groups."""
    grebt: GrebtTerms
    """Eq. 7, as it is in the paper's version."""
    hold: Tensor
    """The penalty of `head.hold` in `loss`, weight included."""
    agrees: Tensor
    """bool; the frozen reward model, too, ranks the pair's chosen response above its rejected one."""
    teaches: Tensor
    """bool; False for a group that `hold: agreement` leaves out. A step of such groups alone does not move the head."""


def head_losses(head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig) -> Iterator[HeadTerms]:
    """Group by group, so that one graph is alive at a time: rewards by the present head on the refreshed feedback."""
    step_rewards = None
    if config.head.hold == "bsr":
        with torch.no_grad():
            step_rewards = [_refreshed_rewards(head, one, step, config) for one in groups]
    for group in groups:
        yield _head_terms(_refreshed_rewards(head, group, step, config), group, step_rewards, config)


def _refreshed_rewards(head: nn.Module, group: HeadGroup, step: int, config: R2MConfig) -> Tensor:
    states, _ = _states(group.feedback, _REFRESHED_NOISE_STREAM, config)
    return head_rewards(head, group.embeddings.rte, states, omega_of(step, config))


def _head_terms(
    rewards: Tensor, group: HeadGroup, step_rewards: Sequence[Tensor] | None, config: R2MConfig
) -> HeadTerms:
    """`step_rewards`: of all the step's groups, for BSR."""
    hold, weight = config.head.hold, config.head.hold_weight
    frozen = group.embeddings.frozen_rewards.to(rewards.device)
    pairs = {"refreshed": None, "annotated": group.annotated.model_rewards.to(rewards.device), "frozen": frozen}
    of_pairs = pairs[config.head.pair_source]
    grebt = grebt_terms(rewards[None], config.head.alpha, None if of_pairs is None else of_pairs[None])
    chooses = rewards if of_pairs is None else of_pairs
    agrees = frozen[chooses.argmax()] > frozen[chooses.argmin()]
    teaches = agrees | (hold != "agreement")
    penalty, loss = torch.zeros((), device=rewards.device), grebt.loss
    if hold == "divergence":
        penalty = weight * preference_divergence(rewards[None], frozen[None])
    elif step_rewards is not None:
        penalty = weight * _mean_square_share(rewards, step_rewards)
    return HeadTerms(loss=loss * teaches + penalty, grebt=grebt, hold=penalty.detach(), agrees=agrees, teaches=teaches)


def _mean_square_share(rewards: Tensor, step_rewards: Sequence[Tensor]) -> Tensor:
    """One group's share in the square of the mean of all of `step_rewards`, whose groups may be of different size: the
    mean of these shares over groups is that square, and has its gradient."""
    every = torch.cat(list(step_rewards))
    mean, rewards_per_group = every.mean(), len(every) / len(step_rewards)
    return 2 * mean * rewards.sum() / rewards_per_group - mean.square()


class HeldHead:
    """The head that scores: the trained one, or under `hold: average` the exponential moving average of its weights."""

    def __init__(self, head: nn.Module, config: R2MConfig) -> None:
        self._averaged = None
        if config.head.hold == "average":
            self._averaged = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(config.head.hold_decay))
        self._trained = head

    @property
    def scoring(self) -> nn.Module:
        return self._trained if self._averaged is None else self._averaged.module

    def start(self) -> None:
        """From the trained head's present weights."""
        if self._averaged is not None:
            self._averaged.n_averaged.zero_()
            self.follow()

    def follow(self) -> None:
        """After an update of the trained head."""
        if self._averaged is not None:
            self._averaged.update_parameters(self._trained)

    def resume(self, weights: Weights) -> None:
        """From a checkpoint's scoring head."""
        if self._averaged is not None:
            load_weights(self._averaged.module, weights)
            self._averaged.n_averaged.fill_(1)


def _clipped(rewards: Tensor, config: R2MConfig) -> Tensor:
    return rewards if config.reward.clip is None else rewards.clamp(-config.reward.clip, config.reward.clip)


def _states(
    feedback: PolicyFeedback | None, noise_stream: int, config: R2MConfig
) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """(states, the twin's as a list of one) as the variant's head sees them."""
    if feedback is None:
        return None, None
    states = [*feedback.hidden_states, *([] if feedback.greedy is None else [feedback.greedy])]
    if config.head.variant == "r2m_noise":
        first = sampling_seed(config.run.seed, max(0, feedback.group_id), noise_stream)
        states = [noise_like(rows, first ^ index) for index, rows in enumerate(states)]
    num = len(feedback.hidden_states)
    return states[:num], states[num:]
