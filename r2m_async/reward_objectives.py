"""The losses that train a reward model offline, on pairs of a chosen and a rejected response.

`preference_loss` adds them up as the config asks:

    (1 - alpha) (preference + bsr_weight * bsr + pos_reg_weight * pos_reg) + alpha * regularizer     (GRM Eq. 4)

Sources: BSR, "On the Robustness of Reward Models for Language Model Alignment", Eq. 24-31. GRM, "Regularizing Hidden
States Enables Learning Generalizable Reward Model for LLMs", arXiv 2406.10216, Sec. 3.2, App. B and C.

Each loss is a mean over pairs. So the loss of a batch is the mean of the losses of its parts, weighted by their number
of pairs. The exception is `squared_mean`, the square of a mean: a part of a batch needs the mean of the whole batch.

GRM prints label smoothing (App. B) with a minus before the second term and with the same argument in both terms. That
is (1 - 2 epsilon) times Bradley-Terry and smooths nothing. `label_smooth` is the standard form instead.

Shapes: B pairs. c is the chosen response, r the rejected one. A log-prob is a sum over the tokens of a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2m_async.head_objectives import bradley_terry as bt

PreferenceName: TypeAlias = Literal["bt", "bt_margin", "label_smooth", "hinge", "norm", "dr"]
BsrName: TypeAlias = Literal["squared_mean", "mean_square"]
RegularizerName: TypeAlias = Literal["sft", "sft_nll", "dpo", "dpo_noref"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogprobs:
    """Log-probabilities of whole responses, log pi(y | x), each [B].

    The reward model keeps its language-model (LM) head to compute them.
    """

    chosen: Tensor
    """Of the chosen responses, by the model in training."""
    rejected: Tensor
    """Of the rejected responses, by the model in training."""
    reference_chosen: Tensor | None = None
    """Of the chosen responses, by the base model. It is None unless the loss reads it."""
    reference_rejected: Tensor | None = None
    """Of the rejected responses, by the base model. It is None unless the loss reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceTerms:
    """The loss of a batch and its terms, all scalars. Only `loss` carries a gradient.

    Each term is given before its weight. A term that the loss does not use is None.
    """

    loss: Tensor
    """The weighted sum, to be minimised."""
    preference: Tensor
    """The term that makes the chosen reward exceed the rejected one."""
    bsr: Tensor | None
    """The term that keeps the rewards centred at 0."""
    pos_reg: Tensor | None
    """The term that pushes the reward of the chosen response up (GRM App. C.6)."""
    regularizer: Tensor | None
    """GRM's loss on the LM head."""


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    preference: PreferenceName = "bt",
    margins: Tensor | None = None,
    epsilon: float = 0.1,
    hinge_margin: float = 1.0,
    bsr: BsrName | None = None,
    bsr_weight: float = 1e-3,
    batch_mean: Tensor | None = None,
    pos_reg_weight: float = 0.0,
    regularizer: RegularizerName | None = None,
    alpha: float = 0.01,
    beta: float = 0.1,
    logprobs: ResponseLogprobs | None = None,
) -> PreferenceTerms:
    """The loss of a batch of pairs: the sum that the module's docstring shows, and its terms.

    Args:
        chosen, rejected: [B] rewards of the two responses of each pair.
        preference: name of the preference term, a function of this module. `bt` is Bradley-Terry.
        margins: [B], how much the data scores the chosen response above the rejected one. Only `bt_margin` reads it.
        epsilon: the share of flipped labels that `label_smooth` assumes.
        hinge_margin: the margin of `hinge`, in units of reward.
        bsr: name of the term that centres the rewards, a function of this module. None leaves it out.
        bsr_weight: its weight.
        batch_mean: the mean reward of the whole batch, if these pairs are a part of it; see `squared_mean`.
        pos_reg_weight: weight of `pos_reg`. 0 leaves it out.
        regularizer: name of the loss on the LM head, a function of this module. None leaves it out.
        alpha: weight of the regularizer. The other terms then have 1 - alpha. Without a regularizer it has no effect.
        beta: factor of the log-probs in the regularizer.
        logprobs: the log-probs that the regularizer reads.

    Raises ValueError for shapes that differ, for an unknown name, and for a missing input that a named loss needs.
    """
    match preference:
        case "bt":
            preferred = bt(chosen, rejected)
        case "bt_margin":
            preferred = bt_margin(chosen, rejected, _given(margins, "margins", preference))
        case "label_smooth":
            preferred = label_smooth(chosen, rejected, epsilon)
        case "hinge":
            preferred = hinge(chosen, rejected, hinge_margin)
        case "norm":
            preferred = norm(chosen, rejected)
        case "dr":
            preferred = dr(chosen, rejected)
        case _:
            raise ValueError(f"preference is {preference!r}; use bt, bt_margin, label_smooth, hinge, norm or dr")
    match bsr:
        case None:
            centred = None
        case "squared_mean":
            centred = squared_mean(chosen, rejected, batch_mean)
        case "mean_square":
            centred = mean_square(chosen, rejected)
        case _:
            raise ValueError(f"bsr is {bsr!r}; use squared_mean, mean_square or None")
    raised = pos_reg(chosen) if pos_reg_weight else None
    loss = preferred
    if centred is not None:
        loss = loss + bsr_weight * centred
    if raised is not None:
        loss = loss + pos_reg_weight * raised
    kept = None
    if regularizer is not None:
        kept = _regularized(regularizer, _given(logprobs, "logprobs", regularizer), beta)
        loss = (1 - alpha) * loss + alpha * kept
    return PreferenceTerms(
        loss=loss,
        preference=preferred.detach(),
        bsr=None if centred is None else centred.detach(),
        pos_reg=None if raised is None else raised.detach(),
        regularizer=None if kept is None else kept.detach(),
    )


