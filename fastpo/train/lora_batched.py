"""Reference and moving averages of LoRA adapters in one forward pass, a set of weights per row.

They differ from one another in the adapters alone, so the base network runs once on their stacked
rows, and each adapted layer adds each average's own low-rank term to its share of them. The
adapters are read where `MovingAverages` keeps them: no copy is made, and none is registered in the
model, to be trained, exported or counted by mistake. Rows come in equal blocks; peft's own
`adapter_names` takes a list per row, and would index by it, making a GPU's host wait in each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastpo.config import EmaAnnotators, TrainConfig
from fastpo.models.denoisers import Denoisers
from fastpo.train.ema import MovingAverages
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser

ADAPTER = "default"
# Elements of the latents `(2B, C, h, w)` up to which one pass is taken: the largest batch measured
# (benchmarks/results/cpu/step_batched.csv: LoRA on a CPU, float32, whole steps). One pass took 0.82
# to 0.94 of the time of separate ones on the tiny UNet (512 to 2048 elements) and 0.94 to 0.96 on
# the mid-size one (8192 to 32768), there within the rounds' spread. No GPU was measured.
SMALL = 32768


def in_one_pass(config: TrainConfig, n_elements: int) -> bool:
    """Whether reference and averages shall run together: as configured, or where it was faster.

    Args:
        config: The training's section.
        n_elements: Of the noisy latents `(2B, C, h, w)`.
    """
    ema = config.annotators
    if config.method != "lora" or not isinstance(ema, EmaAnnotators) or config.lora.use_dora:
        return False
    return n_elements <= SMALL if ema.batched == "auto" else ema.batched


@torch.no_grad()
def predict_together(
    denoisers: Denoisers,
    averages: MovingAverages,
    noised: NoisedPair,
    conditions: Mapping[str, Tensor],
    *,
    reference: bool = True,
) -> list[Tensor]:
    """Runs the adapter-free base (if `reference`) and every average on the same noisy pairs.

    Args:
        denoisers: Their policy has LoRA adapters, which are off inside.
        averages: Averages of exactly these adapters' weights.
        noised: B noisy pairs.
        conditions: What the denoiser is told of them, each `(B, ...)`.
        reference: Whether the base is wanted, too.

    Returns:
        Predictions `(2B, C, h, w)`, the reference's first; equal to separate passes to rounding.
    """
    models = len(averages.decays) + int(reference)
    stacked = replace(
        noised,
        noisy_latents=_tiled(noised.noisy_latents, models),
        index=_tiled(noised.index, models),
        timesteps=_tiled(noised.timesteps, models),
    )
    tiled = {name: _tiled(tensor, models) for name, tensor in conditions.items()}
    policy = denoisers.policy
    with _adapters_by_rows(policy, averages, skip=int(reference)):
        return list(denoisers.predict(policy, stacked, tiled).chunk(models))


def _tiled(tensor: Tensor, times: int) -> Tensor:
    """Returns the rows `times` over."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


@contextmanager
def _adapters_by_rows(policy: Denoiser, averages: MovingAverages, *, skip: int) -> Iterator[None]:
    """Inside, rows are cut into equal blocks: `skip` of them see the base, then one per average."""
    places = {name: i for i, name in enumerate(averages.parameters)}
    handles = []
    for name, layer in policy.named_modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.scaling:
            continue
        a, b = (places[f"{name}.lora_{x}.{ADAPTER}.weight"] for x in "AB")
        weights = [(shadow[a], shadow[b]) for shadow in averages.shadows]
        assert isinstance(layer, nn.Module)
        handles.append(layer.register_forward_hook(_Hook(layer, weights, skip)))
    policy.disable_adapters()
    try:
        yield
    finally:
        policy.enable_adapters()
        for handle in handles:
            handle.remove()


class _Hook:
    """Adds each average's low-rank term to its block of an adapted layer's output."""

    def __init__(self, layer: LoraLayer, weights: list[tuple[Tensor, Tensor]], skip: int) -> None:
        self._factors = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        self._scaling = layer.scaling[ADAPTER]
        self._weights, self._skip = weights, skip

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        blocks = self._skip + len(self._weights)
        rows = inputs[0].chunk(blocks)[self._skip :]
        results = list(output.chunk(blocks))
        down, up = self._factors
        for k, (x, (a, b)) in enumerate(zip(rows, self._weights, strict=True), self._skip):
            term = _apply(up, _apply(down, x.to(a.dtype), a), b) * self._scaling
            results[k] = results[k] + term.to(output.dtype)
        return torch.cat(results)


def _apply(factor: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """One low-rank factor, linear or convolution, with other weights."""
    if isinstance(factor, nn.Conv2d):
        return factor._conv_forward(x, weight, None)
    return F.linear(x, weight)
