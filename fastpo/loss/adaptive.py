"""Adaptive-DPO and its IPO form; the other objectives, and the conventions: `fastpo.loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastpo.loss._options import (
    Slope,
    require,
    require_finite,
    require_positive,
    require_slope,
    require_terms,
)
from fastpo_kernels.pair_loss import (
    Adaptive,
    Given,
    Impl,
    Layout,
    MarginKind,
    Normalize,
    PairLoss,
    Reduce,
    Reduction,
    Target,
    WeightKind,
    pair_loss,
)
from fastpo_kernels.pair_loss.validate import number


def adaptive_dpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    annotators: Sequence[Given] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    reduce: Reduce | None = None,
    normalize: Normalize = "rms",
    rho: float = 3.75,
    weight_kind: WeightKind = "linear",
    weight_scale: float = 10.0,
    weight_intercept: float = 1.0,
    margin_kind: MarginKind = "quadratic",
    margin_scale: float = 1.0,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Adaptive-DPO (arXiv 2503.16921): `w (-ls(z - gamma))`, doubtful pairs weighing less.

    The policy and the annotators each judge the pair by a margin `d_m`, detached.
    `x_m = rho d_m / scale`, `u = |mean_m sigmoid(x_m) - 1| min(std_m(x_m), 1)` (alone: the first
    factor), a `weight_kind` of u as weight, and `gamma = margin_scale (mean(d) - u**2 / beta)`.

    Args:
        margin_scale: 1 as released, where gamma is tiny beside z; beta puts it on the logit's
            scale.
        annotators: other versions of the policy; besides it, none by default.
        minority: `[B]`, u itself from outside (a ledger of earlier visits), instead of annotators;
            any floating dtype.
        statistics: `[1 + M]` float32 from outside the batch: the mean margin, then the scale of
            each of the M annotators, the policy first. None takes the batch's.
        reduce: forms them over all processes; see `fastpo.loss`.
        normalize: the scale over the batch: `rms`, `l2` as released, or `none`, which is 1.
        rho: 3.75 with `rms` is at B = 16 the released 15 with `l2`.
        weight_kind: `linear` 1/(k0 + k1 u); `quadratic` (u squared), `sqrt` 1/(k0 +
            exp(k1 sqrt(u))), `exponential` 1/(k0 + exp(k1 u)), `gate` (1 where u < 1/2, else 0).
        weight_scale: k1.
        weight_intercept: k0.
        margin_kind: `quadratic`, or `linear`: u instead of its square.

    Raises:
        TypeError: as in `fastpo.loss`.
        ValueError: likewise; a beta or rho that is not positive, a weight that could be negative or
            infinite, both `minority` and `annotators`, or both `statistics` and `reduce`.
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    adaptive = Adaptive(
        beta=1.0 if isinstance(beta, Tensor) else beta,  # `pair_loss` takes every pair's own
        normalize=normalize,
        rho=rho,
        weight_kind=weight_kind,
        weight_scale=weight_scale,
        weight_intercept=weight_intercept,
        margin_kind=margin_kind,
        shift_scale=margin_scale,
    )
    _check(adaptive)
    return pair_loss(
        policy,
        reference,
        target,
        "dpo",
        (beta,),
        annotators=annotators,
        minority=minority,
        statistics=statistics,
        reduce=reduce,
        adaptive=adaptive,
        pair_weight=pair_weight,
        sft_weight=sft_weight,
        safeguard=safeguard,
        reduction=reduction,
        layout=layout,
        mask=mask,
        impl=impl,
    )


def adaptive_ipo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    tau: float,
    beta: float,
    annotators: Sequence[Given] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    reduce: Reduce | None = None,
    normalize: Normalize = "rms",
    rho: float = 3.75,
    weight_kind: WeightKind = "linear",
    weight_scale: float = 10.0,
    weight_intercept: float = 1.0,
    margin_kind: MarginKind = "quadratic",
    margin_scale: float = 1.0,
    released_sign: bool = False,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Adaptive-DPO's IPO form: `w (d - gamma/beta - 1/(2 tau))**2`; options as in `adaptive_dpo`.

    The released code adds `gamma / beta` here where its DPO form subtracts gamma. Both subtract
    here: the larger a pair's gamma, the larger the margin asked of it. `released_sign=True` adds.
    """
    require_positive(tau=tau, beta=beta)
    require_terms(safeguard, sft_weight)
    margin_scale = number("margin_scale", margin_scale)
    adaptive = Adaptive(
        beta=beta,
        normalize=normalize,
        rho=rho,
        weight_kind=weight_kind,
        weight_scale=weight_scale,
        weight_intercept=weight_intercept,
        margin_kind=margin_kind,
        shift_scale=(-margin_scale if released_sign else margin_scale) / beta,
    )
    _check(adaptive)
    return pair_loss(
        policy,
        reference,
        target,
        "ipo",
        (tau,),
        annotators=annotators,
        minority=minority,
        statistics=statistics,
        reduce=reduce,
        adaptive=adaptive,
        pair_weight=pair_weight,
        sft_weight=sft_weight,
        safeguard=safeguard,
        reduction=reduction,
        layout=layout,
        mask=mask,
        impl=impl,
    )


def _check(adaptive: Adaptive) -> None:
    """Checks the numbers; names are checked in the kernels' package."""
    require_positive(rho=adaptive.rho)
    require_finite(margin_scale=adaptive.shift_scale)
    scale, intercept = adaptive.weight_scale, adaptive.weight_intercept
    for name, value in (("weight_scale", scale), ("weight_intercept", intercept)):
        require(0 <= value < math.inf, f"{name} must be finite and not negative", value)
    if adaptive.weight_kind in ("linear", "quadratic"):
        require_positive(weight_intercept=intercept)
