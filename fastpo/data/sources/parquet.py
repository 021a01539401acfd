"""Pick-a-Pic v1/v2 and the data sets that copy its schema (Pick-Style, Pick-Safety)."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpo.config import SourceConfig
from fastpo.data.sources.base import ScannedSource, content_hash, found_in
from fastpo.data.sources.columns import (
    BAD,
    IMAGES,
    LABELS,
    SOURCE,
    TIE,
    UNLABELED,
    WEIGHT,
    check_schema,
    holds_sources,
    may_have_nulls,
    null_rows,
    plain,
    winners,
)
from fastpo.data.sources.files import DataFolder
from fastpo.data.sources.rows import pair_weight
from fastpo.errors import DataError, one_line
from fastpo.models.folder import is_hub_id
from fastpo.system.files import user_path
from fastpo.system.retry import is_transient, retrying
from fastpo.types import PreferencePair

_UIDS = ("image_0_uid", "image_1_uid")
_OPTIONAL = ("ranking_id", *_UIDS, WEIGHT)


MOST_BATCH_BYTES = 1 << 28
"""Of a column of images read at a time; far below what an Arrow array holds, as sizes vary."""


class RowGroups:
    """Reads the image columns one row group at a time and keeps the last few.

    Thread-safe. `reads` counts the row groups read so far.
    """

    def __init__(
        self, keep: int = 3, *, allow_outside: bool = False, columns: Sequence[str] = IMAGES
    ) -> None:
        """Keeps at most `keep` row groups in memory.

        Args:
            keep: How many.
            allow_outside: `data.allow_outside`, of images that a row names instead of holding them.
            columns: The columns of images.
        """
        self.reads = 0
        self._keep, self._allow_outside, self._columns = keep, allow_outside, columns
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def image(
        self, path: Path, group: int, row: int, column: str, place: int | None = None
    ) -> bytes:
        """Returns the encoded image in `column` of the group's row; empty if it is null.

        A column of the `datasets` Image feature holds bytes, or names a file that lies beside the
        parquet file.

        Args:
            path: The parquet file.
            group: Its row group.
            row: The row in it.
            column: The column.
            place: Which image of a row's list; None: the row has one image.

        Raises:
            OSError: The named file cannot be read.
            DataError: It lies outside of the folder.
        """
        cell: Any = self._table(path, group)[column][row]
        value = (cell if place is None else cell.values[place]).as_py()
        if isinstance(value, dict):
            name = value.get("path")
            value = value.get("bytes")
            if value is None and name:
                folder = DataFolder(path.parent, allow_outside=self._allow_outside)
                return folder.read(name)
        return value or b""

    def images(self, path: Path, group: int, row: int, column: str) -> list[int | None]:
        """Returns the places of the images in `column` of the row, as `image` takes them."""
        cell: Any = self._table(path, group)[column][row]
        if not cell.is_valid:
            return []
        return [*range(len(cell.values))] if isinstance(cell, pa.ListScalar) else [None]

    def _table(self, path: Path, group: int) -> pa.Table:
        with self._lock:
            table = self._groups.get((path, group))
            if table is None:
                with _open(path) as file:
                    table = _read_group(path, file, group, self._columns, images=True)
                self.reads += 1
                self._groups[path, group] = table
                if len(self._groups) > self._keep:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end((path, group))
            return table


class ParquetSource(ScannedSource):
    """Rows of two images, a caption and two labels in parquet files.

    The files stand in `data.path` or its `data/` subfolder and their names begin with the split
    (`train-00000-of-00645.parquet`); `data.path` may also be one file or a hub id. With a limit,
    hub files are fetched one by one until it is reached.

    A pair is named after `ranking_id` and the images' uids, or, where the file has no uids, after
    a hash of caption and image bytes (which then have to be read while iterating).
    """

    def _scan(self) -> None:
        outside = self.config.allow_outside
        self.images = RowGroups(allow_outside=outside)
        self._begins = RowGroups(allow_outside=outside, columns=[SOURCE])
        self._known: dict[str, Callable[[], bytes]] = {}
        self._faults: dict[str, str] = {}
        self._edits = True
        self._groups: list[tuple[Path, int]] = []
        self._winners: list[np.ndarray] = []  # int8 per row of each group
        for path in _files(self.config):
            with _open(path) as file:
                check_schema(path, file.schema_arrow)
                self._edits = self._edits and holds_sources(file.schema_arrow)
                self._scan_file(path, file)
            if self._full():
                break
        counts = [int((winner >= 0).sum()) for winner in self._winners]
        self._starts = np.cumsum([0, *counts])

    def _scan_file(self, path: Path, file: pq.ParquetFile) -> None:
        start = 0
        for group in range(file.num_row_groups):
            winner, reasons = _winners(path, file, group)
            rows = len(winner)
            if self.config.limit is not None:
                left = self.config.limit - self.report.pairs
                taken = np.flatnonzero(winner >= 0)[:left]
                if len(taken) == left:
                    winner = winner[: taken[-1] + 1]
            for row in np.flatnonzero(winner == BAD).tolist():
                self.bad.add(f"{path}: row {start + row}", reasons[row])
            start += rows
            self._groups.append((path, group))
            self._winners.append(winner)
            self.report.rows += len(winner)
            self.report.ties += int((winner == TIE).sum())
            self.report.unlabeled += int((winner == UNLABELED).sum())
            self.report.bad += int((winner == BAD).sum())
            self.report.pairs += int((winner >= 0).sum())
            if self._full():
                return

    def _captions(self) -> Iterator[str]:
        for _, _, table in self._tables(0, len(self), ["caption"]):
            yield from table["caption"].to_pylist()

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        tables = self._tables(start, stop, ["caption", *_OPTIONAL])
        for k, rows, table in tables:
            (path, group), winner = self._groups[k], self._winners[k][rows]
            places = zip(rows.tolist(), winner.tolist(), table.to_pylist(), strict=True)
            for row, won, values in places:
                yield self._pair(path, group, row, won, values)

    def _tables(
        self, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[int, np.ndarray, pa.Table]]:
        """Yields row group, rows and the columns' values of the pairs `start` to `stop` - 1."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for path, groups in groupby(range(first, last), lambda k: self._groups[k][0]):
            with _open(path) as file:
                present = [name for name in columns if name in file.schema_arrow.names]
                for k in groups:
                    group, before = self._groups[k][1], int(self._starts[k])
                    rows = np.flatnonzero(self._winners[k] >= 0)
                    rows = rows[max(0, start - before) : stop - before]
                    table = _read_group(path, file, group, present)
                    table = pa.table({name: plain(table[name]) for name in present})
                    yield k, rows, table.take(rows)

    def _pair(
        self, path: Path, group: int, row: int, winner: int, values: dict[str, Any]
    ) -> PreferencePair:
        prompt = values["caption"]
        images: list[Callable[[], bytes]] = [
            partial(self.images.image, path, group, row, column) for column in IMAGES
        ]
        if all(values.get(uid) for uid in _UIDS):
            parts = [values.get("ranking_id"), *(values[uid] for uid in _UIDS)]
            name = ":".join(str(part) for part in parts if part is not None)
        else:
            name = content_hash(prompt, images[0](), images[1]())
        weight = pair_weight(values.get(WEIGHT))
        assert not isinstance(weight, str), "such a row is bad"
        sources = self._sources(path, group, row) if self._edits else ()
        sides = images[winner], images[1 - winner]
        return PreferencePair(name, prompt, *sides, source_images=sources, weight=weight)

    def _sources(self, path: Path, group: int, row: int) -> tuple[Callable[[], bytes], ...]:
        """Returns what reads each source image of a row."""
        where = path, group, row, SOURCE
        return tuple(
            partial(self._begins.image, *where, place) for place in self._begins.images(*where)
        )

    def _source_names(self) -> Iterator[tuple[str, ...]]:
        """Yields the names of each row's source images, which are read for it."""
        for k, winner in enumerate(self._winners if self._edits else ()):
            for row in np.flatnonzero(winner >= 0).tolist():
                sources = self._sources(*self._groups[k], row)
                yield tuple(self._named(read) for read in sources)

    def _named(self, read: Callable[[], bytes]) -> str:
        """Returns the name of a source image: the hash of its bytes, which equal ones share."""
        fault = "it has no bytes"
        try:
            data = retrying(read)
        except (OSError, DataError) as error:
            if is_transient(error):
                raise
            data, fault = b"", one_line(error)
        name = content_hash(data) if data else f"unreadable: {fault}"
        if not data:
            self._faults[name] = f"source image {name}"
        self._known.setdefault(name, read)
        return name

    def _source_fault(self, name: str) -> str | None:
        return self._faults.get(name)

    def _read_source(self, name: str) -> bytes:
        return self._known[name]()

    @classmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""
        files = cls.files(config)
        if files is None:
            return None
        sizes = [f"{os.path.basename(file)}:{os.stat(file).st_size}" for file in files]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest()

    @classmethod
    def files(cls, config: SourceConfig) -> list[str] | None:
        """See the base class."""
        path = user_path(config.path)
        return [str(f) for f in _local_files(path, config.split)] if path.exists() else None


