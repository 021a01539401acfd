"""The noised pair: validation, choice of implementation, named result. Imports no Triton."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastpo_kernels._impl import Impl, choose
from fastpo_kernels.pair_noise import ops
from fastpo_kernels.pair_noise import reference as eager

Prediction = Literal["epsilon", "v_prediction", "flow"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NoisedPair(NamedTuple):
    """What the denoiser sees and what it should answer.

    Attributes:
        noisy_latents: `[2B, *dims]`, winners first; a pair's sides share noise and timestep.
        target: float32, `[B, *dims]` for epsilon, where the pair shares it, else `[2B, *dims]`.
        timesteps: `[B]` int64.
    """

    noisy_latents: Tensor
    target: Tensor
    timesteps: Tensor


def _check_latents(latents: Tensor, logvar: Tensor | None, pair_key: Tensor) -> None:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"latents must be a floating-point tensor, got {got}")
    rows = 2 * len(pair_key)
    if latents.ndim < 2 or latents.shape[0] != rows or latents.numel() == 0:
        raise ValueError(
            f"latents must be [2B, *dims] for the {len(pair_key)} pairs of pair_key and not "
            f"empty, got {tuple(latents.shape)}"
        )
    if logvar is not None and (logvar.shape != latents.shape or logvar.dtype != latents.dtype):
        raise ValueError(
            f"logvar must match latents' {tuple(latents.shape)} {latents.dtype}, "
            f"got {tuple(logvar.shape)} {logvar.dtype}"
        )


def _check_counters(pair_key: Tensor, visit: Tensor, seed: int) -> None:
    for name, vector in (("pair_key", pair_key), ("visit", visit)):
        if not isinstance(vector, Tensor) or vector.dtype != torch.int64 or vector.ndim != 1:
            raise TypeError(f"{name} must be a vector of int64, got {vector!r:.60}")
    if pair_key.shape != visit.shape:
        raise ValueError(
            f"pair_key and visit must be of one length, got {len(pair_key)} and {len(visit)}"
        )
    if not 0 <= seed <= eager.MAX_SEED:
        raise ValueError(f"seed must lie in [0, 2^32), got {seed}")


def _check_schedule(signal: Tensor, sigma: Tensor, low: int, high: int, prediction: str) -> None:
    if signal.ndim != 1 or signal.shape != sigma.shape:
        raise ValueError(
            f"signal and sigma must be vectors of one length, got {tuple(signal.shape)} and "
            f"{tuple(sigma.shape)}"
        )
    if not 0 <= low < high <= len(signal):
        raise ValueError(f"0 <= low < high <= {len(signal)} must hold, got {low} and {high}")
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {prediction!r}")


def noised_pair(
    latents: Tensor,
    pair_key: Tensor,
    visit: Tensor,
    signal: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    low: int,
    high: int,
    prediction: Prediction = "epsilon",
    logvar: Tensor | None = None,
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    impl: Impl | None = None,
) -> NoisedPair:
    """Draws each pair's timestep and noise and forms both sides' noisy latents and the target.

    With `x = (latents + exp(logvar/2) n' - shift) scale` and the pair's shared t in [low, high) and
    n: `noisy = signal_t x + sigma_t n`; the target is n (`epsilon`), `signal_t n - sigma_t x`
    (`v_prediction`) or `n - x` (`flow`). All draws are those of `reference.py`: they depend on
    seed, pair and visit alone. One launch on a GPU.

    Args:
        latents: `[2B, *dims]` float32, bfloat16 or float16, winners first; contiguous for triton.
        pair_key: `[B]` int64 in [0, 2^63).
        visit: `[B]` int64 in [0, 2^32).
        signal: `[T]` factor of the latents at each timestep.
        sigma: `[T]` factor of the noise at each timestep.
        seed: the run's seed in [0, 2^32).
        low: first timestep drawn.
        high: first timestep not drawn.
        prediction: what the denoiser predicts.
        logvar: like `latents`, the posterior's log-variance; the sides' draws n' differ. None: no
            draw.
        shift: subtracted from the latents.
        scale: multiplies them then.
        dtype: of the noisy latents.
        impl: None is triton if the latents are on a supported GPU in a dtype it takes, with triton
            installed, else reference. An explicit choice never falls back.

    Returns:
        `NoisedPair`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, range, layout, device or `impl`.
    """
    _check_counters(pair_key, visit, seed)
    _check_latents(latents, logvar, pair_key)
    _check_schedule(signal, sigma, low, high, prediction)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    for name, t in (("logvar", logvar), ("pair_key", pair_key), ("visit", visit),
                    ("signal", signal), ("sigma", sigma)):  # fmt: skip
        if t is not None and t.device != latents.device:
            raise ValueError(f"{name} must be on latents' {latents.device}, got {t.device}")
    if choose(impl, [latents]) == "reference":
        noisy, target, timesteps = eager.noised_pair(
            latents, logvar, pair_key, visit, signal, sigma, prediction=prediction,
            seed=seed, low=low, high=high, shift=shift, scale=scale,
        )  # fmt: skip
        return NoisedPair(noisy.to(dtype), target, timesteps)
    for name, t in (("latents", latents), ("logvar", logvar), ("pair_key", pair_key),
                    ("visit", visit), ("signal", signal), ("sigma", sigma)):  # fmt: skip
        if t is not None and not t.is_contiguous():
            raise ValueError(f"impl='triton' needs {name} contiguous, got strides {t.stride()}")
    return NoisedPair(
        *ops.noised_pair(
            latents, logvar, pair_key, visit, signal, sigma, prediction, seed, low, high,
            shift, scale, dtype,
        )
    )  # fmt: skip
