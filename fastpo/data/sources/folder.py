"""A plain folder: `pairs.jsonl` and the images it names."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.config import DataConfig
from fastpo.data.sources.base import PairSource, content_hash, digest_file, found_in
from fastpo.errors import DataError
from fastpo.types import PreferencePair

SCHEMA = '{"prompt": text, "winner": image path, "loser": image path, "id": text (optional)}'


class FolderSource(PairSource):
    """One JSON object per line: prompt, winner, loser, optionally id; `data.split` is not used.

    Image paths are relative to the folder. Without an id a pair is named after its image paths
    (in alphabetical order, so that turning the label round keeps the name) and the prompt's hash.
    """

    def _scan(self) -> None:
        folder = Path(self.config.path).expanduser()
        self._file = folder / "pairs.jsonl"
        if not self._file.is_file():
            raise DataError(
                f"missing file: {self._file}; expected one line per pair: {SCHEMA} "
                f"(found: {found_in(folder)})"
            )
        places: list[int] = []
        for number, place, entry in listed(self._file):
            for side in ("winner", "loser"):
                if not (folder / entry[side]).is_file():
                    raise DataError(
                        f"{self._file}: line {number}: {side} image not found: "
                        f"{folder / entry[side]}"
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
            winner, loser = (partial(Path.read_bytes, self._file.parent / side) for side in sides)
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
        DataError: A line is not what `SCHEMA` says.
    """
    with path.open("rb") as file:
        file.seek(place)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, place, _parse(path, number, line)
            place += len(line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}: line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}; expected {SCHEMA}") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected {SCHEMA}, got {type(entry).__name__}")
    for key in ("prompt", "winner", "loser"):
        if key not in entry:
            raise DataError(f"{where}: missing key {key}; expected {SCHEMA}; found {[*entry]}")
        if not isinstance(entry[key], str):
            raise DataError(f"{where}: {key} is {entry[key]!r}; expected {SCHEMA}")
    if not isinstance(entry.get("id"), str | int | None):
        raise DataError(f"{where}: id is {entry['id']!r}; expected {SCHEMA}")
    return entry
