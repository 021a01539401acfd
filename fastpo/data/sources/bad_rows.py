"""Rows that are no usable pair: counted, told together, and how many there may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastpo.errors import TooManyBadRowsError

MOST_TOLD = 20
"""Rows that an error names; `quarantine.jsonl` lists more."""
MOST_KEPT = 100_000
"""Rows of which the reason is kept; further ones are counted."""
FEW = 16
"""Bad rows of a small data set that `data.max_bad` allows where it is not set."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out.

    Attributes:
        place: Where it stands, such as `line 7`, or the pair's name.
        reason: What is wrong with it.
        is_pair: Whether it is a pair of the source all the same, which `prepare` finds unusable.
    """

    place: str
    reason: str
    is_pair: bool = False

    def __str__(self) -> str:
        """Returns both in one line."""
        return f"{self.place}: {self.reason}"


class BadRows:
    """The bad rows found so far.

    Attributes:
        count: How many.
        pairs: How many of them are pairs of the source.
        kept: The first `MOST_KEPT` of them.
    """

    def __init__(self, where: str, share: float | None) -> None:
        """Starts with none.

        Args:
            where: The data set, as errors name it.
            share: `data.max_bad`.
        """
        self.count = self.pairs = 0
        self.kept: list[BadRow] = []
        self._where, self._share = where, share

    def add(self, place: str, reason: str, *, is_pair: bool = False) -> None:
        """Takes one more."""
        self.count += 1
        self.pairs += is_pair
        if len(self.kept) < MOST_KEPT:
            self.kept.append(BadRow(place, reason, is_pair))

    def without_pairs(self) -> BadRows:
        """Returns those that are no pair of the source, to which `prepare` adds what it finds."""
        others = BadRows(self._where, self._share)
        others.count = self.count - self.pairs
        others.kept = [row for row in self.kept if not row.is_pair]
        return others

    def check(self, rows: int, again: str = "") -> None:
        """Stops where there are too many.

        Args:
            rows: Rows of the whole data set, the bad ones included.
            again: What the error says at its end.

        Raises:
            TooManyBadRowsError: More than `most_bad`; the text names the first `MOST_TOLD`.
        """
        if self.count > most_bad(self._share, rows):
            raise self.error(rows, again)

    def error(self, rows: int, again: str = "") -> TooManyBadRowsError:
        """Returns the error of `check`."""
        most = most_bad(self._share, rows)
        rule = "data.max_bad is not set" if self._share is None else f"data.max_bad {self._share:g}"
        return TooManyBadRowsError(
            f"{self._where}: {self.count} of {rows} rows are bad, at most {most} may be ({rule}): "
            f"{told(self.kept, self.count)}{again}",
            [(row.place, row.reason) for row in self.kept],
        )


def most_bad(share: float | None, rows: int) -> int:
    """Returns how many of a data set's rows may be bad.

    Args:
        share: `data.max_bad`, a share of the rows. None: 1 %; of few rows up to `FEW`, but no more
            than half of them, so that neither one row nor a wrong folder goes unnoticed.
        rows: All rows.
    """
    if share is None:
        return max(rows // 100, min(FEW, rows // 2))
    return int(share * rows + 1e-9)


def told(rows: Sequence[BadRow], count: int) -> str:
    """Returns rows in one line, the first `MOST_TOLD` of `count`."""
    text = "; ".join(map(str, rows[:MOST_TOLD]))
    return text + (f"; and {count - MOST_TOLD} more" if count > MOST_TOLD else "")


def passed_over(number: int, reason: str) -> None:
    """What is done with a bad row by who reads a listing after the scan has told of it."""
