"""The cache's table of contents: what it is made from, who makes which part, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo.errors import CacheError
from fastpo.models.folder import DigestMemo
from fastpo.system.files import whole_file, write_text

FORMAT = 2
MANIFEST = "manifest.json"


class Record(BaseModel):
    """Base of what manifests are made of: every key must be known."""

    model_config = ConfigDict(extra="forbid")


class FileRecord(Record):
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


class Quarantined(Record):
    """A pair that was left out, and why."""

    pair_id: str
    reason: str


class Range(Record):
    """A stretch that one process encodes at a time: positions of the source, or prompt numbers.

    Attributes:
        start: The first one.
        stop: One past the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int
    stop: int


class Manifest(Record):
    """Everything `manifest.json` holds: the plan first, and the result once all of it is done.

    Attributes:
        format: Version of the layout.
        identity: What decides the content, by name; see `fastpo.data.cache.fingerprint`.
        weights: Memo that saves hashing the model again, by component.
        stamp: `source_stamp` of the data while it was as the cache was made from it.
        limit: `data.limit` of the last preparation.
        complete: Whether every shard and text was done and they were merged.
        report: Counts of the source's scan.
        source_pairs: Pairs of the source within the limit, those in quarantine included.
        shards: Stretches of the source; shard k stands in the folder `shard-k`.
        texts: Stretches of the prompts; text k stands in the folder `text-k`.
        shapes: `(h, w)` of the latents, by bucket number.
        pairs: Usable pairs.
        quarantined: How many pairs were left out as unusable.
        files: The finished cache's files by their path in the folder.
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
    shapes: list[tuple[int, int]] = []
    pairs: int = 0
    quarantined: int = 0
    files: dict[str, FileRecord] = {}

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
        write_text(cache_dir / MANIFEST, self.model_dump_json(indent=1))


def load_manifest(cache_dir: Path) -> Manifest | None:
    """Returns the manifest in a folder, None if there is none.

    Raises:
        CacheError: It cannot be read or is of another version of the layout.
    """
    path = cache_dir / MANIFEST
    try:
        raw = json.loads(path.read_text())
        version = raw.get("format")
        if version == FORMAT:
            return Manifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, ValidationError, AttributeError) as error:
        raise CacheError(
            f"{path} is damaged ({error}); delete {cache_dir} and prepare again"
        ) from None
    raise CacheError(
        f"{path} has layout version {version}, this FastPO reads {FORMAT}; delete {cache_dir} and "
        f"prepare again"
    )


def check_identity(cache_dir: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares what the configuration asks for with what the cache was made from.

    A value that is empty on either side could not be determined and is not compared.

    Raises:
        CacheError: They differ; the text names each field, what was expected and what was found.
    """
    lines = differing_fields(expected, found)
    if lines:
        raise CacheError(
            f"the cache {cache_dir} does not fit the configuration: {'; '.join(lines)}. "
            f"Restore these settings, or point prepare.cache_dir at a new folder and prepare again"
        )


def differing_fields(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Returns one line for each field of two identities that differs; empty values are unknown."""
    return [
        f"{name}: the configuration gives {_short(expected.get(name))}, the cache was made with "
        f"{_short(found.get(name))}"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name) != found.get(name) and expected.get(name) != "" != found.get(name)
    ]


def write_recorded(path: Path, write: Callable[[Path], Any]) -> FileRecord:
    """Lets `write` fill a file, whole or not at all.

    Returns:
        Size and SHA-256 of what was written.
    """
    with whole_file(path) as temporary:
        write(temporary)
        return file_record(temporary)


def file_record(path: Path) -> FileRecord:
    """Returns a file's size and SHA-256."""
    return FileRecord(bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(cache_dir: Path, files: Mapping[str, FileRecord], *, verify: bool) -> None:
    """Checks that every file is there with its size and, with `verify`, its SHA-256.

    Raises:
        CacheError: Naming the first file that is missing or differs.
    """
    for name, record in files.items():
        path = cache_dir / name
        try:
            size = path.stat().st_size
        except OSError:
            raise CacheError(f"missing file: {path}; prepare again into a new folder") from None
        if size != record.bytes:
            raise CacheError(f"{path} is damaged: {size} bytes, expected {record.bytes}")
        if verify:
            digest = _sha256(path)
            if digest != record.sha256:
                raise CacheError(
                    f"{path} is damaged: SHA-256 {digest[:12]}, expected {record.sha256[:12]}"
                )


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return f"sha256 {value[:12]}" if len(value) == 64 and value.isalnum() else repr(value)