def _winners(path: Path, file: pq.ParquetFile, group: int) -> tuple[np.ndarray, dict[int, str]]:
    """As `columns.winners`, of a row group; without a caption, or of a wrong weight it is bad."""
    has = ["has_label"] if "has_label" in file.schema_arrow.names else []
    winner, reasons = winners(_read_group(path, file, group, [*LABELS, *has]))
    if may_have_nulls(file, group, "caption"):
        for row in null_rows(_read_group(path, file, group, ["caption"])["caption"]):
            if winner[row] >= 0:
                winner[row], reasons[row] = BAD, "caption is null"
    if WEIGHT in file.schema_arrow.names:
        weights = plain(_read_group(path, file, group, [WEIGHT])[WEIGHT]).to_pylist()
        for row, weight in enumerate(map(pair_weight, weights)):
            if isinstance(weight, str) and winner[row] >= 0:
                winner[row], reasons[row] = BAD, weight
    return winner, reasons


def _open(path: Path) -> pq.ParquetFile:
    try:
        return retrying(partial(pq.ParquetFile, path, page_checksum_verification=True))
    except (OSError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        text = " ".join(str(error).split())
        raise DataError(f"{path} is not a readable parquet file: {text}") from error


def _read_group(
    path: Path, file: pq.ParquetFile, group: int, columns: Sequence[str], *, images: bool = False
) -> pa.Table:
    """Reads columns of a row group.

    Images are read some rows at a time: of a column of structs Arrow makes one array, which holds
    no more than 2 GiB of bytes.

    Raises:
        DataError: It is damaged.
        OSError: A fault of the machine that did not pass.
    """
    read = _read_in_batches if images else pq.ParquetFile.read_row_group
    try:
        return retrying(partial(read, file, group, columns=list(columns), use_threads=False))
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        text = " ".join(str(error).split())
        raise DataError(f"{path}: row group {group} is damaged: {text}") from error


def _read_in_batches(
    file: pq.ParquetFile, group: int, *, columns: list[str], use_threads: bool
) -> pa.Table:
    about = file.metadata.row_group(group)
    size = max(about.column(k).total_uncompressed_size for k in range(about.num_columns))
    rows = max(1, about.num_rows * MOST_BATCH_BYTES // max(size, 1))
    batches = file.iter_batches(
        batch_size=min(rows, about.num_rows or 1),
        row_groups=[group],
        columns=columns,
        use_threads=use_threads,
    )
    return pa.Table.from_batches(list(batches))


def _files(config: SourceConfig) -> Iterator[Path]:
    """Yields the split's files, from the disk or from the hub."""
    path = user_path(config.path)
    if path.exists():
        yield from _local_files(path, config.split)
        return
    if not is_hub_id(config.path):
        raise DataError(f"data.path: no such file or folder: {config.path} (and no hub id either)")
    yield from _hub_files(config.path, config.split, lazily=config.limit is not None)


def _local_files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path, path / "data"):
        files = sorted(f for f in folder.glob("*.parquet") if _of_split(f.name, split))
        if files:
            return files
    raise DataError(
        f"data.path: no {split}-*.parquet in {path} or {path / 'data'} (data.split is {split!r}); "
        f"found: {found_in(path)}; data/: {found_in(path / 'data')}"
    )


def _hub_files(repo: str, split: str, *, lazily: bool) -> Iterator[Path]:
    """Yields the files of a hub data set, each fetched when it is needed if `lazily`.

    Without a connection, what an earlier run has fetched is used.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    failure: Exception | None = None
    if lazily:
        try:
            names = HfApi().list_repo_files(repo, repo_type="dataset")
            wanted = sorted(name for name in names if _of_split(name, split))
            if not wanted:
                raise DataError(f"data.path: {repo} has no {split}-*.parquet; found: {names[:12]}")
            for name in wanted:
                yield Path(hf_hub_download(repo, name, repo_type="dataset"))
            return
        except DataError:
            raise
        except Exception as error:  # the client also raises its transport's errors
            failure = error
    try:
        patterns = [f"{folder}{split}[-.]*" for folder in ("", "data/")]
        folder = snapshot_download(
            repo, repo_type="dataset", allow_patterns=patterns, local_files_only=lazily
        )
    except Exception as error:
        raise DataError(
            f"data.path: {repo!r} is no local folder and could not be fetched from the hub: "
            f"{failure or error}"
        ) from error
    yield from _local_files(Path(folder), split)


def _of_split(name: str, split: str) -> bool:
    """`train-00000-of-00003.parquet` is of `train`; `train_unique-...` is not."""
    return re.fullmatch(rf"(data/)?{re.escape(split)}([-.][^/]*)?\.parquet", name) is not None
