"""The progress bar of every command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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


class _Rate(ProgressColumn):
    """Things done per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Returns the rate, a dash while it is unknown."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:.1f} {self._unit}/s" if rate else f"- {self._unit}/s")


class Advance:
    """Moves a bar: `advance(2)` by what was just done."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        """Wraps one task of a bar."""
        self._bar, self._task = bar, task

    def __call__(self, count: int = 1, *, note: str | None = None) -> None:
        """Adds what was just done.

        Args:
            count: How many.
            note: Replaces the text behind the bar.
        """
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._bar.update(self._task, advance=count, **fields)


@contextmanager
def progress_bar(
    label: str, total: int, *, unit: str | None = None, done: int = 0, show: bool
) -> Iterator[Advance]:
    """Shows a bar on standard error, with a rate, a note and the time left.

    Args:
        label: What is being done, in front of the bar.
        total: How many in all.
        unit: What is counted, in the plural; None shows no rate.
        done: How many were done before.
        show: False shows nothing.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}") if unit is None else _Rate(unit),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        yield Advance(bar, bar.add_task(label, total=total, completed=done, note=""))
