"""One function per objective: DPO and its relatives, KTO, MaPO, plain fine-tuning.

The conventions that all of them share are those of `fastpo.loss`.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastpo.loss._options import require, require_positive
from fastpo_kernels.pair_loss import (
    Impl,
    PairLoss,
    Reduce,
    Target,
    pair_loss,
)


def _one_element(name: str, vector: Tensor) -> Tensor:
    """The tensor of one element as a vector."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    require(vector.numel() == 1, f"{name} must have one element", vector.numel())
    return vector.reshape(1)


def dpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-DPO: `-(1-a) ls(z) - a ls(-z)` with `a = label_smoothing` in [0, 1/2].

    Wallace et al. 2023 (arXiv 2311.12908), eq. 14; `a > 0` is the conservative form.
    """
    require_positive(beta=beta)
    rule = "label_smoothing must be in [0, 0.5]"
    require(0 <= label_smoothing <= 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(policy, reference, target, "dpo", options, pair_weight=pair_weight, impl=impl)


def robust_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    label_smoothing: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Robust DPO: `[-(1-a) ls(z) + a ls(-z)] / (1-2a)`, `a = label_smoothing` in [0, 1/2).

    Unbiased where labels are flipped with probability a.
    Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    require_positive(beta=beta)
    rule = "label_smoothing must be in [0, 0.5)"
    require(0 <= label_smoothing < 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(
        policy, reference, target, "robust_dpo", options, pair_weight=pair_weight, impl=impl
    )


def ipo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    tau: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """IPO: `(d - 1/(2 tau))**2`, on the margin d, not on the logit z.

    Azar et al. 2023 (arXiv 2310.12036).
    """
    require_positive(tau=tau)
    return pair_loss(policy, reference, target, "ipo", (tau,), pair_weight=pair_weight, impl=impl)


def hinge(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Hinge: `max(0, 1 - z)`, with gradient 0 at the kink.

    Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425).
    """
    require_positive(beta=beta)
    options = (beta,)
    return pair_loss(
        policy, reference, target, "hinge", options, pair_weight=pair_weight, impl=impl
    )


def kto(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    baseline: Tensor | None = None,
    reduce: Reduce | None = None,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-KTO on a pair read as two labeled images (Li et al. 2024, arXiv 2404.04465).

    With `g = r - e` and `z0 = max(mean g, 0)`, detached: the mean of `1 - sigmoid(beta (g_w - z0))`
    and `1 - sigmoid(-beta (g_l - z0))`.

    Args:
        baseline: mean of g from outside, a floating-point tensor of one element on the policy's
            device, instead of `reduce`; None takes this batch's 2B rows.
        reduce: forms it over all processes; see above.
    """
    require_positive(beta=beta)
    statistics = None if baseline is None else _one_element("baseline", baseline)
    return pair_loss(
        policy, reference, target, "kto", (beta,), statistics=statistics, reduce=reduce,
        pair_weight=pair_weight, impl=impl,
    )  # fmt: skip


def dmpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    alpha: float = 0.01,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """DMPO: `KL(Bern(sigmoid(z)) || Bern(1 - alpha))`, the divergence turned round.

    `alpha` lies in (0, 1).
    """
    require_positive(beta=beta)
    require(0 < alpha < 1, "alpha must be in (0, 1)", alpha)
    options = (beta, math.log1p(-alpha), math.log(alpha))
    return pair_loss(policy, reference, target, "dmpo", options, pair_weight=pair_weight, impl=impl)


def linear_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    eta: float = 1e-3,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Linear-DPO: `c (e_w - e_l)`, `c = clip(0.5 - 0.2 z, eta, 1 - eta)` detached.

    `eta` lies in [0, 1/2].
    """
    require_positive(beta=beta)
    require(0 <= eta <= 0.5, "eta must be in [0, 0.5]", eta)
    options = (beta, eta)
    return pair_loss(
        policy, reference, target, "linear_dpo", options, pair_weight=pair_weight, impl=impl
    )


def sdpo(
    policy: Tensor,
    reference: Tensor,
    target: Target,
    *,
    beta: float,
    mu: float,
    reduce: Reduce | None = None,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-SDPO: `dpo` with the loser's gradient scaled so that the winner still gains.

    With `gA = 2 (pred_w - target)/N`, `gB = 2 (pred_l - target)/N` and products summed over the
    batch (over all processes with `reduce`), `lambda = clamp((1 - mu) |gA|**2 / (gA . gB), 0, 1)`
    where `gA . gB > 0`, else 1; mu in [0, 1].
    Released values of mu: 0.9 on SD 1.5, 0.6 on SDXL.
    """
    require_positive(beta=beta)
    require(0 <= mu <= 1, "mu must be in [0, 1]", mu)
    return pair_loss(
        policy, reference, target, "dpo", (beta,), safeguard=mu, reduce=reduce,
        pair_weight=pair_weight, impl=impl,
    )  # fmt: skip


def sft(
    policy: Tensor, target: Target, *, pair_weight: Tensor | None = None, impl: Impl | None = None
) -> PairLoss:
    """Fine-tuning on the winner: `e_w`. The losers' gradient is zero, the margin `e_l - e_w`."""
    return pair_loss(policy, None, target, "sft", (), pair_weight=pair_weight, impl=impl)


def mapo(
    policy: Tensor,
    target: Target,
    *,
    beta: float = 0.1,
    snr: float = 0.5,
    num_timesteps: int = 1000,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """MaPO: `e_w - beta ls(T (f(e_w) - f(e_l)))`, `f(e) = snr e / expm1(snr e)`.

    Hong et al. 2024 (arXiv 2406.06424). No reference. Small errors keep their digits in f.
    """
    require_positive(beta=beta, snr=snr, num_timesteps=num_timesteps)
    return pair_loss(
        policy, None, target, "mapo", (beta, snr, num_timesteps), pair_weight=pair_weight, impl=impl
    )
