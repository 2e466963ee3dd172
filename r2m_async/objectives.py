"""The losses of the policy and of the critic, as pure functions of tensors.

Three policies are in play. mu is the policy that sampled the responses. pi_old is the learner's policy at the start of
the step. pi is the policy that is being trained.

Sources: R2M, arXiv 2601.22664, Eq. 2, for the ratio `sequence`. GRPO, arXiv 2402.03300, for `token`. GSPO,
arXiv 2507.18071, for `sequence_mean`. The off-policy weights come from the decoupled objective, arXiv 2110.00641. The
KL estimators are those of http://joschu.net/blog/kl-approx.html. The critic's loss is PPO's, arXiv 1707.06347; its clip
is not in that paper but in its authors' code (arXiv 2005.12729, Sec. 3).

A batch may be processed in micro-batches. Every loss is therefore divided by a count over the *global* batch
(`loss_denominator`), so that the losses of the micro-batches add up to the loss of the batch.

Shapes: B responses, T response positions (padded), U units that have a ratio: T tokens, or 1 for a whole response.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2m_async.errors import ConfigError
from r2m_async.policy_losses import LOG_RATIO_BOUND, LOSSES, RATIOS, Loss, LossInputs, unit_losses

OFF_POLICY = ("none", "ignore", "full", "clamp", "mask")
AGGREGATIONS = ("sequence", "token", "token_sum", "sequence_sum", "sequence_sum_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The policy loss and its diagnostics. Only `loss` carries a gradient.

    All fields but `loss` are [B, U]. A unit is a whole response, or a response token if the ratio, the off-policy weight or
    the mask is formed for tokens (`units_of`).
    """

    loss: Tensor
    """Scalar, to be minimised."""
    units: Tensor
    """bool: True for a response token, or for a response that has any. The fields below mean nothing elsewhere."""
    ratio: Tensor
    """The importance ratio rho: pi / pi_old, or pi / mu under `off_policy: none`."""
    weight: Tensor
    """The off-policy weight w = pi_old / mu, before it is capped, masked or ignored. It is 1 under `off_policy: none`."""
    clipped: Tensor
    """bool: True where the loss cut the gradient, so that the unit gives none."""
    left_out: Tensor
    """bool: True where `off_policy: mask` or `off_policy_mask` left the unit out of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBounds:
    """What is left out of the loss, in the terms of `objective.off_policy_mask`."""

    level: str
    """One of `RATIOS`: how the weight that is looked at is formed."""
    low: float
    """A smaller weight leaves the unit out."""
    high: float
    """A larger weight leaves the unit out."""


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ratio: str = "sequence",
    loss: Loss = LOSSES["clip"],
    loss_options: Mapping[str, Any] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    off_policy: str = "none",
    off_policy_cap: float = 2.0,
    off_policy_low: float | None = None,
    off_policy_level: str | None = None,
    off_policy_mask: WeightBounds | None = None,
    aggregation: str | None = None,
    denominator: int | None = None,
) -> PolicyLoss:
    """The policy loss: the mean of w times the loss of each unit. By default that is minus the mean of
    w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), with the importance ratio rho, the advantage A and the
    off-policy weight w (R2M Eq. 2, where w is 1).

    Args:
        logprobs: [B, T] log-probabilities under pi. Only they get a gradient.
        behaviour_logprobs: [B, T] under mu.
        advantages: [B], or [B, T] with `ratio: token`.
        mask: [B, T] bool, True on the tokens to train. Every other input may hold anything where it is False. A
            response without any token to train contributes exactly 0.
        old_logprobs: [B, T] under pi_old. It may be None under `off_policy: none` only.
        ratio: `token` gives every token its own ratio. `sequence` takes the product over the tokens of a response.
            `sequence_mean` takes their geometric mean.
        loss: the loss of a unit (`policy_losses`).
        loss_options: its keyword arguments.
        clip_low, clip_high: how far below and above 1 the ratio may go before it is clipped.
        off_policy: what corrects for data that an older policy sampled.
            `none`: rho = pi / mu and w = 1.
            `ignore`: rho = pi / pi_old and w = 1.
            Otherwise rho = pi / pi_old and w = pi_old / mu, formed per token, as a product or as a geometric mean, as
            `off_policy_level` says. If that is as `ratio`, w rho = pi / mu. w carries no gradient.
            `full` uses w as it is. `clamp` uses at least `off_policy_low` and at most `off_policy_cap`. `mask` uses w as
            it is, and leaves out every unit whose w lies outside these two.
        off_policy_cap: the upper bound, at least 1.
        off_policy_low: the lower bound, less than 1. None is 0 for `clamp` and 1 / cap for `mask`.
        off_policy_level: one of `RATIOS`: how w is formed. None is as `ratio`.
        off_policy_mask: leaves out whatever lies outside of bounds on another weight pi_old / mu, beside all the above.
        aggregation: `token` gives all tokens the same weight; the term of a sequence ratio then counts once per token.
            `sequence` gives all responses the same weight and averages over the tokens of each. `token_sum` adds all
            tokens up. `sequence_sum` adds up the tokens of each response and averages over responses.
            `sequence_sum_norm` divides that by a constant number of tokens. None stands for `default_aggregation`.
        denominator: `loss_denominator` of the mask of the global batch. None means that `mask` is the global batch.
            Units that are left out still count in it.

    Raises ConfigError for an unknown name, for missing `old_logprobs`, for bounds that leave out a weight of 1, for
    advantages per token with a ratio per response, for a loss that cannot be used with the ratio, and for what a user's
    loss must not return.
    """
    aggregation = default_aggregation(ratio, loss.name) if aggregation is None else aggregation
    _check(ratio, off_policy, aggregation, loss)
    level = ratio if off_policy_level is None else off_policy_level
    if off_policy == "none":
        # With pi_old = mu the formulas below give rho = pi / mu and w = 1.
        old_logprobs = behaviour_logprobs
    elif old_logprobs is None:
        raise ConfigError(f"objective.off_policy = {off_policy!r} needs old_logprobs; only 'none' does without pi_old")
    mask, old_logprobs = mask.bool(), old_logprobs.detach()

    inputs = LossInputs(
        logprobs=torch.where(mask, logprobs, 0),
        anchor_logprobs=torch.where(mask, old_logprobs, 0),
        ratio=_ratio(logprobs, old_logprobs, mask, ratio),
        advantages=_advantages(advantages, mask, ratio),
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    losses_BU, clipped_BU = unit_losses(loss, inputs, loss_options or {})
    w_BU = _ratio(old_logprobs, behaviour_logprobs, mask, level).detach()
    low = off_policy_low if off_policy_low is not None else 1 / off_policy_cap if off_policy == "mask" else 0.0
    _check_bounds("off_policy_low", low, "off_policy_cap", off_policy_cap)
    left_out_BU = _outside(w_BU, low, off_policy_cap) & (off_policy == "mask")
    if off_policy_mask is not None:
        looked_at = _ratio(old_logprobs, behaviour_logprobs, mask, off_policy_mask.level).detach()
        _check_bounds("off_policy_mask.low", off_policy_mask.low, "off_policy_mask.high", off_policy_mask.high)
        left_out_BU = left_out_BU | _outside(looked_at, off_policy_mask.low, off_policy_mask.high)
    used_BU = {"clamp": w_BU.clamp(low, off_policy_cap), "ignore": torch.ones_like(w_BU)}.get(off_policy, w_BU)
    applied_BU = torch.where(left_out_BU, 0, used_BU)

    units_BU = units_of(mask, ratio, level, off_policy_mask.level if off_policy_mask else ratio)
    return PolicyLoss(
        loss=aggregate(applied_BU * losses_BU, mask, aggregation, denominator),
        units=units_BU,
        ratio=inputs.ratio.detach().expand(units_BU.shape),
        weight=w_BU.expand(units_BU.shape),
        clipped=clipped_BU.expand(units_BU.shape),
        left_out=left_out_BU.expand(units_BU.shape),
    )


def units_of(mask: Tensor, *levels: str) -> Tensor:
    """Returns bool [B, U]: which units there are. U is T if one of `levels` (of `RATIOS`) is `token`, and otherwise 1.

    mask: [B, T] bool, True on response tokens.
    """
    return mask if "token" in levels else mask.any(1, keepdim=True)


def _outside(weights: Tensor, low: float, high: float) -> Tensor:
    """Where weights are smaller than `low` or larger than `high`."""
    return (weights < low) | (weights > high)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimator of KL(pi || pi_ref) per token: exp(d) - d - 1 with d = log pi_ref - log pi.

    It is never negative. d is clamped to +-`LOG_RATIO_BOUND`. Arguments and result have one shape, [B, T] in this
    library. Source: http://joschu.net/blog/kl-approx.html.
    """
    difference = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # For small d, exp(d) - 1 would lose its digits in the subtraction; `expm1` keeps them.
    return difference.expm1() - difference


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k1 estimator of KL(pi || pi_ref) per token: log pi - log pi_ref.

    A single token may give a negative number. The mean over tokens is what R2M plots in Fig. 5. Arguments and result
    have one shape, [B, T] in this library.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k2 estimator per token: half the square of log pi - log pi_ref.

    It is never negative, and biased as an estimate. But the expectation of its gradient, over tokens of pi, is the gradient
    of KL(pi || pi_ref). Arguments and result have one shape, [B, T] in this library. Source:
    http://joschu.net/blog/kl-approx.html.
    """
    return (logprobs - ref_logprobs).square() / 2


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""The KL estimators that `kl_loss` knows, by name."""


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k3",
    cap: float | None = None,
    aggregation: str = "token",
    denominator: int | None = None,
) -> Tensor:
    """The KL of the policy to the reference, KL(pi || pi_ref), as a scalar to be minimised.

    Args:
        logprobs: [B, T] log-probabilities under pi. Only they get a gradient.
        ref_logprobs: [B, T] under the reference pi_ref.
        mask: [B, T] bool, True on the tokens to train. The others may hold anything.
        estimator: `k1`, `k2` or `k3`.
        cap: the estimate of a token is clamped to +- this number, in nats. Beyond it there is no gradient. None: no cap.
        aggregation: one of `AGGREGATIONS`, as in `policy_loss`. `sequence_sum` is the KL of whole responses, as R2M's
            Eq. 2 has it.
        denominator: `loss_denominator` of the mask of the global batch. None means that `mask` is the global batch.

    Raises ConfigError for an unknown estimator or aggregation.
    """
    _choose("objective.kl_estimator", estimator, tuple(KL_ESTIMATORS))
    _choose("objective.aggregation", aggregation, AGGREGATIONS)
    mask = mask.bool()
    # Masked entries are replaced before the arithmetic: a NaN or an infinity there would get into the gradient, even
    # if the result were masked afterwards.
    per_token_BT = KL_ESTIMATORS[estimator](logprobs.masked_fill(~mask, 0), ref_logprobs.detach().masked_fill(~mask, 0))
    if cap is not None:
        per_token_BT = per_token_BT.clamp(-cap, cap)
    return aggregate(per_token_BT, mask, aggregation, denominator)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> float:
    """The KL to the reference in nats: the mean over responses of the sum over tokens of log pi - log pi_ref.

    Args:
        logprobs, ref_logprobs: [B, T]. They may hold anything where `mask` is False.
        mask: [B, T] bool, True on response tokens. All B responses count.

    R2M plots it in Fig. 5.
    """
    return (logprobs - ref_logprobs).masked_fill(~mask, 0).sum(1).mean().item()


