"""Advantage estimators: from a step's rewards to one number per response or per token.

RLOO (R2M, arXiv 2601.22664, Eq. 1; arXiv 2402.14740), GRPO (arXiv 2402.03300), ReMax (arXiv 2310.10505) and
REINFORCE++ (arXiv 2501.03262); GAE (arXiv 1506.02438), as PPO uses it. `docs/advantages.md` shows how to plug one's own.

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

from r2m_async.errors import ConfigError
from r2m_async.plugins import named_function, nearest

Call: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""How an estimator is called: with the function and its arguments."""


class AdvantageNotFinite(ConfigError):
    """An estimator's result is not finite where it counts."""

    def __init__(self, message: str, place: list[int]) -> None:
        super().__init__(message)
        self.place = place
        """Index of the first such value in the result, [n, K] or [n, K, T]."""


PER_TOKEN = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Of this library's estimators, those that give every token its own advantage."""
GROUP_RELATIVE = ("rloo", "grpo", "reinforce_pp_baseline")
"""And those that compare the responses of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    rewards: Tensor
    """[n, K] float32 or float64. A response without response tokens has a reward too and counts in its group."""
    response_mask: Tensor
    """[n, K, T] bool: True on the tokens that the policy loss will train."""
    logprobs: Tensor | None = None
    """[n, K, T] log-probabilities under pi_old, the learner at the start of the step; arbitrary where masked."""
    ref_logprobs: Tensor | None = None
    """[n, K, T] log-probabilities under the reference; None when the run has no reference."""
    greedy_rewards: Tensor | None = None
    """[n] reward of each prompt's greedy twin; None unless the estimator asked for it."""
    values: Tensor | None = None
    """[n, K, T] of the state in which each response token is chosen, by the critic at the start of the step; arbitrary where
    masked. None unless the estimator asked for them."""

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
        for name, shape in (*expected.items(), ("greedy_rewards", (n,))):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)} beside rewards {[n, k]}, got {list(value.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """An advantage estimator and what it asks of the run. Hold on to one: a class keeps its instance here."""

    name: str
    function: Callable[..., Any]
    """f(inputs, **options) -> advantages, or a class: made once with the options, then called with the inputs."""
    needs_greedy: bool
    """Rollouts generate a greedy twin per prompt."""
    kl_in_reward: bool
    """The estimator subtracts the KL itself; the policy loss then has no KL term."""
    needs_values: bool = False
    """A critic is trained; the estimator returns (advantages, returns), the latter [n, K, T], which the critic learns."""
    _made: list[tuple[dict[str, Any], Callable[..., Any]]] = field(default_factory=list, repr=False, compare=False)


_REGISTRY: dict[str, Estimator] = {}


def _estimator(name: str, function: Any) -> Estimator:
    return Estimator(
        name=name,
        function=function,
        needs_greedy=bool(getattr(function, "needs_greedy", False)),
        kl_in_reward=bool(getattr(function, "kl_in_reward", False)),
        needs_values=bool(getattr(function, "needs_values", False)),
    )


def _identity(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def register_advantage(
    name: str, needs_greedy: bool = False, kl_in_reward: bool = False, needs_values: bool = False
) -> Callable[[Any], Any]:
    """Decorates a function or class, which then goes by `name` in the config, or as `module:attr` with the same flags.

    Raises ConfigError when another estimator has the name.
    """

    def register(function: Any) -> Any:
        known = _REGISTRY.get(name)
        if known is not None and _identity(known.function) != _identity(function):
            raise ConfigError(
                f"advantage {name!r} is already registered by {_identity(known.function)}; choose another name"
            )
        function.needs_greedy, function.kl_in_reward, function.needs_values = needs_greedy, kl_in_reward, needs_values
        _REGISTRY[name] = _estimator(name, function)
        return function

    return register


def get_advantage(name: str) -> Estimator:
    """The estimator registered as `name`, or found as `module:attr`. Raises ConfigError when there is none."""
    if ":" in name:
        return _estimator(name, named_function(name, "advantage.name"))
    if name not in _REGISTRY:
        raise ConfigError(
            f"advantage.name = {name!r} is unknown{nearest(name, _REGISTRY)}. Known: {', '.join(sorted(_REGISTRY))}; "
            f"your own is named as module:attr"
        )
    return replace(_REGISTRY[name], _made=[])


def check_options(estimator: Estimator, options: Mapping[str, Any]) -> None:
    """Raises ConfigError when `estimator` does not take exactly these options. Runs nothing."""
    parameters = list(inspect.signature(estimator.function).parameters.values())
    if not inspect.isclass(estimator.function):
        parameters = parameters[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = ", ".join(p.name for p in named) or "none"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in options.keys() - {p.name for p in named}:
            raise ConfigError(
                f"advantage.options.{option} is unknown to {estimator.name}"
                f"{nearest(option, [p.name for p in named])}. It accepts: {accepted}"
            )
    for p in named:
        if p.default is p.empty and p.name not in options:
            raise ConfigError(
                f"advantage.options lacks {p.name}, which {estimator.name} requires. It accepts: {accepted}"
            )


def compute_advantages(
    estimator: Estimator, inputs: AdvantageInputs, options: Mapping[str, Any] | None = None
) -> Tensor:
    """The advantages of `advantages_and_returns`."""
    return advantages_and_returns(estimator, inputs, options)[0]


def _plainly(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def advantages_and_returns(
    estimator: Estimator, inputs: AdvantageInputs, options: Mapping[str, Any] | None = None, call: Call = _plainly
) -> tuple[Tensor, Tensor | None]:
    """([n, K] or [n, K, T] advantages, [n, K, T] returns or None without a critic), no gradient, 0 off response tokens.

    Raises ConfigError when the estimator does not take the options, or returns anything but tensors of these shapes,
    and AdvantageNotFinite, which is one, unless they are finite wherever there are response tokens. What the estimator
    itself raises goes through `call`.
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
    mask = inputs.response_mask
    if not isinstance(result, Tensor) or result.shape not in shapes:
        named = {2: "[n, K]", 3: "[n, K, T]"}
        wanted = " or ".join(f"{named[len(shape)]} = {list(shape)}" for shape in shapes)
        raise ConfigError(f"advantage {estimator.name} must return a tensor {wanted}{what}, got {_describe(result)}")
    if not result.is_floating_point():
        raise ConfigError(f"advantage {estimator.name} must return floating-point numbers{what}, got {result.dtype}")
    counted = mask if result.ndim == 3 else mask.any(-1)
    bad = counted & ~result.isfinite()
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise AdvantageNotFinite(
            f"advantage {estimator.name} must be finite on response tokens{what}, got {result[tuple(where)].item()} at "
            f"{where} and {int(bad.sum())} such values of {int(counted.sum())}; {_not_finite(inputs)}",
            where,
        )
    return result.detach().masked_fill(~counted, 0)


def _not_finite(inputs: AdvantageInputs) -> str:
    """Which of the inputs are not finite, in words."""
    found = [] if inputs.rewards.isfinite().all() else ["rewards"]
    if inputs.greedy_rewards is not None and not inputs.greedy_rewards.isfinite().all():
        found.append("greedy_rewards")
    for name in ("values", "logprobs", "ref_logprobs"):
        tokens = getattr(inputs, name)
        if tokens is not None and not tokens[inputs.response_mask].isfinite().all():
            found.append("the critic's values" if name == "values" else name)
    return f"not all {' and '.join(found)} it was given are finite" if found else "all that it was given is finite"


@register_advantage("rloo")
def rloo(inputs: AdvantageInputs) -> Tensor:
    """[n, K]: reward minus the mean of the other K - 1 (R2M Eq. 1)."""
    deviation = _deviation(inputs.rewards, "rloo")
    return deviation * (inputs.rewards.shape[1] / (inputs.rewards.shape[1] - 1))


@register_advantage("grpo")
def grpo(inputs: AdvantageInputs, *, unbiased: bool = True, eps: float = 1e-6) -> Tensor:
    """[n, K]: (reward - group mean) / (group std + eps).

    `unbiased` divides the variance by K - 1 rather than K. `eps`, in units of reward, only guards the division: a
    group of identical rewards gets exactly 0.
    """
    deviation = _deviation(inputs.rewards, "grpo")
    return deviation / (deviation.std(1, correction=int(unbiased), keepdim=True) + eps)


@register_advantage("remax", needs_greedy=True)
def remax(inputs: AdvantageInputs) -> Tensor:
    """[n, K]: reward minus the reward of the greedy response to the same prompt."""
    if inputs.greedy_rewards is None:
        raise ConfigError(
            "advantage remax needs greedy_rewards, got None: rollouts must generate a greedy twin per prompt"
        )
    return inputs.rewards - inputs.greedy_rewards[:, None]


@register_advantage("reinforce_pp", kl_in_reward=True)
def reinforce_pp(inputs: AdvantageInputs, *, beta: float = 0.05, eps: float = 1e-6) -> Tensor:
    """[n, K, T]: undiscounted reward-to-go, normalised over all response tokens of the batch (population std + eps).

    A token's reward is -`beta` (log pi_old - log pi_ref), plus the response's reward at its last response token. With
    `beta` 0 no log-probabilities are needed. Raises ConfigError when they are and are absent.
    """
    return _normalised(_reward_to_go(inputs, inputs.rewards, beta), inputs.response_mask, eps)


@register_advantage("reinforce_pp_baseline", kl_in_reward=True)
def reinforce_pp_baseline(inputs: AdvantageInputs, *, beta: float = 0.05, eps: float = 1e-6) -> Tensor:
    """[n, K, T]: `reinforce_pp` on rewards from which the group's mean was subtracted."""
    deviation = _deviation(inputs.rewards, "reinforce_pp_baseline")
    return _normalised(_reward_to_go(inputs, deviation, beta), inputs.response_mask, eps)


@register_advantage("gae", kl_in_reward=True, needs_values=True)
def gae(
    inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95, beta: float = 0.05, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """([n, K, T] advantages, [n, K, T] returns): generalised advantage estimation, Eq. 16 of its paper, with a critic.

    Rewards per token are those of `reinforce_pp`; with V_t the value of the state in which token t is chosen and 0 after
    the last,
        A_t = sum_l (`gamma` `lam`)^l delta_(t + l),   delta_t = reward_t + `gamma` V_(t + 1) - V_t.
    Returns, which the critic learns, are A_t + V_t; advantages are A_t normalised over all response tokens of the batch
    (population std + `eps`). A response that the limit of length cut ends there like any other, its reward being that
    of the text as it is. Raises ConfigError without values, and without log-probabilities unless `beta` is 0.
    """
    if inputs.values is None:
        raise ConfigError("advantage gae needs values, got None: a critic must give them, one for each response token")
    mask, reward = inputs.response_mask, _token_rewards(inputs, inputs.rewards, beta)
    values = torch.where(mask, inputs.values, 0).to(reward.dtype)
    raw = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(inputs.rewards)
    for t in reversed(range(mask.shape[-1])):
        counted = mask[..., t]
        delta = reward[..., t] + gamma * next_value - values[..., t]
        ahead = torch.where(counted, delta + gamma * lam * ahead, ahead)
        next_value = torch.where(counted, values[..., t], next_value)
        raw[..., t] = torch.where(counted, ahead, 0)
    return _normalised(raw, mask, eps), raw + values


def _deviation(rewards_nK: Tensor, name: str) -> Tensor:
    """Reward minus group mean; the first reward comes off first, so that identical rewards leave exactly 0."""
    if rewards_nK.shape[1] < 2:
        raise ConfigError(
            f"advantage {name} compares the responses of a group, but rollouts.group_size = {rewards_nK.shape[1]}; "
            f"use at least 2, or remax or reinforce_pp"
        )
    shifted = rewards_nK - rewards_nK[:, :1]
    return shifted - shifted.mean(1, keepdim=True)


def _reward_to_go(inputs: AdvantageInputs, scores_nK: Tensor, beta: float) -> Tensor:
    return _token_rewards(inputs, scores_nK, beta).flip(-1).cumsum(-1).flip(-1)


def _token_rewards(inputs: AdvantageInputs, scores_nK: Tensor, beta: float) -> Tensor:
    """[n, K, T]: the KL's part at every response token, the score at the last, 0 elsewhere."""
    mask = inputs.response_mask
    reward = torch.zeros(mask.shape, dtype=scores_nK.dtype, device=scores_nK.device)
    if beta != 0:
        if inputs.logprobs is None or inputs.ref_logprobs is None:
            absent = "logprobs" if inputs.logprobs is None else "ref_logprobs"
            raise ConfigError(
                f"advantage.options.beta = {beta} puts a KL into the reward, but {absent} is None; "
                f"give a reference or set beta to 0"
            )
        reward = torch.where(mask, -beta * (inputs.logprobs - inputs.ref_logprobs), reward)
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)
    return reward + torch.where(mask & (tokens_left == 1), scores_nK[..., None], 0)


def _normalised(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    if not mask.any():
        return torch.zeros_like(values)
    counted = values[mask]
    deviation = counted - counted[0]
    deviation = deviation - deviation.mean()
    return torch.zeros_like(values).masked_scatter(mask, deviation / (deviation.std(correction=0) + eps))


def _callable(estimator: Estimator, options: dict[str, Any], call: Call) -> Callable[[AdvantageInputs], Any]:
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
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
