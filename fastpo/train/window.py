"""The pairs of a step on one process, and batches made of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.types import NoisedPair, PairBatch

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


def some_noised(noised: NoisedPair, rows: Tensor) -> NoisedPair:
    """Returns the noisy pairs at `rows`."""
    pairs = len(noised.index)
    sides = both_sides(rows, pairs)
    shared = len(noised.target) == pairs
    return NoisedPair(
        noisy_latents=noised.noisy_latents[sides],
        index=noised.index[rows],
        timesteps=noised.timesteps[rows],
        target=noised.target[rows if shared else sides],
        guidance=noised.guidance,
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

    def packed(self, wanted: Sequence[Tensor]) -> list[list[Place]]:
        """Packs pairs into as few micro-batches as their shapes allow, in the window's order.

        Args:
            wanted: `(B,)` bool for each micro-batch, in host memory: which of its pairs.
        """
        by_shape: dict[tuple, list[Place]] = {}
        for k, (batch, which) in enumerate(zip(self.batches, wanted, strict=True)):
            shapes = [t.shape[1:] for t in (batch.latent_mean, *batch.conditions.values())]
            places = [(k, row) for row in which.nonzero().flatten().tolist()]
            by_shape.setdefault(tuple(shapes), []).extend(places)
        return [
            places[start : start + self.size]
            for places in by_shape.values()
            for start in range(0, len(places), self.size)
        ]

    def pairs(self, places: Sequence[Place]) -> PairBatch:
        """Returns the pairs at these places, of one shape, as a batch in host memory."""
        rows: dict[int, list[int]] = {}
        for k, row in places:  # sorted by micro-batch, as `packed` gives them
            rows.setdefault(k, []).append(row)
        return joined_pairs(
            [some_pairs(self.batches[k], torch.tensor(which)) for k, which in rows.items()]
        )
