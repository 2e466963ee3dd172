"""The losses of the policy's single units: `objective.loss`. A unit is a response token, or a whole response.

A loss says what a ratio and an advantage are worth. `objectives.policy_loss` forms the ratios, weighs the losses of the
units with the off-policy weights, and adds them up. So every loss here goes with every weight and aggregation.

Sources: `clip` is PPO's, arXiv 1707.06347 (R2M, arXiv 2601.22664, Eq. 2). `dual_clip` is arXiv 1912.09729. `cispo` is
MiniMax-M1's, arXiv 2506.13585. `gmpo` is arXiv 2507.20673. `sapo` is arXiv 2511.20347.

Shapes: B responses, T response positions (padded), U = T if tokens have the ratios, and 1 if responses have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2m_async.errors import ConfigError
from r2m_async.plugins import check_options, named_function, nearest

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +- this number, so that `exp` cannot overflow. Beyond it they have no gradient."""

RATIOS = ("sequence", "token", "sequence_mean")
"""What `objective.ratio` may be."""
CLIPS = ("clip_low", "clip_high")
"""The keys of `objective` that a loss may read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss receives. Only `logprobs` and `ratio` carry a gradient. What is masked is 0, and its ratio 1."""

    logprobs: Tensor
    """[B, T] log-probabilities under pi, the policy that is being trained."""
    anchor_logprobs: Tensor
    """[B, T] log-probabilities under the policy that the ratio is to: pi_old, or mu under `off_policy: none`."""
    ratio: Tensor
    """[B, U] the importance ratio rho: pi over that policy, formed as `objective.ratio` says."""
    advantages: Tensor
    """[B, 1], or [B, T] for an estimator with an advantage per token."""
    mask: Tensor
    """[B, T] bool: True on the tokens that are trained."""
    clip_low: float
    """`objective.clip_low`."""
    clip_high: float
    """`objective.clip_high`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss, and what it needs from the config."""

    name: str
    """The name in the config: that of a built-in one, or `module:attr`."""
    function: Callable[..., Any]
    """f(inputs, **options) -> the losses of the units, to be minimised, as `unit_losses` documents them."""
    ratios: tuple[str, ...] = RATIOS
    """The values of `objective.ratio` that it can be used with."""
    reads: tuple[str, ...] = CLIPS
    """Which of `CLIPS` it reads."""


def get_loss(name: str) -> Loss:
    """Returns the loss `name`: a built-in one, or the user's function at `module:attr`.

    A user's function may have the attributes `ratios` and `reads`, which say of it what the fields of `Loss` say.

    Raises ConfigError if there is no such function, or if an attribute names something else than these fields may.
    """
    if ":" not in name:
        if name not in LOSSES:
            raise ConfigError(
                f"objective.loss = {name!r} is unknown{nearest(name, LOSSES)}. Known: {', '.join(LOSSES)}; your own is "
                f"named as module:attr"
            )
        return LOSSES[name]
    function = named_function(name, "objective.loss")
    if inspect.isclass(function):
        raise ConfigError(f"objective.loss = {name!r} is a class: name a function of LossInputs, which keeps no state")
    said = {"ratios": RATIOS, "reads": CLIPS}
    for attribute, known in said.items():
        value = getattr(function, attribute, known)
        if not isinstance(value, tuple | list) or not all(one in known for one in value):
            raise ConfigError(
                f"objective.loss = {name!r} has {attribute} = {value!r}: it must be a tuple of some of {', '.join(known)}"
            )
        said[attribute] = tuple(value)
    return Loss(name=name, function=function, **said)


def check_loss_options(loss: Loss, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if a loss does not take one of the options, lacks one that it requires, or refuses its value.

    Of a user's loss only the signature is read. None of its code runs.
    """
    check_options(loss.function, options, "objective.loss_options", loss.name, inputs=1)
    if ":" in loss.name:
        return
    one = torch.ones(2, 1)
    inputs = LossInputs(
        logprobs=-one,
        anchor_logprobs=-one,
        ratio=one,
        advantages=torch.tensor([[1.0], [-1.0]]),
        mask=one.bool(),
        clip_low=0.2,
        clip_high=0.2,
    )
    try:
        losses, _ = unit_losses(loss, inputs, options)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"objective.loss_options = {dict(options)} does not suit {loss.name}: {error}") from None
    if not losses.isfinite().all():
        raise ConfigError(
            f"objective.loss_options = {dict(options)} does not suit {loss.name}: the loss of a ratio of 1 would be "
            f"{losses.flatten().tolist()} for advantages of 1 and -1; use numbers nearer to 1"
        )


def unit_losses(loss: Loss, inputs: LossInputs, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns (losses, clipped): the loss of each unit, and where the loss has cut its gradient.

    A loss function returns the losses, [B, U] or [B, T] with gradient, or this pair. In the pair `clipped` is bool and
    has the shape of the ratio. Losses [B, 1] count for all tokens of their response.

    Raises ConfigError for anything else.
    """
    made = loss.function(inputs, **options)
    losses, clipped = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    shapes = (inputs.ratio.shape, inputs.mask.shape)
    if not (isinstance(losses, Tensor) and losses.is_floating_point() and losses.shape in shapes):
        got = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"objective.loss {loss.name} must return losses in the shape of the ratio {list(shapes[0])} or of the mask "
            f"{list(shapes[1])}, got {got}"
        )
    # A function of the user's may give anything where nothing is trained, and NaN times a weight of 0 is NaN.
    trained = inputs.mask if losses.shape == inputs.mask.shape else inputs.mask.any(1, keepdim=True)
    losses = torch.where(trained, losses, 0)
    if clipped is None:
        return losses, torch.zeros_like(inputs.ratio, dtype=torch.bool)
    if not (isinstance(clipped, Tensor) and clipped.dtype == torch.bool and clipped.shape == shapes[0]):
        raise ConfigError(
            f"objective.loss {loss.name} returned a second result that is not bool in the shape {list(shapes[0])} of the "
            f"ratio: it must say where the loss has cut the gradient"
        )
    return losses, clipped


