"""The noise as a custom operator: schema and fake implementation. Torch only.

`kernel.py`, which imports Triton, is imported inside, when the operator first runs on data. The
inputs are data: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_outputs(
    latents: Tensor, n_pairs: int, target: str, with_schedule: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the results: dense latents keep their layout, what is not wanted is empty."""
    sides = latents if target in ("v_prediction", "flow") else latents[:n_pairs]
    device, full = latents.device, torch.float32
    nothing = target == "none"
    return (
        torch.empty_like(latents, dtype=dtype),
        torch.empty(0, dtype=full, device=device)
        if nothing
        else torch.empty_like(sides, dtype=full),
        torch.empty(n_pairs, dtype=torch.int64, device=device),
        torch.empty((2, n_pairs if with_schedule else 0), dtype=full, device=device),
    )


def noised_pair_eager(
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
    """Noisy latents, target, timesteps and schedule: the launcher, without the dispatcher.

    `target` is `epsilon` (the noise), `v_prediction`, `flow` or `none`; the schedule is signal and
    sigma at each pair's timestep, `[2, B]`. What is not wanted comes back without elements.
    """
    from fastpo_kernels.pair_noise import kernel

    return kernel.launch(
        latents, logvar, pair_key, visit, signal, sigma,
        target, with_schedule, seed, low, high, shift, scale, dtype,
    )  # fmt: skip


noised_pair_op = torch.library.custom_op("fastpo::noised_pair", noised_pair_eager, mutates_args=())


@noised_pair_op.register_fake
def _(latents, logvar, pair_key, visit, signal, sigma, target, with_schedule, *options):
    return empty_outputs(latents, pair_key.shape[0], target, with_schedule, options[-1])


def noised_pair(latents: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator where something traces, else the launcher."""
    traced = torch.compiler.is_compiling() or type(latents) is not Tensor
    return (noised_pair_op if traced else noised_pair_eager)(latents, *rest)
