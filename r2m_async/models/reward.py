"""The frozen reward model, split into a backbone and a scoring head. R2M, arXiv 2601.22664, App. H.1.

The reward model is a sequence classifier of transformers with one label, whose logit is the reward. The backbone maps a
response to its reward token embedding (RTE): the hidden state from which the logit is computed. The scoring head phi
maps the RTE to the logit, so scoring_head(model) of an RTE is the reward of the response.

A scoring head has one linear layer, or two with a ReLU between them. transformers can store only linear heads. So a
classifier with two layers is saved in two parts. Its first weight matrix is saved as a linear head with many labels.
The rest of the head is saved beside it in `reward_head.safetensors`. `load_classifier` puts both together.
`AutoModelForSequenceClassification` loads the first part alone, and its many labels show that it is not a reward model.

Shapes: B responses, S prompt + response positions (padded), D_m hidden size of the reward model, K responses of a
group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from r2m_async.config import R2MConfig
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.errors import ConfigError, StepFailed
from r2m_async.finite import check_embeddings, check_weights, response_name, stop_or_log
from r2m_async.models.batches import right_padded
from r2m_async.models.loading import settled
from r2m_async.models.padding import similar_lengths
from r2m_async.models.pretrained import pretrained_config, pretrained_model, pretrained_tokenizer, quiet
from r2m_async.models.tokens import num_positions, num_tokens_known, padding_token, unknown_token
from r2m_async.models.weight_files import SECOND_LAYER
from r2m_async.plugins import FLOAT32_MAX
from r2m_async.rewards.calls import Values, start_calls
from r2m_async.trajectories import Prompt, RewardEmbeddings, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reward_token_embeddings(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Returns the reward token embeddings [B, D_m]: hidden states of the last layer, after the final norm.

    input_ids: [B, S] int64, padded on the right. attention_mask: [B, S], 1 on tokens and 0 on padding.

    A response's embedding is read at the token whose logit is the model's reward. In transformers 5.19 that is the
    rightmost token that is not the padding token. The token's id decides this, and not `attention_mask`. So if a
    response ends with the padding token, that end is not the scored token.

    Gradients flow if they are enabled. Raises ConfigError if there are several rows and the model has no padding token.
    """
    states_BSD = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return states_BSD[torch.arange(len(input_ids), device=states_BSD.device), scored_positions(model, input_ids)]


def scoring_head(model: PreTrainedModel) -> nn.Module:
    """Returns the scoring head phi, a module that maps [..., D_m] to [..., 1]. It is the model's own, not a copy.

    Raises ConfigError if the model has no head `score`, or more labels than one.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.config.num_labels != 1:
        raise ConfigError(
            f"reward.model must be a sequence-classification model with a `score` head and one label, got "
            f"{type(model).__name__} with num_labels = {model.config.num_labels}"
        )
    return head


def scored_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Returns [B] int64: the position in each row of `input_ids` [B, S] at which the reward token embedding is read.

    Raises ConfigError if there are several rows and the model has no padding token.
    """
    num_rows, length = input_ids.shape
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is None:
        if num_rows != 1:
            raise ConfigError(
                f"reward.model's config has no pad_token_id, so {num_rows} responses cannot be scored at once; set it"
            )
        return input_ids.new_tensor([length - 1])
    # The rule of transformers: padding has position 0 here, so the largest position is that of the last real token.
    positions = torch.arange(length, device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


def know_padding(model: Any, tokenizer: Any, key: str, name: str | Path) -> None:
    """Sets the padding token in a classifier's config to that of its tokenizer, if the config has none.

    Texts of several lengths are scored together, each at its last token that is not padding. So the token must be known.

    key, name: the model's, for messages. Raises ConfigError if nobody names a padding token, or if the model has no
    embedding for it.
    """
    text_config = model.config.get_text_config()
    text_config.pad_token_id = pad = padding_token(tokenizer, model.config)
    if pad is None:
        raise ConfigError(
            f"{key} {str(name)!r}: neither its config (pad_token_id) nor its tokenizer (pad_token) names a padding token, so "
            f"texts of several lengths cannot be scored together; save it with one"
        )
    if pad >= text_config.vocab_size:
        raise ConfigError(
            f"{key} {str(name)!r}: its padding token has the id {pad}, and the model has embeddings for "
            f"{text_config.vocab_size} tokens: resize the embeddings (resize_token_embeddings) and save the model anew, or "
            f"name another padding token"
        )


def two_layer_head(hidden_size: int, width: int) -> nn.Sequential:
    """Returns a new scoring head with two layers, as GRM has it.

    It is Linear(hidden_size, width), ReLU, Linear(width, 1). Both linear layers have biases.
    """
    return nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, 1))


