"""Which pairs a step trains on: a pure function of seed and position, so resuming is a number.

Micro-batches form one endless stream. Optimiser step s of W processes with A accumulated
micro-batches takes number s·W·A to (s+1)·W·A - 1 of it; process r takes those whose number is r
modulo W. The pairs of a step therefore do not depend on how they are spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpo.types import PairBatch


class PairSampler:
    """The endless stream of micro-batches.

    Each epoch visits every pair once, in a fresh permutation of `seed`. A micro-batch holds pairs
    of one bucket; what is left of a bucket at the end of an epoch makes a shorter micro-batch. The
    micro-batches of an epoch come in random order.

    Example:
        >>> sampler = PairSampler(torch.tensor([0, 0, 1, 0]), micro_batch_size=2, seed=0)
        >>> sampler.micro_batches_per_epoch
        3
        >>> epoch, indices = sampler.micro_batch(5)
    """

    def __init__(self, bucket: Tensor, micro_batch_size: int, seed: int) -> None:
        """Prepares the stream.

        Args:
            bucket: `(N,)` int64, the bucket of each pair.
            micro_batch_size: Pairs in a full micro-batch.
            seed: Seed of the order.

        Raises:
            ValueError: No pair, or a micro-batch size below 1.
        """
        if bucket.ndim != 1 or not len(bucket):
            raise ValueError(f"bucket must be (N,) with N > 0, got {tuple(bucket.shape)}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        self._bucket = bucket.cpu().numpy()
        self._size = micro_batch_size
        self._seed = seed
        _, counts = np.unique(self._bucket, return_counts=True)
        self._starts, self._ends = _cut(counts, micro_batch_size)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches in which every pair is visited once."""
        return len(self._starts)

    def micro_batch(self, n: int) -> tuple[int, list[int]]:
        """Returns the epoch and the pairs of the n-th micro-batch of the stream.

        Args:
            n: Number from 0 on.

        Returns:
            The epoch, which is how often each of the pairs was visited before, and their indices.
        """
        epoch, k = divmod(n, self.micro_batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._shuffle(epoch))
        _, pairs, batches = self._epoch
        b = batches[k]
        return epoch, pairs[self._starts[b] : self._ends[b]].tolist()

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs, permuted and grouped by bucket, and the order of the batches.

        Sorting raw Philox output keeps the order the same in every version of numpy.
        """
        raw = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw
        pairs = np.argsort(raw(len(self._bucket)), kind="stable")
        pairs = pairs[np.argsort(self._bucket[pairs], kind="stable")]
        return pairs, np.argsort(raw(self.micro_batches_per_epoch), kind="stable")


def _cut(counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each micro-batch begins and ends if the buckets stand one after another."""
    starts, ends, offset = [], [], 0
    for count in counts.tolist():
        first = np.arange(offset, offset + count, size)
        starts.append(first)
        ends.append(np.minimum(first + size, offset + count))
        offset += count
    return np.concatenate(starts), np.concatenate(ends)


class PairReader(Protocol):
    """What the loader reads from; `fastpo.data.cache.PairCache` is one."""

    def read(self, indices: Sequence[int], visit: int) -> PairBatch:
        """Returns the pairs as a batch."""
        ...


def micro_batch_numbers(
    *, rank: int, world_size: int, accumulation_steps: int, start_step: int, total_steps: int
) -> range:
    """Returns the numbers of the micro-batches that one process takes from `start_step` on."""
    per_step = world_size * accumulation_steps
    return range(start_step * per_step + rank, total_steps * per_step, world_size)


def make_loader(
    cache: PairReader,
    sampler: PairSampler,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[PairBatch]:
    """Returns this process's batches of optimiser steps `start_step` to `total_steps` - 1.

    Each step gives `accumulation_steps` batches; a batch's `visit` is its epoch.

    Args:
        cache: Where the pairs are read from.
        sampler: The stream; the same in every process.
        rank: This process.
        world_size: Number of processes.
        accumulation_steps: Micro-batches per process and step.
        start_step: Optimiser steps already done.
        total_steps: Optimiser steps in all.
        workers: Reading processes; 0 reads in the caller's.
        pin_memory: Put the batches into page-locked memory (needs CUDA).

    Raises:
        ValueError: The rank is not below the number of processes.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    numbers = micro_batch_numbers(
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        start_step=start_step,
        total_steps=total_steps,
    )
    return _Loader(cache, _Stream(sampler, numbers), workers, pin_memory)


class _Stream:
    """Epoch and indices of the micro-batches of given numbers."""

    def __init__(self, sampler: PairSampler, numbers: range) -> None:
        self._sampler, self._numbers = sampler, numbers

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return map(self._sampler.micro_batch, self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class _Batches(Dataset[dict[str, Any]]):
    """Reads a batch as a mapping of its fields, which the loader knows how to pin."""

    def __init__(self, cache: PairReader) -> None:
        self._cache = cache

    def __getitem__(self, item: tuple[int, list[int]]) -> dict[str, Any]:
        epoch, indices = item
        batch = self._cache.read(indices, visit=epoch)
        return {field.name: getattr(batch, field.name) for field in fields(batch)}


class _Loader:
    """The batches of a stream; may be iterated again."""

    def __init__(self, cache: PairReader, stream: _Stream, workers: int, pin_memory: bool) -> None:
        self._loader = DataLoader(
            _Batches(cache),
            batch_size=None,
            sampler=stream,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            generator=torch.Generator(),  # or each pass would advance the caller's random state
        )

    def __iter__(self) -> Iterator[PairBatch]:
        return (PairBatch(**tensors) for tensors in self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _as_is(batch: Any) -> Any:
    return batch