# Losses of rewards [B]. Each returns a scalar.


def bt_margin(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """Bradley-Terry with a margin: -log sigmoid(r_c - r_r - m) (GRM App. B).

    `margins` [B] are m, the difference of the data's scores. Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected, margins)
    return -F.logsigmoid(chosen - rejected - margins).mean()


def label_smooth(chosen: Tensor, rejected: Tensor, epsilon: float = 0.1) -> Tensor:
    """Label smoothing: -(1 - epsilon) log sigmoid(r_c - r_r) - epsilon log sigmoid(r_r - r_c).

    With `epsilon` above 0 the minimum lies at a finite difference of the rewards, where plain Bradley-Terry wants an
    infinite one. GRM's App. B prints another formula; the module's docstring says why it is not used. Raises ValueError
    for shapes that differ.
    """
    return (1 - epsilon) * bt(chosen, rejected) + epsilon * bt(rejected, chosen)


def hinge(chosen: Tensor, rejected: Tensor, margin: float = 1.0) -> Tensor:
    """The hinge loss: max(0, m - (r_c - r_r)), with m the `margin` in units of reward (BSR Eq. 30).

    Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected)
    return (margin - (chosen - rejected)).clamp(min=0).mean()


def norm(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry on normalised rewards: -log sigmoid((r_c - r_r) / sqrt(r_c^2 + r_r^2)) (BSR Eq. 29).

    A pair whose rewards are both 0 counts as log 2, without gradient. Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected)
    square_B = chosen.square() + rejected.square()
    # `where` comes before the root. After it, the gradient of a pair of zeros would be 0 * inf = NaN.
    length_B = torch.where(square_B == 0, 1, square_B).sqrt()
    return -F.logsigmoid(torch.where(square_B == 0, 0, chosen - rejected) / length_B).mean()


