"""Advantage estimators turn the rewards of a step into one advantage per response or per token.

An advantage says how much better a response, or a token, is than expected. The policy loss is weighted by it.
This file holds RLOO (R2M, arXiv 2601.22664, Eq. 1; arXiv 2402.14740), GRPO (arXiv 2402.03300), Dr. GRPO
(arXiv 2503.20783), OPO (arXiv 2505.23585), ReMax (arXiv 2310.10505), REINFORCE++ (arXiv 2501.03262) and GAE
(arXiv 1506.02438), which PPO uses. It also holds the registry through which users add estimators;
`docs/advantages.md` shows how. `docs/algorithms.md` says what other libraries call each.

Shapes: n groups, K responses in a group, T response positions (padded).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from r2m_async import plugins
from r2m_async.errors import ConfigError
from r2m_async.plugins import named_function, nearest

Call: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""A function that calls another: it takes a function and the tuple of its arguments, and returns the result.

`advantages_and_returns` runs a user's code only through it, so the caller can catch and report what that code raises.
"""


class AdvantageNotFinite(ConfigError):
    """An estimator returned NaN or infinity for a response or a token that is trained."""

    def __init__(self, message: str, place: list[int]) -> None:
        super().__init__(message)
        self.place = place
        """Where the first such value is: [group, response], or [group, response, token] for a result per token."""

    def __reduce__(self) -> tuple[type, tuple[str, list[int]]]:
        """Lets another process have the error, as in `errors.StageLost`."""
        return type(self), (str(self), self.place)


WHITENINGS = ("none", "responses", "tokens")
"""What `advantage.whiten` may be: the choices of `whitened`, and `none` for leaving the advantages as they are."""

