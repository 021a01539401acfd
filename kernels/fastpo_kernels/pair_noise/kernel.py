"""The noise kernel and its launcher: draws, noisy latents of both sides and target in one launch.

The noise exists in registers only, unless it is the target. Each element's draw depends on its own
counter, so the launch shape changes nothing: results are bitwise repeatable whatever the tile.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo_kernels._shared.launch_cache import CachedLaunch, LaunchCache, described
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
from fastpo_kernels.pair_noise.spec import NoiseInputs, NoiseSpec, empty_outputs


@triton.jit(do_not_specialize=["n_pairs", "n_chunks", "seed", "low", "count"])
def noised_pair_kernel(
    latents_ptr,  # [2B, N]
    logvar_ptr,  # [2B, N] or None
    pair_key_ptr,  # [B]
    visit_ptr,  # [B]
    signal_ptr,  # [T]
    sigma_ptr,  # [T]
    noisy_ptr,  # [2B, N]
    target_ptr,  # [B, N] for epsilon, [2B, N] for v prediction and flow
    timesteps_ptr,  # [B]
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
    PREDICTION: tl.constexpr,
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
            latents_ptr,
            logvar_ptr,
            at,
            logvar_at,
            mask,
            chunk,
            pair_key,
            visit,
            seed,
            LOSER if side else WINNER,
            shift,
            scale,
            BLOCK_SIZE,
        )
        noisy = signal * x + sigma * noise
        at = strided_offsets(index, sizes, noisy_strides[1:]) + row * noisy_strides[0]
        tl.store(noisy_ptr + at, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
        at = strided_offsets(index, sizes, target_strides[1:]) + row * target_strides[0]
        if PREDICTION == "v_prediction":
            tl.store(target_ptr + at, velocity(noise, x, signal, sigma), mask=mask)
        elif PREDICTION == "flow":
            tl.store(target_ptr + at, noise - x, mask=mask)
        elif side == 0:
            tl.store(target_ptr + at, noise, mask=mask)


_launches = LaunchCache()


def launch(inputs: NoiseInputs, spec: NoiseSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents of the dtype asked for, float32 target, int64 timesteps."""
    outputs = empty_outputs(inputs, spec)
    given = (inputs.latents, inputs.logvar, inputs.pair_key, inputs.visit)
    tensors = (*given, inputs.signal, inputs.sigma, *outputs)
    facts, at = described(tensors)
    # From 2^31 on the seed is of a wider type.
    key = (inputs.latents.device, facts, spec.prediction, spec.seed >> 31)
    numbers = (spec.seed, spec.low, spec.high - spec.low, float(spec.shift), float(spec.scale))
    with device_guard(inputs.latents):
        known = _launches.get(key)
        if known is not None:
            known.relaunch(tuple(at), numbers)
        else:
            new = _prepare(inputs, spec, outputs[0], outputs[1])
            _launches.keep(key, new.launch(noised_pair_kernel, tensors, numbers))
    return outputs


def _prepare(inputs: NoiseInputs, spec: NoiseSpec, noisy: Tensor, target: Tensor) -> CachedLaunch:
    """The launch for tensors that lie as these do."""
    latents, logvar = inputs.latents, inputs.logvar
    n_pairs = len(latents) // 2
    # Draws are numbered in row-major order.
    sizes, (latents_strides, noisy_strides, target_strides, logvar_strides) = joint_layout(
        [latents, noisy, target, latents if logvar is None else logvar], in_order=True
    )
    n_elements = math.prod(sizes)
    block_size = 1024 if n_elements >= 1024 else max(16, triton.next_power_of_2(n_elements))
    n_chunks = -(-n_elements // block_size)
    strides = (latents_strides, logvar_strides, noisy_strides, target_strides)
    return CachedLaunch(
        programs=n_pairs * n_chunks,
        sizes=(n_pairs, n_chunks, n_elements, sizes, *strides),
        constexprs={"PREDICTION": spec.prediction, "BLOCK_SIZE": block_size},
        num_warps=2 if torch.version.hip is not None else 4,
    )