def next_kl_coef(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The KL coefficient of the next step, which pulls the KL towards `target` (arXiv 1909.08593, Sec. 2.2).

    It is coefficient (1 + gain e), where e is kl / target - 1, but at least -0.2 and at most 0.2.

    Args:
        coefficient: beta of the step that was just taken.
        kl: the KL of that step, in nats, as `target`.
        target: the KL that is wanted, above 0.
        gain: K_beta of the paper. In verl and OpenRLHF it is the number of trajectories of a step over `horizon`.
    """
    return coefficient * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """The critic's loss and its diagnostic."""

    loss: Tensor
    """Scalar, to be minimised. Only it carries a gradient."""
    clipped: Tensor
    """[B, T] bool: True where the clip was active, so that the token gives no gradient."""


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    denominator: int | None = None,
) -> ValueLoss:
    """The critic's loss: half the mean over response tokens of the clipped squared error between value and return.

    With V the value, R the return and c the clip, the error of a token is
        max((V - R)^2, (clamp(V, V_old - c, V_old + c) - R)^2).
    So a value that has already moved by c towards its return gets no further gradient in this step. The clip comes from
    the code of PPO's authors (arXiv 2005.12729, Sec. 3).

    Args:
        values: [B, T] values by the present critic. Only they get a gradient.
        old_values: [B, T] values by the critic at the start of the step, V_old.
        returns: [B, T] the critic's targets.
        mask: [B, T] bool, True on the response tokens. The other inputs may hold anything where it is False.
        clip: c, in units of value. None: the error is (V - R)^2.
        denominator: the number of response tokens in the global batch. None means that `mask` is the global batch.
    """
    mask = mask.bool()
    # Masked entries become 0 before the square: a NaN there would otherwise get into the gradient.
    values_BT, old_BT, returns_BT = (
        torch.where(mask, one, 0) for one in (values, old_values.detach(), returns.detach())
    )
    error_BT = (values_BT - returns_BT).square()
    clipped_BT = torch.zeros_like(mask)
    if clip is not None:
        bounded_BT = (values_BT.clamp(old_BT - clip, old_BT + clip) - returns_BT).square()
        clipped_BT = bounded_BT > error_BT
        error_BT = torch.maximum(error_BT, bounded_BT)
    return ValueLoss(loss=0.5 * aggregate(error_BT, mask, "token", denominator), clipped=clipped_BT)


