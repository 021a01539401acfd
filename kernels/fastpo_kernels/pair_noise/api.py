"""The noised pair: validation, choice of implementation, named result. Imports no Triton."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastpo_kernels._shared.dispatch import MAX_ELEMENTS, choose
from fastpo_kernels._shared.philox import MAX_SEED
from fastpo_kernels._shared.target import Prediction
from fastpo_kernels.pair_noise import ops
from fastpo_kernels.pair_noise import reference as oracle
from fastpo_kernels.pair_noise.spec import NoiseInputs, NoiseSpec

Impl = Literal["triton", "reference"]
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
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in [0, 2^32), got {seed}")


def _check_schedule(signal: Tensor, sigma: Tensor, spec: NoiseSpec) -> None:
    if signal.ndim != 1 or signal.shape != sigma.shape:
        raise ValueError(
            f"signal and sigma must be vectors of one length, got {tuple(signal.shape)} and "
            f"{tuple(sigma.shape)}"
        )
    low, high = spec.low, spec.high
    if not 0 <= low < high <= len(signal):
        raise ValueError(f"0 <= low < high <= {len(signal)} must hold, got {low} and {high}")
    if spec.prediction not in get_args(Prediction):
        raise ValueError(
            f"prediction must be one of {get_args(Prediction)}, got {spec.prediction!r}"
        )
    if spec.dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {spec.dtype}")


def _chosen(impl: str | None, latents: Tensor) -> str:
    """`choose`, and the kernel's limit: 32-bit positions in a sample."""
    n_elements = latents[0].numel()
    if impl is None and n_elements > MAX_ELEMENTS:
        return "reference"
    chosen = choose(impl, [latents], get_args(Impl))
    if chosen == "triton" and n_elements > MAX_ELEMENTS:
        raise ValueError(
            f"impl='triton' takes at most {MAX_ELEMENTS} elements a sample, got {n_elements}"
        )
    return chosen


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
    (`v_prediction`) or `n - x` (`flow`). All draws are those of `philox.py`: they depend on
    seed, pair and visit alone. One launch on a GPU.

    Args:
        latents: `[2B, *dims]` float32, bfloat16 or float16, winners first; read as they lie.
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
    inputs = NoiseInputs(latents, logvar, pair_key, visit, signal, sigma)
    spec = NoiseSpec(prediction, seed, low, high, shift, scale, dtype)
    _check_counters(pair_key, visit, seed)
    _check_latents(latents, logvar, pair_key)
    _check_schedule(signal, sigma, spec)
    vectors = [("pair_key", pair_key), ("visit", visit), ("signal", signal), ("sigma", sigma)]
    for name, t in (("logvar", logvar), *vectors):
        if t is not None and t.device != latents.device:
            raise ValueError(f"{name} must be on latents' {latents.device}, got {t.device}")
    if _chosen(impl, latents) == "reference":
        return NoisedPair(*oracle.noised_pair(inputs, spec))
    for name, t in vectors:
        if not t.is_contiguous():
            raise ValueError(f"impl='triton' needs {name} contiguous, got {t.stride()}")
    return NoisedPair(*ops.noised_pair(inputs, spec))
