"""What the prediction is compared with: read, or formed in registers from noise and latents."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from fastpo_kernels._shared.philox_triton import LOSER, NOISE, WINNER, latents_of, normals, velocity
from fastpo_kernels._shared.triton_math import strided_offsets


@triton.jit
def target_tile(
    parts,  # target or noise, latents, logvar, signal, sigma, pair_key, visit; see kernel.py
    pair,
    tile,
    n_pairs,
    index,
    mask,
    sizes,
    strides,
    seed,
    shift,
    scale,
    TARGET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The winner's and the loser's target on one tile of a pair, float32.

    `shared`: the first part, or the noise drawn again; `separate`: the first part's two rows;
    `v_prediction`: `signal n - sigma x`; `flow`: `n - x`.
    """
    pair_key, visit = 0, 0
    if parts[5] is not None:
        pair_key, visit = tl.load(parts[5] + pair), tl.load(parts[6] + pair)
    if parts[0] is None:
        first = tl.where(mask, normals(tile, pair_key, visit, seed, NOISE, BLOCK_SIZE), 0.0)
    else:
        at = strided_offsets(index, sizes, strides[0][1:]) + pair * strides[0][0]
        first = tl.load(parts[0] + at, mask=mask, other=0.0).to(tl.float32)
    if TARGET == "shared":
        winner, loser = first, first
    elif TARGET == "separate":
        at += n_pairs.to(tl.int64) * strides[0][0]
        winner = first
        loser = tl.load(parts[0] + at, mask=mask, other=0.0).to(tl.float32)
    else:
        x_at = strided_offsets(index, sizes, strides[1][1:]) + pair * strides[1][0]
        logvar_at = x_at
        if parts[2] is not None:
            logvar_at = strided_offsets(index, sizes, strides[2][1:]) + pair * strides[2][0]
        winner = latents_of(
            parts[1], parts[2], x_at, logvar_at, mask, tile, pair_key, visit, seed, WINNER,
            shift, scale, BLOCK_SIZE,
        )  # fmt: skip
        loser = latents_of(
            parts[1], parts[2], x_at + n_pairs.to(tl.int64) * strides[1][0],
            logvar_at + n_pairs.to(tl.int64) * strides[2][0], mask, tile, pair_key, visit, seed,
            LOSER, shift, scale, BLOCK_SIZE,
        )  # fmt: skip
        if TARGET == "v_prediction":
            signal = tl.load(parts[3] + pair).to(tl.float32)
            sigma = tl.load(parts[4] + pair).to(tl.float32)
            winner = velocity(first, winner, signal, sigma)
            loser = velocity(first, loser, signal, sigma)
        else:
            winner, loser = first - winner, first - loser
        # Beyond the row predictions are read as 0.
        winner, loser = tl.where(mask, winner, 0.0), tl.where(mask, loser, 0.0)
    return winner, loser
