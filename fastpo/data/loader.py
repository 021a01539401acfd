"""Reads the micro-batches of a stream ahead of training.

The stream is a pure function of its seed and a number, so all that a loader has to remember is how
many micro-batches the whole run has taken: `PairLoader.state_dict` is that number. It has the
protocol of torchdata's `StatefulDataLoader` (and of torch's and accelerate's checkpointing), not
the class: that one keeps a state for each worker of each rank, which cannot be read again by
another number of processes or workers, and fast-forwards what has no state. mosaicml-streaming
shuffles its own shard format, in blocks of shards; the cache has random access, so every epoch is a
permutation of all pairs.

Threads do the reading, see `fastpo.system.read_ahead`. They draw too, since an epoch's first draw
shuffles it: half a second for ten million pairs.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Protocol, Self

from fastpo.data.sampler import PairSampler
from fastpo.system.read_ahead import read_ahead
from fastpo.types import PairBatch


class PairReader(Protocol):
    """What the loader reads from; `fastpo.data.cache.PairCache` is one."""

    def read(self, indices: Sequence[int], visit: int | Sequence[int]) -> PairBatch:
        """Returns the pairs as a batch; may be called by several threads at once.

        `visit` is how often they were drawn before: one number for all of them, or one each.
        """
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
) -> PairLoader:
    """Returns this process's batches of optimizer steps `start_step` to `total_steps` - 1.

    Each step gives `accumulation_steps` batches; a batch's `visit` says how often its
    pairs were drawn before.

    Args:
        cache: Where the pairs are read from.
        sampler: The stream; the same in every process.
        rank: This process.
        world_size: Number of processes.
        accumulation_steps: Micro-batches per process and step.
        start_step: Optimizer steps already done.
        total_steps: Optimizer steps in all.
        workers: Reading threads; 0 reads in the caller's, when it asks.
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
    return PairLoader(cache, sampler, numbers, workers=workers, pin_memory=pin_memory)


class PairLoader:
    """One process's share of the stream; its length is known, and each pass begins anew.

    Example (in a training loop of your own, with torch's or accelerate's checkpoints):
        >>> loader = make_loader(cache, sampler, total_steps=1000, workers=2)
        >>> for batch in loader:
        ...     state = loader.state_dict()
        >>> loader.load_state_dict(state)  # the next pass begins behind `batch`
    """

    def __init__(
        self,
        cache: PairReader,
        sampler: PairSampler,
        numbers: range,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Prepares the share; see `make_loader`.

        Args:
            cache: Where the pairs are read from.
            sampler: The stream.
            numbers: Which micro-batches of it.
            workers: Reading threads.
            pin_memory: Put the batches into page-locked memory.
        """
        self._cache, self._sampler, self._numbers = cache, sampler, numbers
        self._workers, self._pin = workers, pin_memory
        self._given = 0  # batches of the current pass, with those before a loaded state
        self._skip = 0

    def __len__(self) -> int:
        """Returns the number of batches of a whole pass."""
        return len(self._numbers)

    def __iter__(self) -> Generator[PairBatch, None, None]:
        """Yields the batches; the first pass after `load_state_dict` leaves out those given."""
        self._given, self._skip = self._skip, 0
        drawn = self._drawn(self._numbers[self._given :])
        batches = read_ahead(self._read, drawn, threads=self._workers)
        with closing(batches):  # threads end with the pass, however it ends
            for batch in batches:
                self._given += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns how many micro-batches the stream has given to all processes together.

        They move in step, so the number is the same in all of them, and any number of processes can
        go on from it.
        """
        world_size = self._numbers.step
        return {"micro_batches": self._numbers.start // world_size * world_size + self._done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next pass begin where a run of any number of processes stood.

        Raises:
            ValueError: Its micro-batches do not fill whole rounds of this run's processes, or lie
                outside of this loader's steps.
        """
        taken, world_size = state["micro_batches"], self._numbers.step
        first = self._numbers.start // world_size * world_size
        skip, rest = divmod(taken - first, world_size)
        if rest or not 0 <= skip <= len(self):
            raise ValueError(
                f"cannot go on after {taken} micro-batches: this loader gives those from {first} "
                f"to {first + len(self) * world_size - 1} to {world_size} process(es), each one "
                f"of {world_size}"
            )
        self._skip = self._given = skip

    def _done(self) -> int:
        return self._given * self._numbers.step

    def _drawn(self, numbers: range) -> Iterator[tuple[int | list[int], list[int]]]:
        return map(self._sampler.draw, numbers)

    def _read(self, drawn: tuple[int | list[int], list[int]]) -> PairBatch:
        visits, indices = drawn
        batch = self._cache.read(indices, visit=visits)
        return _pinned(batch) if self._pin else batch


def _pinned(batch: PairBatch) -> PairBatch:
    return batch.map(lambda tensor: tensor.pin_memory())


class TimedIterator(Iterator[PairBatch]):
    """An iterator that measures how long its user waited for it.

    Use it in a `with` statement, or call `close`: a pass left half-way ends its reading threads
    then, and not when the garbage collector finds it behind an exception's traceback.
    """

    def __init__(self, batches: Iterable[PairBatch]) -> None:
        """Begins a pass."""
        self._batches = iter(batches)
        self._seconds = 0.0

    def __next__(self) -> PairBatch:
        """Returns the next batch."""
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - began

    def taken(self) -> float:
        """Returns the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Ends the pass, if it is one that can be ended."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the pass."""
        self.close()