FLAGS = ("needs_greedy", "kl_in_reward", "needs_values", "needs_states", "per_token", "group_relative", "whole_batch")
"""What an estimator may say of itself: the fields of `Estimator` with these names say what each means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """What an estimator receives: the rewards of n groups and the tensors that belong to them.

    Construction raises ValueError when a shape or a dtype is wrong.
    """

    rewards: Tensor
    """[n, K] float32 or float64. A response without response tokens has a reward too and counts in its group."""
    response_mask: Tensor
    """[n, K, T] bool: True on the tokens that the policy loss will train."""
    logprobs: Tensor | None = None
    """[n, K, T] log-probabilities under pi_old, the policy at the start of the step.

    Masked entries may hold anything. They may be None only for estimators that do not read them.
    """
    ref_logprobs: Tensor | None = None
    """[n, K, T] log-probabilities under the reference policy. Masked entries may hold anything. None: no reference."""
    greedy_rewards: Tensor | None = None
    """[n] reward of the greedy response to each prompt. It is None unless the estimator asked for it."""
    values: Tensor | None = None
    """[n, K, T] values from the critic at the start of the step. Entry t rates the state in which token t is chosen.

    Masked entries may hold anything. It is None unless the estimator asked for values.
    """
    baselines: Tensor | None = None
    """[n, K] the reward that a probe on the policy's states predicts for each response, from its prompt alone.

    It is None unless the estimator asked for states.
    """
    reward_parts: Tensor | None = None
    """[n, K, R] the R rewards whose weighted sum a reward is: the model's, those of functions, and the penalties.

    None: the reward is one part.
    """
    part_weights: Tensor | None = None
    """[R] the weights of these parts."""

    def __post_init__(self) -> None:
        if self.rewards.ndim != 2 or self.rewards.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"rewards must be [n, K] in float32 or float64 (differences within a group vanish in less), "
                f"got {_describe(self.rewards)}"
            )
        n, k = self.rewards.shape
        if self.response_mask.dtype != torch.bool:
            raise ValueError(f"response_mask must be bool, got {self.response_mask.dtype}")
        tokens = (n, k, self.response_mask.shape[-1])
        expected = dict.fromkeys(("response_mask", "logprobs", "ref_logprobs", "values"), tokens)
        parts = () if self.reward_parts is None else tuple(self.reward_parts.shape[2:])
        shapes = {"greedy_rewards": (n,), "baselines": (n, k), "reward_parts": (n, k, *parts), "part_weights": parts}
        for name, shape in (*expected.items(), *shapes.items()):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)} beside rewards {[n, k]}, got {list(value.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """An advantage estimator and what it needs from the run.

    Keep the same `Estimator` for the whole run. If `function` is a class, its instance is stored here, and with it
    whatever the instance remembers from step to step.
    """

    name: str
    """The name in the config: a registered name, or `module:attr`."""
    function: Callable[..., Any]
    """Either f(inputs, **options) -> advantages, or a class.

    A class is instantiated once with the options. The instance is then called with the inputs of each step.
    """
    needs_greedy: bool = False
    """If True, the rollout generates one greedy response per prompt beside the K sampled ones."""
    kl_in_reward: bool = False
    """If True, the estimator subtracts the KL itself, and the policy loss has no KL term.

    Its option `beta` is `objective.kl_coef`, unless the config's options name another.
    """
    needs_values: bool = False
    """If True, a critic is trained, and the estimator returns a pair (advantages, returns).

    The returns are [n, K, T]. They are the critic's targets.
    """
    needs_states: bool = False
    """If True, a probe predicts the reward of each prompt from the policy's states (`AdvantageInputs.baselines`).

    Its settings are the options `strength` and `decay` of the estimator (`models.reward_probe.RewardProbe`).
    """
    per_token: bool = False
    """If True, every token has an advantage of its own. A ratio per response could not weigh them: it needs
    `objective.ratio: token`."""
    group_relative: bool = False
    """If True, the responses of a group are compared with each other. A group then needs at least two."""
    whole_batch: bool = False
    """If True, it normalises over the whole batch. Groups that the schedule cut short would fall out of it
    (`scheduling.overage: mask`)."""
    _made: list[tuple[dict[str, Any], Callable[..., Any]]] = field(default_factory=list, repr=False, compare=False)
    """Empty, or one pair: the options and the instance of a class that was made with them."""

    def __call__(self, inputs: AdvantageInputs, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The advantages, or (advantages, returns) with `needs_values`, as `advantages_and_returns` documents them."""
        advantages, returns = advantages_and_returns(self, inputs, options)
        return advantages if returns is None else (advantages, returns)

    def accepts(self, option: str) -> bool:
        """Whether the function, or the class as it is made, takes a keyword argument of this name."""
        parameters = list(inspect.signature(self.function).parameters.values())
        by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return option in by_name or any(p.kind is p.VAR_KEYWORD for p in parameters)


_REGISTRY: dict[str, Estimator] = {}


def _estimator(name: str, function: Any) -> Estimator:
    flags: dict[str, Any] = {flag: bool(getattr(function, flag, False)) for flag in FLAGS}
    return Estimator(name=name, function=function, **flags)


def _identity(function: Any) -> str:
    """The full name of a function. It stays the same when a module is reloaded, where the object changes."""
    return f"{function.__module__}.{function.__qualname__}"


def register_advantage(
    name: str,
    *,
    needs_greedy: bool = False,
    kl_in_reward: bool = False,
    needs_values: bool = False,
    needs_states: bool = False,
    per_token: bool = False,
    group_relative: bool = False,
    whole_batch: bool = False,
) -> Callable[[Any], Any]:
    """Returns a decorator that registers a function or a class as an advantage estimator.

    The config can then name it `name`, or `module:attr` with the same flags. The flags are those of `Estimator`.

    `r2m check` and `r2m train` hold the config against them, for a user's own estimator as for ours.

    Raises ConfigError when another estimator already has the name.
    """
    flags = {
        "needs_greedy": needs_greedy,
        "kl_in_reward": kl_in_reward,
        "needs_values": needs_values,
        "needs_states": needs_states,
        "per_token": per_token,
        "group_relative": group_relative,
        "whole_batch": whole_batch,
    }

    def register(function: Any) -> Any:
        known = _REGISTRY.get(name)
        if known is not None and _identity(known.function) != _identity(function):
            raise ConfigError(
                f"advantage {name!r} is already registered by {_identity(known.function)}; choose another name"
            )
        # The flags also go onto the function itself: under `module:attr` it is found without the registry.
        for flag in FLAGS:
            setattr(function, flag, flags[flag])
        _REGISTRY[name] = _estimator(name, function)
        return function

    return register


