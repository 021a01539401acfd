"""Several data sets as one: their pairs one data set after another, each named after its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np

from fastpo.data.sources.bad_rows import BadRows
from fastpo.data.sources.base import PairSource, PromptTable, SourceImages, SourceReport
from fastpo.errors import DataError
from fastpo.types import PreferencePair


class SeveralSources(PairSource):
    """The pairs of several open data sets; each keeps its own counts and limit of bad rows."""

    def __init__(self, parts: Mapping[str, PairSource]) -> None:
        """Joins them.

        Args:
            parts: The data sets by name, in their order.
        """
        self._parts = dict(parts)
        self.where = "; ".join(part.where for part in parts.values())
        counts = [asdict(part.report) for part in parts.values()]
        self.report = SourceReport(**{key: sum(one[key] for one in counts) for key in counts[0]})
        lengths = [len(part) for part in parts.values()]
        self._starts = [0, *np.cumsum(lengths).tolist()]

    @property
    def parts(self) -> Mapping[str | None, PairSource]:
        """See the base class."""
        return {**self._parts}

    @property
    def bad(self) -> BadRows:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bad rows of all of them, whose places begin with the data set's name."""
        joined = BadRows(self.where, None)
        for name, part in self._parts.items():
            for row in part.bad.kept:
                joined.add(f"{name}: {row.place}", row.reason, is_pair=row.is_pair)
        return joined

    def prompt_table(self) -> PromptTable:
        """See the base class."""
        known = {"": 0}
        numbers = []
        for part in self._parts.values():
            table = part.prompt_table()
            joint = [known.setdefault(prompt, len(known)) for prompt in table.prompts]
            numbers.append(np.array(joint, dtype=np.int32)[table.numbers])
        return PromptTable(list(known), np.concatenate(numbers))

    def source_images(self) -> SourceImages | None:
        """See the base class."""
        tables = {name: part.source_images() for name, part in self._parts.items()}
        found = {name: table for name, table in tables.items() if table is not None}
        if not found:
            return None
        if len(found) < len(tables):
            without = ", ".join(name for name, table in tables.items() if table is None)
            raise DataError(
                f"data.sources: pairs of {', '.join(found)} have source images, those of "
                f"{without} have none; train them in one run only if all have"
            )
        names = [f"{name}/{image}" for name, table in found.items() for image in table.names]
        starts = [0, *np.cumsum([len(table.names) for table in found.values()]).tolist()]
        each = list(found.values())
        sets = [
            tuple(image + start for image in images)
            for table, start in zip(each, starts, strict=False)
            for images in table.sets
        ]
        firsts = [0, *np.cumsum([len(table.sets) for table in each]).tolist()]
        numbers = [table.numbers + first for table, first in zip(each, firsts, strict=False)]

        def read(number: int) -> bytes:
            part = int(np.searchsorted(starts, number, side="right")) - 1
            return each[part].read(number - starts[part])

        return SourceImages(names, sets, np.concatenate(numbers).astype(np.int32), read)

    def edits(self) -> bool:
        """See the base class."""
        return any(part.edits() for part in self._parts.values())

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        for (name, part), first in zip(self._parts.items(), self._starts, strict=False):
            for pair in part.pairs(max(0, start - first), max(0, stop - first)):
                yield replace(pair, pair_id=f"{name}/{pair.pair_id}")
