"""The objectives: one function each, tensors first, options by keyword.

A batch holds B pairs, winners in rows `0..B-1`, losers in `B..2B-1`. With `e` and `r` the mean
squared denoising errors of policy and reference, the margin is `d = (r_w - r_l) - (e_w - e_l)` and
the logit `z = beta d`: **beta is the slope itself**. Trainers that write `0.5 * beta_dpo * d` call
5000 what is 2500 here. `ls` below is the log-sigmoid. The batch's loss is the mean of the pairs'
losses.

Every function takes

* `policy`: `[2B, *dims]` float32, bfloat16 or float16 predictions; it alone gets a gradient;
* `reference` (and each annotator): `[2B, *dims]` predictions, or `[2B]` float32 errors already
known;
* `target`: `[2B, *dims]`, or `[B, *dims]` where the pair shares it;
* `pair_weight`: `[B]`, multiplies every pair's loss, or None;
* `impl`: `"triton"`, `"reference"`, or None: triton if every tensor is on a supported GPU, else
  reference. An explicit choice never falls back.

Each returns a `PairLoss`: the scalar `loss`, differentiable, beside detached `margin` `[B]`,
`policy_error` `[2B]`, `reference_error` `[2B]` or None, `minority` `[B]` or None, `weight` `[B]` or
None. Nothing is read back to the host. Each raises `TypeError` on a wrong type or dtype and
`ValueError` on a wrong shape, device, option or `impl`, naming the rule and what it got.

    >>> policy, reference, target = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3)
    >>> out = dpo(policy.requires_grad_(), reference, target, beta=2500.0)
    >>> out.loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastpo_kernels.pair_loss import (
    Adaptive,
    Impl,
    PairLoss,
    pair_errors,
    pair_loss,
)
from fastpo_kernels.pair_loss.reference import MarginKind, Normalize, WeightKind

__all__ = [
    "PairLoss",
    "adaptive_dpo",
    "adaptive_ipo",
    "dmpo",
    "dpo",
    "hinge",
    "ipo",
    "kto",
    "linear_dpo",
    "mapo",
    "pair_errors",
    "robust_dpo",
    "sdpo",
    "sft",
]


def _require(holds: bool, rule: str, got: float) -> None:
    """A check that also refuses NaN: write `holds` so that NaN makes it false."""
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def _require_positive(**options: float) -> None:
    for name, value in options.items():
        _require(0 < value < math.inf, f"{name} must be positive and finite", value)


def dpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-DPO: `-(1-a) ls(z) - a ls(-z)` with `a = label_smoothing` in [0, 1/2].

    Wallace et al. 2023 (arXiv 2311.12908), eq. 14; `a > 0` is the conservative form.
    """
    _require_positive(beta=beta)
    rule = "label_smoothing must be in [0, 0.5]"
    _require(0 <= label_smoothing <= 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(policy, reference, target, "dpo", options, pair_weight=pair_weight, impl=impl)


def robust_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
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
    _require_positive(beta=beta)
    rule = "label_smoothing must be in [0, 0.5)"
    _require(0 <= label_smoothing < 0.5, rule, label_smoothing)
    options = (beta, label_smoothing)
    return pair_loss(
        policy, reference, target, "robust_dpo", options, pair_weight=pair_weight, impl=impl
    )


def ipo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    tau: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """IPO: `(d - 1/(2 tau))**2`, on the margin d, not on the logit z.

    Azar et al. 2023 (arXiv 2310.12036).
    """
    _require_positive(tau=tau)
    return pair_loss(policy, reference, target, "ipo", (tau,), pair_weight=pair_weight, impl=impl)


def hinge(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Hinge: `max(0, 1 - z)`, with gradient 0 at the kink."""
    _require_positive(beta=beta)
    options = (beta,)
    return pair_loss(
        policy, reference, target, "hinge", options, pair_weight=pair_weight, impl=impl
    )


def kto(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    baseline: Tensor | None = None,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-KTO on a pair read as two labelled images (Li et al. 2024, arXiv 2404.04465).

    With `g = r - e` and `z0 = max(mean g, 0)`, detached: the mean of `1 - sigmoid(beta (g_w - z0))`
    and `1 - sigmoid(-beta (g_l - z0))`.

    Args:
        baseline: mean of g over all processes, a float32 scalar tensor; None takes this batch's 2B
            rows.
    """
    _require_positive(beta=beta)
    return pair_loss(
        policy,
        reference,
        target,
        objective="kto",
        options=(beta,),
        statistics=None if baseline is None else baseline.reshape(1),
        pair_weight=pair_weight,
        impl=impl,
    )


def dmpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    alpha: float = 0.01,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """DMPO: `KL(Bern(sigmoid(z)) || Bern(1 - alpha))`, the divergence turned round."""
    _require_positive(beta=beta)
    _require(0 < alpha < 1, "alpha must be in (0, 1)", alpha)
    options = (beta, math.log1p(-alpha), math.log(alpha))
    return pair_loss(policy, reference, target, "dmpo", options, pair_weight=pair_weight, impl=impl)


def linear_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    eta: float = 1e-3,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Linear-DPO: `c (e_w - e_l)`, `c = clip(0.5 - 0.2 z, eta, 1 - eta)` detached."""
    _require_positive(beta=beta)
    _require(0 <= eta <= 0.5, "eta must be in [0, 0.5]", eta)
    options = (beta, eta)
    return pair_loss(
        policy, reference, target, "linear_dpo", options, pair_weight=pair_weight, impl=impl
    )


def sdpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    mu: float,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Diffusion-SDPO: `dpo` with the loser's gradient scaled so that the winner still gains.

    With `gA = 2 (pred_w - target)/N`, `gB = 2 (pred_l - target)/N` and products summed over the
    batch, `lambda = clamp((1 - mu) |gA|**2 / (gA . gB), 0, 1)` where `gA . gB > 0`, else 1.
    Released values of mu: 0.9 on SD 1.5, 0.6 on SDXL.
    """
    _require_positive(beta=beta)
    _require(0 <= mu <= 1, "mu must be in [0, 1]", mu)
    return pair_loss(
        policy,
        reference,
        target,
        objective="dpo",
        options=(beta,),
        safeguard=mu,
        pair_weight=pair_weight,
        impl=impl,
    )


def sft(
    policy: Tensor,
    target: Tensor,
    *,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Fine-tuning on the winner: `e_w`. The losers' gradient is zero, the margin `e_l - e_w`."""
    return pair_loss(policy, None, target, objective="sft", pair_weight=pair_weight, impl=impl)


def mapo(
    policy: Tensor,
    target: Tensor,
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
    _require_positive(beta=beta, snr=snr, num_timesteps=num_timesteps)
    return pair_loss(
        policy,
        None,
        target,
        objective="mapo",
        options=(beta, snr, num_timesteps),
        pair_weight=pair_weight,
        impl=impl,
    )


def adaptive_dpo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    annotators: Sequence[Tensor] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    normalize: Normalize = "rms",
    rho: float = 3.75,
    weight_kind: WeightKind = "linear",
    weight_scale: float = 10.0,
    weight_intercept: float = 1.0,
    margin_kind: MarginKind = "quadratic",
    margin_scale: float = 1.0,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Adaptive-DPO (arXiv 2503.16921): `w (-ls(z - gamma))`, doubtful pairs weighing less.

    The policy and the annotators each judge the pair by a margin `d_m`, detached.
    `x_m = rho d_m / scale`, `u = |mean_m sigmoid(x_m) - 1| min(std_m(x_m), 1)` (alone: the first
    factor), a `weight_kind` of u as weight, and `gamma = margin_scale (mean(d) - u**2 / beta)`.

    Args:
        annotators: other versions of the policy; besides it, none by default.
        minority: `[B]`, u itself from outside (a ledger of earlier visits), instead of annotators.
        statistics: `[1 + M]` float32 from outside the batch: the mean margin, then the scale of
            each of the M annotators, the policy first. None takes the batch's.
        normalize: the scale over the batch: `rms`, or `l2` as released (rho = 15 at B = 16 is 3.75
            by rms).
        weight_kind: `linear` 1/(k0 + k1 u), `quadratic` (u squared), `sqrt` 1/(k0 + exp(k1
            sqrt(u))), `exponential` 1/(k0 + exp(k1 u)), `gate` (1 where u < 1/2, else 0).
        weight_scale: k1.
        weight_intercept: k0.
        margin_kind: `quadratic`, or `linear`: u instead of its square.
        margin_scale: 1 as released, where gamma is tiny beside z; beta puts it on the logit's
            scale.
    """
    _require_positive(beta=beta, rho=rho)
    spec = Adaptive(
        beta=beta,
        normalize=normalize,
        rho=rho,
        weight_kind=weight_kind,
        weight_scale=weight_scale,
        weight_intercept=weight_intercept,
        margin_kind=margin_kind,
        shift_scale=margin_scale,
    )
    return pair_loss(
        policy,
        reference,
        target,
        objective="dpo",
        options=(beta,),
        annotators=annotators,
        minority=minority,
        statistics=statistics,
        adaptive=spec,
        pair_weight=pair_weight,
        impl=impl,
    )


def adaptive_ipo(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    tau: float,
    beta: float,
    annotators: Sequence[Tensor] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    normalize: Normalize = "rms",
    rho: float = 3.75,
    weight_kind: WeightKind = "linear",
    weight_scale: float = 10.0,
    weight_intercept: float = 1.0,
    margin_kind: MarginKind = "quadratic",
    margin_scale: float = 1.0,
    pair_weight: Tensor | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Adaptive-DPO's IPO form: `w (d - gamma/beta - 1/(2 tau))**2`; options as in `adaptive_dpo`.

    The released code adds `gamma / beta` here where its DPO form subtracts gamma. Both subtract
    here: the larger a pair's gamma, the larger the margin asked of it.
    """
    _require_positive(tau=tau, beta=beta, rho=rho)
    spec = Adaptive(
        beta=beta,
        normalize=normalize,
        rho=rho,
        weight_kind=weight_kind,
        weight_scale=weight_scale,
        weight_intercept=weight_intercept,
        margin_kind=margin_kind,
        shift_scale=margin_scale / beta,
    )
    return pair_loss(
        policy,
        reference,
        target,
        objective="ipo",
        options=(tau,),
        annotators=annotators,
        minority=minority,
        statistics=statistics,
        adaptive=spec,
        pair_weight=pair_weight,
        impl=impl,
    )
