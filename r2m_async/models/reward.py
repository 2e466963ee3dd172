"""The frozen reward model in two parts: reward token embedding (RTE) and scoring head; R2M, arXiv 2601.22664, App. H.1.

For any sequence-classification model of transformers with one label: scoring_head(model) of an RTE is its logit.

transformers knows linear heads only. A classifier with a head of two layers is saved as one whose labels are the first
layer's outputs before bias and ReLU, the rest beside it in `reward_head.safetensors`: `AutoModelForSequenceClassification`
loads it, but as a model of many labels that nobody can take for a reward, and `load_classifier` makes it whole.

Shapes: B responses, S prompt + response positions (padded), D_m hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from r2m_async.config import R2MConfig
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.errors import ConfigError
from r2m_async.finite import check_embeddings, check_weights, response_name, stop_or_log
from r2m_async.models.loading import settled
from r2m_async.models.weight_files import SECOND_LAYER, check_weight_files
from r2m_async.plugins import FLOAT32_MAX, called_for_number, named_function
from r2m_async.trajectories import RewardEmbeddings, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reward_token_embeddings(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, D_m]: the last hidden state, after the final norm, at the token whose logit is the model's reward.

    As transformers 5.19 has it, that is the rightmost token of `input_ids` [B, S] unequal to the padding token: by
    its id, not by `attention_mask`. So where the padding token also ends a response, that end is not the scored token.
    Gradients flow if they are enabled. Raises ConfigError for several rows and a model without padding token.
    """
    states_BSD = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return states_BSD[torch.arange(len(input_ids), device=states_BSD.device), scored_positions(model, input_ids)]


def scoring_head(model: PreTrainedModel) -> nn.Module:
    """The model's own module D_m -> 1, not a copy. Raises ConfigError when it has none, or several labels."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.config.num_labels != 1:
        raise ConfigError(
            f"reward.model must be a sequence-classification model with a `score` head and one label, got "
            f"{type(model).__name__} with num_labels = {model.config.num_labels}"
        )
    return head


def scored_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[B], where `reward_token_embeddings` finds them."""
    num_rows, length = input_ids.shape
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is None:
        if num_rows != 1:
            raise ConfigError(
                f"reward.model's config has no pad_token_id, so {num_rows} responses cannot be scored at once; set it"
            )
        return input_ids.new_tensor([length - 1])
    positions = torch.arange(length, device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


def two_layer_head(hidden_size: int, width: int) -> nn.Sequential:
    """GRM's: Linear(hidden_size, width)-ReLU-Linear(width, 1), with biases."""
    return nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, 1))


def load_classifier(path: str | Path, **how: Any) -> PreTrainedModel:
    """A sequence classifier that transformers or `save_classifier` wrote; `how` is for `from_pretrained`."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, **how)
    if rest := second_layer(path):
        first = model.score.weight
        _give_two_layers(model)
        model.score.load_state_dict(load_file(rest) | {"0.weight": first.detach()})
        model.score.to(first.dtype)
    return model


def classifier_skeleton(path: str | Path) -> PreTrainedModel:
    """What `load_classifier` returns, without its weights: on the meta device."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(path))
        if second_layer(path):
            _give_two_layers(model)
    return model


def second_layer(path: str | Path) -> str | None:
    """The file that `save_classifier` leaves beside a model whose head has two layers."""
    return cached_file(
        path,
        SECOND_LAYER,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _give_two_layers(model: PreTrainedModel) -> None:
    width, hidden_size = model.score.weight.shape
    model.score = two_layer_head(hidden_size, width)
    model.config.num_labels = model.num_labels = 1


def save_classifier(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes what `load_classifier` reads, with `weights` of these names in place of the model's own."""
    weights = dict(model.state_dict() if weights is None else weights)
    config = copy.deepcopy(model.config)
    if isinstance(model.score, nn.Sequential):
        weights["score.weight"] = weights.pop("score.0.weight")
        rest = {name: weights.pop(f"score.{name}").contiguous() for name in ("0.bias", "2.weight", "2.bias")}
        config.num_labels = len(weights["score.weight"])
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(weights, assign=True)
    plain.save_pretrained(directory)
    if isinstance(model.score, nn.Sequential):
        save_file(rest, directory / SECOND_LAYER)


def load_reward_model(path: str, config: R2MConfig) -> PreTrainedModel:
    """The frozen sequence classifier at `path`, on the device, in eval mode.

    Raises ConfigError unless it has one label, and where a weight is not finite.
    """
    check_weight_files("reward.model", path)
    model = load_classifier(path, dtype=getattr(torch, config.reward.dtype))
    scoring_head(model)
    check_weights(model, "reward.model", path)
    return settled(model, config.run.device).requires_grad_(False)


@torch.no_grad()
def embed_group(model: PreTrainedModel, tokenizer: Any, group: TrajectoryGroup, config: R2MConfig) -> RewardEmbeddings:
    """The RTEs and bonuses of a group (and its twin), computed as one right-padded batch.

    Raises FunctionFailed for a function of `reward.functions`, and NonFiniteStep for what is not finite, both naming
    the response; under `learner.on_nonfinite: skip` numbers that are not finite are returned.
    """
    both = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
    prompt = group.ticket.prompt
    rows = [
        torch.tensor(
            reward_input_ids(tokenizer, prompt.content, t.text, t.finish_reason == "stop", config.reward.max_tokens)
        )
        for t in both
    ]
    pad_token_id = model.config.get_text_config().pad_token_id
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0)
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    rte = reward_token_embeddings(model, input_ids.to(model.device), attention_mask.to(model.device)).float().cpu()
    num = len(group.trajectories)
    place = group.ticket.place
    bonus = torch.tensor(
        [
            _bonus(prompt.text, trajectory, f"{place}, {response_name(index, num)}", config)
            for index, trajectory in enumerate(both)
        ]
    )
    twin = group.greedy is not None
    phi = scoring_head(model)
    weights = {name: weight.float() for name, weight in phi.named_parameters()}
    frozen = torch.func.functional_call(phi, weights, (rte[:num].to(model.device),)).squeeze(-1).cpu()
    embeddings = RewardEmbeddings(
        group_id=group.ticket.group_id,
        rte=rte[:num].clone(),
        greedy_rte=rte[num].clone() if twin else None,
        bonus=bonus[:num].clone(),
        greedy_bonus=bonus[num].clone() if twin else None,
        frozen_rewards=frozen,
    )
    check_embeddings(embeddings, place, config)
    return embeddings


def _bonus(prompt: str, trajectory: Trajectory, place: str, config: R2MConfig) -> float:
    """What verifiable functions and penalties add to one response's reward; `place` says which response it is."""
    reward, key, finite = config.reward, "reward.functions", config.learner.on_nonfinite == "stop"
    verified = sum(
        called_for_number(named_function(name, key), (prompt, trajectory.text), key, name, place, finite)
        for name in reward.functions
    )
    length = reward.length_penalty * trajectory.num_response_tokens
    bonus = verified - length - reward.missing_eos_penalty * (trajectory.finish_reason != "stop")
    if not abs(bonus) <= FLOAT32_MAX:
        stop_or_log(
            f"{place}: {', '.join((key, *map(repr, reward.functions)))}, reward.length_penalty {reward.length_penalty} and "
            f"missing_eos_penalty {reward.missing_eos_penalty} add {bonus} together, which is not finite in float32",
            config,
        )
    return bonus
