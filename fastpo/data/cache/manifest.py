"""The cache's table of contents: what it is made from, who makes which part, and its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fastpo.errors import CacheError, one_line
from fastpo.models.folder import DigestMemo
from fastpo.system.checksums import checksum
from fastpo.system.files import whole_file, write_text
from fastpo.system.json_text import read_json, seal, unseal
from fastpo.system.ownership import Kind

FORMAT = 2
MANIFEST = "manifest.json"
MOST_BYTES = 1 << 28
"""Of a manifest or record; that of a million pairs has a few megabytes."""
REMAKE = "`fastpo prepare CONFIG --set data.verify=always` makes what is damaged again"
TRY_AGAIN = "`fastpo prepare CONFIG --retry-quarantined`"
"""The command that tries again what was left out."""
# A manifest.json that is none of ours has been refused where it was read.
CACHE = Kind("a cache", "", lambda folder: load_manifest(folder) is not None)


class Record(BaseModel):
    """Base of what manifests are made of: every key must be known."""

    model_config = ConfigDict(extra="forbid")


class FileRecord(Record):
    """What one file holds.

    Attributes:
        bytes: Its size.
        sha256: SHA-256, which enters fingerprints.
        xxh3: XXH3 of 128 bits, five times as fast, with which it is checked; None in caches of
            before it was kept.
    """

    bytes: int
    sha256: str
    xxh3: str | None = None


class Quarantined(Record):
    """A pair that was left out, and why.

    Attributes:
        pair_id: Its name; of a row that is no pair, where it stands.
        reason: What is wrong with it.
        kind: See `fastpo.system.pictures.UnusableImageError`; of before it was kept `bad`.
        source: Of several data sets the name of its own.
    """

    pair_id: str
    reason: str
    kind: Literal["bad", "aspect", "same"] = "bad"
    source: str | None = None

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what a single data set has no use for."""
        return _without_empty(handler(self), "source")


class Range(Record):
    """A stretch that one process encodes at a time: positions of the source, or prompt numbers.

    Attributes:
        start: The first one.
        stop: One past the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int
    stop: int


class SourceCount(Record):
    """One of several data sets, and what was found of it.

    Attributes:
        name: Its name.
        stop: One past the position of its last pair; the first data set begins at 0.
        report: As `Manifest.report`, of this data set alone; and of its pairs those that an earlier
            data set has too (`shared`).
        pairs: Usable pairs.
        quarantined: How many pairs and bad rows were left out as unusable.
    """

    name: str
    stop: int
    report: dict[str, int] = {}
    pairs: int = 0
    quarantined: int = 0


class Manifest(Record):
    """Everything `manifest.json` holds: the plan first, and the result once all of it is done.

    Attributes:
        format: Version of the layout.
        identity: What decides the content, by name; see `fastpo.data.cache.fingerprint`.
        weights: Memo that saves hashing the model again, by component.
        stamp: `source_stamp` of the data while it was as the cache was made from it.
        limit: `data.limit` of the last preparation.
        complete: Whether every shard and text was done and they were merged.
        report: Counts of the source's scan and, where there are any, of pairs left out for
            differing aspect ratios (`aspect`) or one image twice (`same`), and of comparisons that
            are labeled both ways (`contradictions`).
        source_pairs: Pairs of the source within the limit, those in quarantine included.
        shards: Stretches of the source; shard k stands in the folder `shard-k`.
        texts: Stretches of the prompts; text k stands in the folder `text-k`.
        images: Stretches of the images that edits begin from, in folders `image-k`; else empty.
        shapes: `(h, w)` of the latents, by bucket number.
        pairs: Usable pairs.
        quarantined: How many pairs and bad rows were left out as unusable.
        sources: Of several data sets each, in the order of the pairs; empty for a single one.
        files: The finished cache's files by their path in the folder.
        beside: The same of files that add nothing to the content, and so not to the fingerprint:
            records of the parts, checksums of rows, the quarantine.
    """

    format: int = FORMAT
    identity: dict[str, str]
    weights: dict[str, DigestMemo] = {}
    stamp: str | None = None
    limit: int | None = None
    complete: bool = False
    report: dict[str, int] = {}
    source_pairs: int = 0
    shards: list[Range] = []
    texts: list[Range] = []
    images: list[Range] = []
    shapes: list[tuple[int, int]] = []
    pairs: int = 0
    quarantined: int = 0
    sources: list[SourceCount] = []
    files: dict[str, FileRecord] = {}
    beside: dict[str, FileRecord] = {}

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        each = (("shards", self.shards), ("texts", self.texts), ("images", self.images))
        for name, spans in each:
            edges = [0, *(edge for span in spans for edge in (span.start, span.stop))]
            if edges != sorted(edges) or edges[:-1:2] != edges[1::2]:
                raise ValueError(f"{name} do not follow one another from 0 on")
        if self.complete and not (self.shards and self.texts and self.shapes):
            raise ValueError("it is complete and has no part")
        stops = [source.stop for source in self.sources]
        if stops and (stops != sorted(stops) or stops[-1] != self.source_pairs):
            raise ValueError("its sources do not follow one another up to the last pair")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what a single data set, or one without edits, has no use for."""
        return _without_empty(_without_empty(handler(self), "sources"), "images")

    def source_of(self, position: np.ndarray) -> np.ndarray:
        """Returns the number of the data set of each position; all 0 for a single one."""
        stops = [source.stop for source in self.sources[:-1]]
        return np.searchsorted(np.array(stops, dtype=np.int64), position, side="right")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the identity and every file's SHA-256."""
        files = {name: record.sha256 for name, record in self.files.items()}
        text = json.dumps([self.identity, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def covers(self, limit: int | None) -> bool:
        """Tells whether the plan spans every pair that a limit allows."""
        return self.limit is None or (limit is not None and limit <= self.limit)

    def save(self, cache_dir: Path) -> None:
        """Writes `manifest.json`, whole or not at all."""
        write_text(cache_dir / MANIFEST, seal(self.model_dump(mode="json")))


def _without_empty(written: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in written.items() if value or name != key}


def load_manifest(cache_dir: Path) -> Manifest | None:
    """Returns the manifest in a folder, None if there is none.

    Raises:
        CacheError: It cannot be read or is of another version of the layout.
    """
    path = cache_dir / MANIFEST
    try:
        raw = unseal(read_json(path, most_bytes=MOST_BYTES))
        version = raw.get("format")
        if version == FORMAT:
            return Manifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path} is damaged ({one_line(error)}); delete {cache_dir} and prepare again"
        ) from None
    raise CacheError(
        f"{path} has layout version {version!r:.40}, this FastPO reads {FORMAT}; "
        f"delete {cache_dir} and prepare again"
    )


