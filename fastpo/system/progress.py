"""The progress bars of `prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Speed(ProgressColumn):
    """Things done per second."""

    def __init__(self, unit: str) -> None:
        """Names what is counted."""
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Returns the speed, a dash while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._unit}/s" if speed else f"- {self._unit}/s")


class Advance:
    """Moves a bar: `advance(2)` by own work, `advance.to(n)` to what all processes have done."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        """Wraps one task of a bar."""
        self._bar, self._task = bar, task

    def __call__(self, count: int) -> None:
        """Adds what was just done."""
        self._bar.advance(self._task, count)

    def to(self, done: int) -> None:
        """Sets how much is done."""
        self._bar.update(self._task, completed=done)


@contextmanager
def rate_progress(doing: str, unit: str, total: int, *, show: bool) -> Iterator[Advance]:
    """Shows a bar with a rate and time left.

    Args:
        doing: What is being done, in front of the bar.
        unit: What is counted, in the plural.
        total: How many in all.
        show: False shows nothing.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        yield Advance(bar, bar.add_task(doing, total=total))


def image_progress(total: int, *, show: bool) -> AbstractContextManager[Advance]:
    """Shows how far the encoding of images is; see `rate_progress`."""
    return rate_progress("encoding images", "images", total, show=show)
