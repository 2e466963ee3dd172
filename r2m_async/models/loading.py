"""Loads models, and sets how they compute: on which device, on how many threads, with which activations kept."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.models.pretrained import pretrained_model

log = logging.getLogger(__name__)

_TRIED_TOKENS = 8
"""Tokens of a text with which `check_causal` and `check_packing` try a model."""


def load_policy(path: str, config: R2MConfig) -> Any:
    """Loads a causal language model in the configured dtype, moves it to the device and puts it into eval mode.

    path: HF name or directory of the policy or of the reference.

    The result keeps only the special token ids of the model's generation config. Its parameters keep `requires_grad`,
    even in a copy that never trains. Without it torch picks other CPU kernels, also where no gradient is recorded,
    and those round differently.

    Raises ConfigError as `pretrained_model` does, and if a weight is not finite or the model is not causal.
    """
    from transformers import GenerationConfig

    key, dtype = policy_key(path, config), getattr(torch, config.model.dtype)
    model = pretrained_model(
        key,
        path,
        dtype=dtype,
        attention=config.model.attention,
        trust=config.model.trust_remote_code,
        liger=config.model.liger,
    )
    check_weights(model, key, path)
    # Sampling would apply the model's own penalties and bans, and training would not. Their log-probabilities differ.
    own = model.generation_config
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "bos_token_id": own.bos_token_id}
    model.generation_config = GenerationConfig(**ends)
    settled(model, config.run.device)
    check_causal(model, key, path)
    if config.learner.packing:
        check_packing(model, key, path)
    return model


def policy_key(path: str, config: R2MConfig) -> str:
    """Returns the key of the config that names this policy: `model.reference` or `model.policy`."""
    return "model.reference" if path == config.model.reference else "model.policy"


def check_causal(model: Any, key: str, path: str) -> None:
    """Raises ConfigError if what a model computes at a token depends on a later token.

    transformers loads BERT and its kin as causal language models, too. They read a text in both directions, so their
    probability of a token that they have seen means nothing.
    """
    if _reads(model, key, path, _TRIED_TOKENS, slice(0, -1), slice(-1, None)):
        raise ConfigError(
            f"{key}: {path!r} ({type(model).__name__}) reads a text in both directions, and a policy must read it from left "
            f"to right: name a causal language model"
        )


def check_packing(model: Any, key: str, path: str) -> None:
    """Raises ConfigError if a text that follows another one in a packed row is not computed as it is alone.

    `learner.packing` relies on transformers to see from the positions where a text begins. For some models (OPT, BLOOM,
    Falcon, those with a recurrent state) it does not, and a response would attend to those before it.

    model: a language model or a classifier, as it will compute.
    """
    first, second = slice(0, _TRIED_TOKENS), slice(_TRIED_TOKENS, None)
    positions_1S = torch.arange(_TRIED_TOKENS, device=model.device).repeat(2)[None]
    if _reads(model, key, path, 2 * _TRIED_TOKENS, second, first, position_ids=positions_1S):
        raise ConfigError(
            f"learner.packing is true and {key} is {path!r} ({type(model).__name__}): with model.attention "
            f"{model.config._attn_implementation!r} its texts in a packed row are not kept apart; use learner.packing false"
        )


@torch.enable_grad()
def _reads(model: Any, key: str, path: str, num_tokens: int, states: slice, tokens: slice, **inputs: Tensor) -> bool:
    """Whether a model's states at some tokens of a row depend on some other tokens. inputs: what else the model is given.

    A token that is masked has a weight of exactly 0, and so a gradient of exactly 0, on every processor and in every number
    format. The states themselves say less: in bfloat16 two roundings of one row of a real model are apart by a tenth.

    Raises ConfigError if the states do not follow from what the model's input embeddings give: such a model cannot be tried.
    """
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # a model may scale it in place, which a leaf forbids

    ids_1S = torch.arange(num_tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    with model.get_input_embeddings().register_forward_hook(keep):
        read = model.base_model(input_ids=ids_1S, use_cache=False, **inputs).last_hidden_state[0, states]
    # A norm makes the sum of a token's states, and that of their squares, the same whatever it read.
    weights = (torch.arange(read.numel(), device=read.device) % 7 - 3).view_as(read)
    gradient_1SD = None
    if embedded and read.requires_grad:
        (gradient_1SD,) = torch.autograd.grad(read, embedded[0], weights.to(read.dtype), allow_unused=True)
    if gradient_1SD is None:
        raise ConfigError(
            f"{key}: the states of {path!r} ({type(model).__name__}) have no gradient with respect to its input embeddings, so "
            f"it cannot be told which tokens it reads: its code must compute them from what `get_input_embeddings()` gives"
        )
    return bool(gradient_1SD[0, tokens].any())


def check_packing_unread(model: Any, key: str, path: str, trust: bool) -> None:
    """Does what `check_packing` does without reading weights (`_checked_unread`)."""
    _checked_unread(check_packing, model, key, path, trust)


def check_causal_unread(model: Any, key: str, path: str, trust: bool) -> None:
    """Does what `check_causal` does without reading weights (`_checked_unread`).

    Only a model is tried whose family or config leaves it open in which direction it reads. All others pass, and
    `check_causal` sees them once they are loaded.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config.get_text_config()
    both_ways = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    if both_ways or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        _checked_unread(check_causal, model, key, path, trust)


