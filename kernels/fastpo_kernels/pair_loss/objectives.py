"""The scalar functions of the pair losses, in plain PyTorch: a pair's loss from its errors.

`gpu/objectives.py` holds the twin of each. Nothing here is a matrix product and every input is
float32 or better, so autocast changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Errors = Tensor | Sequence[Tensor]


class Judged(NamedTuple):
    """What is known of B pairs.

    Attributes:
        d: `[B]`, the margin `(r_w - e_w) - (r_l - e_l)`, differentiable in `e`.
        e: the policy's errors, `[B]` of the winners and of the losers.
        r: the reference's, or None.
        shift: what is subtracted from the logit, or from the gain: a tensor, or 0.
    """

    d: Tensor
    e: Errors
    r: Errors | None
    shift: Tensor | float


def margin_of(e: Errors, r: Errors | None) -> Tensor:
    """`(r_w - e_w) - (r_l - e_l)`: near the reference both terms are small, and hardly rounded."""
    if r is None:
        return e[1] - e[0]
    if isinstance(e, Tensor) and isinstance(r, Tensor):
        winner, loser = (r - e).unbind()
        return winner - loser
    return (r[0] - e[0]) - (r[1] - e[1])


Slope = Tensor | float  # a number, or `[B]`


def _logit(pair: Judged, beta: Slope) -> Tensor:
    z = beta * pair.d
    return z - pair.shift if isinstance(pair.shift, Tensor) else z


def _softplus(x: Tensor) -> Tensor:
    """`-ls(-x) = log(1 + exp(x))`, one operator fewer than through the log-sigmoid."""
    return F.softplus(x, threshold=40.0)  # beyond, x alone is float64's nearest


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))` whose derivative keeps its digits in both tails.

    `torch.sigmoid` is differentiated as `(1 - y) y`, which is 0 where y rounds to 1.
    """
    left = x < 0
    t = torch.exp(torch.where(left, x, -x))
    return torch.where(left, t, 1.0) / (1 + t)


# For an infinite logit: there a sigmoid is 0 or 1, whose product with infinity is no number.
_SATURATED = 750.0


def dpo(pair: Judged, beta: Slope, smoothing: float = 0.0) -> Tensor:
    """`-(1-a) ls(z) - a ls(-z)` with `z = beta d - shift` (Wallace et al. 2023, eq. 14)."""
    if smoothing == 0 and not isinstance(pair.shift, Tensor):
        return _softplus(-beta * pair.d)
    z = _logit(pair, beta)
    up = _softplus(-z)
    return up if smoothing == 0 else (1 - smoothing) * up + smoothing * _softplus(z)


def robust_dpo(pair: Judged, beta: Slope, smoothing: float) -> Tensor:
    """`[-(1-a) ls(z) + a ls(-z)] / (1 - 2a)` (Chowdhury et al. 2024)."""
    z = _logit(pair, beta)
    if smoothing == 0:
        return _softplus(-z)
    scale = 1 / (1 - 2 * smoothing)
    return (scale * (1 - smoothing)) * _softplus(-z) - (scale * smoothing) * _softplus(z)


def poly_dpo(pair: Judged, beta: Slope, alpha: float) -> Tensor:
    """`-ls(z) + a (1 - sigmoid(z))` (Poly-DPO, arXiv 2604.24953)."""
    z = _logit(pair, beta)
    return _softplus(-z) + alpha * sigmoid(-z)


def ipo(pair: Judged, tau: float) -> Tensor:
    """`(d - shift - 1/(2 tau))**2`: on the margin itself, not on the logit (Azar et al. 2023)."""
    return (pair.d - (pair.shift + 0.5 / tau)).square()


def hinge(pair: Judged, beta: Slope) -> Tensor:
    """`max(0, 1 - z)`."""
    return F.relu(1 - _logit(pair, beta))


def kto(pair: Judged, beta: Slope, liked: float, disliked: float) -> Tensor:
    """Mean of `1 - sigmoid(beta (g_w - z0))` and `1 - sigmoid(-beta (g_l - z0))`, `g = r - e`.

    `liked` multiplies the first, `disliked` the other.
    """
    _, e, r, shift = pair
    assert r is not None, "kto needs a reference"
    winner = sigmoid(-beta * (r[0] - e[0] - shift))
    loser = sigmoid(beta * (r[1] - e[1] - shift))
    if liked == disliked == 1:
        return 0.5 * (winner + loser)
    return 0.5 * (liked * winner + disliked * loser)


def dmpo(pair: Judged, beta: Slope, log_q: float, log_not_q: float) -> Tensor:
    """`KL(Bern(sigmoid(z)) || Bern(q))` with `q = 1 - alpha`, given as two logarithms."""
    z = _logit(pair, beta).nan_to_num(math.nan, _SATURATED, -_SATURATED)
    p_term = sigmoid(z) * (F.logsigmoid(z) - log_q)
    return p_term + sigmoid(-z) * (F.logsigmoid(-z) - log_not_q)


def linear_dpo(pair: Judged, beta: Slope, eta: float) -> Tensor:
    """`c (e_w - e_l)`, `c = clip(0.5 - 0.2 beta d, eta, 1 - eta)` detached."""
    z = _logit(pair, beta).detach()
    return (0.5 - 0.2 * z).clamp(eta, 1 - eta) * (pair.e[0] - pair.e[1])


def sft(pair: Judged) -> Tensor:
    """`e_w`: fine-tuning on the winner alone."""
    return pair.e[0]


def mapo(pair: Judged, weight: Slope, snr: float, num_timesteps: float) -> Tensor:
    """`e_w - b ls(T (f(e_w) - f(e_l)))`, `f(e) = s e / expm1(s e)` (Hong et al. 2024)."""
    e = pair.e if isinstance(pair.e, Tensor) else torch.stack(list(pair.e))
    winner, loser = _decays(e, snr).unbind()
    minus_v = (num_timesteps * (loser - winner)).to(e.dtype)
    if isinstance(weight, Tensor):
        return e[0] + weight * _softplus(minus_v)
    return torch.add(e[0], _softplus(minus_v), alpha=weight)


def _decays(errors: Tensor, snr: float) -> Tensor:
    """`f` of float32 errors in float64, plainly; of others one less, by the series.

    Float64 has the digits that the plain quotient loses, in fewer operators. Between the bounds f
    and its derivative keep them; beyond the upper one f is zero, and errors below the lower one
    belong to predictions that are exact.
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
    """A scalar function `(pair, *options) -> losses [B]`, and what it needs.

    Attributes:
        function: the function.
        options: its options' names, in order.
        n_optional: how many of the last may be left out.
        needs_reference: whether it reads the reference's errors.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    n_optional: int = 0
    needs_reference: bool = True


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo, ("beta", "smoothing"), n_optional=1),
    "robust_dpo": Objective(robust_dpo, ("beta", "smoothing")),
    "poly_dpo": Objective(poly_dpo, ("beta", "alpha")),
    "ipo": Objective(ipo, ("tau",)),
    "hinge": Objective(hinge, ("beta",)),
    "kto": Objective(kto, ("beta", "liked", "disliked")),
    "dmpo": Objective(dmpo, ("beta", "log_q", "log_not_q")),
    "linear_dpo": Objective(linear_dpo, ("beta", "eta")),
    "sft": Objective(sft, needs_reference=False),
    "mapo": Objective(mapo, ("weight", "snr", "num_timesteps"), needs_reference=False),
}
