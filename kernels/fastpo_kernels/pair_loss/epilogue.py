"""What follows the reduction, in plain PyTorch: statistics, weights, loss. Not fused.

The eager implementations share it; each brings its own reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo_kernels.pair_loss.objectives import OBJECTIVES, Judged, margin_of
from fastpo_kernels.pair_loss.spec import Adaptive, LossSpec, PairLoss, PairTensors, Reduce
from fastpo_kernels.pair_loss.validate import check_reduced


@dataclass(frozen=True, eq=False)
class PairErrors:
    """What a reduction gives, float32 or float64.

    Attributes:
        policy: `[2, B]`, differentiable.
        reference: `[2, B]`, detached, or None.
        annotators: `[2, B]` each, detached.
        dot: `[B]`, mean product of winner's and loser's residual, detached; for a safeguard only.
    """

    policy: Tensor
    reference: Tensor | None = None
    annotators: Sequence[Tensor] = ()
    dot: Tensor | None = None


def residual(pred: Tensor, target: Tensor) -> Tensor:
    """`pred - target` as `[2, B, *dims]`, float32 or better; a shared target is `[B, *dims]`."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    shape = (2, pred.shape[0] // 2, *pred.shape[1:])
    pred = pred.to(dtype).view(shape)
    return pred - (target if target.shape[0] == shape[1] else target.view(shape))


