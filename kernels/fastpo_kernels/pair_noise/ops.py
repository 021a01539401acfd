"""The noise as a custom operator: schema and fake implementation. Torch only.

`kernel.py`, which imports Triton, is imported inside, when the operator first runs on data. The
inputs are data: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo_kernels.pair_noise.spec import NoiseInputs, NoiseSpec, empty_outputs


def _launch(inputs: NoiseInputs, spec: NoiseSpec) -> tuple[Tensor, Tensor, Tensor]:
    from fastpo_kernels.pair_noise import kernel

    return kernel.launch(inputs, spec)


@torch.library.custom_op("fastpo::noised_pair", mutates_args=())
def noised_pair_op(
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
    """Noisy latents, target and timesteps."""
    inputs = NoiseInputs(latents, logvar, pair_key, visit, signal, sigma)
    spec = NoiseSpec(prediction, seed, low, high, shift, scale, dtype)  # pyright: ignore[reportArgumentType]
    return _launch(inputs, spec)


@noised_pair_op.register_fake
def _(latents, logvar, pair_key, visit, signal, sigma, prediction, *numbers):
    inputs = NoiseInputs(latents, logvar, pair_key, visit, signal, sigma)
    return empty_outputs(inputs, NoiseSpec(prediction, *numbers))


def noised_pair(inputs: NoiseInputs, spec: NoiseSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The operator where something traces, else the launcher."""
    if not torch.compiler.is_compiling() and type(inputs.latents) is Tensor:
        return _launch(inputs, spec)
    return noised_pair_op(
        inputs.latents,
        inputs.logvar,
        inputs.pair_key,
        inputs.visit,
        inputs.signal,
        inputs.sigma,
        spec.prediction,
        spec.seed,
        spec.low,
        spec.high,
        spec.shift,
        spec.scale,
        spec.dtype,
    )
