"""`@triton.jit` helpers for every operation. Imported only when a kernel is about to run.

No libdevice: the interpreter and the AMD back end lack it, so the stable forms are written out.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_of_exp_neg(a):
    """`log(1 + exp(-a))` for a >= 0, Kahan's correction recovering what `1 + t` rounds off."""
    t = tl.exp(-a)
    u = 1.0 + t
    exact = u - 1.0
    return tl.where(exact == 0.0, t, tl.log(u) * (t / tl.where(exact == 0.0, 1.0, exact)))


@triton.jit
def log_sigmoid(z):
    """`log(1 / (1 + exp(-z)))`, finite for every finite z."""
    return tl.minimum(z, 0.0) - log1p_of_exp_neg(tl.abs(z))


@triton.jit
def sigmoid(z):
    """`1 / (1 + exp(-z))` with full relative accuracy in both tails."""
    t = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def strided_offsets(index, sizes, strides):
    """int64 memory offsets of flat positions in a tensor of `sizes`, last dim fastest."""
    rest = index.to(tl.int64)
    offsets = tl.zeros_like(rest)
    for k in tl.static_range(len(sizes) - 1):
        dim = len(sizes) - 1 - k
        offsets += (rest % sizes[dim]) * strides[dim]
        rest = rest // sizes[dim]
    return offsets + rest * strides[0]