def mean_squares(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared errors `[2, B]`, each square times the mask."""
    squares = residual(pred, target).square()
    if mask is not None:
        squares = squares * (mask if len(mask) == squares.shape[1] else mask.unflatten(0, (2, -1)))
    return squares.flatten(2).mean(2)


def batch_sums(
    gain: Tensor | None, margins: Sequence[Tensor], agreement: Sequence[Tensor], n_pairs: int
) -> Tensor:
    """`sum g | sum d, sum d_m**2 ... | sum e_w, sum dot | pairs`, of the terms that there are."""
    if margins:
        sums = [margins[0].sum(), *(d.square().sum() for d in margins)]
    else:
        sums = [] if gain is None else [gain.sum()]
    sums += [x.sum() for x in agreement]
    return torch.stack([*sums, torch.full_like(sums[0], n_pairs)])


def _statistics_of(totals: Tensor, n_margins: int, spec: Adaptive | None) -> Tensor:
    """Mean and scales from the sums of all processes: what `statistics` holds."""
    mean, count = totals[:1] / totals[-1], totals[-1]
    power = totals[1 : 1 + n_margins]
    is_mean = spec is not None and spec.normalize == "rms"
    return torch.cat([mean, (power / count if is_mean else power).sqrt()])


def minority_metric(
    margins: Sequence[Tensor], given_scales: Tensor | None, spec: Adaptive
) -> Tensor:
    """`u = |mean_m sigmoid(x_m) - 1| min(std_m(x_m), 1)`, `x_m = rho d_m / scale_m`.

    From M margins `[B]`.
    With one annotator `u = |sigmoid(x) - 1|`. The scale is each margin's root mean square over the
    batch (`l2`: its norm, `none`: 1) unless given.
    """
    d = torch.stack(list(margins))
    x = spec.rho * d
    if spec.normalize != "none":
        power = d.square()
        own_scales = (power.mean(1) if spec.normalize == "rms" else power.sum(1)).sqrt()
        scales = own_scales if given_scales is None else given_scales
        x = x / torch.where(scales > 0, scales, 1.0)[:, None]
    doubt = torch.sigmoid(-x).mean(0)
    return doubt if len(margins) == 1 else doubt * x.std(0).clamp(max=1.0)


def pair_weights(u: Tensor, spec: Adaptive) -> Tensor:
    """`w = 1 / (k0 + k1 u)` and its variants; `gate` is 1 where u < 1/2, else 0."""
    k0, k1 = spec.weight_intercept, spec.weight_scale
    if spec.weight_kind == "gate":
        return (u < 0.5).to(u.dtype)
    if spec.weight_kind == "linear":
        return 1 / (k0 + k1 * u)
    if spec.weight_kind == "quadratic":
        return 1 / (k0 + k1 * u.square())
    return 1 / (k0 + torch.exp(k1 * (u.sqrt() if spec.weight_kind == "sqrt" else u)))


def _adapt(
    margins: Sequence[Tensor],
    minority: Tensor | None,
    statistics: Tensor | None,
    spec: Adaptive,
    beta: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minority metric, weight and margin shift of every pair, all detached."""
    d = margins[0]
    scales = None if statistics is None else statistics[1:].to(d.dtype)
    if minority is None:
        u = minority_metric(margins, scales, spec)
    else:
        u = minority.detach().to(d.dtype)
    mean = d.mean() if statistics is None else statistics[0].to(d.dtype)
    power = u.square() if spec.margin_kind == "quadratic" else u
    return u, pair_weights(u, spec), spec.shift_scale * (mean - power / beta)


def _safeguard(agreement: Sequence[Tensor], mu: float) -> Tensor:
    """Diffusion-SDPO's lambda; of two infinite sums there is no ratio, and it is 1."""
    power, total = agreement
    ratio = (1 - mu) * power / torch.where(total > 0, total, 1.0)
    return torch.where((total > 0) & ~ratio.isnan(), ratio.clamp(0, 1), 1.0)


def _safeguarded(errors: Tensor, scale: Tensor) -> list[Tensor]:
    """The errors, the loser's gradient scaled, its value kept."""
    e_w, e_l = errors.unbind()
    value = e_l.detach()
    return [e_w, torch.where(value.isinf(), e_l, value + scale * (e_l - value))]


@dataclass(frozen=True, eq=False)
class _Known:
    """What of a batch multiplies or shifts its losses, all detached, or None."""

    minority: Tensor | None = None
    weight: Tensor | None = None
    shift: Tensor | float = 0.0
    safeguard: Tensor | None = None


def _known(
    errors: PairErrors, margin: Tensor, tensors: PairTensors, spec: LossSpec, reduce: Reduce | None
) -> _Known:
    """The batch's statistics, by `reduce` those of all processes, and what is made of them."""
    reference, policy_error = errors.reference, errors.policy.detach()
    gain = None
    if spec.has_baseline:
        assert reference is not None, "kto needs a reference"
        gain = (reference - policy_error).mean(0)
    margins = []
    if spec.adaptive is not None:
        margins = [margin, *(margin_of(a, reference) for a in errors.annotators)]
    agreement = []
    if spec.safeguard is not None:
        assert errors.dot is not None, "a safeguard needs the residuals' product"
        agreement = [policy_error[0], errors.dot]
    sums, statistics = [x.sum() for x in agreement], tensors.statistics
    if reduce is not None:
        own = batch_sums(gain, margins, agreement, len(margin))
        totals = check_reduced(reduce(own), own)
        statistics = _statistics_of(totals, len(margins), spec.adaptive)
        sums = list(totals[-3:-1])
    scale = None if spec.safeguard is None else _safeguard(sums, spec.safeguard)
    if spec.adaptive is not None:
        beta = spec.adaptive.beta if tensors.beta is None else tensors.beta.to(margin.dtype)
        u, weight, shift = _adapt(margins, tensors.minority, statistics, spec.adaptive, beta)
        return _Known(u, weight, shift, scale)
    if gain is None:
        return _Known(safeguard=scale)
    if tensors.statistics is not None:
        return _Known(shift=tensors.statistics[0], safeguard=scale)
    mean = gain.mean() if statistics is None else statistics[0]
    return _Known(shift=mean.clamp(min=0.0), safeguard=scale)


def from_errors(
    errors: PairErrors, tensors: PairTensors, spec: LossSpec, reduce: Reduce | None = None
) -> PairLoss:
    """The loss, the margin and the policy's errors, differentiable; the rest detached.

    Of `tensors` minority, statistics, pair weights and beta are read.

    Args:
        errors: of every source.
        tensors: as in `api.pair_loss`.
        spec: the objective.
        reduce: maps this batch's sums to those of all processes, or None.
    """
    reference, e = errors.reference, errors.policy
    margin = margin_of(e, reference)
    known = _known(errors, margin.detach(), tensors, spec, reduce)
    weight = known.weight
    if tensors.pair_weight is not None:
        given = tensors.pair_weight.detach().to(margin.dtype)
        weight = given if weight is None else weight * given
    judged = Judged(margin, e, reference, known.shift)
    if known.safeguard is not None:
        guarded = _safeguarded(e, known.safeguard)
        judged = Judged(margin_of(guarded, reference), guarded, reference, known.shift)
    options: tuple[Tensor | float, ...] = spec.options
    if tensors.beta is not None:
        options = (tensors.beta.to(margin.dtype), *options[1:])
    losses = OBJECTIVES[spec.objective].function(judged, *options)
    if spec.sft_weight:
        losses = losses + spec.sft_weight * e[0]
    losses = losses if weight is None else weight * losses
    return PairLoss(
        losses if spec.per_pair else losses.mean(),
        margin,
        e.flatten(),
        None if reference is None else reference.flatten(),
        known.minority,
        weight,
        known.safeguard,
    )
