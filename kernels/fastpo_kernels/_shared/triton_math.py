"""`@triton.jit` helpers for every operation. Imported only when a kernel is about to run.

No libdevice: the interpreter and the AMD back end lack it, so the stable forms are written out.
"""

import triton
import triton.language as tl


@triton.jit
def at_most(x, bound):
    """The smaller one, NaN where either is: a GPU's plain minimum drops NaN."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, bound):
    """The larger one, NaN where either is."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp_neg(a):
    """`exp(-a)` for a >= 0 to an ulp: `2**n` by its bits, the rest, at most ln(2)/2, by Taylor.

    A GPU's own `exp` is a coarse `exp2` of a rounded product: 14 eps off at a = 20, and a logit can
    be larger.
    """
    a = tl.where(a > 140.0, 140.0, a)  # zero from 104 on; NaN is let through
    n = tl.floor(0.5 - 1.4426950408889634 * a)
    x = tl.fma(n, -1.42860682030941723212e-6, tl.fma(n, -0.693145751953125, -a))
    tail = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))
    y = tl.fma(x, tl.fma(x, tl.fma(x, tl.fma(x, tail, 1.0 / 6), 0.5), 1.0), 1.0)
    whole = n.to(tl.int32)
    half = whole >> 1  # the smallest results are no normal numbers
    y *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    return y * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(a):
    """`exp(a)` by `exp_neg`."""
    t = exp_neg(tl.abs(a))
    return tl.where(a < 0.0, t, tl.div_rn(1.0, t))


@triton.jit
def log1p_of_exp_neg(a):
    """`log(1 + exp(-a))` for a >= 0, Kahan's correction recovering what `1 + t` rounds off."""
    t = exp_neg(a)
    u = 1.0 + t
    exact = u - 1.0
    return tl.where(exact == 0.0, t, tl.log(u) * tl.div_rn(t, tl.where(exact == 0.0, 1.0, exact)))


@triton.jit
def log_sigmoid(z):
    """`log(1 / (1 + exp(-z)))`, finite for every finite z."""
    return at_most(z, 0.0) - log1p_of_exp_neg(tl.abs(z))


@triton.jit
def sigmoid(z):
    """`1 / (1 + exp(-z))` with full relative accuracy in both tails."""
    t = exp_neg(tl.abs(z))
    return tl.div_rn(tl.where(z >= 0, 1.0, t), 1.0 + t)


@triton.jit
def strided_offsets(index, sizes, strides):
    """int64 memory offsets of flat positions in a tensor of `sizes`, last dim fastest."""
    # Positions within a sample fit 32 bits; only memory offsets may not. A division is costly, in
    # 64 bits several times so. (`sizes` is indexed by an expression: a name would be a tensor.)
    rest = index
    offsets = tl.zeros_like(index).to(tl.int64)
    for k in tl.static_range(len(sizes) - 1):
        inner = rest % sizes[len(sizes) - 1 - k]
        offsets += inner.to(tl.int64) * strides[len(sizes) - 1 - k]
        rest = rest // sizes[len(sizes) - 1 - k]
    return offsets + rest.to(tl.int64) * strides[0]
