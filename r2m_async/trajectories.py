"""The data types that the stages of the ring hand to each other, one type per stage.

A *trajectory* is a prompt with one response to it. A *group* is the K trajectories that answer one prompt. A *policy
version* counts completed policy steps, and a *head version* counts completed head updates. *Policy feedback* is the
policy's hidden states on a trajectory.

Shapes: S prompt + response tokens of one trajectory, K trajectories of a group, D_p hidden size of the policy, D_m
hidden size of the reward model, P tokens of the probe. Tensors inside these types always lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, as the data has it and as the policy reads it."""

    prompt_id: str
    """Where the prompt comes from, e.g. `posts.jsonl:17`."""
    content: str | tuple[tuple[str, str], ...]
    """The prompt as the data has it: raw text, or (role, content) turns of which the last is the user's."""
    text: str
    """The text that the policy reads, with its chat template applied where the prompt is a conversation."""
    token_ids: tuple[int, ...]
    """The same as tokens of the policy's tokenizer."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Every further field of the data's record by name, e.g. `answer`: all but the field of the prompt.

    A value is what JSON can hold (None, bool, int of 64 bits, float, str, list, dict) or bytes. Dates and times are text in
    ISO 8601. It is empty for prompts that come from no record. Treat it as read-only: the groups of a prompt share it.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The permission to generate one group once.

    If the actor that generates the group is lost, the group gets a new ticket with the next attempt.
    """

    group_id: int
    """The number of the group in the run, from 0. Groups of the evaluation have negative numbers."""
    due_step: int
    """The policy step that trains the group. It is -1 for the evaluation, which trains nothing."""
    seed: int
    """The seed of the group's random numbers. It is the same in every attempt."""
    attempt: int
    """How often the group was issued before: 0, 1, ... The results of older attempts are refused."""
    prompt: Prompt

    @property
    def place(self) -> str:
        """The name of the group in messages."""
        prompt = f" (prompt {self.prompt.prompt_id!r})" if self.prompt.prompt_id else ""
        return group_place(self.due_step, self.group_id) + prompt


