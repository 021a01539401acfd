"""The objectives without a reference: plain fine-tuning, and MaPO.

The conventions that all objectives share are those of `fastpo.loss`.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from fastpo.loss._options import Slope, require_positive, require_slope, require_terms
from fastpo_kernels.pair_loss import (
    Given,
    Impl,
    Layout,
    PairLoss,
    Reduce,
    Reduction,
    Target,
    pair_errors,
    pair_loss,
)
from fastpo_kernels.pair_loss.validate import check_reduction, check_vector

Rows = Literal["pairs", "winners"]


def sft(
    policy: Given,
    target: Target,
    *,
    rows: Rows | None = None,
    pair_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Fine-tuning on the winner: `e_w`. The losers' gradient is zero, the margin `e_l - e_w`.

    Args:
        rows: what the rows are: `pairs`, the first half being the winners; or `winners` alone, any
            number of them, each with a target and, in `pair_weight`, a weight of its own: then the
            margin is `-e_w`. None is `pairs` where the target is `[B, *dims]` for `[2B, *dims]`
            predictions or a `PairTarget`, and is refused where it could be either.
    """
    if rows not in (None, *get_args(Rows)):
        raise ValueError(f"rows must be one of {get_args(Rows)}, got {rows!r}")
    if isinstance(policy, Tensor) and isinstance(target, Tensor) and layout == "halves":
        if rows == "winners":
            return _winners_alone(policy, target, mask, pair_weight, reduction, impl)
        if rows is None and target.shape[:1] == policy.shape[:1]:
            raise ValueError(
                "sft cannot tell winners from pairs where policy and target have as many rows: give"
                f" rows='winners' to train on all {len(policy)}, or rows='pairs' for the first half"
            )
    elif rows == "winners":
        raise ValueError("rows='winners' needs policy and target to be tensors, without a layout")
    return pair_loss(
        policy, None, target, "sft", (), pair_weight=pair_weight, reduction=reduction,
        layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def _winners_alone(
    policy: Tensor,
    target: Tensor,
    mask: Given | None,
    weight: Tensor | None,
    reduction: Reduction,
    impl: Impl | None,
) -> PairLoss:
    """The reduction, and a weighted mean of its errors."""
    if target.shape != policy.shape:
        raise ValueError(
            f"rows='winners' needs a target of policy's shape {tuple(policy.shape)}, got "
            f"{tuple(target.shape)}"
        )
    check_reduction(reduction)
    errors = pair_errors(policy, target, mask=mask, impl=impl)
    losses = errors
    if weight is not None:
        check_vector("pair_weight", weight, len(policy), policy)
        weight = weight.detach().to(errors.dtype)
        losses = weight * errors
    loss = losses if reduction == "none" else losses.mean()
    return PairLoss(loss, -errors, errors, None, None, weight)


def mapo(
    policy: Given,
    target: Target,
    *,
    beta: Slope = 0.1,
    snr: float = 0.5,
    num_timesteps: int = 1000,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """MaPO: `e_w - beta ls(T (f(e_w) - f(e_l)))`, `f(e) = snr e / expm1(snr e)`.

    Hong et al. 2024 (arXiv 2406.06424). No reference. Small errors keep their digits in f.
    """
    require_slope(beta)
    require_positive(snr=snr, num_timesteps=num_timesteps)
    require_terms(safeguard, sft_weight)
    return pair_loss(
        policy, None, target, "mapo", (beta, snr, num_timesteps),
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip
