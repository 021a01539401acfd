"""The passes of a step in which pairs are differentiated at once, in the one forward pass they get.

Processes wait for one another, so all of them make as many passes as the one with the most; what a
step costs is counted on that path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.train.distributed import Processes
from fastpo.train.window import Place, Window


@dataclass(frozen=True)
class Passes:
    """A step's passes on this process.

    Attributes:
        looks: The pairs of each forward pass without gradients.
        longest_looks: Pairs in each of these on the process with the most.
        places: The pairs of each pass with gradients; none where this process has no more.
        longest: Pairs in each of these on the process with the most; 0 where no process makes it.
        judged: The micro-batches whose loss is known, and due, with each of these.
        aligned: Whether the k-th of these judges the k-th micro-batch, on all processes.
    """

    looks: list[list[Place]]
    longest_looks: list[int]
    places: list[list[Place]]
    longest: list[int]
    judged: list[list[int]]
    aligned: bool

    @property
    def last(self) -> int:
        """The last pass with gradients; -1 without any."""
        return max((number for number, rows in enumerate(self.longest) if rows), default=-1)

    def kept(self, window: Window) -> list[Tensor]:
        """Which pairs have a backward pass, `(B,)` of zeros and ones for each micro-batch."""
        kept = [torch.zeros(size) for size in window.sizes]
        for places in self.places:
            for k, row in places:
                kept[k][row] = 1.0
        return kept


def whole_passes(window: Window) -> Passes:
    """Every micro-batch's pairs in a pass of their own: the way of `train.backward: all`."""
    sizes = window.sizes
    places = [[(k, row) for row in range(size)] for k, size in enumerate(sizes)]
    return Passes([], [], places, sizes, [[k] for k in range(len(sizes))], aligned=True)


def sparse_passes(
    window: Window, closed: Sequence[Tensor], processes: Processes, *, aligned: bool
) -> tuple[Passes, int]:
    """Closed pairs in passes without gradients, the others in passes with; collective.

    Args:
        window: The step's micro-batches on this process.
        closed: `(B,)` bool for each of them, in host memory: pairs known to have no gradient.
        processes: All of them.
        aligned: Whether losses of the micro-batches are formed with the other processes, in one
            order; else passes are packed over the window, a micro-batch's pairs in one of them.

    Returns:
        The passes, and the window's pairs on the process with the most.
    """
    count = len(window.batches)
    looks, wanted = window.packed(closed), [~which for which in closed]
    if aligned:
        rows = [which.nonzero().flatten().tolist() for which in wanted]
        places = [[(k, row) for row in found] for k, found in enumerate(rows)]
        judged = [[k] for k in range(count)]
    else:
        packs = window.packed(wanted, together=True)
        places = packs + [[] for _ in range(count - len(packs))]
        judged = [sorted({k for k, _ in pack}) for pack in places]
        judged[0] += [k for k, which in enumerate(wanted) if not which.any()]
    longest_looks, longest, sizes = longest_passes(processes, window, looks, places)
    if not any(longest) and processes.must_differentiate:
        longest[-1] = 1
    return Passes(looks, longest_looks, places, longest, judged, aligned), sum(sizes)


def longest_passes(
    processes: Processes, window: Window, *several: Sequence[Sequence[Place]]
) -> list[list[int]]:
    """Pairs in each pass on the process with the most, of several lists of passes (collective).

    Args:
        processes: All of them.
        window: The step's micro-batches here, of which every process has as many.
        several: The pairs of each pass; at most as many passes as there are micro-batches.

    Returns:
        For each list a number for each micro-batch, and those of the micro-batches' own pairs.
    """
    count = len(window.batches)
    lengths = [*([len(places) for places in passes] for passes in several), window.sizes]
    flat = [n for numbers in lengths for n in (*numbers, *[0] * (count - len(numbers)))]
    most = processes.longest(flat)
    return [most[start : start + count] for start in range(0, len(most), count)]
