"""The noise kernel and its launcher: draws, noisy latents of both sides and target in one launch.

The noise exists in registers only, unless it is the target. Each element's draw depends on its own
counter, so the launch shape changes nothing: results are bitwise repeatable whatever the tile.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo_kernels.pair_noise.reference import Stream

NOISE, TIMESTEP = tl.constexpr(int(Stream.NOISE)), tl.constexpr(int(Stream.TIMESTEP))
WINNER = tl.constexpr(int(Stream.POSTERIOR_WINNER))
LOSER = tl.constexpr(int(Stream.POSTERIOR_LOSER))


@triton.jit
def _words(block, pair_key, visit, seed, stream):
    """Philox4x32-10 under the key (seed, stream) of the counter (block, visit, pair_key)."""
    key = (tl.cast(stream, tl.uint64) << 32) | tl.cast(seed, tl.uint64)
    zero = tl.zeros_like(block).to(tl.uint32)
    low, high = (pair_key & 0xFFFFFFFF).to(tl.uint32), (pair_key >> 32).to(tl.uint32)
    return tl.philox(key, block.to(tl.uint32), zero + visit.to(tl.uint32), zero + low, zero + high)


@triton.jit
def _turn(v):
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
def _box_muller(a, b):
    """`r cos(2 pi v)` and `r sin(2 pi v)`, `u = (a/2^8 + 1) 2^-24`, `r = sqrt(-2 ln u)`."""
    u = (a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 5.9604644775390625e-08
    cosine, sine = _turn((b >> 8).to(tl.float32) * 5.9604644775390625e-08)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * cosine, radius * sine


@triton.jit
def _normals(chunk, pair_key, visit, seed, stream, BLOCK_SIZE: tl.constexpr):
    """Standard normals of the elements of one tile, in order: four a Philox block."""
    block = chunk * (BLOCK_SIZE // 4) + tl.arange(0, BLOCK_SIZE // 4)
    w0, w1, w2, w3 = _words(block, pair_key, visit, seed, stream)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _latents(
    latents_ptr, logvar_ptr, at, mask, chunk, pair_key, visit, seed, stream, shift, scale,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """`(mean + exp(logvar / 2) n - shift) scale`."""
    x = tl.load(latents_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if logvar_ptr is not None:
        logvar = tl.load(logvar_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x += tl.exp(0.5 * logvar) * _normals(chunk, pair_key, visit, seed, stream, BLOCK_SIZE)
    return (x - shift) * scale


@triton.jit(do_not_specialize=["n_pairs", "n_chunks", "seed", "low", "count"])
def _noised_pair_kernel(
    latents_ptr,  # [2B, N]
    logvar_ptr,  # [2B, N] or None
    pair_key_ptr,  # [B]
    visit_ptr,  # [B]
    signal_ptr,  # [T]
    sigma_ptr,  # [T]
    noisy_ptr,  # [2B, N]
    target_ptr,  # [B, N] for epsilon, else [2B, N]
    timesteps_ptr,  # [B]
    n_pairs,
    n_chunks,
    n_elements,
    seed,
    low,
    count,
    shift,
    scale,
    PREDICTION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """noisy = signal_t x + sigma_t n; target = n, signal_t n - sigma_t x, or n - x."""
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // n_chunks, (program % n_chunks).to(tl.int32)
    pair_key, visit = tl.load(pair_key_ptr + pair), tl.load(visit_ptr + pair)
    word, _, _, _ = _words(tl.zeros((1,), tl.int32), pair_key, visit, seed, TIMESTEP)
    timestep = tl.sum(low + ((word.to(tl.int64) * count) >> 32))
    if chunk == 0:
        tl.store(timesteps_ptr + pair, timestep)
    signal = tl.load(signal_ptr + timestep).to(tl.float32)
    sigma = tl.load(sigma_ptr + timestep).to(tl.float32)
    index = chunk * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < n_elements
    noise = _normals(chunk, pair_key, visit, seed, NOISE, BLOCK_SIZE)
    for side in tl.static_range(2):
        at = (pair + side * n_pairs) * n_elements + index
        x = _latents(
            latents_ptr, logvar_ptr, at, mask, chunk, pair_key, visit, seed,
            LOSER if side else WINNER, shift, scale, BLOCK_SIZE,
        )  # fmt: skip
        noisy = signal * x + sigma * noise
        tl.store(noisy_ptr + at, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
        if PREDICTION == "v_prediction":
            tl.store(target_ptr + at, signal * noise - sigma * x, mask=mask)
        elif PREDICTION == "flow":
            tl.store(target_ptr + at, noise - x, mask=mask)
        elif side == 0:
            tl.store(target_ptr + at, noise, mask=mask)


def launch(
    latents: Tensor,
    logvar: Tensor | None,
    pair_key: Tensor,
    visit: Tensor,
    signal: Tensor,
    sigma: Tensor,
    prediction: str,
    seed: int,
    low: int,
    high: int,
    shift: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents of `dtype`, float32 target, int64 timesteps."""
    n_pairs, dims = len(pair_key), latents.shape[1:]
    n_elements = latents[0].numel()
    block_size = 1024 if n_elements >= 1024 else max(16, triton.next_power_of_2(n_elements))
    n_chunks = -(-n_elements // block_size)
    rows = n_pairs if prediction == "epsilon" else 2 * n_pairs
    guard = torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext()
    with guard:
        noisy = torch.empty(latents.shape, dtype=dtype, device=latents.device)
        target = torch.empty((rows, *dims), dtype=torch.float32, device=latents.device)
        timesteps = torch.empty(n_pairs, dtype=torch.int64, device=latents.device)
        _noised_pair_kernel[(n_pairs * n_chunks,)](
            latents, logvar, pair_key, visit, signal, sigma,
            noisy, target, timesteps,
            n_pairs, n_chunks, n_elements,
            seed, low, high - low, shift, scale,
            PREDICTION=prediction,
            BLOCK_SIZE=block_size,
            num_warps=2 if torch.version.hip is not None else 4,
        )  # fmt: skip
    return noisy, target, timesteps
