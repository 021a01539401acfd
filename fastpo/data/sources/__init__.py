"""Preference data sets as a lazy stream of `PreferencePair`s.

`open_source` reads labels only: ties and unlabelled rows are counted and dropped, wrong labels are
refused by file and row. Image bytes are read when a pair's `winner()` or `loser()` is called.
"""

from __future__ import annotations

from fastpo.config import DataConfig
from fastpo.data.sources.base import PairSource, SourceReport
from fastpo.data.sources.folder import FolderSource
from fastpo.data.sources.hpdv2 import HPDv2Source
from fastpo.data.sources.parquet import ParquetSource

__all__ = ["PairSource", "SourceReport", "open_source", "source_digest"]

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
    return _KINDS[config.source](config)


def source_digest(config: DataConfig) -> str | None:
    """Returns a SHA-256 that changes with the data's files, or None if they are not on this disk.

    Listings and texts count by content, parquet files by name and size.
    """
    return _KINDS[config.source].digest(config)