def default_aggregation(ratio: str, loss: str = "clip") -> str:
    """The aggregation that belongs to a ratio and a loss: `token` for the ratio `token`, else `sequence`.

    A ratio per response weighs every response the same: R2M Eq. 2 (`sequence`) and GSPO (`sequence_mean`, arXiv 2507.18071,
    Eq. 5) both average over responses. So does SAPO (arXiv 2511.20347), whose ratio is the token's.
    """
    return "token" if ratio == "token" and loss != "sapo" else "sequence"


def loss_denominator(mask: Tensor, aggregation: str, max_tokens: int | None = None) -> int:
    """The number by which a loss over `mask` [B, T] is divided.

    It is the number of response tokens for the aggregation `token`, 1 for `token_sum`, and otherwise the number of responses
    that have any token. `sequence_sum_norm` multiplies that by `max_tokens`.

    Args:
        max_tokens: the constant of Dr. GRPO (arXiv 2503.20783): the most tokens that a response may have.

    Raises ConfigError for another aggregation, and for `sequence_sum_norm` without `max_tokens`.
    """
    _choose("objective.aggregation", aggregation, AGGREGATIONS)
    if aggregation in ("token", "token_sum"):
        return int(mask.bool().sum()) if aggregation == "token" else 1
    responses = int(mask.bool().any(1).sum())
    if aggregation != "sequence_sum_norm":
        return responses
    if max_tokens is None:
        raise ConfigError("objective.aggregation is 'sequence_sum_norm', which divides by a constant: give max_tokens")
    return responses * max_tokens