def dr(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry that also pushes r_c above 0 and r_r below 0 (BSR Eq. 31).

    The loss is -log sigmoid(r_c - r_r) - log sigmoid(r_c) - log sigmoid(-r_r).

    Raises ValueError for shapes that differ.
    """
    return bt(chosen, rejected) - (F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()


def squared_mean(chosen: Tensor, rejected: Tensor, batch_mean: Tensor | None = None) -> Tensor:
    """Batch-wise sum-to-zero regularisation (BSR): the square of the mean of all 2 B rewards (BSR Eq. 25).

    Args:
        batch_mean: scalar, the mean reward M of the whole batch if these pairs are a part of it: a micro-batch, or the
            share of a rank. It comes from a pass without gradient. None means that these pairs are the whole batch.

    With `batch_mean` the value is M^2, and the gradient is 2 M times the gradient of this part's mean. The parts,
    weighted by their number of pairs, then add up to value and gradient of the whole batch.

    Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected)
    mean = (chosen.mean() + rejected.mean()) / 2
    if batch_mean is None:
        return mean.square()
    batch_mean = batch_mean.detach()
    return batch_mean.square() + 2 * batch_mean * (mean - mean.detach())


def mean_square(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of all 2 B squared rewards.

    BSR's Eq. 28 prints the gradient of this loss, and not that of Eq. 25. Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected)
    return (chosen.square().mean() + rejected.square().mean()) / 2


def pos_reg(chosen: Tensor) -> Tensor:
    """Positive regularisation: -log sigmoid(r_c), in its numerically stable form (GRM App. C.6)."""
    return -F.logsigmoid(chosen).mean()


# Losses of log-probs [B] by the LM head. Each returns a scalar.


def sft(chosen: Tensor, beta: float = 0.1) -> Tensor:
    """GRM's SFT regularizer: -log sigmoid(beta log pi(y_c | x)) (GRM Eq. 10). It is not the negative log-likelihood."""
    return -F.logsigmoid(beta * chosen).mean()


def sft_nll(chosen: Tensor) -> Tensor:
    """The negative log-likelihood of the chosen response: -log pi(y_c | x) (GRM App. C.3).

    Its scale differs from that of `sft`, so it needs another alpha.
    """
    return -chosen.mean()


def dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """DPO: -log sigmoid(beta log(pi(y_c) / pi_ref(y_c)) - beta log(pi(y_r) / pi_ref(y_r))) (GRM Eq. 8).

    pi_ref is the base model. Raises ValueError for shapes that differ.
    """
    _check(chosen, rejected, reference_chosen, reference_rejected)
    return bt(beta * (chosen - reference_chosen), beta * (rejected - reference_rejected))


def dpo_noref(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """DPO without a reference: -log sigmoid(beta log(pi(y_c) / pi(y_r))) (GRM Eq. 9).

    Raises ValueError for shapes that differ.
    """
    return bt(beta * chosen, beta * rejected)


def _regularized(name: RegularizerName, logprobs: ResponseLogprobs, beta: float) -> Tensor:
    """The named loss on the LM head. Raises ValueError for an unknown name and for missing reference log-probs."""
    match name:
        case "sft":
            return sft(logprobs.chosen, beta)
        case "sft_nll":
            return sft_nll(logprobs.chosen)
        case "dpo":
            references = logprobs.reference_chosen, logprobs.reference_rejected
            reference_chosen, reference_rejected = (_given(one, "reference log-probs", name) for one in references)
            return dpo(logprobs.chosen, logprobs.rejected, reference_chosen, reference_rejected, beta)
        case "dpo_noref":
            return dpo_noref(logprobs.chosen, logprobs.rejected, beta)
    raise ValueError(f"regularizer is {name!r}; use sft, sft_nll, dpo, dpo_noref or None")


def _given(value: T | None, what: str, loss: str) -> T:
    """Returns `value`. Raises ValueError, naming the loss that needs it, if it is None."""
    if value is None:
        raise ValueError(f"the loss {loss!r} needs {what}, got None")
    return value


def _check(*tensors_B: Tensor) -> None:
    """Raises ValueError unless all tensors have one shape.

    Without this check, PyTorch could broadcast a mismatch to [B, B] and average it, and nobody would notice.
    """
    shapes = [list(tensor.shape) for tensor in tensors_B]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"chosen, rejected and what belongs to them must have one shape [B], got {shapes}")
