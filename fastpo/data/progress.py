"""The progress bar of `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
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


@contextmanager
def image_progress(total: int, *, done: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar with images/s and time left; gives a function that advances it.

    Args:
        total: Images in all.
        done: Images encoded by an earlier run.
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
        task = bar.add_task("encoding images", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
