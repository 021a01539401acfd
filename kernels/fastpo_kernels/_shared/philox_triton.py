"""The counter-based draws of `philox.py` as `@triton.jit` functions.

Each result is rounded by an explicit `fma`, so that no compiler contracts it with what a kernel
does next: equal counters give equal bits in every kernel.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fastpo_kernels._shared.philox import Stream

NOISE, TIMESTEP = tl.constexpr(int(Stream.NOISE)), tl.constexpr(int(Stream.TIMESTEP))
WINNER = tl.constexpr(int(Stream.POSTERIOR_WINNER))
LOSER = tl.constexpr(int(Stream.POSTERIOR_LOSER))


@triton.jit
def words(block, pair_key, visit, seed, stream):
    """Philox4x32-10 under the key (seed, stream) of the counter (block, visit, pair_key)."""
    key = (tl.cast(stream, tl.uint64) << 32) | tl.cast(seed, tl.uint64)
    zero = tl.zeros_like(block).to(tl.uint32)
    low, high = (pair_key & 0xFFFFFFFF).to(tl.uint32), (pair_key >> 32).to(tl.uint32)
    return tl.philox(key, block.to(tl.uint32), zero + visit.to(tl.uint32), zero + low, zero + high)


@triton.jit
def turn(v):
    """`cos(2 pi v)` and `sin(2 pi v)`, v in [0, 1): exact reduction to an eighth, then Taylor.

    The library's versions carry a reduction for huge arguments, and its stack, in every thread.
    """
    quarter = tl.floor(4.0 * v + 0.5)
    x = 6.283185307179586 * (v - 0.25 * quarter)
    t = x * x
    s = x * (1.0 + t * (-1.0 / 6 + t * (1.0 / 120 + t * (-1.0 / 5040 + t * (1.0 / 362880)))))
    c = -1.0 / 720 + t * (1.0 / 40320 - t * (1.0 / 3628800))
    c = 1.0 + t * (-0.5 + t * (1.0 / 24 + t * c))
    q = quarter.to(tl.int32)
    cosine, sine = tl.where((q & 1) == 0, c, -s), tl.where((q & 1) == 0, s, c)
    return tl.where((q & 2) == 0, cosine, -cosine), tl.where((q & 2) == 0, sine, -sine)


@triton.jit
def box_muller(a, b):
    """`r cos(2 pi v)` and `r sin(2 pi v)`, `u = (a/2^8 + 1) 2^-24`, `r = sqrt(-2 ln u)`."""
    u = (a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 5.9604644775390625e-08
    cosine, sine = turn((b >> 8).to(tl.float32) * 5.9604644775390625e-08)
    radius = tl.sqrt(-2.0 * tl.log(u))
    # Products that no compiler fuses with what comes after: a draw is the same in every kernel.
    return tl.fma(radius, cosine, 0.0), tl.fma(radius, sine, 0.0)


@triton.jit
def normals(chunk, pair_key, visit, seed, stream, BLOCK_SIZE: tl.constexpr):
    """Standard normals of the elements of one tile, in order: four a Philox block."""
    block = chunk * (BLOCK_SIZE // 4) + tl.arange(0, BLOCK_SIZE // 4)
    w0, w1, w2, w3 = words(block, pair_key, visit, seed, stream)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def latents_of(
    latents_ptr,
    logvar_ptr,
    at,
    logvar_at,
    mask,
    tile,
    pair_key,
    visit,
    seed,
    stream,
    shift,
    scale,
    BLOCK_SIZE: tl.constexpr,
):
    """`(mean + exp(logvar / 2) n - shift) scale`."""
    x = tl.load(latents_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if logvar_ptr is not None:
        logvar = tl.load(logvar_ptr + logvar_at, mask=mask, other=0.0).to(tl.float32)
        drawn = normals(tile, pair_key, visit, seed, stream, BLOCK_SIZE)
        x = tl.fma(tl.exp(0.5 * logvar), drawn, x)
    return tl.fma(x - shift, scale, 0.0)


@triton.jit
def velocity(noise, x, signal, sigma):
    """`signal noise - sigma x`, rounded the same in every kernel."""
    return tl.fma(signal, noise, -sigma * x)
