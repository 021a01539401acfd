"""The two kernels of the pair losses and their launchers: one launch forward, one backward.

A forward program sums squared errors over some tiles of one pair, winner and loser side by side, so
a target that the pair shares is read once. It writes one partial per stream; the program that draws
the last ticket reduces them in a fixed order and finishes: statistics, weights, losses,
coefficients.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# ruff: noqa: RUF005 (Triton compiles no starred tuples)
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo_kernels._layout import device_guard
from fastpo_kernels._triton import strided_offsets
from fastpo_kernels.pair_loss import device
from fastpo_kernels.pair_loss.finish import finish, partial_results
from fastpo_kernels.pair_loss.target import target_tile
from fastpo_kernels.pair_target import EncodedTarget, KernelTarget


@dataclass(frozen=True)
class LaunchConfig:
    """Elements per tile, tiles' programs per pair, warps per program."""

    block_size: int
    programs_per_pair: int
    num_warps: int


def launch_config(n_pairs: int, n_elements: int, n_streams: int) -> LaunchConfig:
    """Small tiles while the batch is too small to fill a GPU; about a thousand programs at most.

    `n_streams` counts what a program holds: policy, reference and annotators that are read as
    predictions, latents and drawn noise of a target that is formed. Chosen from
    compiled register counts (benchmarks/results/aot.csv, 2026-11); not yet tuned on a GPU.
    """
    # Five streams over 8 warps spill on sm_80: ptxas stays at 128 registers, over 4 it need not.
    small = n_streams > 4 or n_pairs * n_elements < 1 << 20
    block_size, num_warps = (1024, 4) if small else (2048 if n_streams > 2 else 4096, 8)
    if n_pairs > 1024:
        # The last program holds vectors of all pairs. 16 warps have 128 registers a thread.
        block_size, num_warps = (4096, 16) if n_streams <= 4 else (2048, 8)
    if torch.version.hip is not None:
        num_warps //= 2
    programs = max(1, 1024 // max(n_pairs, 1))
    return LaunchConfig(block_size, min(-(-n_elements // block_size), programs), num_warps)


@triton.jit
def _squared_errors(
    sources,
    target,
    pair,
    chunk,
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    strides,
    target_strides,
    seed,
    shift,
    scale,
    READY: tl.constexpr,
    TARGET: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Per stream, sums of `(pred - target)**2` of winner and loser; last, of their product."""
    zeros = tl.zeros((BLOCK_SIZE,), tl.float32)
    sums = ()
    for _ in tl.static_range(2 * len(sources) + 1):
        sums = sums + (zeros,)
    for tile in range(chunk, tl.cdiv(n_elements, BLOCK_SIZE), n_chunks):
        index = tile * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = index < n_elements
        target_w, target_l = target_tile(
            target, pair, tile, n_pairs, index, mask, sizes, target_strides, seed, shift, scale,
            TARGET, BLOCK_SIZE,
        )  # fmt: skip
        new = ()
        dot = sums[2 * len(sources)]
        for s in tl.static_range(len(sources)):
            if (READY >> s) & 1:
                new = new + (sums[2 * s], sums[2 * s + 1])
            else:
                at = strided_offsets(index, sizes, strides[s][1:]) + pair * strides[s][0]
                winner = tl.load(sources[s] + at, mask=mask, other=0.0).to(tl.float32) - target_w
                at += n_pairs * strides[s][0]
                loser = tl.load(sources[s] + at, mask=mask, other=0.0).to(tl.float32) - target_l
                new = new + (sums[2 * s] + winner * winner, sums[2 * s + 1] + loser * loser)
                if SAFEGUARD and s == 0:
                    dot += winner * loser
        sums = new + (dot,)
    return sums


@triton.jit(do_not_specialize=["n_pairs", "n_chunks", "seed"])
def _pair_loss_fwd_kernel(
    sources,  # policy, then reference and annotators: each [2B, N], or errors [2B] where READY
    target,  # [B, N] or [2B, N] or None: drawn; latents and logvar [2B, N]; four times [B]
    minority_ptr,  # [B] or None
    statistics_ptr,  # [1] or [1 + M] or None
    pair_weight_ptr,  # [B] or None
    partials_ptr,  # [S + 1, P, 2B]
    ticket_ptr,  # [1], zero before and after
    loss_ptr,  # [] or None: errors and sums only
    stats_ptr,  # the layout of ops.py, or errors [S, 2B] and sums
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    strides,
    target_strides,
    options,
    adaptive_options,
    mu,
    seed,
    shift,
    scale,
    READY: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TARGET: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """e = mean (pred - target)**2 of both sides; loss = mean w objective(e_w, e_l, r_w, r_l)."""
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // n_chunks, (program % n_chunks).to(tl.int32)
    sums = _squared_errors(
        sources, target, pair, chunk, n_pairs, n_chunks, n_elements, sizes, strides,
        target_strides, seed, shift, scale, READY, TARGET, SAFEGUARD, BLOCK_SIZE,
    )  # fmt: skip
    for s in tl.static_range(len(sources)):
        if (READY >> s) & 1 == 0:
            out_ptr = partials_ptr + (s * n_chunks + chunk) * 2 * n_pairs + pair
            tl.store(out_ptr, tl.sum(sums[2 * s]))
            tl.store(out_ptr + n_pairs, tl.sum(sums[2 * s + 1]))
    if SAFEGUARD:
        out_ptr = partials_ptr + (len(sources) * n_chunks + chunk) * 2 * n_pairs + pair
        tl.store(out_ptr, tl.sum(sums[2 * len(sources)]))
    # Every store of this program is done before its ticket is drawn (release), and the last drawer
    # reads only after it (acquire).
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    if ticket == n_pairs * n_chunks - 1:
        tl.store(ticket_ptr, 0)
        if OBJECTIVE is None:
            partial_results(
                sources, partials_ptr, stats_ptr, n_pairs, n_chunks, n_elements, READY,
                HAS_REFERENCE, NORMALIZE, BATCH_BASELINE, SAFEGUARD, BLOCK_P, BLOCK_B,
            )  # fmt: skip
        else:
            finish(
                sources, minority_ptr, statistics_ptr, pair_weight_ptr, partials_ptr, loss_ptr,
                stats_ptr, n_pairs, n_chunks, n_elements, options, adaptive_options, mu, READY,
                OBJECTIVE, HAS_REFERENCE, NORMALIZE, WEIGHT_KIND, MARGIN_KIND, BATCH_BASELINE,
                SAFEGUARD, 0, BLOCK_P, BLOCK_B,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs"])
def _pair_loss_finish_kernel(
    sources,  # errors [2B] of policy, then reference and annotators
    minority_ptr,  # [B] or None
    sums_ptr,  # [N_SUMS], the layout of ops.py
    pair_weight_ptr,  # [B] or None
    loss_ptr,  # []
    stats_ptr,  # the layout of ops.py
    n_pairs,
    options,
    adaptive_options,
    mu,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    N_SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The last program's work alone, from errors already known and the sums of all processes."""
    finish(
        sources, minority_ptr, sums_ptr, pair_weight_ptr, stats_ptr, loss_ptr, stats_ptr, n_pairs,
        1, 1, options, adaptive_options, mu, -1, OBJECTIVE, HAS_REFERENCE, NORMALIZE, WEIGHT_KIND,
        MARGIN_KIND, BATCH_BASELINE, SAFEGUARD, N_SUMS, 1, BLOCK_B,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs", "n_chunks", "seed"])
def _pair_loss_bwd_kernel(
    policy_ptr,  # [2B, N]
    target,  # as in the forward kernel
    coefficient_ptr,  # [2B]: dloss/de
    grad_loss_ptr,  # [] or None
    grad_policy_ptr,  # [2B, N]
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    policy_strides,
    target_strides,
    grad_strides,
    seed,
    shift,
    scale,
    TARGET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """dloss/dpred = grad_loss * dloss/de * 2/N * (pred - target)."""
    program = tl.program_id(0).to(tl.int64)
    pair, tile = program // n_chunks, (program % n_chunks).to(tl.int32)
    index = tile * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < n_elements
    upstream = tl.div_rn(2.0, tl.cast(n_elements, tl.float32))
    if grad_loss_ptr is not None:
        upstream *= tl.load(grad_loss_ptr).to(tl.float32)
    targets = target_tile(
        target, pair, tile, n_pairs, index, mask, sizes, target_strides, seed, shift, scale,
        TARGET, BLOCK_SIZE,
    )  # fmt: skip
    for side in tl.static_range(2):
        row = pair + side * n_pairs
        at = strided_offsets(index, sizes, policy_strides[1:]) + row * policy_strides[0]
        diff = tl.load(policy_ptr + at, mask=mask, other=0.0).to(tl.float32) - targets[side]
        grad = (upstream * tl.load(coefficient_ptr + row).to(tl.float32)) * diff
        at = strided_offsets(index, sizes, grad_strides[1:]) + row * grad_strides[0]
        tl.store(grad_policy_ptr + at, grad.to(grad_policy_ptr.dtype.element_ty), mask=mask)


_tickets: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device, *, fresh: bool) -> Tensor:
    """A zeroed int32, left at zero by every launch.

    One a stream, kept, unless `fresh` or a graph is captured: graphs' replays may meet, and what
    is allocated inside a graph's memory pool must not outlive the call.
    """
    if fresh or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]


def launch_forward(
    sources: Sequence[Tensor],
    target: EncodedTarget,
    minority: Tensor | None,
    statistics: Tensor | None,
    pair_weight: Tensor | None,
    loss: Tensor | None,
    stats: Tensor,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: Sequence[str],
    adaptive_scalars: Sequence[float],
    has_reference: bool,
    safeguard: float | None,
    ticket_counter: Tensor,
) -> None:
    """Fills `loss` and `stats`; without an objective, `stats` with errors `[S, 2B]` and sums."""
    policy = sources[0]
    n_pairs = policy.shape[0] // 2
    full = [s for s in sources if s.ndim > 1]
    formed = KernelTarget.decode(*target)
    sizes, rows, target_strides = formed.layout(full)
    by_id = {id(s): r for s, r in zip(full, rows, strict=True)}
    n_elements = math.prod(sizes)
    config = launch_config(n_pairs, n_elements, len(full) + formed.n_streams)
    n_chunks = config.programs_per_pair
    normalize, weight_kind, margin_kind = adaptive_kinds or (None, None, None)
    with device_guard(policy):
        partials = torch.empty(
            (len(sources) + 1) * n_chunks * 2 * n_pairs, dtype=torch.float32, device=policy.device
        )
        _pair_loss_fwd_kernel[(n_pairs * n_chunks,)](
            tuple(sources), formed.tensors, minority, statistics, pair_weight,
            partials, ticket_counter, loss, stats,
            n_pairs, n_chunks, n_elements, sizes,
            tuple(by_id.get(id(s), target_strides[0]) for s in sources), target_strides,
            tuple(options), tuple(adaptive_scalars) or (0.0,), safeguard or 0.0, *formed.scalars,
            READY=sum(1 << k for k, s in enumerate(sources) if s.ndim == 1),
            OBJECTIVE=None if loss is None else device.OBJECTIVES[objective],
            HAS_REFERENCE=has_reference,
            TARGET=formed.kind,
            NORMALIZE=normalize,
            WEIGHT_KIND=weight_kind,
            MARGIN_KIND=margin_kind,
            BATCH_BASELINE=objective == "kto",
            SAFEGUARD=safeguard is not None,
            BLOCK_SIZE=config.block_size,
            BLOCK_P=triton.next_power_of_2(n_chunks),
            BLOCK_B=triton.next_power_of_2(n_pairs),
            num_warps=config.num_warps,
        )  # fmt: skip


def launch_finish(
    errors: Sequence[Tensor],
    minority: Tensor | None,
    sums: Tensor,
    pair_weight: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: Sequence[str],
    adaptive_scalars: Sequence[float],
    has_reference: bool,
    safeguard: float | None,
) -> None:
    """Fills `loss` and `stats` from the errors `[2B]` of every source and sums of all processes."""
    n_pairs = errors[0].shape[0] // 2
    normalize, weight_kind, margin_kind = adaptive_kinds or (None, None, None)
    with device_guard(errors[0]):
        _pair_loss_finish_kernel[(1,)](
            tuple(errors), minority, sums, pair_weight,
            loss, stats,
            n_pairs,
            tuple(options), tuple(adaptive_scalars) or (0.0,), safeguard or 0.0,
            OBJECTIVE=device.OBJECTIVES[objective],
            HAS_REFERENCE=has_reference,
            NORMALIZE=normalize,
            WEIGHT_KIND=weight_kind,
            MARGIN_KIND=margin_kind,
            BATCH_BASELINE=objective == "kto",
            SAFEGUARD=safeguard is not None,
            N_SUMS=sums.shape[0],
            BLOCK_B=triton.next_power_of_2(n_pairs),
            num_warps=4 if torch.version.hip is not None else 8,
        )  # fmt: skip


def launch_backward(
    policy: Tensor,
    target: EncodedTarget,
    coefficients: Tensor,
    grad_loss: Tensor | None,
) -> Tensor:
    """The policy's gradient, in its dtype and, where it is dense, its layout."""
    n_pairs = policy.shape[0] // 2
    with device_guard(policy):
        grad_policy = torch.empty_like(policy)
        formed = KernelTarget.decode(*target)
        sizes, rows, target_strides = formed.layout([policy, grad_policy])
        n_elements = math.prod(sizes)
        config = launch_config(n_pairs, n_elements, 1)
        n_chunks = triton.cdiv(n_elements, config.block_size)
        _pair_loss_bwd_kernel[(n_pairs * n_chunks,)](
            policy, formed.tensors, coefficients, grad_loss,
            grad_policy,
            n_pairs, n_chunks, n_elements, sizes,
            rows[0], target_strides, rows[1], *formed.scalars,
            TARGET=formed.kind,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
        )  # fmt: skip
    return grad_policy
