"""Which of several images of one prompt become pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Pick = Literal["extremes", "once", "all"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One pair among a prompt's images.

    Attributes:
        winner: Number of the better image.
        loser: Number of the other one.
        gap: By how much the winner's value is higher.
    """

    winner: int
    loser: int
    gap: float


def choose_pairs(values: Sequence[float], pick: Pick, *, gap: float = 0.0) -> list[Choice]:
    """Pairs images of one prompt by a value, higher is better; equal values are never a pair.

    Args:
        values: One value an image.
        pick: `extremes`: the best with the worst. `once`: the best with the worst, the second best
            with the second worst, and so on, so that each image is in at most one pair. `all`:
            each image with each worse one.
        gap: By how much the winner's value must at least be higher.

    Returns:
        The pairs, those of the best images first.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])  # of equal ones the first stays
    found = (Choice(w, v, values[w] - values[v]) for w, v in _candidates(order, pick))
    return [choice for choice in found if choice.gap > 0 and choice.gap >= gap]


def _candidates(order: Sequence[int], pick: Pick) -> Iterator[tuple[int, int]]:
    if pick == "all":
        yield from combinations(order, 2)
        return
    most = 1 if pick == "extremes" else len(order) // 2
    yield from zip(order[:most], order[::-1][:most], strict=False)
