"""The critic: a decoder with a linear head that predicts one value for each response token.

The value of response token t is read at the position where the policy chooses t. So it depends on the prompt and on the
response tokens before t, but not on t itself. Tokens that an environment wrote have no value. PPO, arXiv 1707.06347.

Shapes: B trajectories, T response tokens that the policy wrote (padded), N such tokens of all trajectories, R rows of C
input tokens, X = R C input tokens flattened, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.models.loading import check_packing, settled
from r2m_async.models.policy import PassInputs, by_response, microbatches, response_mask
from r2m_async.models.pretrained import pretrained_model
from r2m_async.models.reward import second_layer
from r2m_async.trajectories import Trajectory


class ValueModel(nn.Module):
    """The critic as one module, which computes all that `response_values` needs.

    Learners train it and add adapters to it in the same way as to a policy.
    """

    def __init__(self, classifier: Any) -> None:
        """classifier: a sequence classifier of transformers, whose linear head `score` has one output."""
        super().__init__()
        self.classifier = classifier

    @property
    def device(self) -> torch.device:
        """The device of the classifier's parameters."""
        return self.classifier.device

    def add_adapter(self, lora: Any) -> None:
        """Adds adapters to the decoder and freezes the decoder's weights. The linear head stays trainable.

        lora: a `LoraConfig` of peft.
        """
        self.classifier.base_model.add_adapter(lora)

    def gradient_checkpointing_enable(self, **how: Any) -> None:
        """Passes the call on to the classifier, with the same keyword arguments."""
        self.classifier.gradient_checkpointing_enable(**how)

    def forward(self, inputs_RC: Tensor, positions_RC: Tensor | None, places_N: Tensor) -> Tensor:
        """Returns the values [N] float32 of the response tokens.

        The arguments are the tensors of `PassInputs`: input tokens, positions, and the flat position (0 to R C - 1) at
        which each response token is chosen.
        """
        outputs = self.classifier.base_model(input_ids=inputs_RC, position_ids=positions_RC, use_cache=False)
        states_XD = outputs.last_hidden_state.flatten(0, 1)
        return self.classifier.score(states_XD[places_N]).squeeze(-1).float()


def check_one_layer(path: str) -> None:
    """Raises ConfigError if the model at `path` is a reward model whose head has two layers.

    transformers would load such a model with many labels, and the critic would silently lose the trained head.
    """
    if second_layer(path):
        raise ConfigError(
            f"critic.model is {path!r}: its head has two layers, and a critic's is linear; name a reward model that was "
            f"trained with head.layers 1, or leave critic.model out"
        )


def critic_classifier(path: str, config: R2MConfig, weightless: bool = False) -> Any:
    """Loads the sequence classifier of a critic in the policy's dtype. If its head is not `has_head`, it is random.

    path, weightless: as in `pretrained_model`.

    Raises ConfigError as `pretrained_model` does, and if the model has no linear head `score` or a head of two layers.
    """
    check_one_layer(path)
    classifier = pretrained_model(
        "critic.model",
        path,
        "classifier",
        head="either",  # a head of several labels, or none, is replaced later
        num_labels=1,
        dtype=getattr(torch, config.model.dtype),
        attention=config.model.attention,
        weightless=weightless,
        trust=config.model.trust_remote_code,
        liger=config.model.liger,
    )
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ConfigError(
            f"critic.model: {path!r} is a {type(classifier).__name__}, which has no linear head `score`; name a decoder model"
        )
    return classifier


def load_critic(path: str, config: R2MConfig) -> ValueModel:
    """Loads the critic in the policy's dtype, moves it to the configured device and puts it into eval mode.

    path: HF name or directory. A reward model with a linear head of one label keeps its head, which is the usual
        start. Any other model, such as the policy, gets a head of zeros.

    Raises ConfigError if the model cannot be loaded, has no linear head `score`, has a head of two layers, or has
    weights that are not finite.
    """
    classifier = critic_classifier(path, config)
    head = classifier.score
    if not classifier.has_head:
        # transformers drew the head at random. Zeros make every value 0 at first, so that the first step's advantages
        # hold rewards and no noise.
        nn.init.zeros_(head.weight)
    check_weights(classifier, "critic.model", path)
    settled(classifier, config.run.device)
    if config.learner.packing:
        check_packing(classifier, "critic.model", path)
    return ValueModel(classifier)


def response_values(model: Any, trajectories: Sequence[Trajectory], packed: bool = False) -> Tensor:
    """Returns the values [B, T] float32 of the response tokens, from one forward pass. Padding has value 0.

    model: a `ValueModel`, or an engine that wraps one.
    packed: False pads every trajectory to the longest one. True puts all trajectories into one row without padding.
    """
    return by_response(model(*PassInputs.of(trajectories, packed).on(model.device)), trajectories)


@torch.no_grad()
def proximal_values(model: ValueModel, trajectories: Sequence[Trajectory], config: R2MConfig) -> Tensor:
    """Returns the values [B, T] float32 of the response tokens, on the CPU. Padding has value 0.

    The passes are microbatches of at most `learner.tokens_per_microbatch` tokens.
    """
    values_BT = torch.zeros(response_mask(trajectories).shape)
    packed = config.learner.packing
    for rows in microbatches(trajectories, config.learner.tokens_per_microbatch, packed):
        part_BT = response_values(model, [trajectories[row] for row in rows], packed)
        values_BT[rows, : part_BT.shape[1]] = part_BT.cpu()
    return values_BT
