"""The pairs of a step on one process, and batches made of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.types import PairBatch

Place = tuple[int, int]
"""A pair's micro-batch in the window, and its row there."""


def both_sides(rows: Tensor, pairs: int) -> Tensor:
    """The rows of winners and losers among `2 * pairs`, from those of pairs."""
    return torch.cat([rows, rows + pairs])


def some_pairs(batch: PairBatch, rows: Tensor) -> PairBatch:
    """Returns the pairs at `rows` `(N,)` int64, in that order."""
    sides = both_sides(rows, len(batch))
    return PairBatch(
        index=batch.index[rows],
        pair_key=batch.pair_key[rows],
        visit=batch.visit[rows],
        flipped=batch.flipped[rows],
        latent_mean=batch.latent_mean[sides],
        latent_logvar=batch.latent_logvar[sides],
        conditions={name: tensor[rows] for name, tensor in batch.conditions.items()},
        pair_weight=None if batch.pair_weight is None else batch.pair_weight[rows],
    )


def joined_pairs(parts: Sequence[PairBatch]) -> PairBatch:
    """Returns the pairs of several batches of one shape as one batch."""
    if len(parts) == 1:
        return parts[0]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def sides(tensors: Sequence[Tensor]) -> Tensor:
        halves = [tensor.chunk(2) for tensor in tensors]
        return joined([half[side] for side in (0, 1) for half in halves])

    weights = [part.pair_weight for part in parts if part.pair_weight is not None]
    return PairBatch(
        index=joined([p.index for p in parts]),
        pair_key=joined([p.pair_key for p in parts]),
        visit=joined([p.visit for p in parts]),
        flipped=joined([p.flipped for p in parts]),
        latent_mean=sides([p.latent_mean for p in parts]),
        latent_logvar=sides([p.latent_logvar for p in parts]),
        conditions={n: joined([p.conditions[n] for p in parts]) for n in parts[0].conditions},
        pair_weight=joined(weights) if weights else None,
    )


@dataclass(frozen=True)
class Window:
    """A step's micro-batches of one process.

    Attributes:
        batches: Them, in host memory.
        size: Pairs in a full micro-batch.
    """

    batches: Sequence[PairBatch]
    size: int

    @property
    def sizes(self) -> list[int]:
        """Pairs in each micro-batch."""
        return [len(batch) for batch in self.batches]

    def packed(self, wanted: Sequence[Tensor], *, together: bool = False) -> list[list[Place]]:
        """Packs pairs into as few micro-batches as their shapes allow; no more than there are.

        Args:
            wanted: `(B,)` bool for each micro-batch, in host memory: which of its pairs.
            together: Whether a micro-batch's pairs stay in one pack (the largest are placed first,
                each in the first pack with room); else they are taken in the window's order.
        """
        by_shape: dict[tuple, list[list[Place]]] = {}
        for k, (batch, which) in enumerate(zip(self.batches, wanted, strict=True)):
            shapes = [t.shape[1:] for t in (batch.latent_mean, *batch.conditions.values())]
            places = [(k, row) for row in which.nonzero().flatten().tolist()]
            if places:
                by_shape.setdefault(tuple(shapes), []).append(places)
        pack = self._first_fit if together else self._filled
        return [places for groups in by_shape.values() for places in pack(groups)]

    def _filled(self, groups: Sequence[list[Place]]) -> list[list[Place]]:
        flat = [place for places in groups for place in places]
        return [flat[start : start + self.size] for start in range(0, len(flat), self.size)]

    def _first_fit(self, groups: Sequence[list[Place]]) -> list[list[Place]]:
        packs: list[list[Place]] = []
        for places in sorted(groups, key=len, reverse=True):
            room = (pack for pack in packs if len(pack) + len(places) <= self.size)
            pack = next(room, None)
            if pack is None:
                packs.append(list(places))
            else:
                pack.extend(places)
        return packs

    def pairs(self, places: Sequence[Place]) -> PairBatch:
        """Returns the pairs at these places, of one shape, as a batch in host memory."""
        rows: dict[int, list[int]] = {}
        for k, row in places:  # a micro-batch's next to one another, as `packed` gives them
            rows.setdefault(k, []).append(row)
        return joined_pairs(
            [some_pairs(self.batches[k], torch.tensor(which)) for k, which in rows.items()]
        )
