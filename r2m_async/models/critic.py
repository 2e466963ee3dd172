"""The critic's model: a decoder with a linear head of one output, read where each response token is chosen.

PPO, arXiv 1707.06347. The value of response token t is that of the state in which it is chosen: prompt and response
before t. Shapes: B trajectories, T response tokens (padded), N response tokens in all, R x C input tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.models.loading import settled
from r2m_async.models.policy import PassInputs, by_response, microbatches, response_mask
from r2m_async.models.reward import second_layer
from r2m_async.models.weight_files import check_weight_files
from r2m_async.trajectories import Trajectory


class ValueModel(nn.Module):
    """All that `response_values` computes, as one module; learners train and adapt it as they do a policy."""

    def __init__(self, classifier: Any) -> None:
        """`classifier`: a sequence classifier of transformers with a linear head `score` of one label."""
        super().__init__()
        self.classifier = classifier

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def add_adapter(self, lora: Any) -> None:
        """Into the decoder, whose weights no longer train; the head does."""
        self.classifier.base_model.add_adapter(lora)

    def gradient_checkpointing_enable(self, **how: Any) -> None:
        self.classifier.gradient_checkpointing_enable(**how)

    def forward(
        self, inputs_RC: Tensor, attention_RC: Tensor | None, positions_RC: Tensor | None, places_N: Tensor
    ) -> Tensor:
        """Values [N] float32."""
        outputs = self.classifier.base_model(
            input_ids=inputs_RC, attention_mask=attention_RC, position_ids=positions_RC, use_cache=False
        )
        states_XD = outputs.last_hidden_state.flatten(0, 1)
        return self.classifier.score(states_XD[places_N]).squeeze(-1).float()


def check_one_layer(path: str) -> None:
    """Raises ConfigError for a reward model with a head of two layers, which transformers takes for many labels."""
    if second_layer(path):
        raise ConfigError(
            f"critic.model is {path!r}: its head has two layers, and a critic's is linear; name a reward model that was "
            f"trained with head.layers 1, or leave critic.model out"
        )


def load_critic(path: str, config: R2MConfig) -> ValueModel:
    """The model at `path` (HF name or directory) in the policy's dtype, on the device, in eval mode.

    A linear head of one label that it has is kept: the usual start from a reward model; one of two layers is refused. Any
    other critic gets a head of zeros: all values are 0 at first, so that the first step's advantages hold rewards and no
    noise of a head drawn at random. Raises ConfigError, also where a weight is not finite.
    """
    from transformers import AutoModelForSequenceClassification

    check_weight_files("critic.model", path)
    try:
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attention,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"critic: {path!r} cannot be loaded as one: {error}; name another in critic.model") from None
    check_one_layer(path)
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"critic: {path!r} is a {type(classifier).__name__}, which has no linear head `score`; name a decoder model in "
            f"critic.model"
        )
    mismatched = {str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]}
    if "score.weight" in {*info["missing_keys"], *mismatched}:
        nn.init.zeros_(head.weight)
    check_weights(classifier, "critic.model", path)
    return ValueModel(settled(classifier, config.run.device))


def response_values(model: Any, trajectories: Sequence[Trajectory], packed: bool = False) -> Tensor:
    """[B, T] float32, 0 on padding, in one forward pass. `model` is a `ValueModel`, or an engine around one.

    Padded or packed into one row as in `logprobs_and_states`.
    """
    return by_response(model(*PassInputs.of(trajectories, packed).on(model.device)), trajectories)


@torch.no_grad()
def proximal_values(model: ValueModel, trajectories: Sequence[Trajectory], config: R2MConfig) -> Tensor:
    """[B, T] float32 on the CPU, by micro-batches."""
    values_BT = torch.zeros(response_mask(trajectories).shape)
    packed = config.learner.packing
    for part in microbatches(trajectories, config.learner.tokens_per_microbatch, packed):
        part_BT = response_values(model, trajectories[part], packed)
        values_BT[part, : part_BT.shape[1]] = part_BT.cpu()
    return values_BT
