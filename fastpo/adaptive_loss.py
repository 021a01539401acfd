"""Adaptive-DPO and its IPO form; the other objectives, and the conventions: `fastpo.loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypedDict, Unpack

from torch import Tensor

from fastpo.checks import require, require_finite, require_known, require_positive
from fastpo_kernels.pair_loss import Adaptive, Impl, PairLoss, Reduce, Target, pair_loss
from fastpo_kernels.pair_loss.reference import MarginKind, Normalize, WeightKind


class AdaptiveKeywords(TypedDict, total=False):
    """What both forms take besides their slopes; the meaning and defaults: `adaptive_dpo`."""

    annotators: Sequence[Tensor]
    minority: Tensor | None
    statistics: Tensor | None
    reduce: Reduce | None
    normalize: Normalize
    rho: float
    weight_kind: WeightKind
    weight_scale: float
    weight_intercept: float
    margin_kind: MarginKind
    pair_weight: Tensor | None
    impl: Impl | None


# Those that are fields of `Adaptive`.
_OF_SPEC = tuple(f.name for f in fields(Adaptive) if f.name in AdaptiveKeywords.__annotations__)


def adaptive_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    margin_scale: float = 1.0,
    **options: Unpack[AdaptiveKeywords],
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
        normalize: the scale over the batch: `rms`, the default, or `l2` as released.
        rho: 3.75 by default; at B = 16 that is the released 15 with `l2`.
        weight_kind: `linear`, the default, 1/(k0 + k1 u); `quadratic` (u squared), `sqrt` 1/(k0 +
            exp(k1 sqrt(u))), `exponential` 1/(k0 + exp(k1 u)), `gate` (1 where u < 1/2, else 0).
        weight_scale: k1, 10 by default.
        weight_intercept: k0, 1 by default.
        margin_kind: `quadratic`, the default, or `linear`: u instead of its square.

    Raises:
        TypeError: as in `fastpo.loss`.
        ValueError: likewise; a beta or rho that is not positive, a weight that could be negative or
            infinite, both `minority` and `annotators`, or both `statistics` and `reduce`.
    """
    require_positive(beta=beta)
    sources = (policy, reference, target)
    return _adaptive("dpo", sources, (beta,), beta, margin_scale, options)


def adaptive_ipo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    tau: float,
    beta: float,
    margin_scale: float = 1.0,
    **options: Unpack[AdaptiveKeywords],
) -> PairLoss:
    """Adaptive-DPO's IPO form: `w (d - gamma/beta - 1/(2 tau))**2`; options as in `adaptive_dpo`.

    The released code adds `gamma / beta` here where its DPO form subtracts gamma. Both subtract
    here: the larger a pair's gamma, the larger the margin asked of it.
    """
    require_positive(tau=tau, beta=beta)
    sources = (policy, reference, target)
    return _adaptive("ipo", sources, (tau,), beta, margin_scale / beta, options)


def _adaptive(
    objective: str,
    sources: tuple[Tensor, Tensor, Target],
    scalars: tuple[float],
    beta: float,
    shift_scale: float,
    options: AdaptiveKeywords,
) -> PairLoss:
    """`pair_loss` with weights and margins from the minority metric."""
    require_known(f"adaptive_{objective}", options, AdaptiveKeywords.__annotations__)
    rest: dict[str, Any] = dict(options)
    kinds = {name: rest.pop(name) for name in _OF_SPEC if name in rest}
    spec = Adaptive(beta=beta, shift_scale=shift_scale, **kinds)
    require_positive(rho=spec.rho)
    require_finite(margin_scale=shift_scale)
    for name in ("weight_scale", "weight_intercept"):
        value = getattr(spec, name)
        require(0 <= value < math.inf, f"{name} must be finite and not negative", value)
    if spec.weight_kind in ("linear", "quadratic"):
        require_positive(weight_intercept=spec.weight_intercept)
    return pair_loss(*sources, objective, scalars, adaptive=spec, **rest)