def _ratio(numerator_BT: Tensor, denominator_BT: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """[B, U] probability ratios from two tensors of log-probabilities. Masked tokens count as a ratio of 1."""
    log_BU = torch.where(mask, numerator_BT - denominator_BT, 0)
    if ratio != "token":
        log_BU = log_BU.sum(1, keepdim=True)
    if ratio == "sequence_mean":
        log_BU = log_BU / mask.sum(1, keepdim=True).clamp(min=1)
    return log_BU.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def aggregate(values: Tensor, mask: Tensor, aggregation: str, denominator: int | None) -> Tensor:
    """The scalar that values of tokens or responses become under an aggregation of `policy_loss`.

    Args:
        values: [B, T], finite, or [B, 1]: then the value of a response counts for each of its tokens.
        mask: [B, T] bool, True on response tokens.
        denominator: `loss_denominator` of the mask of the global batch. None means that `mask` is the global batch.
    """
    if denominator is None:
        denominator = loss_denominator(mask, aggregation)
    weights_BT = mask.to(values.dtype)
    if aggregation == "sequence":
        weights_BT = weights_BT / mask.sum(1, keepdim=True).clamp(min=1)
    # A batch without response tokens has the loss 0, and not 0 / 0.
    return (values * weights_BT).sum() / max(denominator, 1)


def _advantages(advantages: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """[B, 1] or [B, T] advantages without gradient, 0 where masked. Raises ConfigError if they do not fit `ratio`."""
    if advantages.shape == mask.shape and ratio == "token":
        return torch.where(mask, advantages.detach(), 0)
    if advantages.shape == mask.shape:
        raise ConfigError(
            f"objective.ratio = {ratio!r} gives a response one ratio, but the estimator gave each token its advantage "
            f"({list(advantages.shape)}); choose ratio: token, or an estimator with one advantage per response"
        )
    if advantages.shape != mask.shape[:1]:
        expected = f"[B] = {list(mask.shape[:1])} or [B, T] = {list(mask.shape)}"
        raise ConfigError(f"advantages must be {expected}, got {list(advantages.shape)}")
    return torch.where(mask.any(1), advantages.detach(), 0)[:, None]


def _check(ratio: str, off_policy: str, aggregation: str, loss: Loss) -> None:
    """Raises ConfigError for an unknown name, and for a loss that cannot be used with the ratio."""
    _choose("objective.ratio", ratio, RATIOS)
    _choose("objective.off_policy", off_policy, OFF_POLICY)
    _choose("objective.aggregation", aggregation, AGGREGATIONS)
    if ratio not in loss.ratios:
        raise ConfigError(
            f"objective.loss is {loss.name!r} and objective.ratio is {ratio!r}: that loss needs objective.ratio "
            f"{' or '.join(map(repr, loss.ratios))}"
        )


def _check_bounds(low_key: str, low: float, high_key: str, high: float) -> None:
    """Raises ConfigError, naming the key, for a bound on the weight w that leaves out 1."""
    for key, bound, wrong, most in ((low_key, low, low > 1, "most"), (high_key, high, high < 1, "least")):
        if wrong:
            raise ConfigError(
                f"objective.{key} = {bound} would cut into on-policy data, whose weight is 1; use at {most} 1"
            )


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the config's key, unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} = {value!r} is unknown; choose one of {', '.join(choices)}")
