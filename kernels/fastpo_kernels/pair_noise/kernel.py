"""The noise kernel and its launcher: draws, noisy latents of both sides and target in one launch.

The noise exists in registers only, unless it is asked for. Each element's draw depends on its own
counter, so the launch shape changes nothing: results are bitwise repeatable whatever the tile.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo_kernels._shared.launch_cache import Plan, Plans, described
from fastpo_kernels._shared.layout import device_guard, joint_layout
from fastpo_kernels._shared.philox_triton import (
    LOSER,
    NOISE,
    TIMESTEP,
    WINNER,
    latents_of,
    normals,
    velocity,
    words,
)
from fastpo_kernels._shared.triton_math import strided_offsets


@triton.jit(do_not_specialize=["n_pairs", "n_chunks", "seed", "low", "count"])
def noised_pair_kernel(
    latents_ptr,  # [2B, N]
    logvar_ptr,  # [2B, N] or None
    pair_key_ptr,  # [B]
    visit_ptr,  # [B]
    signal_ptr,  # [T]
    sigma_ptr,  # [T]
    noisy_ptr,  # [2B, N]
    target_ptr,  # [B, N] for noise, [2B, N] for v prediction and flow, or None: not wanted
    timesteps_ptr,  # [B]
    schedule_ptr,  # [2, B] or None: not wanted
    n_pairs,
    n_chunks,
    n_elements,
    sizes,
    latents_strides,
    logvar_strides,
    noisy_strides,
    target_strides,
    seed,
    low,
    count,
    shift,
    scale,
    TARGET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """noisy = signal_t x + sigma_t n; target = n, signal_t n - sigma_t x, or n - x."""
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program // n_chunks, (program % n_chunks).to(tl.int32)
    pair_key, visit = tl.load(pair_key_ptr + pair), tl.load(visit_ptr + pair)
    word, _, _, _ = words(tl.zeros((1,), tl.int32), pair_key, visit, seed, TIMESTEP)
    timestep = tl.sum(low + ((word.to(tl.int64) * count) >> 32))
    signal = tl.load(signal_ptr + timestep).to(tl.float32)
    sigma = tl.load(sigma_ptr + timestep).to(tl.float32)
    if chunk == 0:
        tl.store(timesteps_ptr + pair, timestep)
        if schedule_ptr is not None:
            tl.store(schedule_ptr + pair, signal)
            tl.store(schedule_ptr + n_pairs + pair, sigma)
    index = chunk * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < n_elements
    noise = normals(chunk, pair_key, visit, seed, NOISE, BLOCK_SIZE)
    for side in tl.static_range(2):
        row = pair + side * n_pairs
        at = strided_offsets(index, sizes, latents_strides[1:]) + row * latents_strides[0]
        logvar_at = at
        if logvar_ptr is not None:
            logvar_at = strided_offsets(index, sizes, logvar_strides[1:]) + row * logvar_strides[0]
        x = latents_of(
            latents_ptr, logvar_ptr, at, logvar_at, mask, chunk, pair_key, visit, seed,
            LOSER if side else WINNER, shift, scale, BLOCK_SIZE,
        )  # fmt: skip
        noisy = signal * x + sigma * noise
        at = strided_offsets(index, sizes, noisy_strides[1:]) + row * noisy_strides[0]
        tl.store(noisy_ptr + at, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
        if target_ptr is not None:
            at = strided_offsets(index, sizes, target_strides[1:]) + row * target_strides[0]
            if TARGET == "v_prediction":
                tl.store(target_ptr + at, velocity(noise, x, signal, sigma), mask=mask)
            elif TARGET == "flow":
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
    target: str,
    with_schedule: bool,
    seed: int,
    low: int,
    high: int,
    shift: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents of `dtype`, float32 target, int64 timesteps, float32 schedule; see `ops.py`."""
    from fastpo_kernels.pair_noise.ops import empty_outputs

    outputs = empty_outputs(latents, len(pair_key), target, with_schedule, dtype)
    noisy, formed, timesteps, schedule = outputs
    written = (
        noisy, formed if target != "none" else None, timesteps, schedule if with_schedule else None,
    )  # fmt: skip
    tensors = (latents, logvar, pair_key, visit, signal, sigma, *written)
    facts, at = described(tensors)
    key = (latents.device, facts, target, seed >> 31)  # of a wider type from there on
    numbers = (seed, low, high - low, float(shift), float(scale))
    with device_guard(latents):
        plan = _plans.get(key)
        if plan is not None:
            plan.repeat(tuple(at), numbers)
        else:
            plan = _plan(latents, logvar, noisy, written[1], target)
            _plans.keep(key, plan.first(noised_pair_kernel, tensors, numbers))
    return outputs


_plans = Plans()


def _plan(
    latents: Tensor, logvar: Tensor | None, noisy: Tensor, formed: Tensor | None, target: str
) -> Plan:
    """The launch for tensors that lie as these do."""
    n_pairs = len(latents) // 2
    given = [latents, noisy, *(t for t in (logvar, formed) if t is not None)]
    sizes, rows = joint_layout(given, in_order=True)
    n_elements = math.prod(sizes)
    block_size = 1024 if n_elements >= 1024 else max(16, triton.next_power_of_2(n_elements))
    n_chunks = -(-n_elements // block_size)
    return Plan(
        programs=n_pairs * n_chunks,
        sizes=(
            n_pairs, n_chunks, n_elements, sizes,
            rows[0], rows[2] if logvar is not None else rows[0], rows[1], rows[-1],
        ),
        constexprs={"TARGET": target, "BLOCK_SIZE": block_size},
        num_warps=2 if torch.version.hip is not None else 4,
    )  # fmt: skip