def load_classifier(path: str | Path, key: str = "reward model", **how: Any) -> PreTrainedModel:
    """Loads a sequence classifier that transformers or `save_classifier` wrote, a scoring head of two layers included.

    path: HF name or directory. key: names the model in messages. how: further arguments of `pretrained_model`.

    Raises ConfigError as `pretrained_model` does, also if the files lack the trained head.
    """
    model = pretrained_model(key, path, "classifier", **how)
    if rest := second_layer(path):
        first = model.score.weight  # [width, D_m]; transformers takes it for a linear head of `width` labels
        _give_two_layers(model)
        if not first.is_meta:
            model.score.load_state_dict(load_file(rest) | {"0.weight": first.detach()})
        model.score.to(first.dtype)
    return model


def head_in_float32(model: PreTrainedModel) -> None:
    """Lets a classifier's head compute in float32, as the reward head of a run does.

    In bfloat16 the rewards 10.01 and 10.04 are one number, and two responses that a run would tell apart are a tie.
    """
    model.score.float().register_forward_pre_hook(lambda _, given: tuple(one.float() for one in given))


def classifier_skeleton(path: str | Path, trust: bool = False) -> PreTrainedModel:
    """Returns the module that `load_classifier` would return, but on the meta device: shapes without weights.

    path: HF name or directory. Only the config is read.
    trust: whether Python code in the model's files may be run.
    """
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            pretrained_config("reward.model", path, trust=trust), trust_remote_code=trust
        )
        if second_layer(path):
            _give_two_layers(model)
    return model


