"""The kernels of the pair losses: one launch forward, one backward.

A forward program sums squared errors over some tiles of one pair, winner and loser side by side, so
a target that the pair shares is read once. It writes one partial per source; the program that draws
the last ticket reduces them in a fixed order and finishes: statistics, weights, losses,
coefficients.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from fastpo_kernels._shared.triton_math import strided_offsets
from fastpo_kernels.pair_loss.gpu.epilogue import (
    finish,
    partial_results,
    ready_errors,
    reduced_errors,
    residual_product,
)
from fastpo_kernels.pair_loss.gpu.tiles import squared_errors, target_tile


@triton.jit(do_not_specialize=["n_pairs", "n_chunks"])
def pair_loss_fwd_kernel(
    sources,  # policy, then reference and annotators: each [2B, N], or errors [2B] where READY
    target_ptr,  # [B, N] where SHARED_TARGET, else [2B, N]
    losers,  # None; or losers of sources and target, each [B, N], the others' winners likewise
    mask_ptr,  # [B, N] where SHARED_MASK, else [2B, N]; or None
    minority_ptr,  # [B] or None
    statistics_ptr,  # [1] or [1 + M] or None
    pair_weight_ptr,  # [B] or None
    beta_ptr,  # [B] or None
    partials_ptr,  # [S + 1, P, 2B]
    ticket_ptr,  # [1], zero before and after
    loss_ptr,  # [], [B] where PER_PAIR, or None where not FINISH
    stats_ptr,  # [StatsLayout.size], or [PartialsLayout.size] where not FINISH
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    strides,
    target_strides,
    mask_strides,
    option_a,
    option_b,
    option_c,
    rho,
    weight_scale,
    weight_intercept,
    shift_scale,
    margin_beta,
    share,
    sft_weight,
    READY: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    FINISH: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    SFT: tl.constexpr,
    PER_PAIR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """e = mean mask (pred - target)**2 of both sides; loss = mean w objective(e_w, e_l, r_w, r_l).

    Writes `StatsLayout`'s vector; where not FINISH, `errors [S, 2B] | sums`.
    """
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // n_chunks, (program % n_chunks).to(tl.int32)
    sums = squared_errors(
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
        READY,
        SHARED_TARGET,
        SHARED_MASK,
        SAFEGUARD,
        BLOCK_SIZE,
    )
    row = 2 * n_pairs.to(tl.int64)
    for s in tl.static_range(len(sources)):
        if (READY >> s) & 1 == 0:
            out_ptr = partials_ptr + (s * n_chunks + chunk) * row + pair
            tl.store(out_ptr, tl.sum(sums[2 * s]))
            tl.store(out_ptr + n_pairs, tl.sum(sums[2 * s + 1]))
    if SAFEGUARD:
        out_ptr = partials_ptr + (len(sources) * n_chunks + chunk) * row + pair
        tl.store(out_ptr, tl.sum(sums[2 * len(sources)]))
    # Every store of this program is done before its ticket is drawn (release), and the last drawer
    # reads only after it (acquire).
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    if ticket == n_pairs * n_chunks - 1:
        errors = reduced_errors(
            sources, partials_ptr, n_pairs, n_chunks, n_elements, READY, BLOCK_P, BLOCK_B
        )
        dot = 0.0
        if SAFEGUARD:
            dot = residual_product(
                partials_ptr, len(sources), n_pairs, n_chunks, n_elements, BLOCK_P, BLOCK_B
            )
        if FINISH:
            finish(
                errors,
                dot,
                minority_ptr,
                statistics_ptr,
                None,
                pair_weight_ptr,
                beta_ptr,
                loss_ptr,
                stats_ptr,
                n_pairs,
                option_a,
                option_b,
                option_c,
                rho,
                weight_scale,
                weight_intercept,
                shift_scale,
                margin_beta,
                share,
                sft_weight,
                OBJECTIVE=OBJECTIVE,
                HAS_REFERENCE=HAS_REFERENCE,
                NORMALIZE=NORMALIZE,
                WEIGHT_KIND=WEIGHT_KIND,
                MARGIN_KIND=MARGIN_KIND,
                BATCH_BASELINE=BATCH_BASELINE,
                SAFEGUARD=SAFEGUARD,
                SFT=SFT,
                PER_PAIR=PER_PAIR,
                N_SUMS=0,
                BLOCK_B=BLOCK_B,
            )
        else:
            partial_results(
                errors,
                dot,
                stats_ptr,
                n_pairs,
                HAS_REFERENCE=HAS_REFERENCE,
                ADAPTIVE=NORMALIZE is not None,
                BATCH_BASELINE=BATCH_BASELINE,
                SAFEGUARD=SAFEGUARD,
                BLOCK_B=BLOCK_B,
            )
        tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize=["n_pairs"])
def pair_loss_finish_kernel(
    sources,  # errors [2B] of policy, then reference and annotators
    minority_ptr,  # [B] or None
    sums_ptr,  # [N_SUMS], in the order of LossSpec.n_sums
    pair_weight_ptr,  # [B] or None
    beta_ptr,  # [B] or None
    loss_ptr,  # [], or [B] where PER_PAIR
    stats_ptr,  # [StatsLayout.size]
    n_pairs,
    option_a,
    option_b,
    option_c,
    rho,
    weight_scale,
    weight_intercept,
    shift_scale,
    margin_beta,
    share,
    sft_weight,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    SFT: tl.constexpr,
    PER_PAIR: tl.constexpr,
    N_SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The last program's work alone, from errors already known and the sums of all processes.

    Writes `StatsLayout`'s vector.
    """
    b = tl.arange(0, BLOCK_B)
    errors = ()
    for s in tl.static_range(len(sources)):
        errors = errors + ready_errors(sources[s], b, n_pairs)
    finish(
        errors,
        0.0,
        minority_ptr,
        None,
        sums_ptr,
        pair_weight_ptr,
        beta_ptr,
        loss_ptr,
        stats_ptr,
        n_pairs,
        option_a,
        option_b,
        option_c,
        rho,
        weight_scale,
        weight_intercept,
        shift_scale,
        margin_beta,
        share,
        sft_weight,
        OBJECTIVE=OBJECTIVE,
        HAS_REFERENCE=HAS_REFERENCE,
        NORMALIZE=NORMALIZE,
        WEIGHT_KIND=WEIGHT_KIND,
        MARGIN_KIND=MARGIN_KIND,
        BATCH_BASELINE=BATCH_BASELINE,
        SAFEGUARD=SAFEGUARD,
        SFT=SFT,
        PER_PAIR=PER_PAIR,
        N_SUMS=N_SUMS,
        BLOCK_B=BLOCK_B,
    )


