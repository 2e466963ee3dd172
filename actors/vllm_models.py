"""Which models vLLM can run, and what it computes otherwise than transformers, which trains them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.models.bloom import BloomMLP

from r2m_async.errors import ConfigError, StageLost

_SHOWN = 400
"""The most characters of an error of vLLM's in a message. Some list all architectures that vLLM has."""


@contextmanager
def or_refused(path: str) -> Iterator[None]:
    """Turns whatever vLLM raises in the block into a ConfigError that says what to do.

    path: name or directory of the policy. StageLost and ConfigError pass through.
    """
    try:
        yield
    except (StageLost, ConfigError):
        raise
    except Exception as error:
        # vLLM has assertions without a text. Then the line tells the reason.
        said = " ".join(str(error).split()) or str(traceback.extract_tb(error.__traceback__)[-1].line)
        raise ConfigError(
            f"rollouts.engine is 'vllm' and model.policy is {path!r}: vLLM {vllm.__version__} does not start with it "
            f"({type(error).__name__}: {said[:_SHOWN]}{'...' if len(said) > _SHOWN else ''}); if it has no such model, use "
            f"rollouts.engine 'transformers'"
        ) from error


def check_model(path: str, args: AsyncEngineArgs) -> None:
    """Raises ConfigError if vLLM says, before it loads a model, that it cannot run it. No weights are read.

    path: name or directory of the policy. args: vLLM's arguments.
    """
    with or_refused(path):
        args.create_model_config()


def mend(model: torch.nn.Module) -> None:
    """Changes what a model of vLLM's computes otherwise than transformers.

    BLOOM has the approximation of GELU by tanh, and vLLM computes GELU itself. A log-probability differs by 1e-4 nats and
    more.
    """
    for layer in model.modules():
        if isinstance(layer, BloomMLP):
            layer.gelu_impl = get_act_fn("gelu_pytorch_tanh")
