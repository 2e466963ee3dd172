"""The sections of `R2MConfig`. Every key has its default, its limits, and a docstring that says what it means.

The equations that are named are those of the paper, R2M (arXiv 2601.22664).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from r2m_async.config_records import RecordsSection
from r2m_async.config_tree import LARGEST, LONGEST, Keys, Options, Section

EMBEDDED_GOLD = {
    "embedded": "r2m_async.from_scratch.language:gold_reward",
    "embedded:letters": "r2m_async.from_scratch.letters:gold_reward",
}
"""For each embedded language, by its name in `model.policy`, `reward.model` and `data.prompts`, its gold reward."""


class RunSection(Section):
    """What a run is called, how long it is, where it is written, and what it runs on."""

    name: str = "r2m"
    """The run directory is called `<name>-<UTC time of its start>`."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in training: the order of the prompts, the sampled responses, new weights of the head
    and of adapters. Evaluations sample with seeds of their own."""
    num_steps: int = Field(100, gt=0)
    """Number of policy steps in the run. `objective.kl_stop` may end it earlier."""
    output_dir: str = "runs"
    """The directory in which the run directory is made."""
    max_restarts: int = Field(3, ge=0)
    """How many times in a row the ring is built anew after a stage was lost or nothing moved any more. It then goes on
    from the newest whole checkpoint. A new checkpoint begins the count again. Without any checkpoint the run ends. A
    lost annotator or queue is restarted by itself, as often in a row without a call of it that ends."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device on which the models compute. `auto` is a GPU if there is one, else the CPU. The head learner is always
    on the CPU."""


class LoRA(Keys):
    """The adapters of `model.lora`: two small trained matrices beside each adapted weight matrix (LoRA)."""

    rank: int = Field(16, gt=0)
    """Inner dimension of an adapter's two matrices."""
    alpha: float = Field(32.0, gt=0, le=LARGEST)
    """The product of an adapter's two matrices is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the modules that get an adapter. `all-linear` is all linear layers but the language-model head."""


class ModelSection(Section):
    """The policy, which is trained, and the reference policy, from which the KL is measured."""

    policy: str = "embedded"
    """Hugging Face name or directory of a causal language model, which the policy starts from. `embedded` is a small
    model of the embedded language, the synthetic language that comes with this package. `embedded:letters` is a larger
    one of a second, harder language (docs/studies_in_full.md). `from_scratch` is a small model that is trained on the texts of `data.prompts` and `data.preferences` before the run."""
    reference: str | None = None
    """Hugging Face name or directory of the reference policy pi_ref. None is the policy as it starts."""
    reference_every: int | None = Field(None, gt=0)
    """Number of policy steps after which the reference policy moves towards the policy, again and again (TR-DPO). All
    KLs are then to the reference as it has become. None: it stays as it is."""
    reference_mix: float = Field(1.0, gt=0, le=1)
    """How far it moves: this part of its new weights is the policy's, and the rest is its own. 1: it becomes the
    policy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights of policy, reference and critic. In bfloat16 the optimizer keeps float32 copies of
    the trained weights."""
    attention: str = "sdpa"
    """Attention implementation of policy, reference and critic, by its name in transformers: `eager`, `sdpa`,
    `flash_attention_2`, `flex_attention`, or a kernel at Hugging Face such as `kernels-community/flash-attn2`. `flash_attention_2`
    and `flex_attention` need a GPU. The first and a kernel of Hugging Face need a package of their own (docs/models.md). A
    vllm engine uses its own attention. `sdpa` is refused for models that cap the attention's logits (Gemma 2), because it leaves the
    cap out."""
    liger: bool = False
    """Whether norms and gated layers of policy, reference and critic compute with the kernels of the package liger-kernel, on a
    GPU (docs/models.md). Other families than it knows are refused."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the files of policy, reference or critic may be run. It is run in every process
    that loads them, with all that you may do on the machine. Some models cannot be loaded otherwise. If false, they are
    refused."""
    lora: LoRA | None = None
    """If set, for example to `{rank: 16, alpha: 32}`, adapters (LoRA) are trained instead of the weights themselves.
    The reference policy is then the policy without its adapters. None trains all weights."""


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))"

REWARD_METRICS = ("mean", "std", "nonfinite", "group_std", "model_mean", "gold")
"""The metrics `reward/...` that are not those of a reward function."""


class RewardFunction(Keys):
    """One of `reward.functions`: a function that scores responses, and how it is called."""

    function: str
    """The function, as `module:attr`. docs/rewards.md says what it is called with, and lists the functions that come
    with this package. It may be `async def`."""
    weight: float = Field(1.0, ge=-LARGEST, le=LARGEST)
    """What its result is multiplied by before it is added to the reward. 0 only watches it."""
    timeout: float = Field(300.0, gt=0, le=LONGEST)
    """Seconds that one call may take. A call that takes longer has failed."""
    retries: int = Field(0, ge=0)
    """How many more times a call that failed is tried, with growing pauses between the tries. 0: the first failure ends
    the run. Otherwise, if the last try fails too, the group is given up: it is counted in the ledger under the reason
    `reward.NAME`, and its step trains without it."""
    options: Options = Field(default_factory=dict)
    """Further keyword arguments of the function."""