def group_place(step: int, group_id: int) -> str:
    """The name of a group in messages: `step 3, group 12`, or `evaluation prompt 2` for a group of the evaluation."""
    return (
        f"step {step}, group {group_id}"
        if group_id >= 0 and step >= 0
        else f"evaluation prompt {-1 - min(-1, group_id)}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One response with its prompt, and how it was sampled. Construction raises ValueError if fields disagree."""

    token_ids: Tensor
    """[S] int64: the prompt, then the response. The end-of-text token is included if the policy sampled it."""
    prompt_len: int
    """The number of prompt tokens, at least 1."""
    behaviour_logprobs: Tensor
    """[S] float32: log-probability of each token under the distribution that it was sampled from; 0 on all others."""
    policy_versions: Tensor
    """[S] int32: the version of the policy that sampled each token; -1 on all others."""
    finish_reason: str
    """What ended the response: `stop` (the policy), `length` (the length limit) or `abort` (the schedule)."""
    text: str
    """The response as text, without special tokens. The reward model reads this text and not the tokens."""
    written: Tensor | None = None
    """[S] bool: True on the tokens that the policy wrote. False on the prompt, and on what an environment wrote.

    None: the policy wrote the whole response, as it does without `rollouts.function`. Only tokens that the policy wrote
    are trained. Hidden states are kept for all.
    """
    info: Mapping[str, Any] | None = None
    """What the user's `rollouts.function` noted about the response, as JSON values. None without such a function."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if not 0 < self.prompt_len <= length:
            raise ValueError(f"prompt_len {self.prompt_len} does not fit in {length} token_ids")
        for name in ("behaviour_logprobs", "policy_versions"):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {length} token_ids")
        if self.finish_reason not in ("stop", "length", "abort"):
            raise ValueError(f"finish_reason {self.finish_reason!r} is none of stop, length, abort")
        if self.written is not None:
            if str(self.written.dtype) != "torch.bool" or tuple(self.written.shape) != (length,):
                raise ValueError(
                    f"written is {self.written.dtype} {list(self.written.shape)}, and must be bool [{length}] as token_ids"
                )
            if self.written[: self.prompt_len].any():
                raise ValueError(
                    f"written is True within the prompt of {self.prompt_len} tokens: nobody trains a prompt"
                )

    def of_policy(self, values: Tensor) -> Tensor:
        """Returns those of values [S, ...] that stand at tokens which the policy wrote, in their order."""
        return values[self.prompt_len :] if self.written is None else values[self.written]

    @property
    def num_response_tokens(self) -> int:
        """The number of tokens in the response, whoever wrote them. It may be 0."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_policy_tokens(self) -> int:
        """The number of tokens in the response that the policy wrote. It may be 0."""
        return self.num_response_tokens if self.written is None else int(self.written.sum())

    @property
    def num_turns(self) -> int:
        """The number of the policy's turns: runs of tokens that it wrote, with tokens of an environment between them."""
        if self.written is None:
            return int(self.num_response_tokens > 0)
        # The first token is the prompt's. So each turn begins where False is followed by True.
        return int((self.written[1:] & ~self.written[:-1]).sum())

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled a token. A response without such tokens gives the largest int32."""
        versions = self.of_policy(self.policy_versions)
        return int(versions.min()) if len(versions) else 2**31 - 1

    @property
    def newest_version(self) -> int:
        """The newest policy version that sampled a token. A response without such tokens gives 0."""
        versions = self.of_policy(self.policy_versions)
        return int(versions.max()) if len(versions) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The K responses to one prompt, and a greedy response to it if the advantage estimator asks for one."""

    ticket: Ticket
    """The ticket under which the group was generated."""
    trajectories: tuple[Trajectory, ...]
    """K trajectories, or fewer if the schedule aborted some."""
    greedy: Trajectory | None
    """The greedy twin: a response that was generated without sampling. It is never trained on."""

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled any token of the group, the greedy twin included."""
        twin = () if self.greedy is None else (self.greedy,)
        return min((trajectory.oldest_version for trajectory in (*self.trajectories, *twin)), default=2**31 - 1)

    @property
    def newest_version(self) -> int:
        """The newest policy version that sampled any token of the group, the greedy twin included."""
        twin = () if self.greedy is None else (self.greedy,)
        return max((trajectory.newest_version for trajectory in (*self.trajectories, *twin)), default=0)

    def finished(self) -> TrajectoryGroup:
        """The group without the responses that the schedule aborted.

        If it aborted the greedy twin, the result has no trajectories: the estimator could not use them.
        """
        kept = tuple(trajectory for trajectory in self.trajectories if trajectory.finish_reason != "abort")
        whole_twin = self.greedy is None or self.greedy.finish_reason != "abort"
        return TrajectoryGroup(ticket=self.ticket, trajectories=kept if whole_twin else (), greedy=self.greedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFeedback:
    """The policy's hidden states on the trajectories of a group: the last layer's, after the final norm."""

    group_id: int
    hidden_states: tuple[Tensor, ...]
    """K tensors [S - 1, D_p]. The last token has no state, because it was never an input."""
    greedy: Tensor | None
    """[S - 1, D_p], the states on the greedy twin."""
    policy_version: int
    """The version of the policy that computed the states; the oldest if there were several.

    For refreshed feedback, which is computed while the policy is trained, it is the step.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEmbeddings:
    """The reward token embeddings (RTE) of a group, and all of its reward that does not depend on the head.

    An RTE is the last hidden state of the reward model at the token that it scores. The backbone of the reward model is
    frozen, so an RTE is computed once and never changes.
    """

    group_id: int
    rte: Tensor
    """[K, D_m] float32."""
    greedy_rte: Tensor | None
    """[D_m] float32, the RTE of the greedy twin."""
    bonus: Tensor
    """[K] float32: what the reward functions and the penalties add to the model's reward."""
    greedy_bonus: Tensor | None
    """The same for the greedy twin, a scalar tensor."""
    frozen_rewards: Tensor
    """[K] float32: phi(RTE), the rewards of the original reward model, without feedback."""
    functions: Tensor | None = None
    """[K, F] float32: what each of the F functions of `reward.functions` returned, before it is multiplied by its weight.
    None without functions. `bonus` contains it."""
    penalties: Tensor | None = None
    """[K] float32, 0 or less: what the penalties of the section `reward` add. None without penalties. `bonus` contains
    it."""
    input_ids: tuple[Tensor, ...] | None = None
    """K tensors [S] int64: the responses as the reward model reads them, for a head that reads tokens
    (`head.variant: iterative_model`). None for others."""
    greedy_input_ids: Tensor | None = None
    """The same for the greedy twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """The rewards of a group. All groups of a step are scored with the same head version."""

    group_id: int
    rewards: Tensor
    """[K] float32: the rewards on which the policy is trained."""
    model_rewards: Tensor
    """[K] float32: the rewards by the head alone, before they are clipped and the bonuses are added."""
    greedy_reward: Tensor | None
    """The reward of the greedy twin on the scale of `rewards`, a scalar tensor."""
    head_version: int
    """The version of the head that scored the group."""
    omega: float
    """The weight of the RTE in the mix of R2M's Eq. 4. It is 1 if the head reads no feedback."""
    parts: Tensor | None = None
    """[K, R] float32: what `rewards` is the weighted sum of, before the weights (`RewardSection.parts`): the model's
    reward as it is clipped, each reward function, the penalties."""
    members: Tensor | None = None
    """[M, K] float32: the rewards by each head of an ensemble. None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards. Construction raises ValueError if they do not belong together."""

    group: TrajectoryGroup
    rewards: GroupRewards

    def __post_init__(self) -> None:
        if self.group.ticket.group_id != self.rewards.group_id:
            raise ValueError(
                f"the rewards are those of group {self.rewards.group_id}, and the group is {self.group.ticket.group_id}"
            )
        if len(self.rewards.rewards) != len(self.group.trajectories):
            raise ValueError(f"{len(self.rewards.rewards)} rewards for {len(self.group.trajectories)} trajectories")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """What the head learns from: one group of a trained step."""

    embeddings: RewardEmbeddings
    feedback: PolicyFeedback | None
    """The refreshed feedback: the policy's states in the last epoch of the step. None if the head reads no feedback."""
    annotated: GroupRewards
    """The rewards that the policy was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a labeller was asked, and perhaps answered, about two responses to one prompt.

    `chosen` and `reason` say how far it has come. Both are None: it is asked. `chosen` alone is set: it is a preference.
    With a `reason` it teaches nothing.
    """

    group_id: int
    """The group of the two responses."""
    step: int
    """The policy step of the group. The label's age at a later step counts from here."""
    pair: tuple[int, int]
    """The indices of the two responses in the group, in the order in which they were shown."""
    chosen: int | None = None
    """The index of the preferred response, one of `pair`."""
    reason: str | None = None
    """Why it teaches nothing: `tie`, `refused`, `disagreed` (the two orders), `failed`, `timeout`, `late`, `left_out`."""
    who: str | None = None
    """Who has answered."""

    @property
    def key(self) -> tuple[int, int, int]:
        """The group and the two responses. A run asks about no pair twice."""
        return self.group_id, *self.pair


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPair:
    """Two responses to one prompt of which one was preferred, with what the head needs to learn that."""

    label: Label
    group: HeadGroup
    """The two alone: the preferred response, then the other."""
    trajectories: tuple[Trajectory, Trajectory] | None = None
    """The same two in full, if the policy reads them anew for this update (`labels.states: refreshed`)."""
    weight: float = 1.0
    """How much the pair counts beside others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RereadPair:
    """What the present policy makes of a labelled pair."""

    group_id: int
    """The place of the pair in `LabelBatch.unread`."""
    feedback: PolicyFeedback | None
    """The policy's states on the two. None if the head reads none."""
    log_ratio: Tensor | None = None
    """log pi - log pi_ref, summed over all tokens of both responses: a scalar tensor. None but for pairs of `offline`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelBatch:
    """The labels of one head update."""

    step: int
    """The step of the update."""
    asked: tuple[int, ...]
    """The groups of this step of which a pair was asked. They learn from labels, and not from the head's own ranking."""
    new: tuple[LabelledPair, ...]
    """The pairs whose labels are used for the first time."""
    replayed: tuple[LabelledPair, ...]
    """Pairs of earlier updates that are used once more."""

    offline: tuple[TrajectoryGroup, ...] = ()
    """Pairs of `labels.offline`, each as a group of two: the preferred response, then the other."""

    @property
    def pairs(self) -> tuple[LabelledPair, ...]:
        """All pairs that this update learns from, but for those in `offline`."""
        return *self.new, *self.replayed

    @property
    def unread(self) -> list[tuple[Trajectory, ...]]:
        """The two trajectories of each pair that the policy reads for this update: those of `offline` come last."""
        own = [pair.trajectories for pair in self.pairs if pair.trajectories is not None]
        return [*own, *(group.trajectories for group in self.offline)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelReport:
    """What the label stage reports to the controller."""

    version: int
    """The policy step of the call."""
    labels: tuple[Label, ...]
    """The pairs that were asked, or all labels whose fate is decided: used, or given up for a reason."""
    records: list[dict[str, Any]]
    """What is to be written of the labels, as JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProbe:
    """What lets a rollout engine check that it has the learner's weights and computes the same with them."""

    digests: dict[str, str]
    """For each parameter, by name, a digest of its bytes."""
    token_ids: Tensor
    """[P] int64: a fixed sequence of tokens."""
    logprobs: Tensor
    """[P - 1] float32: the learner's log-probabilities of these tokens but the first, at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One version of the weights of a policy or of a head."""

    version: int
    tensors: dict[str, Tensor]
    """The parameters by name."""
    probe: WeightProbe | None = None
    """What the receiver checks. It is None for heads, and for engines that compute with the learner's own code."""
    layout: dict[str, list] | None = None
    """Names, dtypes and shapes of the parameters, if the learner sends the tensors to the engine itself.

    None if the tensors travel in `tensors`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a stage reports to the controller beside its payloads."""

    version: int
    """The version that the call used or made. `embed`, which depends on no version, reports the group's number here."""
    metrics: dict[str, float]
    """Measured values by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A response to a held-out prompt, and what an evaluation found of it. It is there to be read by people."""

    prompt_id: str
    """The name of the prompt's record."""
    prompt: str | tuple[tuple[str, str], ...]
    """The prompt as its record has it, a text or turns (role, content)."""
    response: str
    """The response as text."""
    finished: bool
    """Whether the policy ended the response itself."""
    reward: float
    """The whole reward by the reward model as it came, with reward functions and penalties."""
    gold: float | None
    """The gold reward. None if `evaluation.gold` is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What a reward annotator reports of an evaluation."""

    version: int
    """The version of the head that scored."""
    metrics: dict[str, float]
    """Measured values by name."""
    samples: tuple[Sample, ...]
    """The first response to each held-out prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """What the schedule needs to know about a generated group. The group itself is not sent to the controller."""

    group_id: int
    attempt: int
    """The attempt of the ticket."""
    oldest_version: int
    """The oldest policy version that sampled a token of the group."""
    newest_version: int
    """The newest policy version that sampled a token of the group."""
    num_responses: int
    """The number of finished responses: K, or fewer if the schedule aborted some."""
    num_tokens: int
    """The number of tokens that the policy wrote for the K trajectories, aborted ones included."""
    num_bytes: int
    """The bytes of the group and of its hidden states, which are counted twice: as sampled and as refreshed."""
