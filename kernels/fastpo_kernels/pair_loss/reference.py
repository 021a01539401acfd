"""Eager oracle of the pair losses: torch only, any device, float64-capable.

Each objective is one scalar function of the errors of a pair; `gpu/objectives.py` holds its twin.
Nothing here is a matrix product and every input is lifted to float32 or better first, so autocast
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Errors = Tensor | Sequence[Tensor]
WeightKind = Literal["linear", "quadratic", "sqrt", "exponential", "gate"]
MarginKind = Literal["quadratic", "linear"]
Normalize = Literal["rms", "l2"]


@dataclass(frozen=True)
class Adaptive:
    """How a pair's minority metric becomes weight and margin (Adaptive-DPO, arXiv 2503.16921).

    `shift_scale` multiplies `mean(d) - u**k / beta`: the margin scale, divided by beta in the IPO
    form.
    """

    beta: float
    normalize: Normalize = "rms"
    rho: float = 3.75
    weight_kind: WeightKind = "linear"
    weight_scale: float = 10.0
    weight_intercept: float = 1.0
    margin_kind: MarginKind = "quadratic"
    shift_scale: float = 1.0

    @property
    def kinds(self) -> str:
        """The names the kernel is compiled for, in its order, as one word list."""
        return f"{self.normalize} {self.weight_kind} {self.margin_kind}"

    @property
    def scalars(self) -> list[float]:
        """The numbers the kernel reads, in its order."""
        return [self.rho, self.weight_scale, self.weight_intercept, self.shift_scale, self.beta]


def margin_of(e: Errors, r: Errors | None) -> Tensor:
    """`(r_w - e_w) - (r_l - e_l)`: near the reference both terms are small, and hardly rounded."""
    if r is None:
        return e[1] - e[0]
    if isinstance(e, Tensor) and isinstance(r, Tensor):
        winner, loser = (r - e).unbind()
        return winner - loser
    return (r[0] - e[0]) - (r[1] - e[1])


def _logit(d, shift, beta):
    z = beta * d
    return z - shift if isinstance(shift, Tensor) else z


def _softplus(x: Tensor) -> Tensor:
    """`-ls(-x) = log(1 + exp(x))`, one operator fewer than through the log-sigmoid."""
    return F.softplus(x, threshold=40.0)  # beyond, x alone is float64's nearest


def _sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))` whose derivative keeps its digits in both tails.

    `torch.sigmoid` is differentiated as `(1 - y) y`, which is 0 where y rounds to 1.
    """
    left = x < 0
    t = torch.exp(torch.where(left, x, -x))
    return torch.where(left, t, 1.0) / (1 + t)


# For an infinite logit: there a sigmoid is 0 or 1, whose product with infinity is no number.
_SATURATED = 750.0


def dpo(d, e, r, shift, beta, smoothing, _):
    """`-(1-a) ls(z) - a ls(-z)` with `z = beta d - shift` (Wallace et al. 2023, eq. 14)."""
    if smoothing == 0 and not isinstance(shift, Tensor):
        return _softplus(-beta * d)
    z = _logit(d, shift, beta)
    up = _softplus(-z)
    return up if smoothing == 0 else (1 - smoothing) * up + smoothing * _softplus(z)


def robust_dpo(d, e, r, shift, beta, smoothing, _):
    """`[-(1-a) ls(z) + a ls(-z)] / (1 - 2a)` (Chowdhury et al. 2024)."""
    z = _logit(d, shift, beta)
    if smoothing == 0:
        return _softplus(-z)
    scale = 1 / (1 - 2 * smoothing)
    return (scale * (1 - smoothing)) * _softplus(-z) - (scale * smoothing) * _softplus(z)


def ipo(d, e, r, shift, tau, _, __):
    """`(d - shift - 1/(2 tau))**2`: on the margin itself, not on the logit (Azar et al. 2023)."""
    return (d - (shift + 0.5 / tau)).square()


def hinge(d, e, r, shift, beta, _, __):
    """`max(0, 1 - z)`."""
    return F.relu(1 - _logit(d, shift, beta))


def kto(d, e, r, shift, beta, _, __):
    """Mean of `1 - sigmoid(beta (g_w - z0))` and `1 - sigmoid(-beta (g_l - z0))`, `g = r - e`."""
    winner = _sigmoid(-beta * (r[0] - e[0] - shift))
    loser = _sigmoid(beta * (r[1] - e[1] - shift))
    return 0.5 * (winner + loser)


