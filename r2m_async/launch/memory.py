"""How much memory each process of a run will take, by part, before anything starts. `r2m check` shows it.

Weights, optimizer and gradients follow from the models' shapes. What depends on lengths (activations, states, keys and
values) is for the longest texts that the config allows. docs/check.md has the formulas. What Python and its libraries take
by themselves is not in it, nor what is on its way between two processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from r2m_async.config import R2MConfig
from r2m_async.models.adapters import TrainedPart, add_adapters
from r2m_async.models.critic import ValueModel, critic_classifier
from r2m_async.models.policy import LOGITS_AT_ONCE
from r2m_async.models.pretrained import pretrained_config
from r2m_async.models.reward import TOKENS_OF_A_PASS, classifier_skeleton, scoring_head

ESTIMATED = ("activations", "logits", "KV cache", "steering", "labelled pairs")
"""The parts that are estimates. Weights, optimizer and gradients are exact for the torch backend. The others are the most that
there can be."""
REMEDIES = {
    "weights": "use bfloat16 (model.dtype, reward.dtype), learner.zero_stage 3, or rollouts.tensor_parallel",
    "reference": "set model.lora, whose reference policy is the policy without its adapters, or use bfloat16",
    "optimizer": "set model.lora, or learner.backend deepspeed with zero_stage 1 and more num_ranks",
    "gradients": "set model.lora, or learner.backend deepspeed with zero_stage 2 and more num_ranks",
    "critic": "take a smaller critic.model",
    "activations": "lower learner.tokens_per_microbatch, or set learner.activation_checkpointing",
    "logits": "use a model with a smaller vocabulary",
    "staged versions": "set model.dtype bfloat16, lower scheduling.max_policy_age, or weights.transport object_store",
    "KV cache": "lower rollouts.concurrent_groups, rollouts.group_size or rollouts.max_new_tokens",
    "head": "lower head.width or head.ensemble",
    "steering": "lower head.width or rollouts.group_size",
    "moving average": "lower head.width or head.ensemble, or take another head.hold",
    "head before an update": "lower head.width or head.ensemble, or set learner.on_nonfinite stop",
    "states": "lower rollouts.prompts_per_step, rollouts.group_size or rollouts.max_new_tokens, or set feedback.dtype bfloat16",
    "labelled pairs": "lower labels.replay_from or rollouts.max_new_tokens",
    "groups": "lower queue.max_bytes",
    "published versions": "set model.dtype bfloat16, or lower scheduling.max_policy_age",
}
"""What makes each part smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the memory of a model depends on."""

    parameters: int
    """Number of all parameters without adapters. Those that are tied count once."""
    adapters: int
    """Number of the parameters of its adapters (`model.lora`)."""
    trained: int
    """Number of the parameters that are trained: all, or with adapters these and a critic's head."""
    head: int
    """Number of parameters of a classifier's scoring head. 0 for a language model."""
    layers: int
    width: int
    """The hidden size."""
    inner: int
    """Width of the feed-forward layers."""
    queries: int
    """Width of the queries: heads times head size."""
    keys: int
    """Width of the keys, and of the values: key-value heads times head size."""
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The memory of one process, or of several that are alike."""

    name: str
    count: int
    computes: bool
    """Whether it computes with a model, and so on a GPU if there is one."""
    parts: dict[str, int]
    """Bytes by part, where it computes."""
    in_main: dict[str, int] = field(default_factory=dict)
    """Bytes by part that lie in main memory, wherever the process computes."""

    def split(self, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
        """The parts on a GPU and those in main memory, without parts of 0 bytes.

        on_gpu: whether processes that compute have a GPU.
        """
        gpu, main = (self.parts, self.in_main) if on_gpu and self.computes else ({}, self.parts | self.in_main)
        return _nonzero(gpu), _nonzero(main)


def _nonzero(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def language_model_shape(key: str, name: str, config: R2MConfig) -> Shape:
    """Returns the shape of a language model, made without weights.

    Args:
        key: the key of the config that names the model, for messages.
        name: Hugging Face name or directory of the model.
        config: the run's config, whose adapters the model gets.

    Raises ConfigError as `pretrained_config` and `add_adapters` do.
    """
    from transformers import AutoModelForCausalLM

    trust = config.model.trust_remote_code
    with torch.device("meta"):
        read = pretrained_config(key, name, trust=trust)
        model = AutoModelForCausalLM.from_config(read, trust_remote_code=trust)
        return _trained_shape(model, model, config)


def critic_shape(name: str, config: R2MConfig) -> Shape:
    """Returns the shape of the critic, as `language_model_shape` does. name: Hugging Face name or directory.

    Raises ConfigError as `critic_classifier` does.
    """
    classifier = critic_classifier(name, config, weightless=True)
    with torch.device("meta"):
        return _trained_shape(ValueModel(classifier), classifier, config)


def _trained_shape(model: Any, sizes_of: Any, config: R2MConfig) -> Shape:
    """The shape of a model without weights that is trained, and gets adapters here. sizes_of: the model with the sizes."""
    parameters = _number(model)
    if config.model.lora:
        add_adapters(model, config.model.lora, config.run.seed)
    trained = sum(one.numel() for one in TrainedPart(model).parameters())
    adapters = _number(model) - parameters
    return Shape(parameters=parameters, adapters=adapters, trained=trained, head=0, **_sizes(sizes_of))


def classifier_shape(name: str, config: R2MConfig) -> Shape:
    """Returns the shape of a reward model, made without weights. name: Hugging Face name or directory."""
    model = classifier_skeleton(name, config.reward.trust_remote_code)
    head = _number(scoring_head(model))
    return Shape(parameters=_number(model), adapters=0, trained=0, head=head, **_sizes(model))


def _number(module: Any) -> int:
    return sum(one.numel() for one in module.parameters())


def _sizes(model: Any) -> dict[str, int]:
    """The fields of `Shape` that a model's config has. Where layers differ, the largest counts."""
    read = model.config.get_text_config()

    def size(*names: str) -> int:
        """The first of some sizes that the config has, or 0."""
        found = (getattr(read, name, None) for name in names)
        value = next((one for one in found if one), 0)
        return int(max(value)) if isinstance(value, list | tuple) else int(value)

    width, heads = read.hidden_size, size("num_attention_heads")  # 0 without attention, as in Mamba
    each = size("head_dim") or (width // heads if heads else 0)
    return {
        "layers": read.num_hidden_layers,
        "width": width,
        "inner": size("intermediate_size", "ffn_dim") or 4 * width,
        "queries": heads * each,
        "keys": (size("num_key_value_heads", "num_kv_heads") or heads) * each,
        "vocabulary": read.vocab_size,
    }


def activation_bytes(shape: Shape, tokens: int, itemsize: int, checkpointing: bool) -> int:
    """Estimates the bytes that a forward pass keeps for its backward pass. It is within a factor of 2 of what it takes.

    A layer keeps, for each token, b (6 h + 5 q + 4 f) bytes, with b the bytes of a number, h the hidden size, q the width of
    the queries and f that of the feed-forward layers: the inputs of two norms, what they make and what they divided (6 h);
    queries, keys and values repeated for all heads, the attention's output and its copy (5 q); the gate, what its activation
    makes of it, the other half, and their product (4 f). In bfloat16 the norms keep float32 copies of their inputs, 8 h.
    Attention that does not hold all pairs of tokens is assumed: `eager` takes more.

    Args:
        shape: the model.
        tokens: the tokens of the pass, padding included.
        itemsize: b.
        checkpointing: whether a layer keeps its input alone (`learner.activation_checkpointing`). One layer at a time is
            then computed again.
    """
    layer = itemsize * (6 * shape.width + 5 * shape.queries + 4 * shape.inner) + (itemsize < 4) * 8 * shape.width
    if checkpointing:
        return tokens * (shape.layers * itemsize * shape.width + layer)
    return tokens * shape.layers * layer


def microbatch_tokens(config: R2MConfig) -> int:
    """Returns the most tokens of one pass of the policy learner, padding included."""
    rollouts = config.rollouts
    longest = _longest(config)
    groups = -(-rollouts.prompts_per_step // config.objective.num_minibatches)
    rows = -(-groups * rollouts.group_size // config.learner.num_ranks)
    return min(max(longest, config.learner.tokens_per_microbatch), rows * longest)


def training_parts(shape: Shape, config: R2MConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bytes of a model that is trained, by part, for one rank of the learner: where it computes, and in main memory.

    With P parameters, A more of adapters (LoRA), of all of which T are trained, and b bytes a number, the torch backend has
    weights (P + A) b, gradients 4 T, and an optimizer of 8 T for its two moments, and 4 T more for float32 masters if b is 2.
    DeepSpeed divides them among its ranks from zero_stage 1 (optimizer), 2 (gradients) and 3 (weights)
    on, and from zero_stage 1 on it has masters under float32, too. With `learner.offload` optimizer and weights lie in main
    memory.
    """
    learner, itemsize = config.learner, _itemsize(config.model.dtype)
    deepspeed = learner.backend == "deepspeed"

    def shared(size: int, stage: int) -> int:
        return -(-size // learner.num_ranks) if deepspeed and learner.zero_stage >= stage else size

    masters = itemsize < 4 or (deepspeed and learner.zero_stage > 0)
    parts = {
        "weights": shared((shape.parameters + shape.adapters) * itemsize, 3),
        "optimizer": shared(shape.trained * (12 if masters else 8), 1),
        "gradients": shared(shape.trained * (itemsize if deepspeed else 4), 2),
    }
    moved = {"none": (), "optimizer": ("optimizer",), "params": ("weights", "optimizer")}[learner.offload]
    offloaded = {name: parts[name] for name in moved}
    return parts | dict.fromkeys(moved, 0), offloaded


def state_bytes(config: R2MConfig, policy: Shape, responses: int) -> int:
    """Returns the most bytes of the policy's hidden states on some responses: (P + T - 1) D_p numbers of feedback.dtype each.

    P and T are the most tokens of a prompt and of a response, D_p is the policy's hidden size. 0 if the head reads no states.
    """
    tokens = config.rollouts.max_prompt_tokens + config.rollouts.max_new_tokens - 1
    return responses * tokens * policy.width * _itemsize(config.feedback_dtype) if config.reads_feedback else 0


def processes(
    config: R2MConfig, policy: Shape, reward_model: Shape | None, critic: Shape | None, group_bytes: int
) -> list[Process]:
    """Returns the memory of all processes of a run.

    Args:
        config: the config of the run.
        policy, reward_model, critic: the models. None if there is none.
        group_bytes: the most bytes of one group in the queue, from `worst_group_bytes`.
    """
    rollouts, at_once = config.rollouts, config.concurrent_groups * config.rollouts.group_size
    longest, split, itemsize = _longest(config), rollouts.tensor_parallel, _itemsize(config.model.dtype)
    found = [
        _policy_learner(config, policy, critic),
        Process(
            name="rollout",
            count=rollouts.num_actors * split,
            computes=True,
            parts={
                "weights": -(-policy.parameters * itemsize // split),
                "KV cache": -(-at_once * longest * policy.layers * 2 * policy.keys * itemsize // split),
            },
            in_main={"states": state_bytes(config, policy, at_once) if config.wants_rollout_states else 0},
        ),
    ]
    if reward_model:
        found.append(_annotator(config, policy, reward_model))
    found.append(_head_learner(config, policy, reward_model))
    if config.labels.active:
        labels = config.labels
        pairs = (labels.replay_from * (labels.replay > 0) + labels.budget * (labels.max_age + 1)) * bool(labels.source)
        held = {"labelled pairs": pairs * -(-2 * group_bytes // rollouts.group_size)}
        found.append(Process(name="labeller", count=1, computes=False, parts=held))
    store = 0 if config.weights.direct else (_kept_policies(config) + 1) * policy.parameters * itemsize
    return [
        *found,
        Process(name="queue", count=1, computes=False, parts={"groups": config.queue.max_bytes}),
        Process(name="object store", count=1, computes=False, parts={"published versions": store}),
    ]


def _policy_learner(config: R2MConfig, policy: Shape, critic: Shape | None) -> Process:
    """The ranks of the policy learner. The critic is of the same size on each."""
    learner, itemsize, tokens = config.learner, _itemsize(config.model.dtype), microbatch_tokens(config)
    parts, offloaded = training_parts(policy, config)
    own_reference = config.model.lora is None
    # A reference that moves a little at a time in bfloat16 has float32 masters.
    masters = config.model.reference_every is not None and config.model.reference_mix < 1 and itemsize < 4
    parts["reference"] = own_reference * (parts["weights"] + masters * 4 * policy.parameters)
    if own_reference and "weights" in offloaded:
        offloaded["reference"] = offloaded["weights"]
    if critic:
        of_critic, besides = training_parts(critic, config)
        parts["critic"] = sum(of_critic.values())
        offloaded["critic"] = sum(besides.values())
    # Policy and critic run one after the other, so the larger of the two passes counts.
    parts["activations"] = max(
        activation_bytes(one, tokens, itemsize, learner.activation_checkpointing) for one in (policy, critic) if one
    )
    # Logits, their logarithms and the gradient of one of them, in float32.
    parts["logits"] = 3 * 4 * min(LOGITS_AT_ONCE, tokens * policy.vocabulary)
    if config.weights.direct:
        of_versions = offloaded if config.weights.transport == "gloo" else parts  # gloo sends from main memory
        of_versions["staged versions"] = (2 + config.scheduling.max_policy_age) * policy.parameters * itemsize
    rows = -(-config.rollouts.prompts_per_step // learner.num_ranks) * config.rollouts.group_size
    # Those of the pairs that it reads once more come after those of the step.
    offloaded["states"] = state_bytes(config, policy, max(rows, 2 * _pairs_of_update(config) * config.labels.rereads))
    return Process(name="policy-learner", count=learner.num_ranks, computes=True, parts=parts, in_main=offloaded)


def _annotator(config: R2MConfig, policy: Shape, reward_model: Shape) -> Process:
    """A reward annotator: the frozen reward model, and the head that scores with its first version beside it."""
    rollouts, itemsize = config.rollouts, _itemsize(config.reward.dtype)
    longest = min(_longest(config), config.reward.max_tokens or _longest(config))
    # Asynchronously, all groups that have arrived go through it together.
    groups = rollouts.prompts_per_step * (1 + config.scheduling.max_policy_age) if config.asynchronous else 1
    rows = groups * rollouts.group_size
    tokens = min(max(longest, TOKENS_OF_A_PASS), rows * longest)
    head = 4 * _head_parameters(config, policy, reward_model)
    parts = {
        "weights": reward_model.parameters * itemsize,
        "head": 2 * head,
        # The gradients of a group's responses: one by one, together, less their mean, and multiplied.
        "steering": 4 * rollouts.group_size * (head // config.head.ensemble) * bool(config.head.steering),
        # Without a backward pass one layer is in memory at a time.
        "activations": activation_bytes(reward_model, tokens, itemsize, False) // reward_model.layers,
    }
    of_step = {"states": state_bytes(config, policy, rollouts.prompts_per_step * rollouts.group_size)}
    return Process(name="annotator", count=config.reward.replicas, computes=True, parts=parts, in_main=of_step)


def _head_learner(config: R2MConfig, policy: Shape, reward_model: Shape | None) -> Process:
    """The head learner: float32 weights with AdamW, and what the options of the section `head` keep besides."""
    rollouts, trains = config.rollouts, config.trains_head
    head = 4 * _head_parameters(config, policy, reward_model)
    responses = rollouts.prompts_per_step * rollouts.group_size + 2 * _pairs_of_update(config)
    parts = {
        "head": head,
        "gradients": head * trains,
        "optimizer": 2 * head * trains,
        "moving average": head * (config.head.hold == "average"),
        "head before an update": 3 * head * (trains and config.learner.on_nonfinite == "skip"),
        "states": state_bytes(config, policy, responses) * trains,
    }
    if config.head.reads_tokens and reward_model:
        # All models of an ensemble read a group before its backward pass.
        longest = min(_longest(config), config.reward.max_tokens or _longest(config))
        one = activation_bytes(reward_model, rollouts.group_size * longest, 4, False)
        parts["activations"] = config.head.ensemble * one
    return Process(name="head-learner", count=1, computes=False, parts=parts)


def checkpoint_bytes(config: R2MConfig, policy: Shape, reward_model: Shape | None, critic: Shape | None) -> int:
    """Returns the bytes of one checkpoint of the torch backend, without those of names, counts and labelled pairs.

    It has what trains with its optimizer, the head that trains and the one that scores, and the versions that may still be
    needed. DeepSpeed writes about as much.
    """
    itemsize, model = _itemsize(config.model.dtype), config.model
    trained = sum(one.trained * (itemsize + 8 + (4 if itemsize < 4 else 0)) for one in (policy, critic) if one)
    if model.reference_every is not None:
        trained += policy.parameters * (4 if model.reference_mix < 1 else itemsize)
    versions = (1 if config.weights.direct else _kept_policies(config)) * policy.parameters * itemsize
    heads = 1 + (config.scheduling.max_head_age if config.scheduling.lag == "exact" else 0)
    head = 4 * _head_parameters(config, policy, reward_model)
    return trained + versions + head * (2 + 2 * config.trains_head + heads)


def _pairs_of_update(config: R2MConfig) -> int:
    """The most pairs of labels and of a data set that one update of the head sees."""
    labels = config.labels
    labelled = labels.budget * (labels.max_age + 1) + labels.replay if labels.source else 0
    return labelled + (labels.offline_pairs if labels.offline else 0)


def _kept_policies(config: R2MConfig) -> int:
    """The most policy versions that are kept, because a group may still be generated with them."""
    return 1 + (config.scheduling.max_policy_age if config.scheduling.lag == "exact" else 0)


def _head_parameters(config: R2MConfig, policy: Shape, reward_model: Shape | None) -> int:
    """Number of the parameters of all reward heads.

    A head is phi, with the four matrices of Eq. 3 where it reads feedback. Under `iterative_model` it is the whole reward
    model.
    """
    if reward_model is None:
        return 0
    matrices = 2 * config.head.width * (reward_model.width + policy.width) if config.reads_feedback else 0
    one = reward_model.parameters if config.head.reads_tokens else reward_model.head + matrices
    return config.head.ensemble * one


def _longest(config: R2MConfig) -> int:
    """The most tokens of a prompt and its response."""
    return config.rollouts.max_prompt_tokens + config.rollouts.max_new_tokens


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def lacking(found: list[Process], memory: Mapping[str, float], gpus: float, share: float) -> list[str]:
    """Compares processes with the memory that there is, and returns a line for whatever does not fit, with what to change.

    Args:
        found: the processes.
        memory: bytes of one GPU under `GPU` and of the machine under `machine`. What is not known is left out.
        gpus: the number of GPUs.
        share: the GPUs of each process that computes (`gpus.gpu_share`). 0: none has one.
    """
    told = list[str]()
    on_gpu, in_main = dict[tuple[str, str], int](), dict[tuple[str, str], int]()
    for one in found:
        gpu, main = one.split(share > 0)
        on_gpu |= {(one.name, part): one.count * size for part, size in gpu.items()}
        in_main |= {(one.name, part): one.count * size for part, size in main.items()}
    if "GPU" in memory and share >= 1:
        for one in found:
            gpu = one.split(True)[0]
            if sum(gpu.values()) > memory["GPU"]:
                told.append(
                    f"{one.name} needs {gib(sum(gpu.values()))} and a GPU has {gib(memory['GPU'])}: "
                    f"{_remedy({(one.name, part): size for part, size in gpu.items()})}"
                )
    elif "GPU" in memory and on_gpu and sum(on_gpu.values()) / gpus > memory["GPU"]:
        told.append(
            f"the processes on one GPU need {gib(sum(on_gpu.values()) / gpus)} and it has {gib(memory['GPU'])}: "
            f"{_remedy(on_gpu)}"
        )
    if "machine" in memory and (total := sum(in_main.values())) > memory["machine"]:
        told.append(
            f"all processes need {gib(total)} of main memory and the machine has {gib(memory['machine'])}: {_remedy(in_main)}"
        )
    return told


def _remedy(parts: Mapping[tuple[str, str], int]) -> str:
    """What to change about the largest of some parts, which are named by process and part."""
    process, part = max(parts, key=lambda name: parts[name])
    return f"the most is {part} of {process}; {REMEDIES[part]}"


def gib(size: float) -> str:
    """Bytes, to be read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
