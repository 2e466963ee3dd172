"""The types that travel round the ring, one per stage (design.md, "Types, one per stage").

Legend of shapes: S prompt + response tokens of one trajectory, K trajectories of a group, D_p hidden size of the
policy, D_m hidden size of the reward model. Tensors live on the CPU whenever they are inside one of these types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    prompt_id: str
    """Where it comes from, e.g. `posts.jsonl:17`."""
    content: str | tuple[tuple[str, str], ...]
    """Raw text, or (role, content) turns that end with the user's."""
    text: str
    """What the policy reads, as text."""
    token_ids: tuple[int, ...]
    """What the policy reads, as its own tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The right to generate one group, once."""

    group_id: int
    due_step: int
    """The policy step that trains the group; -1 for evaluation, which trains nothing."""
    seed: int
    """Of the group's random numbers; the same in every attempt."""
    attempt: int
    """Counts issues of this ticket from 0; a result of an older attempt is fenced."""
    prompt: Prompt

    @property
    def place(self) -> str:
        """Which group it is, for messages."""
        prompt = f" (prompt {self.prompt.prompt_id!r})" if self.prompt.prompt_id else ""
        return group_place(self.due_step, self.group_id) + prompt


def group_place(step: int, group_id: int) -> str:
    """A group's name in messages: `step 3, group 12`, or `evaluation prompt 2` where none is trained."""
    return (
        f"step {step}, group {group_id}"
        if group_id >= 0 and step >= 0
        else f"evaluation prompt {-1 - min(-1, group_id)}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    token_ids: Tensor
    """[S] int64: prompt, then response, end-of-text token included when the policy wrote it."""
    prompt_len: int
    behaviour_logprobs: Tensor
    """[S] float32: log-probability under the distribution sampled from; 0 on the prompt."""
    policy_versions: Tensor
    """[S] int32: version of the policy that sampled each token; -1 on the prompt."""
    finish_reason: str
    """`stop` (the policy ended the text), `length` (the limit did) or `abort` (the schedule did)."""
    text: str
    """The response as text, special tokens removed: what crosses to the reward model."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if not 0 < self.prompt_len <= length:
            raise ValueError(f"prompt_len {self.prompt_len} does not fit in {length} token_ids")
        for name in ("behaviour_logprobs", "policy_versions"):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {length} token_ids")
        if self.finish_reason not in ("stop", "length", "abort"):
            raise ValueError(f"finish_reason {self.finish_reason!r} is none of stop, length, abort")

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def oldest_version(self) -> int:
        """Of the policies that sampled the response; the newest possible where it is empty."""
        versions = self.policy_versions[self.prompt_len :]
        return int(versions.min()) if len(versions) else 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The K responses to one prompt, and their greedy twin where the estimator asks for one."""

    ticket: Ticket
    trajectories: tuple[Trajectory, ...]
    greedy: Trajectory | None

    @property
    def oldest_version(self) -> int:
        twin = () if self.greedy is None else (self.greedy,)
        return min((trajectory.oldest_version for trajectory in (*self.trajectories, *twin)), default=2**31 - 1)

    def finished(self) -> TrajectoryGroup:
        """Without the responses that the schedule cut short; empty if it cut the greedy twin."""
        kept = tuple(trajectory for trajectory in self.trajectories if trajectory.finish_reason != "abort")
        whole_twin = self.greedy is None or self.greedy.finish_reason != "abort"
        return TrajectoryGroup(ticket=self.ticket, trajectories=kept if whole_twin else (), greedy=self.greedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFeedback:
    """The policy's last-layer states, after the final norm, on a group's trajectories."""

    group_id: int
    hidden_states: tuple[Tensor, ...]
    """K tensors [S - 1, D_p]: the last token was never an input."""
    greedy: Tensor | None
    policy_version: int
    """The policy that produced the states, the oldest if several did (for refreshed feedback: the step it was refreshed in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEmbeddings:
    """The reward token embeddings (RTE) of a group: the frozen backbone's, so they never change."""

    group_id: int
    rte: Tensor
    """[K, D_m] float32."""
    greedy_rte: Tensor | None
    """[D_m]."""
    bonus: Tensor
    """[K] float32: what the verifiable reward functions and penalties add to the model's reward."""
    greedy_bonus: Tensor | None
    """Scalar tensor."""
    frozen_rewards: Tensor
    """[K] float32: phi(RTE), what the reward model gives without feedback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """A group's rewards, bound by one head version for the whole batch."""

    group_id: int
    rewards: Tensor
    """[K] float32: what the policy is trained on."""
    model_rewards: Tensor
    """[K] float32: the head's part of it, before clipping and bonuses."""
    greedy_reward: Tensor | None
    """Scalar tensor."""
    head_version: int
    omega: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """The proof that a group was scored."""

    group: TrajectoryGroup
    rewards: GroupRewards

    def __post_init__(self) -> None:
        if self.group.ticket.group_id != self.rewards.group_id:
            raise ValueError(f"rewards of group {self.rewards.group_id} meet group {self.group.ticket.group_id}")
        if len(self.rewards.rewards) != len(self.group.trajectories):
            raise ValueError(f"{len(self.rewards.rewards)} rewards for {len(self.group.trajectories)} trajectories")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """What the head learns from: embeddings, refreshed feedback and the rewards bound at annotation."""

    embeddings: RewardEmbeddings
    feedback: PolicyFeedback | None
    """None where the variant's head reads no feedback."""
    annotated: GroupRewards


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProbe:
    """What an engine must see once it has loaded a version."""

    digests: dict[str, str]
    """Of every parameter's bytes, by name."""
    token_ids: Tensor
    """[P] int64: a fixed text."""
    logprobs: Tensor
    """[P - 1] float32: the learner's log-probabilities of all its tokens but the first, at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The named parameters of one version of a policy or of a head."""

    version: int
    tensors: dict[str, Tensor]
    probe: WeightProbe | None = None
    """None where nobody checks: heads, and policies for an engine that computes as the learner does."""
    layout: dict[str, list] | None = None
    """Names, dtypes and shapes in place of `tensors`, where the learner sends those to the engine itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a stage tells the controller beside its payloads."""

    version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """What the schedule needs to know of a finished group; the payloads stay where they are."""

    group_id: int
    attempt: int
    oldest_version: int
    num_responses: int
    """K, or fewer where the schedule cut the group."""
    num_tokens: int
    """Response tokens generated for the K trajectories, cut ones included."""
    num_bytes: int
    """Of the group and its states, as sampled and as refreshed."""