def get_advantage(name: str) -> Estimator:
    """Returns the estimator that is registered as `name`, or that lies at `module:attr`.

    Each call returns a fresh `Estimator`, so two runs in one process never share the instance of a class.

    Raises ConfigError when no such estimator exists.
    """
    if ":" in name:
        return _estimator(name, named_function(name, "advantage.name"))
    if name not in _REGISTRY:
        raise ConfigError(
            f"advantage.name = {name!r} is unknown{nearest(name, _REGISTRY)}. Known: {', '.join(sorted(_REGISTRY))}; "
            f"your own is named as module:attr"
        )
    return replace(_REGISTRY[name], _made=[])


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "eps": ("it guards a division by 0, so use a number above 0", lambda value: value > 0),
    "beta": ("the KL would be sought and not avoided; use 0 or more", lambda value: value >= 0),
    "gamma": ("use a number from 0 to 1", lambda value: 0 <= value <= 1),
    "lam": ("use a number from 0 to 1", lambda value: 0 <= value <= 1),
}
"""What the options of the estimators here must be, by name: (what is told, whether a value is so)."""


def check_options(estimator: Estimator, options: Mapping[str, Any]) -> None:
    """Raises ConfigError when `estimator` does not know one of the options, lacks one that it requires, or refuses its value.

    Of a user's estimator only the signature is read. None of its code runs.
    """
    # A function takes the inputs first. A class takes them later, when its instance is called.
    taken = 0 if inspect.isclass(estimator.function) else 1
    plugins.check_options(estimator.function, options, "advantage.options", estimator.name, taken)
    if estimator.function.__module__ != __name__:
        return
    for option, (why, holds) in _RANGES.items():
        if option in options and not holds(options[option]):
            raise ConfigError(f"advantage.options.{option} is {options[option]}; {why}")


