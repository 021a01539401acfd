"""What a program reads of one pair: tiles of winner and loser, and the sums of their squares."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# ruff: noqa: RUF005 (Triton compiles no starred tuples)
import triton
import triton.language as tl

from fastpo_kernels._shared.triton_math import strided_offsets


@triton.jit
def target_tile(
    target_ptr,
    loser_ptr,
    pair,
    n_pairs,
    index,
    mask,
    sizes,
    strides,
    SHARED_TARGET: tl.constexpr,
):
    """The winner's and the loser's target on one tile of a pair, float32."""
    at = strided_offsets(index, sizes, strides[1:]) + pair * strides[0]
    winner = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
    loser = winner
    if not SHARED_TARGET:
        if loser_ptr is None:
            at += n_pairs.to(tl.int64) * strides[0]
            loser = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            loser = tl.load(loser_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return winner, loser


@triton.jit
def squared_errors(
    sources,
    target_ptr,
    losers,
    mask_ptr,
    pair,
    chunk,
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    strides,
    target_strides,
    mask_strides,
    READY: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Per source, sums of `(pred - target)**2` of winner and loser; last, of their product."""
    zeros = tl.zeros((BLOCK_SIZE,), tl.float32)
    sums = ()
    for _ in tl.static_range(2 * len(sources) + 1):
        sums = sums + (zeros,)
    target_loser_ptr = None if losers is None else losers[len(sources)]
    for tile in range(chunk, tl.cdiv(n_elements, BLOCK_SIZE), n_chunks):
        index = tile * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = index < n_elements
        target_w, target_l = target_tile(
            target_ptr,
            target_loser_ptr,
            pair,
            n_pairs,
            index,
            mask,
            sizes,
            target_strides,
            SHARED_TARGET,
        )
        if mask_ptr is not None:
            mask_w, mask_l = target_tile(
                mask_ptr, None, pair, n_pairs, index, mask, sizes, mask_strides, SHARED_MASK
            )
        new = ()
        dot = sums[2 * len(sources)]
        for s in tl.static_range(len(sources)):
            if (READY >> s) & 1:
                new = new + (sums[2 * s], sums[2 * s + 1])
            else:
                at = strided_offsets(index, sizes, strides[s][1:]) + pair * strides[s][0]
                winner = tl.load(sources[s] + at, mask=mask, other=0.0).to(tl.float32) - target_w
                if losers is None:
                    at += n_pairs.to(tl.int64) * strides[s][0]
                    loser = tl.load(sources[s] + at, mask=mask, other=0.0).to(tl.float32)
                else:
                    loser = tl.load(losers[s] + at, mask=mask, other=0.0).to(tl.float32)
                loser -= target_l
                if mask_ptr is None:
                    new = new + (sums[2 * s] + winner * winner, sums[2 * s + 1] + loser * loser)
                else:
                    square_w, square_l = mask_w * (winner * winner), mask_l * (loser * loser)
                    new = new + (sums[2 * s] + square_w, sums[2 * s + 1] + square_l)
                if SAFEGUARD and s == 0:
                    dot += winner * loser
        sums = new + (dot,)
    return sums
