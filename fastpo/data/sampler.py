"""Which pairs a step trains on: a pure function of seed and position, so resuming is a number.

Micro-batches form one endless stream. Optimizer step s of W processes with A accumulated
micro-batches takes number s·W·A to (s+1)·W·A - 1 of it; process r takes those whose number is r
modulo W. The pairs of a step therefore do not depend on how they are spread. Steps are those of the
run, or with `train.rounds_draws: same` those of its round.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from fastpo.config import TrainConfig


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

    def __init__(
        self, bucket: Tensor, micro_batch_size: int, seed: int, pairs: Tensor | None = None
    ) -> None:
        """Prepares the stream.

        Args:
            bucket: `(N,)` int64, the bucket of each pair.
            micro_batch_size: Pairs in a full micro-batch.
            seed: Seed of the order.
            pairs: `(M,)` int64, positions of the pairs that are drawn; None: all.

        Raises:
            ValueError: No pair, or a micro-batch size below 1.
        """
        self._pairs = None if pairs is None else pairs.numpy()
        bucket = bucket if pairs is None else bucket[pairs]
        if bucket.ndim != 1 or not len(bucket):
            raise ValueError(f"bucket must be (N,) with N > 0, got {tuple(bucket.shape)}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        self._bucket = bucket.long().cpu().numpy()
        if self._bucket.min() < 0 or self._bucket.max() >= 2**16:
            _, self._bucket = np.unique(self._bucket, return_inverse=True)
        counts = np.bincount(self._bucket)
        self._bucket = self._bucket.astype(np.uint16 if len(counts) <= 2**16 else np.uint32)
        self._size = micro_batch_size
        self._seed = seed
        self._starts, self._ends = cut_batches(counts, micro_batch_size)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def pairs(self) -> np.ndarray:
        """The positions of all pairs that an epoch visits, ascending."""
        return self._at(np.arange(len(self._bucket)))

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
        return epoch, self._at(pairs[self._starts[b] : self._ends[b]]).tolist()

    def _at(self, rows: np.ndarray) -> np.ndarray:
        """The positions of pairs, of which an epoch may leave some out, by their number in it."""
        return rows if self._pairs is None else self._pairs[rows]

    def draw(self, n: int) -> tuple[int | list[int], list[int]]:
        """Returns how often the pairs of the n-th micro-batch were visited before, and the pairs.

        The former is one number for all of them, or one each.
        """
        return self.micro_batch(n)

    def needed(self, micro_batches: int) -> list[np.ndarray]:
        """Returns, visit by visit, the pairs that the first micro-batches of the stream draw.

        Args:
            micro_batches: How many; the last epoch may be partial.
        """
        visits, rest = divmod(micro_batches, self.micro_batches_per_epoch)
        needed = [self.pairs] * visits
        if rest:
            first = visits * self.micro_batches_per_epoch
            drawn = (self.micro_batch(first + k)[1] for k in range(rest))
            needed.append(np.sort(np.concatenate([np.asarray(pairs) for pairs in drawn])))
        return needed

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs, permuted and grouped by bucket, and the order of the batches.

        Raw Philox output is the same in every version of numpy.
        """
        raw = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw
        pairs = shuffled(raw(len(self._bucket)), self._bucket)
        return pairs, shuffled(raw(self.micro_batches_per_epoch))


def shuffled(raw: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Returns `0..N-1` in the order of random 64-bit numbers, group by group.

    Group, upper bits of the number, and position share one word, so one sort of plain integers does
    it in place; where the upper bits are equal, the position decides.
    """
    position_bits = (len(raw) - 1).bit_length()
    mask = np.uint64((1 << position_bits) - 1)
    if group is not None:
        group_bits = int(group.max()).bit_length()
        raw >>= np.uint64(group_bits)
        if group_bits:
            raw |= group.astype(np.uint64) << np.uint64(64 - group_bits)
    raw &= ~mask
    raw |= np.arange(len(raw), dtype=np.uint64)
    raw.sort()
    raw &= mask
    return raw.astype(np.int32 if len(raw) < 2**31 else np.int64)


def cut_batches(counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each micro-batch begins and ends if the buckets stand one after another."""
    starts, ends, offset = [], [], 0
    for count in counts.tolist():
        first = np.arange(offset, offset + count, size)
        starts.append(first)
        ends.append(np.minimum(first + size, offset + count))
        offset += count
    return np.concatenate(starts), np.concatenate(ends)


def round_steps(
    train: TrainConfig, sampler: PairSampler, micro_batches_per_step: int
) -> tuple[int, int]:
    """Optimizer steps of each of a run's rounds but the last, and of the last; see `train.rounds`.

    Args:
        train: The training's section.
        sampler: Its stream.
        micro_batches_per_step: Micro-batches of one optimizer step, over all processes.
    """
    size = {
        "micro_batches_per_epoch": sampler.micro_batches_per_epoch,
        "micro_batches_per_step": micro_batches_per_step,
    }
    last = count_steps(train.max_steps, train.epochs, **size)
    if train.round_epochs is None:
        return last, last
    return count_steps(None, train.round_epochs, **size), last


def count_steps(
    max_steps: int | None,
    epochs: float | None,
    *,
    micro_batches_per_epoch: int,
    micro_batches_per_step: int,
) -> int:
    """Optimizer steps of a run: `max_steps`, or enough to reach the end of the last epoch.

    Args:
        max_steps: Steps asked for, or None.
        epochs: Epochs asked for, where `max_steps` is None.
        micro_batches_per_epoch: Micro-batches in which every pair is visited once.
        micro_batches_per_step: Micro-batches of one optimizer step, over all processes.
    """
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return math.ceil(epochs * micro_batches_per_epoch / micro_batches_per_step)
