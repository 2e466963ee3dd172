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

from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_async.errors import ConfigError

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +- this number, so that `exp` cannot overflow. Beyond it they have no gradient."""

RATIOS = ("sequence", "token", "sequence_mean")
OFF_POLICY = ("none", "full", "clamp", "mask")
AGGREGATIONS = ("sequence", "token")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The policy loss and its diagnostics. Only `loss` carries a gradient.

    All fields but `loss` are [B, U]. A unit is what has one ratio: a response token, or a whole response.
    """

    loss: Tensor
    """Scalar, to be minimised."""
    units: Tensor
    """bool: True for a response token, or for a response that has any. The fields below mean nothing elsewhere."""
    ratio: Tensor
    """The importance ratio rho: pi / pi_old, or pi / mu under `off_policy: none`."""
    weight: Tensor
    """The off-policy weight w = pi_old / mu, before it is capped or masked. It is 1 under `off_policy: none`."""
    clipped: Tensor
    """bool: True where the clip was active, so that the unit gives no gradient."""
    left_out: Tensor
    """bool: True where `off_policy: mask` left the unit out of the loss."""


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ratio: str = "sequence",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    off_policy: str = "none",
    off_policy_cap: float = 2.0,
    aggregation: str | None = None,
    denominator: int | None = None,
) -> PolicyLoss:
    """The clipped policy loss: minus the mean of w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).

    rho is the importance ratio, A the advantage and w the off-policy weight (R2M Eq. 2, where w is 1).

    Args:
        logprobs: [B, T] log-probabilities under pi. Only they get a gradient.
        behaviour_logprobs: [B, T] under mu.
        advantages: [B], or [B, T] with `ratio: token`.
        mask: [B, T] bool, True on the tokens to train. Every other input may hold anything where it is False. A
            response without any token to train contributes exactly 0.
        old_logprobs: [B, T] under pi_old. It may be None under `off_policy: none` only.
        ratio: `token` gives every token its own ratio. `sequence` takes the product over the tokens of a response.
            `sequence_mean` takes their geometric mean.
        clip_low, clip_high: how far below and above 1 the ratio may go before it is clipped.
        off_policy: what corrects for data that an older policy sampled.
            `none`: rho = pi / mu and w = 1.
            Otherwise rho = pi / pi_old and w = pi_old / mu, formed per token, as a product or as a geometric mean, as
            `ratio` says. So w rho = pi / mu. w carries no gradient.
            `full` uses w as it is, `clamp` uses at most `off_policy_cap`, and `mask` leaves out every unit whose w lies
            outside [1 / cap, cap].
        off_policy_cap: the cap, at least 1.
        aggregation: `token` gives all tokens the same weight; the term of a sequence ratio then counts once per token.
            `sequence` gives all responses the same weight and averages over the tokens of each. None stands for
            `default_aggregation(ratio)`.
        denominator: `loss_denominator` of the mask of the global batch. None means that `mask` is the global batch.
            Units that `off_policy: mask` leaves out still count in it.

    Raises ConfigError for an unknown name, for missing `old_logprobs`, for a cap below 1, and for advantages per token
    with a ratio per response.
    """
    aggregation = default_aggregation(ratio) if aggregation is None else aggregation
    _check(ratio, off_policy, off_policy_cap, aggregation)
    if off_policy == "none":
        # With pi_old = mu the formulas below give rho = pi / mu and w = 1.
        old_logprobs = behaviour_logprobs
    elif old_logprobs is None:
        raise ConfigError(f"objective.off_policy = {off_policy!r} needs old_logprobs; only 'none' does without pi_old")
    mask = mask.bool()
    advantages_BU = _advantages(advantages, mask, ratio)
    units_BU = mask if ratio == "token" else mask.any(1, keepdim=True)

    rho_BU = _ratio(logprobs, old_logprobs.detach(), mask, ratio)
    w_BU = _ratio(old_logprobs, behaviour_logprobs, mask, ratio).detach()
    left_out_BU = ((w_BU < 1 / off_policy_cap) | (w_BU > off_policy_cap)) & (off_policy == "mask")
    applied_BU = (w_BU.clamp(max=off_policy_cap) if off_policy == "clamp" else w_BU).masked_fill(left_out_BU, 0)
    clipped_BU = rho_BU.clamp(1 - clip_low, 1 + clip_high)
    # The minimum cuts the gradient only where the ratio has already moved past the clip in the direction that the
    # advantage asks for. A ratio that moved the other way keeps its gradient and can come back.
    surrogate_BU = applied_BU * torch.minimum(rho_BU * advantages_BU, clipped_BU * advantages_BU)

    return PolicyLoss(
        loss=-_aggregate(surrogate_BU, mask, aggregation, denominator),
        units=units_BU,
        ratio=rho_BU.detach(),
        weight=w_BU,
        clipped=(clipped_BU != rho_BU) & (clipped_BU * advantages_BU < rho_BU * advantages_BU),
        left_out=left_out_BU,
    )


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


KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}
"""The KL estimators that `kl_loss` knows, by name."""


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k3",
    aggregation: str = "token",
    denominator: int | None = None,
) -> Tensor:
    """The KL of the policy to the reference, KL(pi || pi_ref), as a scalar to be minimised.

    Args:
        logprobs: [B, T] log-probabilities under pi. Only they get a gradient.
        ref_logprobs: [B, T] under the reference pi_ref.
        mask: [B, T] bool, True on the tokens to train. The others may hold anything.
        estimator: `k1` or `k3`.
        aggregation: `token` averages over all tokens of the batch. `sequence` averages over the tokens of each response
            and then over responses. `sequence_sum` adds up the tokens of each response and averages over responses:
            this is the KL of whole responses, as R2M's Eq. 2 has it.
        denominator: the number of tokens in the global batch for `token`, and of responses with tokens otherwise. None
            means that `mask` is the global batch.

    Raises ConfigError for an unknown estimator or aggregation.
    """
    _choose("estimator", estimator, tuple(KL_ESTIMATORS))
    _choose("objective.aggregation", aggregation, (*AGGREGATIONS, "sequence_sum"))
    mask = mask.bool()
    # Masked entries are replaced before the arithmetic: a NaN or an infinity there would get into the gradient, even
    # if the result were masked afterwards.
    per_token_BT = KL_ESTIMATORS[estimator](logprobs.masked_fill(~mask, 0), ref_logprobs.detach().masked_fill(~mask, 0))
    if aggregation == "sequence_sum":
        return torch.where(mask, per_token_BT, 0).sum() / max(denominator or loss_denominator(mask, "sequence"), 1)
    return _aggregate(per_token_BT, mask, aggregation, denominator)


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
    return ValueLoss(loss=0.5 * _aggregate(error_BT, mask, "token", denominator), clipped=clipped_BT)


def default_aggregation(ratio: str) -> str:
    """The aggregation that belongs to a ratio: `token` for the ratio `token`, else `sequence`.

    A ratio per response weighs every response the same: R2M Eq. 2 (`sequence`) and GSPO (`sequence_mean`, arXiv 2507.18071,
    Eq. 5) both average over responses.
    """
    return "token" if ratio == "token" else "sequence"


def loss_denominator(mask: Tensor, aggregation: str) -> int:
    """The number by which a loss over `mask` [B, T] is divided.

    It is the number of response tokens for the aggregation `token`. For `sequence` it is the number of responses that
    have any. Raises ConfigError for another aggregation.
    """
    _choose("objective.aggregation", aggregation, AGGREGATIONS)
    return int(mask.bool().sum()) if aggregation == "token" else int(mask.bool().any(1).sum())


def _ratio(numerator_BT: Tensor, denominator_BT: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """[B, U] probability ratios from two tensors of log-probabilities. Masked tokens count as a ratio of 1."""
    log_BU = torch.where(mask, numerator_BT - denominator_BT, 0)
    if ratio != "token":
        log_BU = log_BU.sum(1, keepdim=True)
    if ratio == "sequence_mean":
        log_BU = log_BU / mask.sum(1, keepdim=True).clamp(min=1)
    return log_BU.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _aggregate(values_BU: Tensor, mask: Tensor, aggregation: str, denominator: int | None) -> Tensor:
    """The sum of `values_BU`, weighted as `aggregation` says, divided by `denominator`; see `policy_loss`.

    A value of a whole response, U = 1, is broadcast over its tokens.
    """
    if denominator is None:
        denominator = loss_denominator(mask, aggregation)
    weights_BT = mask.to(values_BU.dtype)
    if aggregation == "sequence":
        weights_BT = weights_BT / mask.sum(1, keepdim=True).clamp(min=1)
    # A batch without response tokens has the loss 0, and not 0 / 0.
    return (values_BU * weights_BT).sum() / max(denominator, 1)


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


def _check(ratio: str, off_policy: str, cap: float, aggregation: str) -> None:
    """Raises ConfigError for an unknown name and for a cap below 1."""
    _choose("objective.ratio", ratio, RATIOS)
    _choose("objective.off_policy", off_policy, OFF_POLICY)
    _choose("objective.aggregation", aggregation, AGGREGATIONS)
    if cap < 1:
        raise ConfigError(
            f"objective.off_policy_cap = {cap} would cut into on-policy data, whose weight is 1; use at least 1"
        )


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the config's key, unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} = {value!r} is unknown; choose one of {', '.join(choices)}")
