"""A folder with a listing of image paths: CSV, Parquet, JSON lines, `imagefolder` metadata."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpo.config import SourceConfig
from fastpo.data.sources.base import ScannedSource, digest_file, printable
from fastpo.data.sources.columns import TIE, is_number, is_text, plain_type
from fastpo.data.sources.files import DataFolder, is_file
from fastpo.data.sources.folder import OTHERS, json_lines
from fastpo.data.sources.rows import NoPair, Row, find_columns, read_row
from fastpo.errors import DataError, one_line
from fastpo.system.files import user_path
from fastpo.types import PreferencePair

SUFFIXES = (".csv", ".parquet", ".jsonl")


def find_listing(config: SourceConfig) -> Path | None:
    """Returns the listing in `data.path` or its folder of the split's name, or the file itself."""
    path = user_path(config.path)
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    for folder in (path, path / config.split):
        names = ("pairs.jsonl", *OTHERS) if folder != path else OTHERS
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


class ListingSource(ScannedSource):
    """Rows of a listing that name images relative to the listing's folder.

    Of the listing its prompts and names are held in memory, some hundred bytes a row.
    """

    def _scan(self) -> None:
        listing = find_listing(self.config)
        if listing is None:
            raise DataError(f"data.path: {self.config.path} has no listing")
        self._listing = listing
        self._images = DataFolder(listing.parent, allow_outside=self.config.allow_outside)
        kept: list[Row] = []
        columns: dict[str, str] | None = None
        for place, row in _rows(listing):
            if isinstance(row, str):
                self._bad_row(place, row)
                continue
            try:
                columns = columns or find_columns(str(listing), row)
            except DataError as error:  # of JSON lines, where each has its own keys
                self._bad_row(place, str(error))
                continue
            self._take(place, read_row(row, columns), kept)
            if self._full():
                break
        values = {
            name: pa.array([getattr(row, name) for row in kept], pa.large_string())
            for name in ("name", "prompt", "winner", "loser", "misnamed")
        }
        texts = pa.list_(pa.large_string())
        values["sources"] = pa.array([list(row.sources) for row in kept], texts)
        values["weight"] = pa.array([row.weight for row in kept], pa.float64())
        self._kept = pa.table(values)

    def _take(self, place: str, row: Row | NoPair, kept: list[Row]) -> None:
        if isinstance(row, NoPair):
            self._no_pair(place, row.reason, tie=row.kind == TIE)
            return
        for name in (row.winner, row.loser):
            complaint = self._images.complaint(name)
            if complaint is not None:
                raise DataError(f"{self._listing}: {place}: image {complaint}")
            if not is_file(self._images.folder, name):  # it keeps its place: it may come back
                missing = printable(str(self._images.folder / name))
                self.bad.add(place, f"image not found: {missing}", is_pair=True)
                break
        kept.append(row)
        self.report.rows += 1
        self.report.pairs += 1

    def _captions(self) -> Iterator[str]:
        for chunk in self._kept["prompt"].chunks:
            for start in range(0, len(chunk), 8192):
                yield from chunk[start : start + 8192].to_pylist()

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        for place in range(start, stop, 1024):
            for row in self._kept.slice(place, min(1024, stop - place)).to_pylist():
                winner, loser = (partial(self._images.read, row[s]) for s in ("winner", "loser"))
                sources = tuple(partial(self._images.read, name) for name in row["sources"])
                about = {"source_images": sources, "weight": row["weight"]}
                yield PreferencePair(row["name"], row["prompt"], winner, loser, **about)

    def _source_names(self) -> Iterator[tuple[str, ...] | str]:
        for start in range(0, len(self), 8192):
            for row in self._kept.slice(start, 8192).select(["sources", "misnamed"]).to_pylist():
                yield row["misnamed"] or tuple(row["sources"])

    def _source_fault(self, name: str) -> str | None:
        return self._images.fault(name)

    def _read_source(self, name: str) -> bytes:
        return self._images.read(name)

    @classmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""
        listing = find_listing(config)
        return None if listing is None else digest_file(listing)

    @classmethod
    def files(cls, config: SourceConfig) -> Iterator[str] | None:
        """See the base class."""
        listing = find_listing(config)
        return None if listing is None else cls._named_in(listing)

    @classmethod
    def _named_in(cls, listing: Path) -> Iterator[str]:
        columns: dict[str, str] | None = None
        for _, row in _rows(listing):
            if isinstance(row, str):
                continue
            with contextlib.suppress(DataError):
                columns = columns or find_columns(str(listing), row)
                found = read_row(row, columns)
                if isinstance(found, Row):
                    for name in (found.winner, found.loser, *found.sources):
                        yield os.path.join(listing.parent, name)


def _rows(listing: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields where each row stands, and its values by column, or why it has none."""
    if listing.suffix == ".parquet":
        return _parquet_rows(listing)
    if listing.suffix == ".csv":
        return _csv_rows(listing)
    return (
        (f"line {number}", value) for number, _, value in json_lines(listing) if value is not None
    )


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is not None:
                find_columns(str(listing), reader.fieldnames)
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield f"line {reader.line_num}", f"not valid CSV: {one_line(error)}"
                    continue
                if row is None:
                    return
                yield f"line {reader.line_num}", {k: v or None for k, v in row.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{listing} cannot be read as CSV in UTF-8: {one_line(error)}") from None


def _parquet_rows(listing: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        with pq.ParquetFile(listing, page_checksum_verification=True) as file:
            columns = find_columns(str(listing), file.schema_arrow.names)
            for what, name in columns.items():
                kind = file.schema_arrow.field(name).type
                labels = what in ("label_0", "label_1", "has_label", "weight")
                words = "a number" if labels else "text" if what == "prompt" else "an image's path"
                if what == "source":  # of a model without source images it may hold anything
                    continue
                fits = is_number if labels or what == "id" else is_text
                if not fits(plain_type(kind)):
                    raise DataError(f"{listing}: column {name} is {kind!s:.200}; expected {words}")
            number = 0
            for batch in file.iter_batches(8192, columns=[*columns.values()], use_threads=False):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{listing} is not a readable parquet file: {one_line(error)}") from None
