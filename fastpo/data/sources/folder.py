"""A plain folder: `pairs.jsonl` and the images it names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.config import DataConfig
from fastpo.data.sources.base import (
    PairSource,
    content_hash,
    digest_file,
    found_in,
    plain_text,
    printable,
    shown,
)
from fastpo.data.sources.files import DataFolder, is_file
from fastpo.errors import DataError
from fastpo.system.json_text import parse_json
from fastpo.types import PreferencePair

SCHEMA = '{"prompt": text, "winner": image path, "loser": image path, "id": text (optional)}'
MOST_LINE = 1 << 20
"""Bytes of a line of the listing."""


class FolderSource(PairSource):
    """One JSON object per line: prompt, winner, loser, optionally id; `data.split` is not used.

    Image paths are relative to the folder. Without an id a pair is named after its image paths
    (in alphabetical order, so that turning the label round keeps the name) and the prompt's hash.
    Images lie in the folder unless `data.allow_outside` says that they need not.
    """

    def _scan(self) -> None:
        folder = Path(self.config.path).expanduser()
        self._file = folder / "pairs.jsonl"
        if not self._file.is_file():
            raise DataError(
                f"missing file: {self._file}; expected one line per pair: {SCHEMA} "
                f"(found: {found_in(folder)})"
            )
        self._images = DataFolder(folder, allow_outside=self.config.allow_outside)
        places: list[int] = []
        for number, place, entry in listed(self._file):
            for side in ("winner", "loser"):
                complaint = self._images.complaint(entry[side])
                if complaint is not None:
                    raise DataError(f"{self._file}: line {number}: {side} image {complaint}")
                if not is_file(folder, entry[side]):
                    missing = printable(str(folder / entry[side]))
                    raise DataError(
                        f"{self._file}: line {number}: {side} image not found: {missing}"
                    )
            places.append(place)
            self.report.rows += 1
            self.report.pairs += 1
            if self._full():
                break
        self._places = np.array(places, dtype=np.int64)

    def _captions(self) -> Iterator[str]:
        return (entry["prompt"] for _, _, entry in islice(listed(self._file), len(self)))

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        lines = listed(self._file, int(self._places[start]))
        for _, _, entry in islice(lines, stop - start):
            sides = (entry["winner"], entry["loser"])
            winner, loser = (partial(self._images.read, side) for side in sides)
            name = entry.get("id")
            if name is None:
                name = ":".join([*sorted(sides), content_hash(entry["prompt"])[:8]])
            yield PreferencePair(str(name), entry["prompt"], winner, loser)

    @classmethod
    def digest(cls, config: DataConfig) -> str | None:
        """See `source_digest`."""
        return digest_file(Path(config.path).expanduser() / "pairs.jsonl")

    @classmethod
    def files(cls, config: DataConfig) -> Iterator[str] | None:
        """See the base class."""
        listing = Path(config.path).expanduser() / "pairs.jsonl"
        return cls._named_in(listing) if listing.is_file() else None

    @classmethod
    def _named_in(cls, listing: Path) -> Iterator[str]:
        with contextlib.suppress(DataError):  # of a line beyond `data.limit`
            for _, _, entry in listed(listing):
                for side in ("winner", "loser"):
                    yield os.path.join(listing.parent, entry[side])


def listed(path: Path, place: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields number, place in bytes and content of a listing's lines from `place` on.

    Raises:
        DataError: A line is not what `SCHEMA` says, or too long, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(place)
            for number in count(1):
                line = file.readline(MOST_LINE + 1)
                if not line:
                    return
                if len(line) > MOST_LINE:
                    text = f"has more than {MOST_LINE:,} bytes"
                    raise DataError(f"{path}: line {number} {text}; expected {SCHEMA}")
                if line.strip():
                    yield number, place, _parse(path, number, line)
                place += len(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}: line {number}"
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}; expected {SCHEMA}") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected {SCHEMA}, got {type(entry).__name__}")
    for key in ("prompt", "winner", "loser"):
        if key not in entry:
            found = shown([*entry])
            raise DataError(f"{where}: missing key {key}; expected {SCHEMA}; found {found}")
        if not plain_text(entry[key]):
            raise DataError(f"{where}: {key} is {shown(entry[key])}; expected {SCHEMA}")
    name = entry.get("id")
    if not (name is None or isinstance(name, int) or plain_text(name)):
        raise DataError(f"{where}: id is {shown(name)}; expected {SCHEMA}")
    return entry
