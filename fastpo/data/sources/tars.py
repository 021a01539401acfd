"""WebDataset: uncompressed tar files in which a pair's files have one name before the first dot."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpo.config import SourceConfig
from fastpo.data.sources.base import ScannedSource, content_hash, printable, shown
from fastpo.data.sources.columns import BAD, TIE
from fastpo.data.sources.files import MOST_IMAGE_BYTES
from fastpo.data.sources.folder import MOST_LINE
from fastpo.data.sources.rows import FILE_NAME, NoPair, Row, find_columns, read_row
from fastpo.errors import DataError, one_line
from fastpo.system.files import user_path
from fastpo.system.json_text import parse_json
from fastpo.system.retry import is_transient
from fastpo.types import PreferencePair

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
NUMBERS = {"0": "image_0", "1": "image_1"}
"""`key.0.jpg` and `key.1.jpg` are two images that labels tell apart."""


def find_tars(config: SourceConfig) -> list[Path]:
    """Returns the tar files of `data.path`: those of the split if any is named so, or all."""
    path = user_path(config.path)
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    found = sorted(path.glob("*.tar")) or sorted((path / config.split).glob("*.tar"))
    return [
        file for file in found if file.name.startswith((f"{config.split}-", f"{config.split}."))
    ] or found


class TarSource(ScannedSource):
    """Pairs of WebDataset shards; a pair's name is its key.

    `key.winner.png` and `key.loser.png`, or `key.jpg_0` and `key.jpg_1` (or `key.0.png` and
    `key.1.png`) with labels; `key.txt` is the prompt, and `key.json` holds it or other columns of
    `fastpo.data.sources.rows`. Images are read from their place in the tar file. `key.source.png`
    is the image that an edit begins from, and `key.source_2.png` the next one; equal ones are
    known by their bytes.
    """

    def _scan(self) -> None:
        self._files = find_tars(self.config)
        names: list[str] = []
        prompts: list[str] = []
        weights: list[float | None] = []
        places = array("q")  # file, then place and size of winner and loser
        sources, counts = array("q"), array("q")  # place and size of each; how many before a pair's
        for number, file in enumerate(self._files):
            for key, values, members in _samples(file):
                row = _row(key, values, members)
                if isinstance(row, NoPair):
                    place = f"{file.name}: {printable(key)}"
                    self._no_pair(place, row.reason, tie=row.kind == TIE)
                else:
                    names.append(row.name)
                    prompts.append(row.prompt)
                    weights.append(row.weight)
                    places.extend((number, *members[row.winner], *members[row.loser]))
                    counts.append(len(sources) // 2)
                    for name in _sources(row, values):
                        sources.extend(members.get(name, ()))
                    self.report.rows += 1
                    self.report.pairs += 1
                if self._full():
                    break
            if self._full():
                break
        self._names, self._prompts = (pa.array(x, pa.large_string()) for x in (names, prompts))
        self._weights = pa.array(weights, pa.float64())
        self._places = np.array(places, dtype=np.int64).reshape(-1, 5)
        self._source_places = np.array(sources, dtype=np.int64).reshape(-1, 2)
        self._source_starts = np.array([*counts, len(self._source_places)])
        self._sources: dict[str, tuple[Path, int, int]] = {}

    def _captions(self) -> Iterator[str]:
        for start in range(0, len(self._prompts), 8192):
            yield from self._prompts[start : start + 8192].to_pylist()

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        for number in range(start, stop):
            file, *spans = self._places[number].tolist()
            path = self._files[file]
            winner = partial(_read, path, *spans[:2])
            loser = partial(_read, path, *spans[2:4])
            sources = tuple(partial(_read, *where) for where in self._sources_of(number))
            name, prompt = self._names[number].as_py(), self._prompts[number].as_py()
            weight = self._weights[number].as_py()
            about = {"source_images": sources, "weight": weight}
            yield PreferencePair(name, prompt, winner, loser, **about)

    def _sources_of(self, number: int) -> Iterator[tuple[Path, int, int]]:
        """Where the source images of a pair are."""
        path = self._files[int(self._places[number, 0])]
        start, stop = self._source_starts[number : number + 2]
        return ((path, *span) for span in self._source_places[start:stop].tolist())

    def _source_names(self) -> Iterator[tuple[str, ...]]:
        for number in range(len(self)):
            names = []
            for where in self._sources_of(number):
                names.append(content_hash(_read(*where)))
                self._sources.setdefault(names[-1], where)
            yield tuple(names)

    def _read_source(self, name: str) -> bytes:
        return _read(*self._sources[name])

    @classmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""
        files = find_tars(config)
        sizes = [f"{file.name}:{file.stat().st_size}" for file in files]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest() if files else None

    @classmethod
    def files(cls, config: SourceConfig) -> list[str] | None:
        """See the base class."""
        return [str(file) for file in find_tars(config)] or None


def _samples(
    path: Path,
) -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[int, int]]]]:
    """Yields key, values by column, and place and size of the images by their name."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            plain = (member for member in tar if member.isreg() and not member.issparse())
            for key, members in groupby(plain, key=_key):
                values: dict[str, Any] = {}
                images: dict[str, tuple[int, int]] = {}
                for member in members:
                    field = member.name[len(key) + 1 :].lower()
                    _enter(tar, member, field, values, images)
                yield key, values, images
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        if is_transient(error):
            raise
        raise DataError(
            f"{path} is not a readable tar file, or compressed: {one_line(error)}"
        ) from None


def _key(member: tarfile.TarInfo) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _enter(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    field: str,
    values: dict[str, Any],
    images: dict[str, tuple[int, int]],
) -> None:
    """Enters a file of a sample: text is read, of an image the place."""
    if field in ("txt", "json") or field.rpartition(".")[2] in ("txt", "json"):
        file = tar.extractfile(member) if member.size <= MOST_LINE else None
        content = b"" if file is None else file.read()
        name = field.rpartition(".")[0] or "prompt"
        with contextlib.suppress(ValueError):  # the row then lacks its columns, and says so
            if field.endswith("txt"):
                values[name] = content.decode("utf-8-sig").strip()
            elif isinstance(parsed := parse_json(content), dict):
                values.update({key: value for key, value in parsed.items() if key not in values})
        return
    stem, dot, suffix = field.rpartition(".")
    name = stem if f".{suffix}" in IMAGES and dot else field
    name = NUMBERS.get(name, name)
    images[member.name] = member.offset_data, member.size
    values[name.removesuffix(FILE_NAME)] = member.name


def _row(key: str, values: dict[str, Any], images: dict[str, tuple[int, int]]) -> Row | NoPair:
    try:
        columns = find_columns("this key", values)
    except DataError as error:
        return NoPair(BAD, str(error))
    row = read_row({"id": key, **values}, {**columns, "id": "id"})
    if isinstance(row, Row):
        for name in (row.winner, row.loser):
            if name not in images:
                return NoPair(BAD, f"{shown(name)} is no image of this key")
    return row


def _sources(row: Row, values: dict[str, Any]) -> Iterator[str]:
    """Yields the names of the source images of a key: `source`, `source_2` and so on."""
    yield from row.sources
    for number in count(2):
        name = values.get(f"source_{number}")
        if not row.sources or not isinstance(name, str):
            return
        yield name


def _read(path: Path, place: int, size: int) -> bytes:
    """Returns an image's bytes.

    Raises:
        OSError: It cannot be read, or is too large.
    """
    if size > MOST_IMAGE_BYTES:
        text = f"it has {size:,} bytes, at most {MOST_IMAGE_BYTES:,} are read"
        raise OSError(errno.EFBIG, text, str(path))
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, place)
