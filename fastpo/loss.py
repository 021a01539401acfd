"""The objectives: one function each, tensors first, options by keyword.

A batch holds B pairs, winners in rows `0..B-1`, losers in `B..2B-1`. With `e` and `r` the mean
squared denoising errors of policy and reference, the margin is `d = (r_w - r_l) - (e_w - e_l)` and
the logit `z = beta d`: **beta is the slope itself**. Trainers that write `0.5 * beta_dpo * d` call
5000 what is 2500 here. `ls` below is the log-sigmoid. The batch's loss is the mean of the pairs'
losses.

Every function takes (`sft` and `mapo` without `reference`)

* `policy`: `[2B, *dims]` float32, bfloat16 or float16 predictions; it alone gets a gradient;
* `reference` (and each annotator): `[2B, *dims]` predictions, or `[2B]` float32 errors already
known;
* `target`: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, or a `PairTarget`: latents,
  noise (or its counters) and the schedule, from which the tensor is formed first;
* `pair_weight`: `[B]`, multiplies every pair's loss, or None, the default;
* `impl`: `"triton"`, `"cpu"`, `"reference"`, or None: triton if every tensor is on a supported GPU
  (compute capability 8.0, or AMD) and there are at most 2048 pairs, else `"cpu"`: the reference's
  mathematics in fewer operators and passes. A name never falls back; Triton needs vectors and
  ready errors contiguous.

Each returns a `PairLoss`: the scalar `loss`, differentiable, beside detached `margin` `[B]`,
`policy_error` `[2B]`, `reference_error` `[2B]` or None, `minority` `[B]` or None, `weight` `[B]` or
None. Objectives with statistics over the batch (kto, sdpo, adaptive_dpo, adaptive_ipo) also take

* `reduce`: maps this process's sums, one short float32 vector whose last entry is its number of
  pairs, to those of all processes (`dist.all_reduce`, for one). The pass over the predictions and
  the finish are then two launches, with one call of `reduce` between them.

Nothing is read back to the host. Each raises `TypeError` on a wrong type or dtype and
`ValueError` on a wrong shape, device, option or `impl`, naming the rule and what it got.

    >>> policy, reference, target = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3)
    >>> out = dpo(policy.requires_grad_(), reference, target, beta=2500.0)
    >>> out.loss.backward()
"""

from __future__ import annotations

import math

from torch import Tensor

from fastpo.adaptive_loss import adaptive_dpo, adaptive_ipo
from fastpo.checks import require, require_positive
from fastpo_kernels.pair_loss import (
    Impl,
    PairDraw,
    PairLoss,
    PairTarget,
    Reduce,
    Target,
    pair_errors,
    pair_loss,
)

__all__ = [
    "PairDraw",
    "PairLoss",
    "PairTarget",
    "Reduce",
    "Target",
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
    """Diffusion-KTO on a pair read as two labelled images (Li et al. 2024, arXiv 2404.04465).

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
