"""What is measured: the grid, its order by importance, and what does not fit in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

LATENTS = {"sdxl": (4, 128, 128), "sd15": (4, 64, 64), "video": (16, 21, 60, 104)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIRECTIONS = ("fwd", "bwd", "both")
PAIRS = (1, 4, 16, 64, 256)
# What the speed targets speak of comes first, then latents, dtype and batch in these orders.
FIRST = (
    ("sdxl", "bf16", 16),
    ("sdxl", "bf16", 256),
    ("video", "bf16", 16),
    ("sdxl", "bf16", 1),
    ("sdxl", "bf16", 4),
    ("sdxl", "bf16", 64),
    ("sd15", "bf16", 1),
)
_PAIRS_ORDER = (16, 256, 1, 64, 4)


def count_of(pairs: int) -> str:
    """`1 pair`, `16 pairs`."""
    return f"{pairs} pair{'s' * (pairs != 1)}"


@dataclass(frozen=True)
class Case:
    """One batch of one objective (or of one prediction, for the noise)."""

    op: str
    name: str
    latents: str
    dtype: str
    pairs: int

    @property
    def dims(self) -> tuple[int, ...]:
        return LATENTS[self.latents]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one side of the batch in its dtype."""
        return self.pairs * math.prod(self.dims) * DTYPES[self.dtype].itemsize

    @property
    def float_bytes(self) -> int:
        """Bytes of both sides in float32: one of eager's temporaries."""
        return 2 * self.pairs * math.prod(self.dims) * 4

    def __str__(self) -> str:
        return f"{self.name} {self.latents} {self.dtype} B={self.pairs}"


def grid(
    op: str,
    names: Iterable[str],
    latents: Iterable[str] = tuple(LATENTS),
    dtypes: Iterable[str] = tuple(DTYPES),
    pairs: Iterable[int] = PAIRS,
) -> list[Case]:
    """All combinations, the most important first; `names` come in their order of importance."""
    names = list(names)
    found = [Case(op, *c) for c in itertools.product(names, latents, dtypes, pairs)]
    return sorted(found, key=lambda case: _rank(case, names))


def _rank(case: Case, names: list[str]) -> tuple[int, ...]:
    shape = (case.latents, case.dtype, case.pairs)
    # Of the shapes that targets speak of, every leading objective, shape by shape; then the rest.
    leading = names.index(case.name) < 2 and shape in FIRST
    first = FIRST.index(shape) if leading else len(FIRST)
    batch = _PAIRS_ORDER.index(case.pairs) if case.pairs in _PAIRS_ORDER else len(_PAIRS_ORDER)
    return (
        first,
        names.index(case.name),
        list(DTYPES).index(case.dtype),
        list(LATENTS).index(case.latents),
        batch,
        case.pairs,
    )