def _plainly(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Calls a function and lets its errors through."""
    return function(*arguments)


def advantages_and_returns(
    estimator: Estimator, inputs: AdvantageInputs, options: Mapping[str, Any] | None = None, call: Call = _plainly
) -> tuple[Tensor, Tensor | None]:
    """Runs the estimator on one step and checks what it returns.

    Args:
        options: the estimator's keyword arguments.
        call: runs the estimator's code; errors of that code pass through it. The default lets them through unchanged.

    Returns:
        The advantages, [n, K] or [n, K, T], and the returns, [n, K, T], or None for an estimator without a critic.
        Both carry no gradient. Entries off the response tokens are 0, as are those of responses without any.

    Raises ConfigError when the estimator does not take the options, or when it returns anything but floating-point
    tensors of these shapes. Raises AdvantageNotFinite, a ConfigError, for NaN or infinity on response tokens.
    """
    made = call(_callable(estimator, dict(options or {}), call), (inputs,))
    mask = inputs.response_mask
    if not estimator.needs_values:
        return _checked(estimator, "", made, inputs, (mask.shape[:2], mask.shape)), None
    if not isinstance(made, tuple) or len(made) != 2:
        raise ConfigError(
            f"advantage {estimator.name} needs values, so it must return (advantages, returns), got {_describe(made)}"
        )
    advantages = _checked(estimator, " as advantages", made[0], inputs, (mask.shape[:2], mask.shape))
    return advantages, _checked(estimator, " as returns", made[1], inputs, (mask.shape,))


def _checked(
    estimator: Estimator, what: str, result: Any, inputs: AdvantageInputs, shapes: tuple[torch.Size, ...]
) -> Tensor:
    """Returns a result without gradient and with zeros where it is not trained, or raises as its caller documents.

    `what` names the result in messages. `shapes` are those that it may have.
    """
    mask = inputs.response_mask
    if not isinstance(result, Tensor) or result.shape not in shapes:
        named = {2: "[n, K]", 3: "[n, K, T]"}
        wanted = " or ".join(f"{named[len(shape)]} = {list(shape)}" for shape in shapes)
        raise ConfigError(f"advantage {estimator.name} must return a tensor {wanted}{what}, got {_describe(result)}")
    if not result.is_floating_point():
        raise ConfigError(f"advantage {estimator.name} must return floating-point numbers{what}, got {result.dtype}")
    counted = mask if result.ndim == 3 else mask.any(-1)
    bad = counted & ~result.float().isfinite()  # as the loss will read it: 1e39 is finite in float64 alone
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise AdvantageNotFinite(
            f"advantage {estimator.name} must be finite on response tokens{what}, got {result[tuple(where)].item()} at "
            f"{where} and {int(bad.sum())} such values of {int(counted.sum())}; {_not_finite(inputs)}",
            where,
        )
    return result.detach().masked_fill(~counted, 0)


def _not_finite(inputs: AdvantageInputs) -> str:
    """Says, for an error message, which of the inputs hold NaN or infinity. Masked entries are not looked at."""
    found = [] if inputs.rewards.isfinite().all() else ["rewards"]
    if inputs.greedy_rewards is not None and not inputs.greedy_rewards.isfinite().all():
        found.append("greedy_rewards")
    for name in ("values", "logprobs", "ref_logprobs"):
        tokens = getattr(inputs, name)
        if tokens is not None and not tokens[inputs.response_mask].isfinite().all():
            found.append("the critic's values" if name == "values" else name)
    return f"not all {' and '.join(found)} it was given are finite" if found else "all that it was given is finite"


@register_advantage("rloo", group_relative=True)
def rloo(inputs: AdvantageInputs) -> Tensor:
    """RLOO: a response's reward minus the mean reward of the other K - 1 responses of its group (R2M Eq. 1).

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    deviation = _deviation(inputs.rewards, "rloo")
    # The distance to the mean of the others is K / (K - 1) times the distance to the mean of all.
    return deviation * (inputs.rewards.shape[1] / (inputs.rewards.shape[1] - 1))


@register_advantage("rloo_kl", kl_in_reward=True, group_relative=True)
def rloo_kl(inputs: AdvantageInputs, *, beta: float = 0.05) -> Tensor:
    """RLOO with the KL in the reward: `rloo` on reward - `beta` KL (arXiv 2402.14740; BSR's runs).

    The KL of a response is the sum of log pi_old - log pi_ref over its tokens. So a response has one advantage, and all
    of its KL counts in the baseline of the others.

    Args:
        beta: weight of the KL in the reward. With 0 the log-probabilities are not needed.

    Returns [n, K]. Raises ConfigError for K = 1, and when `beta` is not 0 and log-probabilities are absent.
    """
    charged = inputs.rewards + _kl_charges(inputs, beta).sum(-1)
    deviation = _deviation(charged, "rloo_kl")
    return deviation * (charged.shape[1] / (charged.shape[1] - 1))


@register_advantage("dr_grpo", group_relative=True)
def dr_grpo(inputs: AdvantageInputs) -> Tensor:
    """Dr. GRPO: reward - group mean, not divided by any spread (arXiv 2503.20783).

    The paper's loss also divides by a constant instead of lengths: `objective.aggregation: sequence_sum_norm`.

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    return _deviation(inputs.rewards, "dr_grpo")


@register_advantage("grpo_batch", group_relative=True, whole_batch=True)
def grpo_batch(inputs: AdvantageInputs, *, unbiased: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO with the spread of the batch: (reward - group mean) / (std of all rewards + `eps`) (arXiv 2508.08221).

    Args:
        unbiased: divides the variance by n K - 1, and by n K when False.
        eps: in units of reward. It only guards the division.

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    deviation = _deviation(inputs.rewards, "grpo_batch")
    return deviation / (inputs.rewards.std(correction=int(unbiased)) + eps)


@register_advantage("opo", group_relative=True)
def opo(inputs: AdvantageInputs) -> Tensor:
    """OPO: reward - mean reward of the group, in which a response weighs as much as it is long (arXiv 2505.23585).

    The length of a response is its number of response tokens. A group without any token has the plain mean.

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    deviation = _deviation(inputs.rewards, "opo")  # from the plain mean, which the weighted mean of these then corrects
    lengths = inputs.response_mask.sum(-1).to(deviation.dtype)
    return deviation - (lengths * deviation).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp(min=1)


@register_advantage("grpo", group_relative=True)
def grpo(inputs: AdvantageInputs, *, unbiased: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO: (reward - group mean) / (group std + `eps`) (arXiv 2402.03300).

    Args:
        unbiased: divides the variance by K - 1, and by K when False. The paper does not say which; common
            implementations use K - 1.
        eps: in units of reward. It only guards the division: a group of identical rewards gets exactly 0 anyway.

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    deviation = _deviation(inputs.rewards, "grpo")
    return deviation / (deviation.std(1, correction=int(unbiased), keepdim=True) + eps)


@register_advantage("gdpo", group_relative=True, whole_batch=True)
def gdpo(inputs: AdvantageInputs, *, unbiased: bool = True, eps: float = 1e-6) -> Tensor:
    """GDPO: each part of the reward is normalised in its group, before the weighted sum (arXiv 2601.05242, Eq. 4-7).

    A part is the model's reward, that of one function, or the penalties. For part k with weight w_k the group's
    advantage is A_k = (r_k - group mean) / (group std + `eps`). The result is A = sum of w_k A_k, normalised over the
    batch: (A - mean) / (std + `eps`).

    Args:
        unbiased: divides variances by one less than the number of values, and by the number when False.
        eps: guards the divisions only.

    Returns [n, K]. Raises ConfigError for K = 1.
    """
    parts, weights = inputs.reward_parts, inputs.part_weights
    if parts is None or weights is None:
        parts, weights = inputs.rewards[..., None], torch.ones(1)
    total = torch.zeros_like(inputs.rewards)
    for part, weight in zip(parts.unbind(-1), weights.tolist(), strict=True):
        deviation = _deviation(part, "gdpo")
        total += weight * deviation / (deviation.std(1, correction=int(unbiased), keepdim=True) + eps)
    return (total - total.mean()) / (total.std(correction=int(unbiased)) + eps)


@register_advantage("remax", needs_greedy=True)
def remax(inputs: AdvantageInputs) -> Tensor:
    """ReMax: a response's reward minus the reward of the greedy response to the same prompt (arXiv 2310.10505).

    Returns [n, K]. Raises ConfigError when `greedy_rewards` is None.
    """
    if inputs.greedy_rewards is None:
        raise ConfigError(
            "advantage remax needs greedy_rewards, got None: rollouts must generate a greedy twin per prompt"
        )
    return inputs.rewards - inputs.greedy_rewards[:, None]


@register_advantage("probe", needs_states=True)
def probe(inputs: AdvantageInputs, *, strength: float = 0.1, decay: float = 0.9) -> Tensor:
    """A probe's baseline: a response's reward minus the reward that a linear probe predicts for its prompt.

    The probe reads the policy's state at the end of the prompt, and has learnt from earlier steps alone. So a group may
    have a single response, and no response is compared with another. The idea is that of arXiv 2605.07579; the fit is
    this project's own (`models/reward_probe.py`).

    Args:
        strength: the penalty of the probe's ridge regression, as a share of the mean variance of a state's entry.
        decay: how much the rewards of a step count for the probe one step later.

    Returns [n, K]. Raises ConfigError when `baselines` is None.
    """
    if inputs.baselines is None:
        raise ConfigError(
            "advantage probe needs baselines, got None: a probe must predict them from the policy's states"
        )
    return inputs.rewards - inputs.baselines


@register_advantage("reinforce_pp", kl_in_reward=True, per_token=True, whole_batch=True)
def reinforce_pp(inputs: AdvantageInputs, *, beta: float = 0.05, eps: float = 1e-6) -> Tensor:
    """REINFORCE++: the undiscounted reward-to-go of each token, normalised over the batch (arXiv 2501.03262).

    Every response token has the reward -`beta` (log pi_old - log pi_ref). The last response token also gets the reward
    of the response. A token's reward-to-go is the sum of the rewards from that token to the end.

    Args:
        beta: weight of the KL in the reward. With 0 the log-probabilities are not needed.
        eps: added to the standard deviation by which the batch is divided.

    Returns [n, K, T]: mean 0 and population std close to 1 over all response tokens of the batch.

    Raises ConfigError when `beta` is not 0 and log-probabilities are absent.
    """
    return _normalised(_reward_to_go(inputs, inputs.rewards, beta), inputs.response_mask, eps)


@register_advantage("reinforce_pp_baseline", kl_in_reward=True, per_token=True, group_relative=True, whole_batch=True)
def reinforce_pp_baseline(inputs: AdvantageInputs, *, beta: float = 0.05, eps: float = 1e-6) -> Tensor:
    """REINFORCE++ with a baseline: `reinforce_pp` on rewards from which the group's mean was subtracted.

    Returns [n, K, T]. Raises ConfigError for K = 1, and as `reinforce_pp` does.
    """
    deviation = _deviation(inputs.rewards, "reinforce_pp_baseline")
    return _normalised(_reward_to_go(inputs, deviation, beta), inputs.response_mask, eps)


@register_advantage("gae", kl_in_reward=True, needs_values=True, per_token=True, whole_batch=True)
def gae(
    inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95, beta: float = 0.05, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with a critic (arXiv 1506.02438, Eq. 16).

    The reward of each token is that of `reinforce_pp`. V_t is the value of the state in which token t is chosen; after
    the last token it is 0. Then
        A_t = sum_l (`gamma` `lam`)^l delta_(t + l),   delta_t = reward_t + `gamma` V_(t + 1) - V_t.
    A response that was cut at the length limit is treated like any other: it ends where it was cut, and its reward is
    that of the text so far.

    Args:
        gamma: discount per token.
        lam: the lambda of GAE. 0 looks one token ahead and then trusts the critic; 1 adds up all later rewards.
        beta: weight of the KL in the reward. With 0 the log-probabilities are not needed.
        eps: added to the standard deviation by which the batch is divided.

    Returns:
        The advantages [n, K, T]: A_t, shifted to mean 0 over all response tokens and divided by population std + `eps`.
        The returns [n, K, T]: A_t + V_t, before normalisation. They are the critic's targets.

    Raises ConfigError without values, and without log-probabilities unless `beta` is 0.
    """
    if inputs.values is None:
        raise ConfigError("advantage gae needs values, got None: a critic must give them, one for each response token")
    mask, reward = inputs.response_mask, _token_rewards(inputs, inputs.rewards, beta)
    values = torch.where(mask, inputs.values, 0).to(reward.dtype)
    raw = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(inputs.rewards)
    for t in reversed(range(mask.shape[-1])):
        counted = mask[..., t]
        # Masked positions change neither `ahead` nor `next_value`, so padding on the right leaves both at 0.
        delta = reward[..., t] + gamma * next_value - values[..., t]
        ahead = torch.where(counted, delta + gamma * lam * ahead, ahead)
        next_value = torch.where(counted, values[..., t], next_value)
        raw[..., t] = torch.where(counted, ahead, 0)
    return _normalised(raw, mask, eps), raw + values


def whitened(advantages: Tensor, mask: Tensor, over: str) -> Tensor:
    """Shifts the advantages of a batch to mean 0 and scales them to standard deviation 1.

    Args:
        advantages: [B], or [B, T] with `over` = `tokens`.
        mask: [B, T] bool, True on response tokens.
        over: `responses` counts every response that has tokens once, and divides by std + 1e-4, as TRL does.
            `tokens` counts every response token, and divides by sqrt(variance + 1e-8), as verl does. Both take the
            variance of a sample, which divides by one less than the count.

    Returns a tensor of the same shape, with zeros where nothing is trained. Less than two counted values become 0.

    Raises ConfigError for another `over`, and for advantages per token with `responses`.
    """
    if over not in WHITENINGS[1:]:
        raise ConfigError(f"advantage.whiten = {over!r} is unknown; choose one of {', '.join(WHITENINGS)}")
    per_token = advantages.shape == mask.shape
    if per_token and over == "responses":
        raise ConfigError(
            "advantage.whiten is 'responses', and the estimator gave each token its advantage: use 'tokens'"
        )
    trained = mask if per_token else mask.any(1)
    counted = advantages if per_token or over == "responses" else advantages[:, None].expand(mask.shape)
    values = counted[trained if over == "responses" else mask]
    if len(values) < 2:
        return torch.zeros_like(advantages)
    # As in `_deviation`: subtracting the first value makes equal values exactly 0.
    first = values[0]
    mean, variance = (values - first).mean(), (values - first).var()
    spread = variance.sqrt() + 1e-4 if over == "responses" else (variance + 1e-8).sqrt()
    return torch.where(trained, (advantages - first - mean) / spread, 0)


def _deviation(rewards_nK: Tensor, name: str) -> Tensor:
    """[n, K] rewards minus the mean of their group. Raises ConfigError, naming the estimator, for K = 1."""
    if rewards_nK.shape[1] < 2:
        raise ConfigError(
            f"advantage {name} compares the responses of a group, but rollouts.group_size = {rewards_nK.shape[1]}; "
            f"use at least 2, or remax or reinforce_pp"
        )
    # The mean of K equal numbers may round to another number. Without the shift, a group of identical rewards would
    # keep a tiny deviation, which a division by its standard deviation would blow up.
    shifted = rewards_nK - rewards_nK[:, :1]
    return shifted - shifted.mean(1, keepdim=True)


def _reward_to_go(inputs: AdvantageInputs, scores_nK: Tensor, beta: float) -> Tensor:
    """[n, K, T] sums of the token rewards from each token to the end of its response."""
    return _token_rewards(inputs, scores_nK, beta).flip(-1).cumsum(-1).flip(-1)


def _token_rewards(inputs: AdvantageInputs, scores_nK: Tensor, beta: float) -> Tensor:
    """[n, K, T] rewards of single tokens: the KL term at every response token, plus the score at the last one.

    Entries off the response tokens are 0. Raises ConfigError if `beta` is not 0 and log-probabilities are absent.
    """
    mask = inputs.response_mask
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)
    return _kl_charges(inputs, beta) + torch.where(mask & (tokens_left == 1), scores_nK[..., None], 0)


def _kl_charges(inputs: AdvantageInputs, beta: float) -> Tensor:
    """[n, K, T] -`beta` (log pi_old - log pi_ref) on response tokens, and 0 elsewhere.

    Raises ConfigError if `beta` is not 0 and log-probabilities are absent.
    """
    mask, rewards = inputs.response_mask, inputs.rewards
    charges = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    if beta == 0:
        return charges
    if inputs.logprobs is None or inputs.ref_logprobs is None:
        absent = "logprobs" if inputs.logprobs is None else "ref_logprobs"
        raise ConfigError(
            f"advantage.options.beta = {beta} puts a KL into the reward, but {absent} is None; "
            f"give a reference or set beta to 0"
        )
    # `where`, and no product with the mask: masked entries may be NaN, and NaN times 0 is NaN.
    return torch.where(mask, -beta * (inputs.logprobs - inputs.ref_logprobs), charges)


def _normalised(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Shifts the masked values to mean 0 and divides them by their population std + `eps`. The others become 0."""
    if not mask.any():
        return torch.zeros_like(values)
    counted = values[mask]
    # As in `_deviation`: subtracting the first value makes equal values exactly 0.
    deviation = counted - counted[0]
    deviation = deviation - deviation.mean()
    return torch.zeros_like(values).masked_scatter(mask, deviation / (deviation.std(correction=0) + eps))


def _callable(estimator: Estimator, options: dict[str, Any], call: Call) -> Callable[[AdvantageInputs], Any]:
    """Returns what is called with the inputs: the function with its options, or the one instance of a class.

    Raises ConfigError for options that do not fit, or that differ from those that the instance was made with.
    """
    if estimator._made:
        made_with, instance = estimator._made[0]
        if made_with != options:
            raise ConfigError(
                f"advantage {estimator.name} was made with options {made_with}, which cannot become {options}"
            )
        return instance
    check_options(estimator, options)
    with_options = functools.partial(estimator.function, **options)
    if not inspect.isclass(estimator.function):
        return with_options
    made = call(with_options, ())
    estimator._made.append((options, made))
    return made


def _describe(value: Any) -> str:
    """Names a value in an error message: dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
