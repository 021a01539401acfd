"""The noised pair: inputs, bytes and providers.

`randn` is what trainers do: it draws from the generator and forms noisy latents and target in
eager; its numbers depend on the generator's state, not on the pair. The others' draws are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastpo.bench.cases import DTYPES, Case
from fastpo.bench.losses import COMPILE_MODES
from fastpo.bench.measure import Call, device, graphed
from fastpo_kernels.pair_noise import noised_pair

PREDICTIONS = ("epsilon", "flow", "v_prediction")
PROVIDERS = ("randn", "reference", *COMPILE_MODES, "ours", "ours-graph")
OPTIONS: dict[str, Any] = {"seed": 7, "low": 0, "high": 1000, "scale": 0.13}
Inputs = tuple[Tensor, ...]


def inputs(case: Case) -> Inputs:
    """Latents, keys, visits and the schedule's two tables."""
    where = device()
    torch.manual_seed(0)
    shape = (2 * case.pairs, *case.dims)
    latents = torch.randn(shape, device=where, dtype=DTYPES[case.dtype])
    keys = torch.randint(0, 2**62, (case.pairs,), device=where)
    power = torch.linspace(0.999, 0.005, 1000, device=where)
    return latents, keys, torch.zeros_like(keys), power.sqrt(), (1 - power).sqrt()


def least_bytes(case: Case) -> dict[str, int]:
    """Latents read, float32 noisy latents and target written."""
    n_elements = case.pairs * math.prod(case.dims)
    return {"fwd": 2 * case.sample_bytes + n_elements * (12 if case.name == "epsilon" else 16)}


def needed_bytes(case: Case) -> int:
    """Latents, results, and the reference's 64-bit words with their temporaries."""
    return 2 * case.sample_bytes + 16 * case.float_bytes


def trainer_noise(x: Inputs, prediction: str) -> tuple[Tensor, Tensor]:
    """A trainer's own lines."""
    latents, keys, _, signal, sigma = x
    n_pairs, ones = len(keys), [1] * (latents.ndim - 1)
    scaled = latents.float() * OPTIONS["scale"]
    noise = torch.randn(n_pairs, *latents.shape[1:], device=latents.device).repeat(2, *ones)
    t = torch.randint(0, 1000, (n_pairs,), device=latents.device).repeat(2)
    a, s = signal[t].view(-1, *ones), sigma[t].view(-1, *ones)
    noisy = a * scaled + s * noise
    if prediction == "epsilon":
        return noisy, noise
    return noisy, a * noise - s * scaled if prediction == "v_prediction" else noise - scaled


def calls(case: Case, x: Inputs, providers: Iterable[str]) -> dict[str, Callable[[], Call]]:
    """How to make the call of every provider."""
    prediction: Any = case.name
    default: Any = "triton" if device() == "cuda" else None

    def run(impl: Any) -> object:
        return noised_pair(*x, prediction=prediction, impl=impl, **OPTIONS)

    def make(provider: str) -> Call:
        if provider == "randn":
            return lambda: trainer_noise(x, case.name)
        if provider == "reference":
            return lambda: run("reference")
        if provider in COMPILE_MODES:
            mode = COMPILE_MODES[provider]
            return torch.compile(lambda: run("reference"), mode=mode, dynamic=False)
        return graphed(lambda: run(default)) if provider == "ours-graph" else lambda: run(default)

    return {provider: (lambda p=provider: make(p)) for provider in providers}


def disagreement(case: Case, x: Inputs) -> str:
    """Empty, or how the default's results depart from the reference's."""
    prediction: Any = case.name
    default: Any = "triton" if device() == "cuda" else None
    found = [
        noised_pair(*x, prediction=prediction, impl=impl, **OPTIONS)
        for impl in (default, "reference")
    ]
    for k, (ours, theirs) in enumerate(zip(*found, strict=True)):
        error = (ours.float() - theirs.float()).abs().max().item()
        if not error <= 2e-2:
            return f"output {k} departs from the reference by {error:.3g}"
    return ""