def second_layer(path: str | Path) -> str | None:
    """Returns the path of `reward_head.safetensors`, or None if the model's scoring head has one layer.

    path: HF name or directory. For an HF name the file is downloaded if it is not in the cache.
    """
    return cached_file(
        path,
        SECOND_LAYER,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _give_two_layers(model: PreTrainedModel) -> None:
    """Replaces a head [width, D_m] of `width` labels by a head of two layers and one label. Its weights are new."""
    width, hidden_size = model.score.weight.shape
    model.score = two_layer_head(hidden_size, width)
    model.config.num_labels = model.num_labels = 1


def save_classifier(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the files that `load_classifier` reads.

    model: a sequence classifier whose scoring head has one layer or two.
    directory: must exist.
    weights: the state dict to write. None writes the model's own.
    """
    weights = dict(model.state_dict() if weights is None else weights)
    config = copy.deepcopy(model.config)
    if isinstance(model.score, nn.Sequential):
        weights["score.weight"] = weights.pop("score.0.weight")
        rest = {name: weights.pop(f"score.{name}").contiguous() for name in ("0.bias", "2.weight", "2.bias")}
        config.num_labels = len(weights["score.weight"])
    # transformers saves modules, not state dicts. `assign` puts the tensors themselves into an empty one: no second
    # copy.
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(weights, assign=True)
    with quiet():
        plain.save_pretrained(directory)
    if isinstance(model.score, nn.Sequential):
        save_file(rest, directory / SECOND_LAYER)


def load_reward_model(path: str, config: R2MConfig) -> PreTrainedModel:
    """Loads the reward model in `reward.dtype`, moves it to the device, freezes it and puts it into eval mode.

    path: HF name or directory.

    Raises ConfigError as `load_classifier` and `know_padding` do, and if the model has more labels than one or a weight
    is not finite.
    """
    trust = config.reward.trust_remote_code
    model = load_classifier(path, "reward.model", dtype=getattr(torch, config.reward.dtype), trust=trust)
    scoring_head(model)  # raises unless the model can be one
    know_padding(model, pretrained_tokenizer("reward.model", path, trust), "reward.model", path)
    check_weights(model, "reward.model", path)
    return settled(model, config.run.device).requires_grad_(False)


TOKENS_OF_A_PASS = 8192
"""The most tokens in one pass of the frozen reward model, padding included. A longer response gets a pass of its own."""


def embed_group(
    model: PreTrainedModel | None,
    tokenizer: Any,
    group: TrajectoryGroup,
    config: R2MConfig,
    calls: Future[Values] | None = None,
    passes: Callable[[TrajectoryGroup], tuple[Tensor, Tensor, list[Tensor]]] | None = None,
) -> RewardEmbeddings:
    """Returns the reward token embeddings, bonuses and frozen rewards of a group.

    A greedy twin, if the group has one, gets an embedding and a bonus too. It gets no frozen reward.

    model: the reward model, or None if there is none. Embeddings then have no numbers, and frozen rewards are 0.
    tokenizer: the reward model's own tokenizer. The responses come to it as text.
    calls: the calls of the reward functions for this group, which `start_calls` has started. None starts them here.
    passes: returns what `embed_responses` does for the group. None: the group goes through the model by itself.

    The reward functions are called during the passes through the model. The tensors of the result are float32 on the CPU.

    Raises FunctionFailed or RewardFailed if a function of `reward.functions` fails (`start_calls`). Raises
    NonFiniteStep if an embedding, a bonus or a reward is not finite. Both messages name the response. Under
    `learner.on_nonfinite: skip` such numbers are logged and returned.
    """
    if calls is None and config.reward.functions:
        calls = start_calls(group, config)
    both, place, num = _responses(group), group.ticket.place, len(group.trajectories)
    rte, frozen, rows = torch.zeros(len(both), 0), torch.zeros(num), list[Tensor]()
    if model is not None:
        rte, frozen, rows = passes(group) if passes else embed_responses(model, tokenizer, [group], config)[0]
    values = calls.result() if calls else ((),) * len(both)
    penalties = [_penalty(trajectory, config) for trajectory in both]
    bonus = torch.tensor(
        [
            _bonus(
                own,
                penalty,
                f"{place}, {response_name(index, num)}",
                group.ticket.group_id < 0 and isnan(sum(own)),
                config,
            )
            for index, (own, penalty) in enumerate(zip(values, penalties, strict=True))
        ]
    )
    twin = group.greedy is not None
    embeddings = RewardEmbeddings(
        group_id=group.ticket.group_id,
        rte=rte[:num].clone(),
        greedy_rte=rte[num].clone() if twin else None,
        bonus=bonus[:num].clone(),
        greedy_bonus=bonus[num].clone() if twin else None,
        frozen_rewards=frozen,
        functions=torch.tensor(values[:num]) if calls else None,
        penalties=torch.tensor([-sum(own) for own in penalties[:num]]) if config.reward.has_penalties else None,
        input_ids=tuple(rows[:num]) if config.head.reads_tokens else None,
        greedy_input_ids=rows[num] if twin and config.head.reads_tokens else None,
    )
    check_embeddings(embeddings, place, config)
    return embeddings


def embed_offline(
    model: PreTrainedModel | None, tokenizer: Any, groups: Sequence[TrajectoryGroup], config: R2MConfig
) -> tuple[RewardEmbeddings, ...]:
    """Returns the embeddings of pairs of a data set, without any reward function. Arguments are those of `embed_group`."""
    alone = config.reward(functions=())
    return tuple(embed_group(model, tokenizer, group, alone) for group in groups)


def _responses(group: TrajectoryGroup) -> tuple[Trajectory, ...]:
    """The responses of a group. Its greedy twin comes last, if it has one."""
    return (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))


@torch.no_grad()
def embed_responses(
    model: PreTrainedModel, tokenizer: Any, groups: Sequence[TrajectoryGroup], config: R2MConfig
) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Returns for each group the embeddings of all its responses, the frozen rewards of those that were sampled, and the
    tokens [S] of each response as the reward model reads it.

    The embeddings are [K, D_m], or [K + 1, D_m] if there is a greedy twin. The frozen rewards are [K]. Both are float32 on
    the CPU. The responses of all groups go through the model together, those of similar lengths in one pass. So rounding
    depends on which groups these are.

    Raises StepFailed if the chat template refuses a response, or if the model has no embedding for a token.
    """
    limit = num_positions(model.config) if config.reward.max_tokens is None else config.reward.max_tokens
    texts = [
        _read(tokenizer, group.ticket.prompt, one, limit, model, group.ticket.place)
        for group in groups
        for one in _responses(group)
    ]
    padding = model.config.get_text_config().pad_token_id or 0
    of_text: dict[int, Tensor] = {}
    for rows in similar_lengths([len(text) for text in texts], TOKENS_OF_A_PASS):
        input_ids, mask = right_padded([texts[row] for row in rows], padding, model.device)
        of_text |= zip(rows, reward_token_embeddings(model, input_ids, mask.long()).float().cpu(), strict=True)
    phi = scoring_head(model)
    # In float32, because the reward head has phi in float32: both then give the same reward for the same embedding.
    weights = {name: weight.float() for name, weight in phi.named_parameters()}
    embedded, first = [], 0
    for group in groups:
        last = first + len(_responses(group))
        rte = torch.stack([of_text[row] for row in range(first, last)])
        sampled = rte[: len(group.trajectories)].to(model.device)
        frozen = torch.func.functional_call(phi, weights, (sampled,)).squeeze(-1).cpu()
        embedded.append((rte, frozen, [torch.tensor(text) for text in texts[first:last]]))
        first = last
    return embedded


def _read(tokenizer: Any, prompt: Prompt, response: Trajectory, limit: int | None, model: Any, place: str) -> list[int]:
    """Returns the token ids of a response as the reward model reads it, at most `limit`.

    Raises StepFailed if the chat template refuses the response, or if the model has no embedding for a token.
    """
    finished = response.finish_reason == "stop"
    try:
        ids = reward_input_ids(tokenizer, prompt.content, response.text, finished, limit)
    except TemplateRefusal as error:
        how = "finished" if finished else "unfinished"
        raise StepFailed(
            f"{place}: the chat template of reward.model's tokenizer refuses the {how} response {response.text[:60]!r} "
            f"({error.reason}); correct the template (chat_template)"
        ) from None
    if (unknown := unknown_token(ids, model.config)) is not None:
        raise StepFailed(
            f"{place}: the token {tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) of the response "
            f"{response.text[:60]!r} has no embedding in reward.model, which knows {num_tokens_known(model.config)} tokens: "
            f"resize its embeddings and save it anew"
        )
    return ids


def _penalty(trajectory: Trajectory, config: R2MConfig) -> tuple[float, float, float]:
    """The penalties of one response, 0 or more: for its length, for a missing end, and for being overlong.

    Its length is the number of tokens that the policy wrote. What an environment wrote is not the policy's fault.
    """
    reward, length = config.reward, trajectory.num_policy_tokens
    return (
        reward.length_penalty * length,
        reward.missing_eos_penalty * (trajectory.finish_reason != "stop"),
        overlong_penalty(length, config),
    )


def overlong_penalty(length: int, config: R2MConfig) -> float:
    """Returns what a response of this many tokens loses by `reward.overlong` (DAPO, arXiv 2503.14476, Eq. 13).

    It is 0 up to `start`, the whole penalty from `end` on, and between them on the line that joins these.
    """
    overlong = config.reward.overlong
    if overlong is None:
        return 0.0
    end = config.rollouts.max_new_tokens if overlong.end is None else overlong.end
    return overlong.penalty * min(1.0, max(0.0, (length - overlong.start) / (end - overlong.start)))


def _bonus(
    values: tuple[float, ...], penalties: tuple[float, float, float], place: str, gap: bool, config: R2MConfig
) -> float:
    """Returns the bonus of one response: what the user's reward functions and the penalties add to the model's reward.

    values: what the functions returned. penalties: what `_penalty` returned. place: names the response in messages.
    gap: whether the response is of an evaluation, and a function failed for it. Its bonus is then NaN.

    Raises NonFiniteStep if the bonus is not finite. Under `learner.on_nonfinite: skip` such a bonus is logged and
    returned.
    """
    reward, functions = config.reward, config.reward.named_functions.values()
    length, missing_eos, overlong = penalties
    verified = sum(one.weight * value for one, value in zip(functions, values, strict=True))
    bonus = verified - length - missing_eos - overlong
    # Finite numbers may add up to one that float32 cannot hold. Written with `not`, so that NaN is caught as well.
    if not abs(bonus) <= FLOAT32_MAX and not gap:
        stop_or_log(
            f"{place}: {', '.join(('reward.functions', *(repr(one.function) for one in functions)))}, reward.length_penalty "
            f"{reward.length_penalty} and missing_eos_penalty {reward.missing_eos_penalty} add {bonus} together, which is "
            f"not finite in float32",
            config,
        )
    return bonus
