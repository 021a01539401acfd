"""The scalar functions of `pair_loss/objectives.py` as device code, with partial derivatives.

`name(d, e_w, e_l, r_w, r_l, shift, a, b, c) -> (loss, dloss/de_w, dloss/de_l)`, all float32, with
the margin `d = (r_w - r_l) - (e_w - e_l)`, so `dd/de_w = -1` and `dd/de_l = 1`. A new objective is
one function and one line of the table here, one function and line of the same name there, one row
in the tests' table.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from fastpo_kernels._shared.triton_math import at_least, at_most, exp_neg, log_sigmoid, sigmoid

# Beyond it a sigmoid is exactly 0 or 1 in float32, and its product with a larger logit no number.
SATURATED = tl.constexpr(150.0)


@triton.jit
def _logit(d, shift, beta):
    return beta * d - shift


@triton.jit
def _share(smoothing, loss):
    """`smoothing loss`, 0 without smoothing: an infinite loss has no share of 0."""
    return tl.where(smoothing == 0.0, 0.0, smoothing * loss)


@triton.jit
def dpo(d, e_w, e_l, r_w, r_l, shift, beta, smoothing, _):
    z = _logit(d, shift, beta)
    loss = _share(smoothing, -log_sigmoid(-z)) - (1.0 - smoothing) * log_sigmoid(z)
    slope = beta * ((1.0 - smoothing) * sigmoid(-z) - smoothing * sigmoid(z))
    return loss, slope, -slope


@triton.jit
def robust_dpo(d, e_w, e_l, r_w, r_l, shift, beta, smoothing, _):
    z = _logit(d, shift, beta)
    scale = tl.div_rn(1.0, 1.0 - 2.0 * smoothing)
    loss = scale * (_share(smoothing, log_sigmoid(-z)) - (1.0 - smoothing) * log_sigmoid(z))
    slope = scale * beta * ((1.0 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z))
    return loss, slope, -slope


@triton.jit
def poly_dpo(d, e_w, e_l, r_w, r_l, shift, beta, alpha, _):
    z = _logit(d, shift, beta)
    not_p = sigmoid(-z)
    slope = beta * not_p * (1.0 + alpha * sigmoid(z))
    return alpha * not_p - log_sigmoid(z), slope, -slope


@triton.jit
def ipo(d, e_w, e_l, r_w, r_l, shift, tau, _, __):
    gap = d - shift - tl.div_rn(0.5, tau)
    return gap * gap, -2.0 * gap, 2.0 * gap


@triton.jit
def hinge(d, e_w, e_l, r_w, r_l, shift, beta, _, __):
    slack = 1.0 - _logit(d, shift, beta)
    slope = tl.where(slack <= 0.0, 0.0, beta)
    return at_least(slack, 0.0), slope, -slope


@triton.jit
def kto(d, e_w, e_l, r_w, r_l, shift, beta, liked, disliked):
    v_w = beta * (r_w - e_w - shift)
    v_l = beta * (r_l - e_l - shift)
    loss = 0.5 * (liked * sigmoid(-v_w) + disliked * sigmoid(v_l))
    slope_w = 0.5 * beta * liked * sigmoid(v_w) * sigmoid(-v_w)
    slope_l = 0.5 * beta * disliked * sigmoid(v_l) * sigmoid(-v_l)
    return loss, slope_w, -slope_l


@triton.jit
def dmpo(d, e_w, e_l, r_w, r_l, shift, beta, log_q, log_not_q):
    z = at_most(at_least(_logit(d, shift, beta), -SATURATED), SATURATED)
    p, not_p = sigmoid(z), sigmoid(-z)
    loss = p * (log_sigmoid(z) - log_q) + not_p * (log_sigmoid(-z) - log_not_q)
    slope = -beta * p * not_p * (z - (log_q - log_not_q))
    return loss, slope, -slope


@triton.jit
def linear_dpo(d, e_w, e_l, r_w, r_l, shift, beta, eta, _):
    z = _logit(d, shift, beta)
    c = at_most(at_least(0.5 - 0.2 * z, eta), 1.0 - eta)
    return c * (e_w - e_l), c, -c


@triton.jit
def sft(d, e_w, e_l, r_w, r_l, shift, _, __, ___):
    return e_w, tl.full(e_w.shape, 1.0, tl.float32), tl.zeros(e_w.shape, tl.float32)


@triton.jit
def _decay_minus_one(x):
    """`h = x / expm1(x) - 1` and `dh/dx`, x >= 0: Bernoulli's series below 1/2, else closed."""
    small = x < 0.5
    n = tl.where(small, x, 0.0)
    t = n * n
    series = t * (1.0 / 12 + t * (-1.0 / 720 + t * (1.0 / 30240 - t * (1.0 / 1209600)))) - 0.5 * n
    slope = n * (1.0 / 6 + t * (-1.0 / 180 + t * (1.0 / 5040 - t * (1.0 / 151200)))) - 0.5
    far = at_most(tl.where(small, 1.0, x), SATURATED)
    decayed = exp_neg(far)
    f = tl.div_rn(far * decayed, 1.0 - decayed)
    closed = tl.div_rn(f * (1.0 - f), far) - f
    return tl.where(small, series, f - 1.0), tl.where(small, slope, closed)


@triton.jit
def mapo(d, e_w, e_l, r_w, r_l, shift, weight, snr, num_timesteps):
    h_w, slope_w = _decay_minus_one(snr * e_w)
    h_l, slope_l = _decay_minus_one(snr * e_l)
    v = num_timesteps * (h_w - h_l)
    pull = weight * num_timesteps * snr * sigmoid(-v)
    return e_w - weight * log_sigmoid(v), 1.0 - pull * slope_w, pull * slope_l


OBJECTIVES = {
    "dpo": dpo,
    "robust_dpo": robust_dpo,
    "poly_dpo": poly_dpo,
    "ipo": ipo,
    "hinge": hinge,
    "kto": kto,
    "dmpo": dmpo,
    "linear_dpo": linear_dpo,
    "sft": sft,
    "mapo": mapo,
}