def clip(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """PPO's: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). R2M Eq. 2, arXiv 1707.06347."""
    bounded = inputs.ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    # The minimum cuts the gradient only where the ratio has already moved past the clip in the direction that the
    # advantage asks for. A ratio that moved the other way keeps its gradient and can come back.
    free, held = inputs.ratio * inputs.advantages, bounded * inputs.advantages
    return -torch.minimum(free, held), (bounded != inputs.ratio) & (held < free)


def dual_clip(inputs: LossInputs, *, c: float = 3.0) -> tuple[Tensor, Tensor]:
    """`clip`, and where A < 0 the loss is at most -`c` A: -max(min(...), c A). arXiv 1912.09729.

    Args:
        c: the largest ratio that counts against a response. More than 1.

    Raises ConfigError for another `c`.
    """
    if not c > 1:
        raise ConfigError(f"objective.loss_options.c = {c} would cut into a ratio of 1; use more than 1")
    losses, clipped = clip(inputs)
    most = -c * inputs.advantages
    capped = (inputs.advantages < 0) & (losses > most)
    return torch.where(capped, most, losses), clipped | capped


def cispo(inputs: LossInputs, *, lower: float = 0.0) -> tuple[Tensor, Tensor]:
    """CISPO: -sg(clip(rho, `lower`, 1 + clip_high)) A log pi. arXiv 2506.13585.

    sg stops the gradient: the ratio is a weight, and every token keeps a gradient.

    Args:
        lower: the smallest weight, from 0 to 1. The paper has none, which is 0. verl has 1 - clip_low.

    Raises ConfigError for another `lower`.
    """
    if not 0 <= lower <= 1:
        raise ConfigError(f"objective.loss_options.lower = {lower} would change a ratio of 1; use 0 to 1")
    weights = inputs.ratio.detach().clamp(lower, 1 + inputs.clip_high)
    return -weights * inputs.advantages * inputs.logprobs, torch.zeros_like(weights, dtype=torch.bool)


def gmpo(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """GMPO: -A times the geometric mean of the tokens' ratios, each clipped by itself. arXiv 2507.20673.

    A log-ratio is clipped to [-clip_low, clip_high], and only on the side to which the advantage pushes it. A response
    counts as clipped if all of its tokens are.
    """
    mask, sign = inputs.mask, inputs.advantages.sign()
    free = torch.where(mask, inputs.logprobs - inputs.anchor_logprobs, 0)
    held = free.clamp(-inputs.clip_low, inputs.clip_high)
    log_ratios = torch.where(sign > 0, torch.minimum(free, held), torch.maximum(free, held))
    log_ratios = torch.where(sign == 0, free, log_ratios)  # the loss is 0 there, so nothing is clipped
    mean = log_ratios.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = mean.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return -ratio * inputs.advantages, ((log_ratios != free) | ~mask).all(1, keepdim=True) & mask.any(1, keepdim=True)


def sapo(inputs: LossInputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> tuple[Tensor, Tensor]:
    """SAPO: -4 / tau sigmoid(tau (rho - 1)) A, a clip that is soft. arXiv 2511.20347.

    Args:
        tau_positive, tau_negative: tau where A > 0, and elsewhere. Both are above 0. The larger, the sooner the gradient
            fades.

    Raises ConfigError for another tau.
    """
    if not min(tau_positive, tau_negative) > 0:
        raise ConfigError(
            f"objective.loss_options.tau_positive = {tau_positive} and tau_negative = {tau_negative} must be above 0"
        )
    tau = torch.full_like(inputs.advantages, tau_negative).masked_fill(inputs.advantages > 0, tau_positive)
    gate = torch.sigmoid(tau * (inputs.ratio - 1)) * (4 / tau)
    return -gate * inputs.advantages, torch.zeros_like(inputs.ratio, dtype=torch.bool)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(name="clip", function=clip),
        Loss(name="dual_clip", function=dual_clip),
        Loss(name="cispo", function=cispo, ratios=("token",), reads=("clip_high",)),
        Loss(name="gmpo", function=gmpo, ratios=("sequence_mean",)),
        Loss(name="sapo", function=sapo, ratios=("token",), reads=()),
    )
}
"""The built-in losses, by name."""
