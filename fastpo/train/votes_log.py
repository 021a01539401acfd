"""`votes.csv`: every margin that the ledger has counted, a line each, in the order of the steps.

The ledger itself keeps a sum a pair. The file keeps what it summed, so that `fastpo minority` can
show how a pair's metric came about. Lines are held back until a checkpoint or the end, since a
resumed run drops those of later steps anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastpo.system.files import append_text, flush, write_bytes

if TYPE_CHECKING:
    from fastpo.train.metrics import StepTable

VOTES = "votes.csv"
HEAD = "step,round,pair,timestep,bin,turned,margin\n"
MOST_WAITING = 1 << 16
"""Lines that wait in memory before they are appended without a checkpoint."""


def is_votes(path: Path) -> bool:
    """Whether a file begins as a run's does."""
    with path.open("rb") as file:
        return file.readline(len(HEAD) + 1) == HEAD.encode()


class VotesLog:
    """The file of one run; only the main process has one.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def begin(self, start: int) -> None:
        """Keeps the lines up to finished step `start`; what follows is written anew."""
        self._waiting.clear()
        write_bytes(self.path, kept_votes(self.path, start))

    def add(
        self, step: int, number: int, table: StepTable, bins: list[int], turned: list[int]
    ) -> None:
        """Notes one step's margins as the ledger counts them.

        Args:
            step: Finished optimizer steps.
            number: The round, from 1.
            table: The step's pairs.
            bins: `(N,)` the ledger's timestep bin of each.
            turned: `(N,)` 1 where the label was turned round, and the margin is about that.
        """
        columns = (table.index.tolist(), table["timestep"].long().tolist(), bins, turned)
        rows = zip(*columns, table.votes.tolist(), strict=True)
        self._waiting += [f"{step},{number},{i},{t},{b},{o},{m:.9g}\n" for i, t, b, o, m in rows]
        if len(self._waiting) > MOST_WAITING:
            self._append()

    def flush(self) -> None:
        """Waits until the disk holds all lines so far."""
        self._append()
        flush(self.path)

    def _append(self) -> None:
        if self._waiting:
            append_text(self.path, "".join(self._waiting))
            self._waiting.clear()


def kept_votes(path: Path, start: int) -> bytes:
    """Returns the whole lines of `votes.csv` up to a step, its head at least.

    Steps never decrease from line to line, so that the place is found by halving.

    Args:
        path: The file; a run of an earlier version has none.
        start: Finished optimizer steps.
    """
    head = HEAD.encode()
    text = path.read_bytes() if start and path.is_file() else b""
    if not text.startswith(head):
        return head
    low, high = len(head), text.rfind(b"\n") + 1
    while low < high:  # every line before `low` stays, none from `high` on does
        middle = text.rfind(b"\n", 0, (low + high) // 2) + 1
        step = text[middle : text.find(b",", middle)]
        if step.isdigit() and int(step) <= start:
            low = text.find(b"\n", middle) + 1
        else:
            high = middle
    return text[:low]
