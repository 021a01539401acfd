"""Where a process stands in its run: told by the loop, read by the heartbeat."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Place(NamedTuple):
    """One place in a run; all processes of a run pass the same places in the same order.

    Attributes:
        count: Places passed before.
        step: Number of the step that is being made, from 1; 0 before the first.
        doing: What is being done.
        slow: Whether it may take long: compiling, loading, saving.
    """

    count: int = 0
    step: int = 0
    doing: str = "starting"
    slow: bool = True

    def __str__(self) -> str:
        """Returns `step 12, waiting for data`."""
        return f"step {self.step}, {self.doing}" if self.step else self.doing


class Progress:
    """This process's place; to move on costs one small tuple.

    Attributes:
        place: Where it stands.
    """

    def __init__(self) -> None:
        self.place = Place()
        self._slow_step = True

    def at(self, doing: str) -> None:
        """Moves on to something that may take long: loading, saving, an observer's work."""
        self.place = Place(self.place.count + 1, self.place.step, doing, True)

    def step(self, number: int, *, slow: bool) -> None:
        """Moves on to a step.

        Args:
            number: Its number, from 1.
            slow: Whether it may take long, as the first one in a process does.
        """
        self._slow_step = slow
        self.place = Place(self.place.count + 1, number, "computing", slow)

    def reading(self, batches: Iterable[Item]) -> Generator[Item, None, None]:
        """Hands batches on; the time until each arrives is spent waiting for data."""
        iterator = iter(batches)
        try:
            while True:
                self._within_step("waiting for data")
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self._within_step("computing")
                yield batch
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def _within_step(self, doing: str) -> None:
        self.place = Place(self.place.count + 1, self.place.step, doing, self._slow_step)
