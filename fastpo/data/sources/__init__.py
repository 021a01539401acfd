"""Preference data sets as a lazy stream of `PreferencePair`s.

`open_source` reads labels only: ties and unlabeled rows are counted and dropped, wrong labels are
refused by file and row. Image bytes are read when a pair's `winner()` or `loser()` is called.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastpo.config import DataConfig, SourceConfig
from fastpo.config.data import SourceKind
from fastpo.data.sources.base import PairSource, ScannedSource, SourceReport, found_in
from fastpo.data.sources.folder import OTHERS, FolderSource
from fastpo.data.sources.hpdv2 import HPDv2Source
from fastpo.data.sources.listing import ListingSource, find_listing
from fastpo.data.sources.parquet import ParquetSource
from fastpo.data.sources.several import SeveralSources
from fastpo.data.sources.tars import TarSource, find_tars
from fastpo.errors import DataError, one_line
from fastpo.models.hub import is_hub_id
from fastpo.system.files import user_path

__all__ = [
    "PairSource",
    "SourceReport",
    "open_local",
    "open_source",
    "recognize",
    "source_digest",
    "source_stamp",
    "source_stamps",
]

_KINDS: dict[str, type[ScannedSource]] = {
    "pickapic": ParquetSource,
    "pickstyle": ParquetSource,
    "picksafety": ParquetSource,
    "hpdv2": HPDv2Source,
    "folder": FolderSource,
}


def open_source(config: DataConfig) -> PairSource:
    """Opens the configured data, scans the labels and reports what they hold.

    Several data sets follow one another, and their pairs' names begin with the data set's.

    Args:
        config: Source, path, split and limit, or several of them. The flip settings play no part
            here: flips are applied when the cache is read.

    Returns:
        An iterable of pairs that can be iterated again, with `report`.

    Raises:
        DataError: A file or column is missing, a label is not what the schema allows, or no pair
            is left.
    """
    opened = {one.name: _kind(one)(one) for one in config.each()}
    return SeveralSources(opened) if config.sources else next(iter(opened.values()))


def open_local(config: SourceConfig) -> PairSource | None:
    """Opens one data set if it is on this disk, however many of its rows are bad; else None.

    Raises:
        DataError: As `open_source`.
    """
    kind = _kind(config)
    if kind.digest(config) is None:
        return None
    return kind(config.model_copy(update={"max_bad": 1.0}))


def recognize(path: str) -> SourceKind:
    """Tells what kind of data a path names, by what lies there, or a hub id by its name.

    Raises:
        DataError: There is nothing that any source reads.
    """
    folder = user_path(path)
    if not folder.exists():
        if not is_hub_id(path):
            raise DataError(f"no such file or folder: {path} (and no hub id either)")
        name = _plain(path)
        if "pickstyle" in name:
            return "pickstyle"
        return "picksafety" if "picksafety" in name else "pickapic"
    one = SourceConfig(name="data", source="folder", path=path)
    listing = (folder / "pairs.jsonl").is_file() or find_listing(one) is not None
    columns = _first_columns(folder)
    if listing and not (folder.is_file() and "jpg_0" in columns):
        return "folder"
    if "jpg_0" in columns:
        return "pickapic"
    if any((folder / f"{split}.json").is_file() for split in ("train", "test")):
        return "hpdv2"
    if find_tars(one):
        return "folder"
    raise DataError(
        f"{path} holds no preferences that FastPO reads: Parquet files with the columns caption, "
        f"jpg_0, jpg_1, label_0 and label_1, train.json of HPDv2, or pairs.jsonl, "
        f"{', '.join(OTHERS)}, *.tar (found: "
        f"{found_in(folder if folder.is_dir() else folder.parent)})"
    )


def _plain(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def _first_columns(path: Path) -> list[str]:
    """The columns of a Parquet file, or of the first one in a folder."""
    inside = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    files = [path] if path.suffix == ".parquet" else inside
    try:
        return pq.read_schema(files[0]).names if files else []
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0]} is no readable Parquet file: {one_line(error)}") from None


def _kind(config: SourceConfig) -> type[ScannedSource]:
    """Of a folder, what is read is told by the listing that there is."""
    kind = _KINDS[config.source]
    if kind is not FolderSource or (user_path(config.path) / "pairs.jsonl").is_file():
        return kind
    if find_listing(config) is not None:
        return ListingSource
    return TarSource if find_tars(config) else kind


def source_digest(config: DataConfig) -> str | None:
    """Returns a SHA-256 of what the data set lists, or None if it is not on this disk.

    Listings count by content, parquet files by name and size; of several data sets each.
    """
    digests = [_kind(one).digest(one) for one in config.each()]
    return _joined(digests) if config.sources else digests[0]


def _joined(digests: Sequence[str | None]) -> str | None:
    """Returns a SHA-256 of several, None if one is not known."""
    known = [digest for digest in digests if digest is not None]
    if len(known) < len(digests):
        return None
    return hashlib.sha256("\n".join(known).encode()).hexdigest()


def source_stamp(config: DataConfig) -> str | None:
    """Returns a SHA-256 that changes whenever a file of the data set is written.

    Names in `data.path`, sizes and times of change count; nothing is read but the listing. None if
    the data set is not on this disk.
    """
    stamps = source_stamps(config)
    return None if stamps is None else stamps[0]


def source_stamps(config: DataConfig) -> tuple[str, str] | None:
    """Returns the stamp, and the one that earlier versions kept, where the whole path counts."""
    found = [_stamps(one) for one in config.each()]
    if not config.sources:
        return found[0]
    stamps = _joined([None if one is None else one[0] for one in found])
    return None if stamps is None else (stamps, stamps)


def _stamps(config: SourceConfig) -> tuple[str, str] | None:
    """As `source_stamps`, of one data set."""
    files = _kind(config).files(config)
    if files is None:
        return None
    path = user_path(config.path)
    inside = f"{path.parent if path.is_file() else path}{os.sep}"
    stamp, former = hashlib.sha256(), hashlib.sha256()
    for file in files:
        try:
            stat = os.stat(file)
            text = f"\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except (OSError, ValueError):  # of a name with a zero byte
            text = "\0missing\n"
        stamp.update((file.removeprefix(inside) + text).encode())
        former.update((file + text).encode())
    return stamp.hexdigest(), former.hexdigest()
