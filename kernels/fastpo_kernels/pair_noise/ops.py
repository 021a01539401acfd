"""The noise as a custom operator: schema and fake implementation. Torch only.

`kernel.py`, which imports Triton, is imported inside, when the operator first runs on data. The
inputs are data: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noised_pair_eager(
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
    """Noisy latents, target and timesteps: the launcher, without the dispatcher."""
    from fastpo_kernels.pair_noise import kernel

    return kernel.launch(
        latents, logvar, pair_key, visit, signal, sigma,
        prediction, seed, low, high, shift, scale, dtype,
    )  # fmt: skip


noised_pair_op = torch.library.custom_op("fastpo::noised_pair", noised_pair_eager, mutates_args=())


@noised_pair_op.register_fake
def _(
    latents,
    logvar,
    pair_key,
    visit,
    signal,
    sigma,
    prediction,
    seed,
    low,
    high,
    shift,
    scale,
    dtype,
):
    rows = pair_key.shape[0] * (1 if prediction == "epsilon" else 2)
    return (
        torch.empty(latents.shape, dtype=dtype, device=latents.device),
        latents.new_empty((rows, *latents.shape[1:]), dtype=torch.float32),
        pair_key.new_empty(pair_key.shape, dtype=torch.int64),
    )


def noised_pair(latents: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """The operator where something traces, else the launcher."""
    traced = torch.compiler.is_compiling() or type(latents) is not Tensor
    return (noised_pair_op if traced else noised_pair_eager)(latents, *rest)
