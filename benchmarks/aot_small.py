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

import triton
from aot_cases import Batch, LossCall

from fastpo_kernels._shared.launch_cache import CachedLaunch
from fastpo_kernels._shared.layout import joint_layout
from fastpo_kernels.pair_loss.gpu import launch

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
    sizes, _ = joint_layout([*full, x.target])
    elements = math.prod(sizes)
    config = launch.forward_config(call.batch.pairs, elements, len(full), len(sizes))
    return FullShape(call.batch.pairs, elements, config)


def small(batch: Batch, elements: int) -> Batch:
    """Few pairs, but as many as leave every address as far aligned, of so many elements."""
    assert elements % (4 * WIDTH) == 0
    return replace(batch, pairs=min(batch.pairs, 4), dims=(4, elements // (4 * WIDTH), WIDTH))


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
