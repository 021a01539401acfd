"""One function per objective with a reference: DPO and its relatives, KTO.

The conventions that all of them share are those of `fastpo.loss`.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastpo.loss._options import (
    Slope,
    require,
    require_positive,
    require_slope,
    require_terms,
)
from fastpo.loss.unpaired import Likes, kto_of_images
from fastpo_kernels.pair_loss import (
    Given,
    Impl,
    Layout,
    PairLoss,
    Reduce,
    Reduction,
    Target,
    pair_loss,
)
from fastpo_kernels.pair_loss.validate import number


def _one_element(name: str, vector: Tensor) -> Tensor:
    """The tensor of one element as a vector."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    require(vector.numel() == 1, f"{name} must have one element", vector.numel())
    return vector.reshape(1)


def dpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-DPO: `-(1-a) ls(z) - a ls(-z)` with `a = label_smoothing` in [0, 1/2].

    Wallace et al. 2023 (arXiv 2311.12908), eq. 14; `a > 0` is the conservative form.
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    rule = "label_smoothing must be in [0, 0.5]"
    require(0 <= label_smoothing <= 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(
        policy, reference, target, "dpo", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def robust_dpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    label_smoothing: float,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Robust DPO: `[-(1-a) ls(z) + a ls(-z)] / (1-2a)`, `a = label_smoothing` in [0, 1/2).

    Unbiased where labels are flipped with probability a.
    Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    rule = "label_smoothing must be in [0, 0.5)"
    require(0 <= label_smoothing < 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(
        policy, reference, target, "robust_dpo", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def poly_dpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    alpha: float,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Poly-DPO: `-ls(z) + alpha (1 - sigmoid(z))`, with `alpha >= -1`.

    The slope in z is `-(1 - p) (1 + alpha p)`, `p = sigmoid(z)`: with `alpha > 0` pairs that the
    policy orders as the label says pull longer, and those that contradict it less, relative to
    them; below 0 the other way round.
    ViPO (arXiv 2604.24953): about 8 on Pick-a-Pic v2, near 0 on clean data, below 0 on easy data.
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    require(-1 <= alpha < math.inf, "alpha must be finite and at least -1", alpha)
    options = (beta, alpha)
    return pair_loss(
        policy, reference, target, "poly_dpo", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def ipo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    tau: float,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """IPO: `(d - 1/(2 tau))**2`, on the margin d, not on the logit z.

    Azar et al. 2023 (arXiv 2310.12036).
    """
    require_positive(tau=tau)
    require_terms(safeguard, sft_weight)
    return pair_loss(
        policy, reference, target, "ipo", (tau,),
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def hinge(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Hinge: `max(0, 1 - z)`, with gradient 0 at the kink.

    Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425).
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    options = (beta,)
    return pair_loss(
        policy, reference, target, "hinge", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def kto(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    labels: Tensor | None = None,
    liked_weight: float = 1.0,
    disliked_weight: float = 1.0,
    baseline: Tensor | None = None,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-KTO on a pair read as two labeled images (Li et al. 2024, arXiv 2404.04465).

    With `g = r - e` and `z0 = max(mean g, 0)`, detached: the mean of
    `liked_weight (1 - sigmoid(beta (g_w - z0)))` and
    `disliked_weight (1 - sigmoid(-beta (g_l - z0)))`.

    Args:
        labels: `[N]`, truth values, or numbers of which the positive ones are likes: every row is
            an image by itself, with a target and a reference of its own, and any number of them
            may be liked. `pair_weight` and `beta` then hold one number a row, and so do `loss` with
            `reduction="none"`, `margin`, which is g, and both errors; `reduce` gets `sum g`
            and the number of rows. It is a launch for the policy, one for the reference's
            predictions, and a few operators over N numbers.
        liked_weight: of the winners' terms; the released code's and TRL's desirable weight.
        disliked_weight: of the losers'.
        baseline: z0 itself from outside, a floating-point tensor of one element on the policy's
            device, instead of `reduce`; it is taken as it is, below zero too. None takes the mean
            of this batch's 2B rows, not below zero.
        reduce: forms it over all processes; see above.
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    for name, weight in (("liked_weight", liked_weight), ("disliked_weight", disliked_weight)):
        require(0 <= weight < math.inf, f"{name} must be finite and not negative", weight)
    statistics = None if baseline is None else _one_element("baseline", baseline)
    if labels is not None:
        if safeguard is not None or sft_weight or layout != "halves":
            raise ValueError("kto with labels takes no safeguard, sft_weight or layout")
        likes = Likes(
            labels, liked_weight, disliked_weight, pair_weight, statistics, reduce, reduction, mask
        )
        return kto_of_images(policy, reference, target, beta, likes, impl)  # pyright: ignore[reportArgumentType]
    options = (beta, liked_weight, disliked_weight)
    return pair_loss(
        policy, reference, target, "kto", options, statistics=statistics,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def dmpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    alpha: float = 0.01,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """DMPO: `KL(Bern(sigmoid(z)) || Bern(1 - alpha))`, the divergence turned round.

    `alpha` lies in (0, 1).
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    require(0 < alpha < 1, "alpha must be in (0, 1)", alpha)
    alpha = number("alpha", alpha)
    options = (beta, math.log1p(-alpha), math.log(alpha))
    return pair_loss(
        policy, reference, target, "dmpo", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def linear_dpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    eta: float = 1e-3,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Linear-DPO: `c (e_w - e_l)`, `c = clip(0.5 - 0.2 z, eta, 1 - eta)` detached.

    `eta` lies in [0, 1/2].
    """
    require_slope(beta)
    require_terms(safeguard, sft_weight)
    require(0 <= eta <= 0.5, "eta must be in [0, 0.5]", eta)
    options = (beta, eta)
    return pair_loss(
        policy, reference, target, "linear_dpo", options,
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=safeguard, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip


def sdpo(
    policy: Given,
    reference: Given,
    target: Target,
    *,
    beta: Slope,
    mu: float,
    pair_weight: Tensor | None = None,
    sft_weight: float = 0.0,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-SDPO: `dpo` with the loser's gradient scaled so that the winner still gains.

    With `gA = 2 (pred_w - target)/N`, `gB = 2 (pred_l - target)/N` and products summed over the
    batch (over all processes with `reduce`), `lambda = clamp((1 - mu) |gA|**2 / (gA . gB), 0, 1)`
    where `gA . gB > 0`, else 1; mu in [0, 1].
    Released values of mu: 0.9 on SD 1.5, 0.6 on SDXL.
    """
    require_slope(beta)
    require_terms(None, sft_weight)
    require(0 <= mu <= 1, "mu must be in [0, 1]", mu)
    return pair_loss(
        policy, reference, target, "dpo", (beta,),
        pair_weight=pair_weight, sft_weight=sft_weight, safeguard=mu, reduce=reduce,
        reduction=reduction, layout=layout, mask=mask, impl=impl,
    )  # fmt: skip
