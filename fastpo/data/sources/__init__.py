"""Preference data sets as a lazy stream of `PreferencePair`s.

`open_source` reads labels only: ties and unlabeled rows are counted and dropped, wrong labels are
refused by file and row. Image bytes are read when a pair's `winner()` or `loser()` is called.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fastpo.config import DataConfig
from fastpo.data.sources.base import PairSource, SourceReport
from fastpo.data.sources.folder import FolderSource
from fastpo.data.sources.hpdv2 import HPDv2Source
from fastpo.data.sources.listing import ListingSource, find_listing
from fastpo.data.sources.parquet import ParquetSource
from fastpo.data.sources.tars import TarSource, find_tars

__all__ = [
    "PairSource",
    "SourceReport",
    "open_source",
    "source_digest",
    "source_stamp",
    "source_stamps",
]

_KINDS: dict[str, type[PairSource]] = {
    "pickapic": ParquetSource,
    "pickstyle": ParquetSource,
    "picksafety": ParquetSource,
    "hpdv2": HPDv2Source,
    "folder": FolderSource,
}


def open_source(config: DataConfig) -> PairSource:
    """Opens the configured data set, scans its labels and reports what they hold.

    Args:
        config: Source, path, split and limit. The flip settings play no part here: flips are
            applied when the cache is read.

    Returns:
        An iterable of pairs that can be iterated again, with `report`.

    Raises:
        DataError: A file or column is missing, a label is not what the schema allows, or no pair
            is left.
    """
    return _kind(config)(config)


def _kind(config: DataConfig) -> type[PairSource]:
    """Of a folder, what is read is told by the listing that there is."""
    kind = _KINDS[config.source]
    if kind is not FolderSource or (Path(config.path).expanduser() / "pairs.jsonl").is_file():
        return kind
    if find_listing(config) is not None:
        return ListingSource
    return TarSource if find_tars(config) else kind


def source_digest(config: DataConfig) -> str | None:
    """Returns a SHA-256 of what the data set lists, or None if it is not on this disk.

    Listings count by content, parquet files by name and size.
    """
    return _kind(config).digest(config)


def source_stamp(config: DataConfig) -> str | None:
    """Returns a SHA-256 that changes whenever a file of the data set is written.

    Names in `data.path`, sizes and times of change count; nothing is read but the listing. None if
    the data set is not on this disk.
    """
    stamps = source_stamps(config)
    return None if stamps is None else stamps[0]


def source_stamps(config: DataConfig) -> tuple[str, str] | None:
    """Returns the stamp, and the one that earlier versions kept, where the whole path counts."""
    files = _kind(config).files(config)
    if files is None:
        return None
    path = Path(config.path).expanduser()
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
