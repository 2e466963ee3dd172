"""Models as they are loaded: on which device, on how many threads, with what is kept in a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.models.weight_files import check_weight_files


def load_policy(path: str, config: R2MConfig) -> Any:
    """The causal language model at `path` (HF name or directory) in the configured dtype, on the device, in eval mode.

    Every copy keeps `requires_grad`, those that never train too: torch picks other CPU kernels without it, even where
    no gradient is recorded, and they round otherwise. Raises ConfigError where a weight is not finite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, config.model.dtype)
    check_weight_files("model.reference" if path == config.model.reference else "model.policy", path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.model.attention, trust_remote_code=False
        )
    except ImportError as error:
        raise ConfigError(f"model.attention is {config.model.attention!r}: {error}; or use sdpa") from None
    check_weights(model, "model.reference" if path == config.model.reference else "model.policy", path)
    own = model.generation_config  # its penalties and bans would be sampled with and not trained with
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "bos_token_id": own.bos_token_id}
    model.generation_config = GenerationConfig(**ends)
    return settled(model, config.run.device)


@torch.no_grad()
def settled(model: Any, device: str = "auto") -> Any:
    """The loaded model on a device in eval mode, its parameters in memory of torch's own.

    device: one of torch's names, or `auto`: the GPU where there is one.

    A loader may leave them in a mapped file at odd addresses, and CPU kernels round by alignment: two copies of the same
    weights would then give different bits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def checkpoint_activations(model: Any) -> None:
    """Every layer keeps its input alone and computes the rest again in the backward pass, to the same bits.

    transformers does so only where a layer says it is in training. The layers' insides stay in eval mode: no dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU sums depend on how many threads share them: wherever bits matter, one does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
