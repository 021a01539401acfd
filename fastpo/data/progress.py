"""The progress bar of `prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Returns the speed, a dash while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} images/s" if speed else "- images/s")


class Advance:
    """Moves a bar: `advance(2)` by own work, `advance.to(n)` to what all processes have done."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        """Wraps one task of a bar."""
        self._bar, self._task = bar, task

    def __call__(self, count: int) -> None:
        """Adds images."""
        self._bar.advance(self._task, count)

    def to(self, done: int) -> None:
        """Sets the number of images that are done."""
        self._bar.update(self._task, completed=done)


@contextmanager
def image_progress(total: int, *, show: bool) -> Iterator[Advance]:
    """Shows a bar with images/s and time left.

    Args:
        total: Images in all.
        show: False shows nothing.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        yield Advance(bar, bar.add_task("encoding images", total=total))