def dmpo(d, e, r, shift, beta, log_q, log_not_q):
    """`KL(Bern(sigmoid(z)) || Bern(q))` with `q = 1 - alpha`, given as two logarithms."""
    z = _logit(d, shift, beta).nan_to_num(math.nan, _SATURATED, -_SATURATED)
    p_term = _sigmoid(z) * (F.logsigmoid(z) - log_q)
    return p_term + _sigmoid(-z) * (F.logsigmoid(-z) - log_not_q)


def linear_dpo(d, e, r, shift, beta, eta, _):
    """`c (e_w - e_l)`, `c = clip(0.5 - 0.2 beta d, eta, 1 - eta)` detached."""
    z = _logit(d.detach(), shift, beta)
    return (0.5 - 0.2 * z).clamp(eta, 1 - eta) * (e[0] - e[1])


def sft(d, e, r, shift, _, __, ___):
    """`e_w`: fine-tuning on the winner alone."""
    return e[0]


def mapo(d, e, r, shift, weight, snr, num_timesteps):
    """`e_w - b ls(T (f(e_w) - f(e_l)))`, `f(e) = s e / expm1(s e)` (Hong et al. 2024)."""
    e = e if isinstance(e, Tensor) else torch.stack(e)
    winner, loser = _decays(e, snr).unbind()
    minus_v = (num_timesteps * (loser - winner)).to(e.dtype)
    return torch.add(e[0], _softplus(minus_v), alpha=weight)


def _decays(errors: Tensor, snr: float) -> Tensor:
    """`f` of float32 errors in float64, plainly; of others one less, by the series.

    Float64 has the digits that the plain quotient loses, in five operators instead of twenty, which
    a small batch pays for. Between the bounds f and its derivative keep them; beyond the upper one
    f is zero, and errors below the lower one belong to predictions that are exact.
    """
    if errors.dtype == torch.float32 and errors.device.type != "mps":  # which has no float64
        x = (errors.double() * snr).clamp(1e-12, 700.0)
        return x / torch.expm1(x)
    return decay_minus_one(snr * errors)


def decay_minus_one(x: Tensor) -> Tensor:
    """`x / expm1(x) - 1` for x >= 0, value and derivative to rounding; zero at zero.

    Below 1/2 the Bernoulli series: there `x / expm1(x)` is near 1, and its autograd derivative
    cancels.
    """
    small = x < 0.5
    near = torch.where(small, x, 0.0)
    far = torch.where(small, 1.0, x).clamp(max=_SATURATED)
    t = near * near
    series = t * (-1 / 1209600 + t * (1 / 47900160 - t * (691 / 1307674368000)))
    series = t * (1 / 12 + t * (-1 / 720 + t * (1 / 30240 + series)))
    decayed = torch.exp(-far)
    return torch.where(small, series - 0.5 * near, far * decayed / (1 - decayed) - 1)


@dataclass(frozen=True)
class Objective:
    """A scalar function `(d, e, r, shift, a, b, c) -> losses` and what it needs.

    `e` and `r` hold the winners' errors, then the losers', `r` is None without a reference;
    `d = (r_w - e_w) - (r_l - e_l)` is differentiable in `e`.
    """

    function: Callable[..., Any]
    needs_reference: bool = True


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo),
    "robust_dpo": Objective(robust_dpo),
    "ipo": Objective(ipo),
    "hinge": Objective(hinge),
    "kto": Objective(kto),
    "dmpo": Objective(dmpo),
    "linear_dpo": Objective(linear_dpo),
    "sft": Objective(sft, needs_reference=False),
    "mapo": Objective(mapo, needs_reference=False),
}


def residual(pred: Tensor, target: Tensor) -> Tensor:
    """`pred - target` as `[2, B, *dims]`, float32 or better; a shared target is `[B, *dims]`."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    shape = (2, pred.shape[0] // 2, *pred.shape[1:])
    pred = pred.to(dtype).view(shape)
    return pred - (target if target.shape[0] == shape[1] else target.view(shape))


def pair_errors(pred: Tensor, target: Tensor) -> Tensor:
    """Mean over every dimension but the first of `(pred - target)**2`: `[2B]`, winners first."""
    return residual(pred, target).square().flatten(2).mean(2).flatten()


def _errors_of(source: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    source = source.detach()
    return (source if source.ndim == 1 else pair_errors(source, target)).to(dtype)


Reduce = Callable[[Tensor], Tensor]


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


def reduced(reduce: Reduce, sums: Tensor) -> Tensor:
    """`reduce(sums)`, checked.

    Raises:
        ValueError: the result is no tensor like `sums`.
    """
    totals = reduce(sums)
    if not isinstance(totals, Tensor):
        raise ValueError(f"reduce must return a tensor, got {type(totals).__name__}")
    same = (totals.shape, totals.dtype, totals.device) == (sums.shape, sums.dtype, sums.device)
    if not same or not totals.is_contiguous():
        raise ValueError(
            f"reduce must return a tensor like its argument, contiguous {tuple(sums.shape)} "
            f"{sums.dtype} on {sums.device}; got {tuple(totals.shape)} {totals.dtype} on "
            f"{totals.device}"
        )
    return totals


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
    batch (`l2`: its norm) unless given.
    """
    d = torch.stack(list(margins))
    power = d.square()
    own_scales = (power.mean(1) if spec.normalize == "rms" else power.sum(1)).sqrt()
    scales = own_scales if given_scales is None else given_scales
    scales = torch.where(scales > 0, scales, 1.0)
    x = spec.rho * d / scales[:, None]
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
    return u, pair_weights(u, spec), spec.shift_scale * (mean - power / spec.beta)