def check_identity(cache_dir: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares what the configuration asks for with what the cache was made from.

    A value that is empty on either side could not be determined and is not compared.

    Raises:
        CacheError: They differ; the text names each field, what was expected and what was found.
    """
    lines = differing_fields(expected, found)
    if lines:
        copied = f" with prepare.reuse={cache_dir}, which copies what is encoded"
        raise CacheError(
            f"the cache {cache_dir} does not fit the configuration: {'; '.join(lines)}. "
            f"Restore these settings, or point prepare.cache_dir at a new folder and prepare again"
            f"{copied if all(map(is_of_data, lines)) else ''}"
        )


def is_of_data(line: str) -> bool:
    """Tells of a line of `differing_fields` whether the field is of the data alone."""
    return line.startswith(("data.", "data files:"))


def differing_fields(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Returns one line for each field of two identities that differs; empty values are unknown.

    Data that lies elsewhere and lists the same is the same data.
    """
    listed = [identity.get("data files", "") for identity in (expected, found)]
    same = listed[0] == listed[1] != ""
    return [
        f"{name}: the configuration gives {_short(expected.get(name))}, the cache was made with "
        f"{_short(found.get(name))}"
        for name in dict.fromkeys([*expected, *found])
        if not (same and _is_data_path(name))
        and expected.get(name) != found.get(name)
        and expected.get(name) != "" != found.get(name)
    ]


def _is_data_path(name: str) -> bool:
    return name.startswith("data.") and name.endswith(".path")


def write_recorded(path: Path, write: Callable[[Path], Any]) -> FileRecord:
    """Lets `write` fill a file, whole or not at all.

    Returns:
        Size and checksums of what was written.
    """
    with whole_file(path) as temporary:
        write(temporary)
        return file_record(temporary)


def file_record(path: Path) -> FileRecord:
    """Returns a file's size and checksums."""
    found = checksum(path)
    return FileRecord(bytes=found.bytes, sha256=_sha256(path), xxh3=found.xxh3)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(path: Path, record: FileRecord, *, content: bool) -> str | None:
    """Says what is wrong with a file, or returns None.

    Args:
        path: The file.
        record: What it held when it was written.
        content: Also read it, and compare its checksum: XXH3, or SHA-256 in caches of before.
    """
    try:
        size = os.stat(path).st_size
        if size != record.bytes:
            return f"{path} is damaged: {size} bytes, expected {record.bytes}"
        if not content:
            return None
        name, expected = ("XXH3", record.xxh3) if record.xxh3 else ("SHA-256", record.sha256)
        found = checksum(path).xxh3 if record.xxh3 else _sha256(path)
    except FileNotFoundError:
        return f"missing file: {path}"
    except ValueError:  # a zero byte
        return f"{str(path)!a} is no name that a file can have"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found != expected:
        told = " ".join(expected[:12].split())
        return f"{path} is damaged: {name} {found[:12]}, expected {told}"
    return None


def damages(cache_dir: Path, files: Mapping[str, FileRecord], *, content: bool) -> dict[str, str]:
    """Says by name what is wrong with each file that is missing or differs; see `damage_of`.

    Contents are read by four threads.
    """

    def look(name: str) -> str | None:
        return damage_of(cache_dir / name, files[name], content=content)

    if not content:
        found = list(map(look, files))
    else:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(look, files))
    return {name: what for name, what in zip(files, found, strict=True) if what}


def check_files(cache_dir: Path, files: Mapping[str, FileRecord], *, verify: bool) -> None:
    """Checks that every file is there with its size and, with `verify`, its content.

    Raises:
        CacheError: Naming the first file that is missing or differs.
    """
    for content in (False, True) if verify else (False,):
        for what in damages(cache_dir, files, content=content).values():
            raise CacheError(f"{what}; {REMAKE}")


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return f"sha256 {value[:12]}" if len(value) == 64 and value.isalnum() else repr(value)
