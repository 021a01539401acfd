"""A plain folder: `pairs.jsonl` and the images it names, read without being held in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastpo.config import SourceConfig
from fastpo.data.sources.bad_rows import passed_over
from fastpo.data.sources.base import (
    ScannedSource,
    digest_file,
    found_in,
    plain_text,
    printable,
    shown,
)
from fastpo.data.sources.files import DataFolder, is_file
from fastpo.data.sources.rows import misnamed, name_of, named, pair_weight
from fastpo.errors import DataError
from fastpo.system.files import user_path
from fastpo.system.json_text import parse_json
from fastpo.types import PreferencePair

SCHEMA = (
    '{"prompt": text, "winner": image path, "loser": image path, "id": text (optional), '
    '"pair_weight": number from 0 (optional)}'
)
SOURCE = "source"
"""Of an edit, the image, or the list of images, that the prompt says how to change."""
OTHERS = ("pairs.csv", "pairs.parquet", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Listings that are read where there is no `pairs.jsonl`, by `ListingSource`."""
MOST_LINE = 1 << 20
"""Bytes of a line of the listing."""


class FolderSource(ScannedSource):
    """One JSON object per line: prompt, winner, loser, optionally id; `data.split` is not used.

    Image paths are relative to the folder. Without an id a pair is named after its image paths
    (in alphabetical order, so that turning the label round keeps the name) and the prompt's hash.
    Images lie in the folder unless `data.allow_outside` says that they need not.
    """

    def _where(self) -> str:
        return str(user_path(self.config.path) / "pairs.jsonl")

    def _scan(self) -> None:
        folder = user_path(self.config.path)
        self._file = folder / "pairs.jsonl"
        if not self._file.is_file():
            raise DataError(
                f"missing file: {self._file}; expected one line per pair: {SCHEMA}, or another "
                f"listing: {', '.join(OTHERS)}, *.tar (found: {found_in(folder)})"
            )
        self._images = DataFolder(folder, allow_outside=self.config.allow_outside)
        places: list[int] = []
        for number, place, entry in listed(self._file, bad=self._bad_line):
            for side in ("winner", "loser"):
                complaint = self._images.complaint(entry[side])
                if complaint is not None:
                    raise DataError(f"{self._file}: line {number}: {side} image {complaint}")
            missing = [side for side in ("winner", "loser") if not is_file(folder, entry[side])]
            if missing:  # it keeps its place: the image may come back
                files = " and ".join(printable(str(folder / entry[side])) for side in missing)
                sides = " and ".join(missing)
                self.bad.add(f"line {number}", f"{sides} image not found: {files}", is_pair=True)
            places.append(place)
            self.report.rows += 1
            self.report.pairs += 1
            if self._full():
                break
        self._places = np.array(places, dtype=np.int64)

    def _captions(self) -> Iterator[str]:
        entries = listed(self._file, bad=passed_over)
        return (entry["prompt"] for _, _, entry in islice(entries, len(self)))

    def _bad_line(self, number: int, reason: str) -> None:
        self._bad_row(f"line {number}", reason)

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        lines = listed(self._file, int(self._places[start]), passed_over)
        for _, _, entry in islice(lines, stop - start):
            sides = (entry["winner"], entry["loser"])
            winner, loser = (partial(self._images.read, side) for side in sides)
            name = entry.get("id")
            if name is None:
                name = name_of(*sides, entry["prompt"])
            weight = pair_weight(entry.get("pair_weight"))
            assert not isinstance(weight, str), "bad lines were passed over"
            sources = tuple(partial(self._images.read, one) for one in named(entry.get(SOURCE)))
            yield PreferencePair(
                str(name), entry["prompt"], winner, loser, source_images=sources, weight=weight
            )

    def _source_names(self) -> Iterator[tuple[str, ...] | str]:
        entries = islice(listed(self._file, bad=passed_over), len(self))
        values = (entry.get(SOURCE) for _, _, entry in entries)
        return (misnamed(value) or named(value) for value in values)

    def _source_fault(self, name: str) -> str | None:
        return self._images.fault(name)

    def _read_source(self, name: str) -> bytes:
        return self._images.read(name)

    @classmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""
        return digest_file(user_path(config.path) / "pairs.jsonl")

    @classmethod
    def files(cls, config: SourceConfig) -> Iterator[str] | None:
        """See the base class."""
        listing = user_path(config.path) / "pairs.jsonl"
        return cls._named_in(listing) if listing.is_file() else None

    @classmethod
    def _named_in(cls, listing: Path) -> Iterator[str]:
        with contextlib.suppress(DataError):  # the scan tells what cannot be read
            for _, _, entry in listed(listing, bad=passed_over):
                for side in ("winner", "loser"):
                    yield os.path.join(listing.parent, entry[side])
                for name in named(entry.get(SOURCE)):
                    yield os.path.join(listing.parent, name)


def listed(
    path: Path, place: int = 0, bad: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields number, place in bytes and content of a listing's lines from `place` on.

    Args:
        path: The listing.
        place: Where to begin, in bytes; the line there has number 1.
        bad: Called with number and reason of a line that is not what `SCHEMA` says, or too long;
            the line is passed over. None: it is an error.

    Raises:
        DataError: The file cannot be read, or a line is bad.
    """
    for number, start, value in json_lines(path, place):
        entry = _checked(value) if isinstance(value, dict) else f"{value}; expected {SCHEMA}"
        if isinstance(entry, dict):
            yield number, start, entry
        elif bad is not None:
            bad(number, entry)
        else:
            raise DataError(f"{path}: line {number}: {entry}")


def json_lines(path: Path, place: int = 0) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
    """Yields number, place in bytes and object of a file's lines, or why a line has none.

    Lines that are blank are passed over.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(place)
            for number in count(1):
                line = file.readline(MOST_LINE + 1)
                if not line:
                    return
                length = len(line)
                if length > MOST_LINE:
                    length += _skip_line(file, line)
                if line.strip():
                    yield number, place, _parse(line)
                place += length
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _skip_line(file: BinaryIO, begun: bytes) -> int:
    """Reads the rest of a line of which too much was read; returns its length."""
    rest = 0
    while begun and not begun.endswith(b"\n"):
        begun = file.readline(MOST_LINE)
        rest += len(begun)
    return rest


def _parse(line: bytes) -> dict[str, Any] | str:
    """Returns a line's object, or why there is none."""
    if len(line) > MOST_LINE:
        return f"it has more than {MOST_LINE:,} bytes"
    try:
        entry = parse_json(line)
    except ValueError as error:
        return f"not valid JSON: {error}"
    return entry if isinstance(entry, dict) else f"expected an object, got {type(entry).__name__}"


def _checked(entry: dict[str, Any]) -> dict[str, Any] | str:
    """Returns a line's object, or why it is not what `SCHEMA` says."""
    for key in ("prompt", "winner", "loser"):
        if key not in entry:
            found = shown([*entry])
            return f"missing key {key}; expected {SCHEMA}; found {found}"
        if not plain_text(entry[key]):
            return f"{key} is {shown(entry[key])}; expected {SCHEMA}"
    name = entry.get("id")
    if not (name is None or isinstance(name, int) or plain_text(name)):
        return f"id is {shown(name)}; expected {SCHEMA}"
    weight = pair_weight(entry.get("pair_weight"))
    return weight if isinstance(weight, str) else entry