class Overlong(Keys):
    """`reward.overlong`: a penalty that grows with the length of a response, up to the limit (DAPO, Eq. 13)."""

    start: int = Field(ge=0)
    """The number of response tokens up to which there is no penalty. In DAPO it is L_max - L_cache."""
    end: int | None = Field(None, gt=0)
    """The number of response tokens from which on the penalty is whole, L_max. None is `rollouts.max_new_tokens`."""
    penalty: float = Field(1.0, gt=0, le=LARGEST)
    """The whole penalty, in units of reward. Between `start` and `end` it rises along a straight line."""


class RewardSection(Section):
    """The reward model, and what is added to its reward or subtracted from it."""

    model: str | None = "embedded"
    """Hugging Face name or directory of a sequence classifier with one label. `embedded` is a small reward model of the
    embedded language, `embedded:letters` that of the harder one. `from_scratch` is a small reward model that is trained on `data.preferences` before the run.
    None: there is no reward model. The reward is that of `functions` alone, and `head.variant` must be `vanilla`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen backbone's weights. The head computes in float32."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the files of the reward model may be run, as in `model.trust_remote_code`."""
    replicas: int = Field(1, gt=0)
    """Number of processes that hold the frozen backbone and embed responses. The head scores in one of them."""
    max_tokens: int | None = Field(None, gt=1)
    """The most tokens that the reward model reads, prompt and response together. A longer text loses its beginning.
    None: as many as the model has positions."""
    functions: Annotated[
        Annotated[tuple[str, ...], Tag("<list>")] | Annotated[dict[str, RewardFunction], Tag("<mapping>")],
        Discriminator(lambda value: "<mapping>" if isinstance(value, Mapping) else "<list>"),
    ] = ()
    """Functions that score responses: a list of `module:attr`, or a mapping of names to settings, for example `{answer:
    {function: mine:answer, weight: 2.0}}`. Each returns a number, which must be finite in float32. The numbers are
    multiplied by the weights and added to the model's reward. The mean of each is the metric `reward/NAME`. In a list
    every weight is 1, and a name is the `attr`."""
    max_voided: int = Field(16, ge=0)
    """The most groups in a row that may be given up because a reward function failed (`retries`), or their generation
    (`rollouts.retries`). One more ends the run with the error."""
    clip: float | None = Field(None, gt=0)
    """The model's reward is clipped to [-clip, clip] before anything is added to it. None: no clip."""
    length_penalty: float = Field(0.0, ge=0)
    """What is subtracted from the reward for each response token, in units of reward. 0: no penalty."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """What is subtracted from the reward of a response that the policy did not end itself, in units of reward. 0: no
    penalty."""
    overlong: Overlong | None = None
    """If set, for example to `{start: 400}`, long responses lose reward (DAPO's soft overlong punishment). None: no
    penalty."""
    normalize: Literal["none", "center", "whiten", "running"] = "none"
    """What is done to the whole reward before advantages are computed. `center`: the mean of the step is taken away.
    `whiten`: it is also divided by the standard deviation of the step. `running`: the same with the mean and the
    standard deviation of all steps so far. Metrics show the rewards as they were."""
    normalize_clip: float | None = Field(None, gt=0)
    """After `normalize` a reward is clipped to [-normalize_clip, normalize_clip]. None: no clip."""

    @field_validator("functions")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Refuses functions whose names would be no names of metrics of their own."""
        for name in value if isinstance(value, dict) else ():
            if not re.fullmatch(r"[\w.:-]+", name) or name in REWARD_METRICS:
                raise ValueError(
                    f"{name!r} cannot be the name of a reward: its metric would be reward/{name}. Use letters, digits and "
                    f"_.:- and none of {', '.join(REWARD_METRICS)}"
                )
        for place, name in enumerate(value if isinstance(value, tuple) else ()):
            if name in value[:place]:
                raise ValueError(
                    f"{name!r} stands twice; name it once, and give it a weight: {{NAME: {{function: {name}, weight: 2}}}}"
                )
        return value

    @property
    def named_functions(self) -> dict[str, RewardFunction]:
        """The reward functions by name, in the order of the config.

        In a list, the name of `module:attr` is `attr`. It is the whole of `module:attr` if another function or a metric
        of this package has that name.
        """
        if isinstance(self.functions, dict):
            return self.functions
        attrs = [name.rpartition(":")[2] for name in self.functions]
        taken = {attr for attr in attrs if attrs.count(attr) > 1} | set(REWARD_METRICS)
        return {
            name if attr in taken else attr: RewardFunction(function=name)
            for name, attr in zip(self.functions, attrs, strict=True)
        }

    @property
    def parts(self) -> dict[str, float]:
        """What the reward is the sum of, by name, each with its weight: the model's reward, functions, penalties."""
        parts = {"model": 1.0} if self.model is not None else {}
        # A function may be called `model` or `penalties`, too; the names here only tell the parts apart.
        parts |= {f"function {name}": one.weight for name, one in self.named_functions.items()}
        return parts | ({"penalties": 1.0} if self.has_penalties else {})

    @property
    def has_penalties(self) -> bool:
        """Whether the reward of some response is lowered by a penalty."""
        return bool(self.length_penalty or self.missing_eos_penalty or self.overlong)

    @property
    def may_void(self) -> bool:
        """Whether a group may be given up because a reward function failed."""
        return any(one.retries for one in self.named_functions.values())


class HeadSection(Section):
    """The reward head, which turns the reward model's embedding of a response into a reward, and how it is trained."""

    variant: Literal["r2m", "vanilla", "r2m_no_train", "r2m_noise", "iterative_head", "iterative_model"] = "r2m"
    """What the head reads, and whether it is trained. `r2m` reads the policy's hidden states (the feedback) and is
    trained. `r2m_no_train` is R2M w/o Train: it reads them and is not trained. `r2m_noise` reads noise in their place
    and is trained. `iterative_head` is Iterative RM_Head: the reward model's own scoring head, which is trained without
    feedback. `iterative_model` is the whole reward model, its backbone included, which is trained without feedback. It is
    sent anew with every update, and trained on the CPU. `vanilla` is the reward model as it came. The paper's R2M w/o BT and w/o GRE are `r2m` with `alpha` 1
    and 0."""
    width: int = Field(2048, gt=0)
    """Width d of the head's cross-attention (Eq. 3)."""
    omega_floor: float = Field(0.6, ge=0.0, le=1.0)
    """Omega of Eq. 4: the smallest weight of the reward token embedding beside the feedback. With 1 the feedback has no
    weight."""
    omega_horizon: int | None = Field(None, gt=0)
    """T of Eq. 4: the step at which the weight of the reward token embedding would reach 0 if there were no floor. None
    is `run.num_steps`."""
    alpha: float = Field(0.3, ge=0.0, le=1.0)
    """alpha of Eq. 7: the weight of the group reward entropy. The Bradley-Terry term has the weight 1 - alpha."""
    pair_source: Literal["refreshed", "annotated", "frozen"] = "refreshed"
    """The rewards that choose the best and the worst response of a group for Eq. 5. `refreshed`: the head's rewards on
    the refreshed hidden states, which are those of the step's last epoch. `annotated`: the head's rewards when the
    responses were scored. `frozen`: the rewards of the reward model as it came, phi(RTE)."""
    hold: Literal["none", "divergence", "bsr", "agreement", "average"] = "none"
    """What keeps the head near the reward model as it came. It is not in the paper; docs/holding_the_head.md compares
    the values. `none`: nothing. `divergence`: a penalty for preferences within a group that differ from those of the
    frozen reward model. `bsr`: a penalty on the square of the step's mean reward. `agreement`: a group trains the head
    only if the frozen reward model ranks its pair in the same way. `average`: a moving average of the trained weights
    scores."""
    hold_weight: float = Field(1.0, gt=0)
    """Weight of the penalty that `hold: divergence` and `hold: bsr` add to Eq. 7."""
    hold_decay: float = Field(0.9, gt=0, lt=1)
    """Decay of the moving average of `hold: average`, per update. Near 1 the head that scores changes slowly."""
    ensemble: int = Field(1, gt=0)
    """Number of heads. Several learn from the same groups and labels, each of which a head sees as often as a Poisson
    number with mean 1 says (bootstrap), and score together. It is not in the paper."""
    pessimism: float = Field(0.0, ge=0)
    """kappa: the reward of an ensemble is the mean of its heads' minus kappa times their standard deviation."""
    steering: float = Field(0.0, ge=0)
    """gamma: the policy's reward for a response is less by gamma times how far the head would move in favour of this response
    if it learnt from it (arXiv 2605.04266). It is not in R2M's paper. It takes a backward pass of the head for each
    response."""
    lr: float = Field(1e-6, gt=0)
    """Learning rate of the head. It stays the same for the whole run."""

    @property
    def trains(self) -> bool:
        """Whether the head of this variant is trained."""
        return self.variant not in ("vanilla", "r2m_no_train")

    @property
    def reads_tokens(self) -> bool:
        """Whether the head of this variant is a whole reward model, which reads tokens in the place of embeddings."""
        return self.variant == "iterative_model"


class LabelsSection(Section):
    """Labels: somebody is asked, while the run goes on, which of two responses is better, and the head learns the answers.

    docs/labels.md says what becomes of a label. It is not in the paper, whose head learns from its own ranking alone.
    """

    source: str | None = None
    """Who gives the labels: a function as `module:attr`, `judge` (a language model on a server), `people` (a web page), or
    `file` (a watched file). None: there are no labels."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the source. docs/labels.md lists those of each."""
    budget: int = Field(8, gt=0)
    """The most pairs that are asked about in a step. No response is in two pairs."""
    pairs: Literal["extremes", "uncertain", "random"] = "extremes"
    """Which pairs of a group are asked about first. `extremes`: the best and the worst response by the head's rewards.
    `uncertain`: those on which the heads of `head.ensemble` differ most, or the one head and the frozen reward model.
    `random`: any two."""
    max_age: int = Field(4, ge=0)
    """The largest age of a label, in steps: the step whose head update uses it first, minus the step of its responses. A
    pair without a label by then is given up."""
    wait: bool = False
    """If true, a label is used by the head update exactly `max_age` steps after its own, which waits for it: the run can be
    reproduced, and it waits for people, too. If false, the first head update after the label has come uses it, and
    nothing waits."""
    timeout: float = Field(600.0, gt=0, le=LONGEST)
    """Seconds after which a pair without a label is given up, however old it is in steps."""
    max_failed: int = Field(16, ge=0)
    """The most labels in a row for which the source may fail. One more ends the run with its error."""
    states: Literal["kept", "refreshed"] = "kept"
    """Which of the policy's hidden states a labelled pair teaches with. `kept`: those of the last epoch of its own step.
    `refreshed`: those of the policy as it is before the update, which reads the pairs once more."""
    replay: int = Field(0, ge=0)
    """How many labelled pairs of earlier updates each head update sees once more."""
    replay_from: int = Field(256, gt=0)
    """Among how many of the newest labelled pairs these are drawn. That many are kept, with their hidden states."""
    self_weight: float = Field(1.0, ge=0, le=LARGEST)
    """How much a group of which no pair was asked about counts in the Bradley-Terry term, beside a labelled pair, which
    counts 1. Such a group teaches the head by the head's own ranking (Eq. 5). 0: labels alone teach."""
    offline: str | None = None
    """Source of preference pairs that the head learns from beside labels, or without any: records in the forms of
    `data.preferences`, or `embedded` for pairs of the embedded language. Each is weighted by how much likelier its
    responses are under the policy than under the reference policy (OCRM). None: no such pairs."""
    offline_pairs: int = Field(8, gt=0)
    """How many of these pairs each head update sees, drawn at random."""
    offline_weight: float = Field(1.0, gt=0, le=LARGEST)
    """How much such a pair counts in the mean, beside a labelled pair, which counts 1."""
    offline_temper: float = Field(0.001, ge=0)
    """The weight of a pair is the ratio of the probabilities of both its responses to this power, divided by the mean
    over the pairs of the update. 1 is the whole ratio, which few pairs would dominate. 0 weighs all alike."""
    noise: float = Field(0.0, ge=0, lt=1)
    """For studies: the probability that a label is turned round before it is used."""

    @property
    def active(self) -> bool:
        """Whether the head learns from pairs that somebody else has ranked."""
        return self.source is not None or self.offline is not None

    @property
    def rereads(self) -> bool:
        """Whether the policy reads pairs for the head's update."""
        return self.offline is not None or (self.source is not None and self.states == "refreshed")


class FeedbackSection(Section):
    """The policy's hidden states that the head reads (the feedback)."""

    source: Literal["rollout", "learner"] = "rollout"
    """Whose hidden states the head reads when it scores. `rollout`: those of the policy that sampled the response, as
    in the paper. `learner`: those of the learner's policy at the start of the step."""
    dtype: Literal["model", "float32", "bfloat16"] = "model"
    """Number format in which the hidden states are sent and kept. `model` is that of `model.dtype`."""


class RolloutsSection(Section):
    """The rollout actors, which sample the responses."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the responses. `transformers` is slow and simple. `vllm` batches requests continuously."""
    num_actors: int = Field(1, gt=0)
    """Number of rollout actors. Each has an engine of its own."""
    concurrent_groups: int | None = Field(None, gt=0)
    """Number of groups that one actor generates at once. Rounding then depends on which groups run together. `transformers`
    generates those that it is asked for at the same time as one batch, and takes no other before the batch has ended. None:
    1, but with `transformers` in an asynchronous run as many as an actor has of a step, with 64 responses at most."""
    tensor_parallel: int = Field(1, gt=0)
    """Number of GPUs that one vllm engine spreads its model over."""
    in_flight_updates: bool = False
    """If true, new weights are loaded into a vllm engine while its requests wait, and the requests then go on with
    them. If false, an actor finishes its groups first."""
    keep_stale_cache: bool = False
    """If true, requests go on after an in-flight update with the keys and values that the old weights computed. If
    false, they compute them again."""
    engine_options: Options = Field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, for example gpu_memory_utilization."""
    prompts_per_step: int = Field(8, gt=0)
    """B: the number of prompts, and so of groups, that one policy step trains."""
    group_size: int = Field(8, gt=0)
    """K: the number of responses to each prompt, which form a group."""
    max_refills: int = Field(0, ge=0)
    """How many times a group whose responses all have the same reward is replaced by a group of another prompt, because it
    would teach nothing (the dynamic sampling of DAPO). Then it is trained as it is. It needs `head.variant: vanilla`: the
    rewards of other heads are not known before the step. Each group keeps its room in the queue at its largest. 0: no
    group is replaced."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. It divides the logits, in training as in sampling."""
    max_prompt_tokens: int = Field(512, gt=0)
    """The most tokens of a prompt. A longer prompt is a bad record (`data.on_bad_record`)."""
    max_new_tokens: int = Field(512, gt=0)
    """The most tokens of a response. A longer response is cut there. What an environment writes into it counts, too."""
    function: str | None = None
    """The user's own rollout function as `module:attr`, an `async def` that drives each response through several turns with
    tools or an environment (`docs/rollouts.md`). None: a response is one turn of the policy."""
    function_options: Options = Field(default_factory=dict)
    """Keyword arguments of the rollout function."""
    function_timeout: float = Field(600.0, gt=0, le=LONGEST)
    """Seconds that the rollout function may take for one response, what the policy samples not counted. A function that
    takes longer ends the run."""
    max_restarts: int = Field(3, ge=0)
    """How many times in a row a rollout actor may die, without finishing a group in between. With one death more the actor
    has left (`min_actors`). 0: it leaves with the first death."""
    retries: int = Field(3, ge=0)
    """How often a group is generated again if an engine that still lives could not finish its responses. Then the group is
    given up under the reason `generation_failed`, and its step trains without it (`reward.max_voided`)."""
    min_actors: int | None = Field(None, gt=0)
    """The least rollout actors with which the run goes on. One that cannot come back, because its node is gone, leaves the
    fleet, and joins again when there is a place for it. None: all must be there."""
    hang_after: float = Field(1200.0, gt=0, le=LONGEST)
    """Seconds that an actor may take for one group, or for any other call. Then its process counts as hung and is
    replaced."""


class SchedulingSection(Section):
    """How far the stages may run ahead of each other, and how long they wait."""

    max_policy_age: int = Field(0, ge=0)
    """The largest policy age, in steps: the step that trains a group, minus the oldest policy version that sampled it.
    0 samples every group with the newest version."""
    max_head_age: int = Field(0, ge=0)
    """The largest head age, in steps: a step, minus the head version that scores it. 0 scores every step with the
    newest version."""
    lag: Literal["bounded", "exact"] = "bounded"
    """`bounded`: ages may be anything up to their bounds. `exact`: every age is exactly its bound (in the first steps,
    version 0 is used), so that even an asynchronous run can be reproduced bit for bit."""
    overage: Literal["wait", "mask", "drop"] = "wait"
    """What happens to late groups. `wait`: the step waits for them. `mask`: they are cut to their finished responses.
    `drop`: they are given up."""
    overage_after: float = Field(60.0, gt=0, le=LONGEST)
    """Seconds after which a group counts as late. They begin with the last arrival of its step, the end of the step
    before, or its own start, whichever comes last."""
    stall_after: float = Field(1800.0, gt=0, le=LONGEST)
    """Seconds in which no stage finishes anything, after which the run ends with a list of who waits for what. The
    start of the run must take no longer, either."""


class ClusterSection(Section):
    """Where the processes of the stages lie in a Ray cluster of several nodes. On one node only `gpus` changes anything.

    The first three keys choose nodes by their labels, for example `{ray.io/market-type: spot}`. A value is what the label must
    be, `!` before it is what it must not be, and `in(a, b)` or `!in(a, b)` names several. A node that does not have the label
    passes a value with `!`. With `{}` any node will do. Whoever starts a node gives it labels (docs/cluster.md).
    """

    stable: dict[str, str] = Field(default_factory=lambda: {"ray.io/market-type": "!spot"})
    """Labels of the nodes for what a run cannot go on without: the replay queue, the head learner, the labeller and the ranks of
    the policy learner. They lie on as few nodes as possible."""
    rollouts: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for the rollout actors, which may be lost at any time. They lie on as many nodes as possible."""
    annotators: dict[str, str] = Field(default_factory=lambda: {"ray.io/market-type": "!spot"})
    """Labels of the nodes for the reward annotators. They lie on as many nodes as possible."""
    annotator_memory: int | None = Field(None, gt=0)
    """Bytes of main memory that Ray keeps free for each reward annotator. It is meant for reward models that are large beside the
    memory of a node. None: none is kept."""
    gpus: int | None = Field(None, gt=0)
    """Number of GPUs that the run counts on. A cluster whose nodes come only when something asks for them needs it. None: the
    GPUs that the cluster has when the run starts."""
    wait: float = Field(60.0, gt=0, le=LONGEST)
    """Seconds that the cluster may take until it has room for all processes. A lost rollout actor waits as long for new room, but
    300 seconds at least."""

    @field_validator("stable", "rollouts", "annotators")
    @classmethod
    def _selectors(cls, value: dict[str, str]) -> dict[str, str]:
        """Refuses what Ray would not read as a selector of labels."""
        for label, wanted in value.items():
            if not re.fullmatch(_SELECTOR, wanted):
                raise ValueError(
                    f"{wanted!r} is no selector of the label {label!r}; write a value such as spot, or !spot, in(a, b) or !in(a, b)"
                )
        return value


class QueueSection(Section):
    """The replay queue, which keeps groups until both learners have used them."""

    max_bytes: int = Field(2 * 1024**3, gt=0)
    """The most bytes that all groups together may take in the queue. It must hold the groups of at least one step at
    their largest."""
    journal: int = Field(1024**3, ge=0)
    """The most bytes of the journal in the run directory, in which finished groups survive until the next checkpoint. A
    resumed run does not generate them again. 0: no journal. With the learner on other machines than the driver, all must
    share the run directory."""


class AdvantageSection(Section):
    """The advantage estimator, which turns the rewards of a step into advantages."""

    name: str = "rloo"
    """rloo, rloo_kl, grpo, grpo_batch, dr_grpo, opo, gdpo, remax, probe, reinforce_pp, reinforce_pp_baseline, gae, the name of a
    registered estimator, or a user's own as `module:attr`. `docs/algorithms.md` says what each is."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the estimator."""
    whiten: Literal["none", "responses", "tokens"] = "none"
    """What is whitened over the whole batch: shifted to mean 0 and divided by its standard deviation. `responses`: the
    advantages of responses, each of which counts once. `tokens`: the advantages of tokens, so that a long response
    counts more. `none`: the advantages stay as the estimator gives them."""


class OffPolicyMask(Keys):
    """The bounds of `objective.off_policy_mask`, on a weight like w of `objective.off_policy`."""

    level: Literal["sequence", "token", "sequence_mean"] = "sequence_mean"
    """What has one such weight, as in `objective.ratio`."""
    low: float = Field(0.5, ge=0, lt=1)
    """What has a smaller weight is left out. 0: nothing is, for that."""
    high: float = Field(2.0, gt=1, le=LARGEST)
    """What has a larger weight is left out."""


class ObjectiveSection(Section):
    """The policy's loss, and how often it is minimised on the data of a step."""

    loss: str = "clip"
    """The loss of what has one ratio: clip (Eq. 2, PPO), dual_clip, cispo, gmpo, sapo, or a user's own as `module:attr`.
    cispo and sapo need `ratio: token`, and gmpo needs `ratio: sequence_mean`. `docs/algorithms.md` says what each is."""
    loss_options: Options = Field(default_factory=dict)
    """Keyword arguments of the loss."""
    ratio: Literal["sequence", "token", "sequence_mean"] = "sequence"
    """What has one importance ratio. `sequence`: a whole response, with the product of its tokens' ratios (Eq. 2).
    `token`: each token. `sequence_mean`: a whole response, with the geometric mean of its tokens' ratios; this is GSPO,
    and `gspo` may be written for it."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped from below, at 1 - clip_low. Under `loss: gmpo` log-ratios are, at -clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped from above, at 1 + clip_high. Under `loss: gmpo` log-ratios are, at clip_high."""
    off_policy: Literal["none", "ignore", "full", "clamp", "mask"] = "clamp"
    """What corrects for responses that an older policy sampled. `none`: nothing; the ratio is to the policy that
    sampled. `ignore`: nothing; the ratio is to the policy at the start of the step. Otherwise the ratio is to that one,
    too, and a weight w multiplies the loss. w is the probability under that policy, divided by the probability under the
    policy that sampled. `full`: w as it is. `clamp`: w, but at most `off_policy_cap` and at least `off_policy_low`.
    `mask`: what has a w outside these two is left out."""
    off_policy_cap: float = Field(2.0, gt=1)
    """The upper bound of `off_policy: clamp` and `mask`."""
    off_policy_low: float | None = Field(None, ge=0, lt=1)
    """The lower bound of `off_policy: clamp` and `mask`. None: `clamp` has none, and that of `mask` is
    1 / off_policy_cap. 0: none."""
    off_policy_level: Literal["sequence", "token", "sequence_mean"] | None = None
    """What has one w. None: what has one ratio."""
    off_policy_mask: OffPolicyMask | None = None
    """If set, for example to `{level: sequence_mean, low: 0.5, high: 2}`, what has such a weight outside of these bounds
    is left out, beside what `off_policy` does. The weight is formed like w, but at a level of its own. None: nothing more
    is left out."""
    kl_coef: float = Field(0.05, ge=0)
    """beta of Eq. 2: the weight of the KL to the reference policy. 0: no KL term."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the loss estimates the KL of a token. `k3`: exp(d) - d - 1, where d is the log-probability under the reference
    minus that under the policy. `k2`: d^2 / 2, whose gradient is that of the KL on average. k1, which is -d, is no choice:
    its gradient is 0 on average, so it would hold nothing."""
    kl_cap: float | None = Field(None, gt=0)
    """The most that the estimate of a token may be, in nats. Beyond it the token has no gradient of the KL. None: no
    cap."""
    kl_target: float | None = Field(None, gt=0)
    """The KL that `kl_coef` is adapted to, measured as for `kl_stop`. After every step the coefficient is multiplied by
    1 + kl_gain e, where e is KL / kl_target - 1, but at least -0.2 and at most 0.2. None: it stays as it is."""
    kl_gain: float = Field(0.1, gt=0, le=1)
    """How fast `kl_target` adapts the coefficient."""
    kl_stop: float | None = Field(None, gt=0)
    """The run ends after a step in which the KL to the reference policy is larger than this. It is the mean over
    responses, in nats, of the policy at the start of the step. None: no such end."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus: the entropy of the policy's distribution, in nats per token, is taken from the loss
    with this weight. It is averaged as the loss is (`aggregation`). 0: no bonus."""
    aggregation: Literal["sequence", "token", "token_sum", "sequence_sum", "sequence_sum_norm"] | None = None
    """What the losses of tokens become. `sequence`: every response has the same weight, and its tokens are averaged.
    `token`: every token has the same weight. `token_sum`: the sum of all tokens. `sequence_sum`: the tokens of a response
    are added up, and responses are averaged. `sequence_sum_norm`: that, divided by `rollouts.max_new_tokens` (Dr. GRPO).
    The loss of a whole response counts for each of its tokens. None is `token` under `ratio: token`, but for `loss: sapo`,
    and `sequence` otherwise, as Eq. 2, GSPO and SAPO have it."""
    mask_cut: bool = False
    """If true, responses that were cut at `rollouts.max_new_tokens` are left out of the policy's loss (DAPO's overlong
    filtering). They keep their place in the baselines of the others, and the critic still learns from them."""
    epochs: int = Field(2, gt=0)
    """Number of passes over the responses of a step."""
    num_minibatches: int = Field(1, gt=0)
    """Number of optimizer steps in each epoch. A minibatch is made of whole groups."""

    @field_validator("ratio", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """GSPO is known by its name, too."""
        return "sequence_mean" if value == "gspo" else value

    @property
    def levels(self) -> tuple[str, str, str]:
        """What has one ratio, one off-policy weight, and one weight that `off_policy_mask` looks at."""
        return self.ratio, self.off_policy_level or self.ratio, getattr(self.off_policy_mask, "level", self.ratio)


class CriticSection(Section):
    """The critic, for advantage estimators that need values (`gae`). With other estimators there is no critic."""

    model: str | None = None
    """Hugging Face name or directory of the model that the critic starts from. It must read the policy's tokens. A
    sequence classifier with one label keeps its head. None is the model of `model.policy`, with a head of zeros."""
    lr: float = Field(1e-5, ge=0)
    """The critic's highest learning rate. Schedule, warmup, weight decay, gradient clip and all else are those of the
    section `learner`."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may be pushed from its value at the start of the step, in units of reward. None: no limit."""


class LearnerSection(Section):
    """How the policy is trained: the backend, the optimizer (AdamW) and the memory."""

    backend: Literal["torch", "deepspeed"] = "torch"
    """`torch` is one process, which computes the same bits in every run. `deepspeed` spreads the work over several
    processes with ZeRO."""
    num_ranks: int = Field(1, gt=0)
    """For deepspeed: number of processes that share the groups of a step. If there are GPUs, each has its own."""
    zero_stage: int = Field(0, ge=0, le=3)
    """For deepspeed: what the ranks divide among themselves. 0: nothing. 1: the optimizer's state. 2: gradients, too.
    3: weights, too."""
    zero_options: Options = Field(default_factory=dict)
    """For deepspeed: further keys of its `zero_optimization`, for example overlap_comm or
    stage3_param_persistence_threshold."""
    offload: Literal["none", "optimizer", "params"] = "none"
    """For deepspeed: what lies in the memory of the CPU instead of the GPU. `optimizer`: the optimizer's state, and its
    step runs there. `params`: the weights, too."""
    activation_checkpointing: bool = False
    """If true, layers are computed again in the backward pass instead of being kept. This takes less memory and about a
    third more time. The results are the same bits."""
    lr: float = Field(1e-6, ge=0)
    """The policy's highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warmup. `linear` and `cosine` fall to 0 at `run.num_steps`."""
    warmup: int = Field(0, ge=0)
    """Number of policy steps over which the learning rate rises linearly. 0: it starts at its highest."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW. 0: none."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A gradient with a larger norm is scaled down to this norm."""
    tokens_per_microbatch: int = Field(8192, gt=0)
    """The most tokens in one forward pass, padding included. A trajectory (a prompt with its response) that is longer
    gets a pass of its own."""
    packing: bool = False
    """If true, a forward pass is one row of trajectories without padding, each of which attends only to itself. It is
    meant for `model.attention: flash_attention_2`. Other attention computes all pairs of tokens in the row and masks
    most of them, which costs more than padding unless lengths differ widely. Models that do not keep the trajectories
    of a row apart (OPT, BLOOM, Falcon, Mamba) are refused."""
    max_mismatch: float | None = Field(None, gt=0)
    """The most that learner and rollout engine may differ in the first step, in nats: the mean, over the tokens that the
    learner's own version of the policy sampled, of the difference between their log-probabilities. With a larger one
    the run ends, because they do not compute the same model. None is 0.01 under `model.dtype: float32`, and 0.1 under
    bfloat16."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens if a reward, an advantage, a gradient or the head's update is NaN or infinite. `stop`: the run ends,
    and the message names what made the number. `skip`: that update is left out. A step with such a reward or advantage
    is left out whole, for the head, too."""


class WeightsSection(Section):
    """How new versions of the policy get into the engines of the rollout actors."""

    transport: Literal["auto", "object_store", "gloo", "nccl", "ipc"] = "auto"
    """How a version gets from the learner to a vllm engine. `object_store`: through Ray's object store and shared
    memory. `gloo`, `nccl`: the learner broadcasts it. `ipc`: the engine reads it from the learner's memory on the same
    GPU. `auto` is nccl if learner and engines have GPUs of their own, ipc if all of them share one GPU, and otherwise
    object_store. It is also object_store for other engines and under `scheduling.lag: exact`."""
    probe: bool = True
    """If true, a vllm engine must show after every update that it has the learner's weights, and that it computes the
    same log-probabilities with them."""
    timeout: float = Field(300.0, gt=0, le=LONGEST)
    """Seconds that each part of an update may take. Then the engine counts as dead and is replaced."""

    @property
    def direct(self) -> bool:
        """Whether the learner itself sends the weights to the engines, by `gloo`, `nccl` or `ipc`."""
        return self.transport in ("gloo", "nccl", "ipc")


class DataSection(RecordsSection):
    """The prompts, and the preference pairs for a reward model that is made from scratch.

    A source is a file (JSONL, a JSON list, CSV, Parquet), several files with commas between them, a folder with a data
    set, or the name of a data set at Hugging Face.
    """

    prompts: str = "embedded"
    """Source of the prompts. `embedded` stands for prompts of the embedded language, the synthetic language that comes
    with this package, and `embedded:letters` for those of the harder one."""
    preferences: str | None = None
    """Source of preference pairs, records with the fields prompt, chosen and rejected. `reward.model: from_scratch` is
    trained on them, and `model.policy: from_scratch` learns from their texts, too. None: no pairs. `filters` is not for
    these: such models have no tokenizer yet."""
    eval: str | None = None
    """Source of the held-out prompts for evaluations. None holds back the last `evaluation.num_prompts` of `prompts`.
    With prompts of an embedded language it is not used: that language has held-out prompts of its own."""


class EvaluationSection(Section):
    """Evaluations on held-out prompts. They run beside training and train nothing."""

    every: int | None = Field(None, gt=0)
    """Number of policy steps between two evaluations. There is also one before the first step and one after the last.
    None: there are no evaluations at all."""
    num_prompts: int = Field(16, gt=0)
    """Number of held-out prompts. Each evaluation generates one group for each of them."""
    gold: str | None = None
    """The gold reward function of the user, as `module:attr`. It is given what it names, as a reward function is, and
    returns a number. A function of three other parameters is called as f(prompt, response, finished).
    It is reported for steps and evaluations, and nothing is trained on it. It must be finite. Under
    `learner.on_nonfinite: skip` it may be NaN, and a step or evaluation with such a number reports no gold reward.
    None: no gold reward."""

    @field_validator("gold", mode="before")
    @classmethod
    def _moved(cls, value: Any) -> Any:
        """A config of an earlier version names the function where it was then."""
        return EMBEDDED_GOLD["embedded"] if value == "r2m_async.language:gold_reward" else value


class CheckpointSection(Section):
    """Which checkpoints a run writes and keeps."""

    every: int | None = Field(None, gt=0)
    """Number of policy steps between two checkpoints in the run directory. None: none before the end."""
    at_end: bool = True
    """If true, a checkpoint is written after the last step. `r2m export` needs one."""
    keep: int = Field(2, gt=0)
    """Number of checkpoints that are kept, the newest ones. Older ones are deleted."""


class LoggingSection(Section):
    """What a run shows and records while it goes on."""

    tensorboard: bool = True
    """If true, the metrics are also written for TensorBoard, into the run directory."""
    wandb: str | None = None
    """The W&B project to which the metrics are also sent. Account, server and offline mode are W&B's own environment
    variables. docs/observing.md."""
    mlflow: str | None = None
    """The MLflow experiment to which the metrics are also sent. MLFLOW_TRACKING_URI says where it is."""
    trackio: str | None = None
    """The trackio project in which the metrics are also kept."""
    prometheus: bool = False
    """If true, the metrics are also among those of Ray, for Prometheus. docs/observing.md."""
    live: bool = True
    """If true, a table in the terminal shows the last steps. Without a terminal, plain lines are printed instead."""
    actors: bool = True
    """If true, what the processes of the stages print is shown, with the name of the stage. The user's own functions
    print there, too."""