def _checked_unread(check: Callable[[Any, str, str], None], model: Any, key: str, path: str, trust: bool) -> None:
    """Checks a model without reading weights: on two layers with random float32 weights.

    check: the check, which gets these layers as a base model, and the next two arguments.
    model: as `pretrained_model` returns it with `weightless`. One that cannot be cut down to two layers passes: the
        check sees it once it is loaded.
    trust: whether Python code in the model's files may be run.
    """
    from transformers import AutoModel

    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    try:
        layers = min(2, text_config.num_hidden_layers)
        pad = None if text_config.pad_token_id is None else 0  # RoBERTa counts positions from it
        text_config.update({"num_hidden_layers": layers, "vocab_size": 2 * _TRIED_TOKENS, "pad_token_id": pad})
        if isinstance(kinds := vars(text_config).get("layer_types"), list):
            text_config.layer_types = kinds[:layers]
        with torch.random.fork_rng():
            shallow = AutoModel.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=model.config._attn_implementation,
                trust_remote_code=trust,
            )
        check(shallow.eval(), key, path)
    except ConfigError:
        raise
    except Exception as error:
        log.debug("%s: %r: %s is asked once the weights are loaded: %s", key, path, check.__name__, error)


def check_checkpointing(model: Any, key: str, path: str, config: R2MConfig) -> None:
    """Raises ConfigError if a model cannot compute its layers again where the config asks for that."""
    if config.learner.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"learner.activation_checkpointing is true and {key} is {path!r}: transformers' {type(model).__name__} cannot "
            f"compute its layers again; use learner.activation_checkpointing false"
        )


@torch.no_grad()
def settled(model: Any, device: str = "auto") -> Any:
    """Copies a loaded model's parameters into torch's own memory, moves it to a device, and returns it in eval mode.

    device: one of torch's device names, or `auto` for the GPU if there is one and the CPU if not.

    Raises ConfigError for `cuda` where there is no GPU.
    """
    # A loader may leave parameters in a mapped file at odd addresses, and CPU kernels round differently by alignment.
    # Two copies of the same weights would then not compute the same bits.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"run.device is {device!r} and torch finds no CUDA device here: use 'auto' or 'cpu', or install torch for CUDA"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def checkpoint_activations(model: Any) -> None:
    """Switches on activation checkpointing: less memory, more time, the same bits.

    Each layer then keeps only its input in the forward pass, and computes the rest again in the backward pass.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers checkpoints a layer only in training mode. The flag is set on the layer alone, and not by
    # `train()`, so that the modules inside it stay in eval mode, without dropout.
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            module._gradient_checkpointing_func = functools.partial(
                _in_eval_mode, module, module._gradient_checkpointing_func
            )


def _in_eval_mode(layer: Any, checkpointed: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoints a layer whose forward pass runs in eval mode, the second time as well.

    Some layers (OPT, Falcon, BioGPT, XGLM) ask themselves whether they are in training mode, and then drop numbers out.

    checkpointed: torch's `checkpoint`, which runs `forward` on the inputs.
    """

    def evaluated(*given: Any) -> Any:
        layer.training = False
        try:
            return forward(*given)
        finally:
            layer.training = True

    return checkpointed(evaluated, *inputs)
