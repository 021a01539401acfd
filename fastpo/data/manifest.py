"""The cache's table of contents: what it was made from, and its files with size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo.errors import CacheError

FORMAT = 1
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


class ShardRecord(Record):
    """One finished stretch of the source.

    Attributes:
        source_pairs: Pairs it took from the source, those in quarantine included.
        pairs: Pairs it holds.
        prompts: Prompts that occur here for the first time.
        files: Its files by name.
        quarantined: The pairs left out.
    """

    source_pairs: int
    pairs: int
    prompts: int
    files: dict[str, FileRecord]
    quarantined: list[Quarantined]


class WeightsMemo(Record):
    """A component's digest, valid while its files keep name, size and time of change."""

    stamp: str
    sha256: str


class Manifest(Record):
    """Everything `manifest.json` holds.

    Attributes:
        format: Version of the layout.
        identity: What decides the content, by name; see `fastpo.data.identity`.
        weights: Memo that saves hashing the model again, by component.
        limit: `data.limit` of the last preparation.
        complete: Whether the source was exhausted (or the limit reached).
        report: Counts of the source's scan.
        shards: In the order of the source.
    """

    format: int = FORMAT
    identity: dict[str, str]
    weights: dict[str, WeightsMemo] = {}
    limit: int | None = None
    complete: bool = False
    report: dict[str, int] = {}
    shards: list[ShardRecord] = []

    @property
    def source_pairs(self) -> int:
        """Pairs of the source that are done."""
        return sum(shard.source_pairs for shard in self.shards)

    @property
    def quarantined(self) -> list[Quarantined]:
        """All pairs left out."""
        return [pair for shard in self.shards for pair in shard.quarantined]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the identity and every file's SHA-256."""
        files = {name: r.sha256 for shard in self.shards for name, r in shard.files.items()}
        text = json.dumps([self.identity, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, cache_dir: Path) -> None:
        """Writes `manifest.json` and `quarantine.jsonl` atomically."""
        lines = "".join(pair.model_dump_json() + "\n" for pair in self.quarantined)
        write_atomically(cache_dir / "quarantine.jsonl", lambda p: p.write_text(lines))
        text = self.model_dump_json(indent=1)
        write_atomically(cache_dir / MANIFEST, lambda p: p.write_text(text))


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


def write_atomically(path: Path, write: Callable[[Path], Any]) -> FileRecord:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk and renames it.

    Returns:
        Size and SHA-256 of what was written.
    """
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = temporary.stat().st_size
    os.replace(temporary, path)
    return FileRecord(bytes=size, sha256=digest)


def check_files(cache_dir: Path, manifest: Manifest, *, verify: bool) -> None:
    """Checks that every file is there with its size and, with `verify`, its SHA-256.

    Raises:
        CacheError: Naming the first file that is missing or differs.
    """
    for shard in manifest.shards:
        for name, record in shard.files.items():
            path = cache_dir / name
            if not path.is_file():
                raise CacheError(f"missing file: {path}; prepare again into a new folder")
            size = path.stat().st_size
            if size != record.bytes:
                raise CacheError(f"{path} is damaged: {size} bytes, expected {record.bytes}")
            if verify:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != record.sha256:
                    raise CacheError(
                        f"{path} is damaged: SHA-256 {digest[:12]}, expected {record.sha256[:12]}"
                    )


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return f"sha256 {value[:12]}" if len(value) == 64 and value.isalnum() else repr(value)
