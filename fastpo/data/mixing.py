"""How often the pairs of several data sets come: repeats, or weights.

An epoch visits a pair `repeats` times, as kohya's `num_repeats`. With weights, as the probabilities
of `datasets.interleave_datasets`, a data set's share of an epoch's visits is its weight's, and the
epoch is so long that every pair is visited (`stopping_strategy="all_exhausted"`): once in the data
set that its weight makes come most seldom, more often, and in part once more, in the others.

The pairs of one data set and latent shape are a group. Each group has its own endless stream of
visits, one permutation after another, of which every epoch takes the same number, so that the
micro-batches of all epochs are alike in number and size. No pair comes for the (v+1)-th time in an
epoch before all of its group came for the v-th time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastpo.config import Config, SourceConfig
from fastpo.data.cache import PairCache
from fastpo.data.sampler import PairSampler, cut_batches, shuffled


def make_sampler(cache: PairCache, config: Config) -> PairSampler:
    """Returns the stream of a configuration's micro-batches.

    Args:
        cache: Its cache.
        config: The configuration.
    """
    size, seed, kept = config.train.micro_batch_size, config.seed, cache.trained
    source = cache.source_index if kept is None else cache.source_index[kept]
    counts = np.bincount(source.numpy(), minlength=len(config.data.sources))
    visits = visits_per_epoch(config.data.sources, counts.tolist())
    if all(number == 1.0 for number in visits):
        return PairSampler(cache.bucket, size, seed, kept)
    return MixedSampler(
        cache.bucket, size, seed, source=cache.source_index, visits=visits, pairs=kept
    )


def visits_per_epoch(sources: Sequence[SourceConfig], pairs: Sequence[int]) -> list[float]:
    """Returns how often an epoch visits each pair, by data set.

    Args:
        sources: The data sets; empty for a single one.
        pairs: Usable pairs of each; one without any does not count.
    """
    weights = [source.weight for source in sources]
    if not any(weights):
        return [float(source.repeats) for source in sources]
    rates = [w / n if w and n else 0.0 for w, n in zip(weights, pairs, strict=True)]
    slowest = min(rate for rate in rates if rate)
    return [rate / slowest for rate in rates]


class MixedSampler(PairSampler):
    """The endless stream of micro-batches where data sets come with different frequency.

    Example:
        >>> source = torch.tensor([0, 0, 1])
        >>> sampler = MixedSampler(source * 0, 2, 0, source=source, visits=[1.0, 3.0])
        >>> sampler.micro_batches_per_epoch
        3
        >>> visits, indices = sampler.draw(5)
    """

    def __init__(
        self,
        bucket: Tensor,
        micro_batch_size: int,
        seed: int,
        *,
        source: Tensor,
        visits: Sequence[float],
        pairs: Tensor | None = None,
    ) -> None:
        """Prepares the stream.

        Args:
            bucket: `(N,)` int64, the bucket of each pair.
            micro_batch_size: Pairs in a full micro-batch.
            seed: Seed of the order.
            source: `(N,)` int64, the number of each pair's data set.
            visits: How often an epoch visits each pair, by data set; 1 or more.
            pairs: As of `PairSampler`.

        Raises:
            ValueError: As `PairSampler`.
        """
        super().__init__(bucket, micro_batch_size, seed, pairs)
        source = source if pairs is None else source[pairs]
        keys = np.stack([source.numpy(), self._bucket.astype(np.int64)], axis=1)
        kinds, group = np.unique(keys, axis=0, return_inverse=True)
        self._groups = [np.flatnonzero(group.ravel() == g) for g in range(len(kinds))]
        rates = [visits[of_source] for of_source, _ in kinds.tolist()]
        self._draws = [round(r * len(g)) for r, g in zip(rates, self._groups, strict=True)]
        self._draw_bucket = np.repeat(kinds[:, 1], self._draws).astype(self._bucket.dtype)
        self._starts, self._ends = cut_batches(np.bincount(self._draw_bucket), micro_batch_size)
        self._visits: tuple[int, np.ndarray] | None = None

    def draw(self, n: int) -> tuple[list[int], list[int]]:
        """Returns how often each pair of the n-th micro-batch was visited before, and the pairs."""
        epoch, k = divmod(n, self.micro_batches_per_epoch)
        pairs, visits, batches = self._epoch_of(epoch)
        here = slice(self._starts[batches[k]], self._ends[batches[k]])
        return visits[here].tolist(), self._at(pairs[here]).tolist()

    def micro_batch(self, n: int) -> tuple[int, list[int]]:
        """Returns the epoch and the pairs of the n-th micro-batch of the stream."""
        return n // self.micro_batches_per_epoch, self.draw(n)[1]

    def needed(self, micro_batches: int) -> list[np.ndarray]:
        """See the base class."""
        epochs, rest = divmod(micro_batches, self.micro_batches_per_epoch)
        drawn: list[list[np.ndarray]] = []

        def add(visit: int, pairs: np.ndarray) -> None:
            drawn.extend([] for _ in range(visit + 1 - len(drawn)))
            drawn[visit].append(pairs)

        for number, group in enumerate(self._groups):
            cycles, part = divmod(epochs * self._draws[number], len(group))
            for visit in range(cycles):
                add(visit, self._at(group))
            if part:
                add(cycles, self._at(self._cycle(number, cycles)[:part]))
        for k in range(rest):
            visits, pairs = self.draw(epochs * self.micro_batches_per_epoch + k)
            for visit, pair in zip(visits, pairs, strict=True):
                add(visit, np.array([pair]))
        return [np.unique(np.concatenate(pairs)) for pairs in drawn]

    def _cycle(self, number: int, cycle: int) -> np.ndarray:
        """A group's pairs in the order of their visit number `cycle`."""
        group = self._groups[number]
        key = np.array([self._seed, cycle], dtype=np.uint64)
        counter = np.array([0, 0, 0, 1 + number], dtype=np.uint64)  # 0 shuffles the epochs
        return group[shuffled(np.random.Philox(key=key, counter=counter).random_raw(len(group)))]

    def _epoch_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The visits of an epoch grouped by bucket: pairs, visits; and the order of the batches."""
        if self._epoch is None or self._visits is None or self._epoch[0] != epoch:
            pairs, visits = map(np.concatenate, zip(*self._drawn(epoch), strict=True))
            raw = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw
            order = shuffled(raw(len(pairs)), self._draw_bucket)
            batches = shuffled(raw(self.micro_batches_per_epoch))
            self._visits = (epoch, visits[order])
            self._epoch = (epoch, pairs[order], batches)
        return self._epoch[1], self._visits[1], self._epoch[2]

    def _drawn(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """By group the pairs that an epoch draws, and their visits."""
        found = []
        for number, (group, draws) in enumerate(zip(self._groups, self._draws, strict=True)):
            first, stop = epoch * draws, (epoch + 1) * draws
            cycles = range(first // len(group), -(-stop // len(group)))
            pairs = np.concatenate([self._cycle(number, cycle) for cycle in cycles])
            visits = np.repeat(np.array(cycles, dtype=np.int64), len(group))
            here = slice(first - cycles[0] * len(group), stop - cycles[0] * len(group))
            found.append((pairs[here], visits[here]))
        return found
