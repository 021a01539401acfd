"""The calls of `aot_cases.py` in a small size, compiled into the same code as in their own.

Which code a launch takes depends on the pairs and the elements of a call: the launch table chooses
tiles and warps by them, and the last program's vectors are as long as there are pairs and programs
a pair. `compiled_as` keeps these of the full size, so that a few pairs of a few tiles execute the
very instructions that the full batch would, and `tests/kernels/compiled_cases.py` holds the text of
both to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from aot_cases import Batch, LossCall, LossTensors, NoiseCall
from torch import Tensor

from fastpo_kernels._shared.launch_cache import CachedLaunch
from fastpo_kernels._shared.layout import joint_layout
from fastpo_kernels.pair_loss.gpu import launch
from fastpo_kernels.pair_loss.sides import weights_of

WIDTH = 16  # of small samples: what divides the full sizes' divides theirs


@dataclass(frozen=True)
class FullShape:
    """The forward launch of a call in its own size.

    Attributes:
        pairs: of the batch.
        elements: of a sample.
        config: tiles and programs, by the launch table.
    """

    pairs: int
    elements: int
    config: launch.LaunchConfig


def full_shape(call: LossCall) -> FullShape:
    """By the launch table."""
    x = call.empty(call.batch)
    full = [x.policy, *(s for s in x.sources if s.ndim > 1)]
    if "labels" in x.vectors:
        full = full[:1]  # reference and policy have launches of their own
    masks = [weights_of(x.vectors["mask"], x.policy, "halves")] if call.mask else []
    sizes, _ = joint_layout([*full, *masks, x.target])
    elements = math.prod(sizes)
    config = launch.forward_config(call.batch.pairs, elements, len(full), len(sizes))
    return FullShape(call.batch.pairs, elements, config)


def small(batch: Batch, elements: int, pairs: int = 4) -> Batch:
    """Few pairs, in fours, which leave every address as far aligned, of so many elements."""
    assert elements % (4 * WIDTH) == 0 and pairs % 4 == 0
    dims = (4, elements // (4 * WIDTH), WIDTH)
    return replace(batch, pairs=min(batch.pairs, pairs), dims=dims)


@contextmanager
def compiled_as(full: FullShape, programs: int) -> Iterator[None]:
    """Inside, a forward launch has this many programs a pair, and the code of the full shape."""
    config = replace(full.config, programs_per_pair=min(programs, full.config.programs_per_pair))
    blocks = {
        "BLOCK_P": triton.next_power_of_2(full.config.programs_per_pair),
        "BLOCK_B": triton.next_power_of_2(full.pairs),
    }

    def made(*, constexprs: dict[str, Any], **given: Any) -> CachedLaunch:
        kept = {name: blocks.get(name, value) for name, value in constexprs.items()}
        return CachedLaunch(constexprs=kept, **given)

    launch._launches.clear()
    with (
        mock.patch.object(launch, "forward_config", lambda *_: config),
        mock.patch.object(launch, "CachedLaunch", made),
    ):
        yield
    launch._launches.clear()


def filled(x: LossTensors) -> LossTensors:
    """Predictions near their targets, ready errors near those of predictions, other vectors."""
    rng = torch.Generator().manual_seed(0)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=rng)

    def beside(t: Tensor, values: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(values)

    target = like(x.target).to(x.target.dtype)
    repeats = len(x.policy) // len(target)
    policy = target.float().repeat(repeats, *[1] * (target.ndim - 1)) + 0.3 * like(x.policy)
    sources = [
        beside(s, policy + 0.1 * like(s)) if s.ndim > 1 else 0.09 + 0.002 * like(s)
        for s in x.sources
    ]
    vectors = {name: torch.rand(v.shape, generator=rng) for name, v in x.vectors.items()}
    return LossTensors(beside(x.policy, policy), target, sources, vectors)


def noise_inputs(batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Latents, log-variances, and keys, visits and a schedule."""
    rng = torch.Generator().manual_seed(0)
    latents, logvar = (
        like.copy_(torch.randn(like.shape, generator=rng)) for like in (batch.rows(), batch.rows())
    )
    keys = torch.randint(0, 2**62, (batch.pairs,), generator=rng)
    power = torch.linspace(0.99, 0.005, 1000)
    return latents, logvar - 3, (keys, keys % 7, power.sqrt(), (1 - power).sqrt())


def small_run(call: LossCall | NoiseCall, size: int, full: FullShape | None) -> None:
    """A launch of `size` times as many programs as the smallest, each with as much to do.

    There are more programs a pair, or more pairs where the full size has one program a pair.
    """
    if isinstance(call, NoiseCall):
        call(*noise_inputs(small(call.batch, 1024 * size)), "triton")
        return
    assert full is not None
    programs = full.config.programs_per_pair
    tiles = -(-full.elements // full.config.block_size) // programs
    elements = tiles * full.config.block_size
    batch = small(call.batch, elements, 4 * size) if programs == 1 else None
    batch = batch or small(call.batch, elements * size)
    with compiled_as(full, size):
        call.gradient(filled(call.empty(batch)))