def _safeguarded(errors: Tensor, agreement: Sequence[Tensor], mu: float) -> list[Tensor]:
    """The errors, the loser's gradient scaled by Diffusion-SDPO's lambda, its value kept.

    Of two infinite sums there is no ratio, and lambda is 1.
    """
    e_w, e_l = errors.unbind()
    power, total = agreement
    ratio = (1 - mu) * power / torch.where(total > 0, total, 1.0)
    scale = torch.where((total > 0) & ~ratio.isnan(), ratio.clamp(0, 1), 1.0)
    value = e_l.detach()
    return [e_w, torch.where(value.isinf(), e_l, value + scale * (e_l - value))]


def from_errors(
    errors: Tensor,
    reference_errors: Tensor | None,
    annotator_errors: Sequence[Tensor],
    dot: Tensor | None,
    *,
    objective: str,
    options: Sequence[float],
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    pair_weight: Tensor | None = None,
    adaptive: Adaptive | None = None,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What follows the reduction: statistics, weights and the loss, from a few numbers of a pair.

    Args:
        errors: `[2, B]` float32 or float64, the policy's; differentiable.
        reference_errors: `[2, B]` of the same dtype, detached, or None.
        annotator_errors: likewise, one of every annotator.
        dot: `[B]`, mean product of winner's and loser's residual, detached; for a safeguard only.
        objective: and the others as in `pair_loss`.

    Returns:
        As `pair_loss`.
    """
    policy_error, known = errors.detach(), reference_errors
    d = margin_of(errors, known)
    margin = d.detach()
    gain = None
    if objective == "kto":
        assert known is not None, "kto needs a reference"
        gain = (known - policy_error).mean(0)
    margins = []
    if adaptive is not None:
        margins = [margin, *(margin_of(a, known) for a in annotator_errors)]
    agreement = []
    if safeguard is not None:
        assert dot is not None, "a safeguard needs the residuals' product"
        agreement = [policy_error[0], dot]
    sums = [x.sum() for x in agreement]
    if reduce is not None:
        totals = reduced(reduce, batch_sums(gain, margins, agreement, len(margin)))
        statistics = _statistics_of(totals, len(margins), adaptive)
        sums = list(totals[-3:-1])
    u = weight = None
    shift: Tensor | float = 0.0
    if adaptive is not None:
        u, weight, shift = _adapt(margins, minority, statistics, adaptive)
    elif gain is not None:
        shift = (gain.mean() if statistics is None else statistics[0]).clamp(min=0.0)
    if pair_weight is not None:
        given = pair_weight.detach().to(errors.dtype)
        weight = given if weight is None else weight * given
    e: Errors = errors
    if safeguard is not None:
        e = _safeguarded(errors, sums, safeguard)
        d = margin_of(e, known)
    losses = OBJECTIVES[objective].function(d, e, known, shift, *options)
    loss = (losses if weight is None else weight * losses).mean()
    reference_error = None if reference_errors is None else reference_errors.flatten()
    return loss, margin, policy_error.flatten(), reference_error, u, weight


def pair_loss(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    *,
    annotators: Sequence[Tensor] = (),
    safeguard: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`loss = mean_i weight_i * objective(d, e, r)_i`; see `api.pair_loss`.

    `rest` are the keywords of `from_errors`.

    Returns:
        The loss (differentiable) and, detached, margin `[B]`, policy error `[2B]`, reference error
        `[2B]` or None, minority metric `[B]` or None, weight `[B]` or None.
    """
    target = target.detach()
    diff = residual(policy, target)
    errors = diff.square().flatten(2).mean(2)
    sources = annotators if reference is None else (reference, *annotators)
    judged = [_errors_of(s, target, errors.dtype).view_as(errors) for s in sources]
    known = None if reference is None else judged.pop(0)
    dot = None if safeguard is None else (diff[0] * diff[1]).detach().flatten(1).mean(1)
    return from_errors(errors, known, judged, dot, safeguard=safeguard, **rest)