@triton.jit(
    do_not_specialize=["n_pairs", "n_chunks"],
    # A part of `stats`: where it begins depends on the number of pairs.
    do_not_specialize_on_alignment=["coefficient_ptr"],
)
def pair_loss_bwd_kernel(
    policy_ptr,  # [2B, N]
    target_ptr,  # [B, N] where SHARED_TARGET, else [2B, N]
    coefficient_ptr,  # [2B]: dloss/de
    grad_loss_ptr,  # [] or None
    grad_policy_ptr,  # [2B, N]
    losers,  # None; or losers of policy, target and gradient, each [B, N], the others' likewise
    mask_ptr,  # [B, N] where SHARED_MASK, else [2B, N]; or None
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    policy_strides,
    target_strides,
    grad_strides,
    mask_strides,
    SHARED_TARGET: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """dloss/dpred = grad_loss * dloss/de * 2/N * mask * (pred - target)."""
    program = tl.program_id(0).to(tl.int64)
    pair, tile = program // n_chunks, (program % n_chunks).to(tl.int32)
    index = tile * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < n_elements
    upstream = tl.div_rn(2.0, tl.cast(n_elements, tl.float32))
    if grad_loss_ptr is not None:
        upstream *= tl.load(grad_loss_ptr).to(tl.float32)
    targets = target_tile(
        target_ptr,
        None if losers is None else losers[1],
        pair,
        n_pairs,
        index,
        mask,
        sizes,
        target_strides,
        SHARED_TARGET,
    )
    if mask_ptr is not None:
        masks = target_tile(
            mask_ptr, None, pair, n_pairs, index, mask, sizes, mask_strides, SHARED_MASK
        )
    for side in tl.static_range(2):
        row = pair + side * n_pairs
        place, pred_ptr, grad_ptr = row, policy_ptr, grad_policy_ptr
        if losers is not None:
            place = pair
            if side == 1:
                pred_ptr, grad_ptr = losers[0], losers[2]
        at = strided_offsets(index, sizes, policy_strides[1:]) + place * policy_strides[0]
        diff = tl.load(pred_ptr + at, mask=mask, other=0.0).to(tl.float32) - targets[side]
        grad = (upstream * tl.load(coefficient_ptr + row).to(tl.float32)) * diff
        if mask_ptr is not None:
            grad *= masks[side]
        at = strided_offsets(index, sizes, grad_strides[1:]) + place * grad_strides[0]
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
