"""The frozen reference's errors on the visits to come, on disk: two float32 per pair and visit.

Timestep, noise, posterior draw and dropped caption of a visit come from counters, so the
reference's mean squared errors on it are known before training: 8 bytes a pair and visit, 31 MB for
four visits of 959,040 pairs. A cache of prepared latents may have many such tables, one folder for
each identity (weights, seed, schedule, ...):

    <cache_dir>/reference/<first digits of the identity's SHA-256>/
        reference.json              the identity, and the finished tables
        visit-00003-<pairs>.npy     (N, 2) float32, NaN where not computed; mapped, not read
        part-00003-0000017-<XXH3>.safetensors   a finished block of pairs, until it is merged

Every file is checked when it is opened: tables by the checksum in `reference.json`, which carries
one of itself, and a block by the one in its name. Columns are the sides that the data set calls
winner and loser: flips are applied on reading.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.numpy import load, save
from torch import Tensor

from fastpo.data.cache.manifest import (
    MOST_BYTES,
    FileRecord,
    Record,
    damage_of,
    differing_fields,
    write_recorded,
)
from fastpo.errors import CacheError, one_line
from fastpo.system.files import write_bytes, write_text
from fastpo.system.json_text import read_json, seal, unseal
from fastpo.system.ownership import Kind, remove_file
from fastpo.types import PairBatch

FORMAT = 1
MANIFEST = "reference.json"


def _holds_errors(folder: Path) -> bool:
    """One identity's folder, or the folder of all of them."""
    if (folder / MANIFEST).is_file() or re.fullmatch(r"[0-9a-f]{16}", folder.name):
        return True
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return all(re.fullmatch(r"[0-9a-f]{16}|\w+\.json", name) for name in names)


REFERENCE = Kind(
    "a cache of reference errors",
    r"([0-9a-f]{16}/)?(\w+\.json|\.claims|(visit|part)-[\da-f-]+\.(npy|safetensors))",
    _holds_errors,
)


class VisitRecord(Record):
    """One visit's table.

    Attributes:
        name: Its file.
        pairs: Rows.
        computed: Rows that are not NaN.
        file: The file's size and hash.
    """

    name: str
    pairs: int
    computed: int
    file: FileRecord


class ReferenceManifest(Record):
    """Everything `reference.json` holds; `visits` are in order, from 0."""

    format: int = FORMAT
    identity: dict[str, str]
    visits: tuple[VisitRecord, ...] = ()


class ReferenceErrors:
    """Reads one identity's tables.

    Attributes:
        folder: Where they lie.
        visits: How many visits have any entry.
    """

    def __init__(self, folder: Path, manifest: ReferenceManifest, *, content: bool = True) -> None:
        """Maps the tables; use `open_reference_errors`.

        Args:
            folder: Where they lie.
            manifest: What it says of them.
            content: Whether they are read once, and their checksums compared.

        Raises:
            CacheError: A file is missing or is not what the manifest says.
        """
        self.folder = folder
        self._tables = [_map_table(folder, record, content=content) for record in manifest.visits]

    @property
    def visits(self) -> int:
        """How many visits have any entry."""
        return len(self._tables)

    def complete_visits(self, num_pairs: int) -> int:
        """Returns how many visits, from the first on, are known of all the first `num_pairs`."""
        everybody = np.arange(num_pairs)
        known = (len(self.missing(visit, everybody)) == 0 for visit in range(self.visits))
        return next((visit for visit, whole in enumerate(known) if not whole), self.visits)

    def missing(self, visit: int, positions: np.ndarray) -> np.ndarray:
        """Returns those of `positions` (in the cache of latents) that `visit` has no entry for."""
        if visit >= self.visits:
            return positions
        table = self._tables[visit]
        inside = positions < len(table)
        known = np.zeros(len(positions), dtype=bool)
        known[inside] = ~np.isnan(table[positions[inside], 0])
        return positions[~known]

    def lookup(self, batch: PairBatch) -> Tensor:
        """Returns the errors of a batch in host memory, `(2B,)` float32, winners first.

        Raises:
            CacheError: A pair has no entry for its visit.
        """
        index, flipped = batch.index.numpy(), batch.flipped.numpy()
        visits = batch.visit.numpy()
        pairs = np.full((len(index), 2), np.nan, dtype=np.float32)
        for visit in np.unique(visits):
            here = visits == visit
            if visit < self.visits and index[here].max() < len(self._tables[visit]):
                pairs[here] = self._tables[visit][index[here]]
        if np.isnan(pairs).any():
            raise CacheError(f"{self.folder} lacks pairs {index.tolist()} of visits {visits}")
        pairs[flipped] = pairs[flipped, ::-1]
        return torch.from_numpy(pairs.T.reshape(-1).copy())


def reference_root(cache_dir: Path) -> Path:
    """Returns the folder of all reference errors of a cache of latents."""
    return cache_dir / "reference"


def reference_folder(cache_dir: Path, identity: Mapping[str, str]) -> Path:
    """Returns the folder of one identity."""
    text = json.dumps(dict(identity), sort_keys=True)
    return reference_root(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]


def open_reference_errors(
    cache_dir: Path, identity: Mapping[str, str], *, command: str, content: bool = True
) -> ReferenceErrors:
    """Opens the errors that were computed with this identity.

    Args:
        cache_dir: Folder of the cache of latents.
        identity: What they must have been computed with, by name.
        command: What computes them; named in errors.
        content: Whether the tables' checksums are compared, or their sizes alone.

    Raises:
        CacheError: There are none, or they are damaged. If some were computed otherwise, the text
            names each field in which the nearest differ, what was expected and what was found.
    """
    folder = reference_folder(cache_dir, identity)
    manifest = load_reference_manifest(folder)
    if manifest is not None and manifest.identity == dict(identity):
        return ReferenceErrors(folder, manifest, content=content)
    others = [
        (len(lines), str(path.parent), lines)
        for path in sorted(reference_root(cache_dir).glob(f"*/{MANIFEST}"))
        if (other := load_reference_manifest(path.parent)) is not None
        and (lines := differing_fields(identity, other.identity))
    ]
    if not others:
        raise CacheError(f"no reference errors in {reference_root(cache_dir)}: run `{command}`")
    _, nearest, lines = min(others)
    raise CacheError(
        f"the reference errors in {nearest} do not fit the configuration: {'; '.join(lines)}. "
        f"Restore these settings, or run `{command}`, which computes those of this configuration "
        "and keeps the others"
    )


def load_reference_manifest(folder: Path) -> ReferenceManifest | None:
    """Returns the manifest in a folder, None if there is none.

    Raises:
        CacheError: It cannot be read or is of another version of the layout.
    """
    path = folder / MANIFEST
    try:
        raw = unseal(read_json(path, most_bytes=MOST_BYTES))
        manifest = ReferenceManifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({one_line(error)}); delete {folder}") from None
    if manifest.format != FORMAT:
        raise CacheError(
            f"{path} has layout version {manifest.format}, this FastPO reads {FORMAT}; "
            f"delete {folder}"
        )
    return manifest


def has_part(folder: Path, visit: int, block: int) -> bool:
    """Tells whether a block is finished and not merged yet."""
    return any(folder.glob(f"part-{visit:05d}-{block:07d}*.safetensors"))


def write_part(
    folder: Path, visit: int, block: int, positions: np.ndarray, errors: np.ndarray
) -> None:
    """Writes a finished block, whole or not at all.

    Args:
        folder: The identity's folder.
        visit: The visit.
        block: Number of the block.
        positions: `(n,)` int64 positions in the cache of latents.
        errors: `(n, 2)` float32, of the data set's winners and losers.
    """
    # safetensors writes an array's memory as it lies, so it must lie row by row
    content = {
        "positions": np.ascontiguousarray(positions, dtype=np.int64),
        "errors": np.ascontiguousarray(errors, dtype=np.float32),
    }
    data = save(content)
    name = f"part-{visit:05d}-{block:07d}-{xxhash.xxh3_64_hexdigest(data)}.safetensors"
    write_bytes(folder / name, data)


def merge_parts(folder: Path, identity: Mapping[str, str], num_pairs: int) -> ReferenceErrors:
    """Enters all finished blocks into the tables; one process at a time, others may write blocks.

    A table is complete on disk before the manifest names it, and a block's file is removed after
    that: a kill at any moment loses nothing. A damaged table is left out, so that it is computed
    again.

    Args:
        folder: The identity's folder.
        identity: Kept in the manifest.
        num_pairs: Pairs of the cache of latents; tables grow to as many rows.
    """
    manifest = load_reference_manifest(folder) or ReferenceManifest(identity=dict(identity))
    if manifest.identity != dict(identity):
        raise CacheError(f"{folder / MANIFEST} is of another identity than its folder; delete it")
    parts: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        parts.setdefault(int(path.name.split("-")[1]), []).append(path)
    records: list[VisitRecord] = []
    for visit in range(max(len(manifest.visits), max(parts, default=-1) + 1)):
        before = manifest.visits[visit] if visit < len(manifest.visits) else None
        if before and (what := damage_of(folder / before.name, before.file, content=True)):
            print(f"computed again: {what}", file=sys.stderr)
            before = None
        if before is None or visit in parts:
            before = _merge_visit(folder, visit, before, parts.get(visit, []), num_pairs)
        records.append(before)
    manifest.visits = tuple(records)
    write_text(folder / MANIFEST, seal(manifest.model_dump(mode="json")))
    kept = {record.name for record in records}
    merged = [path for paths in parts.values() for path in paths]
    for path in [*merged, *(p for p in folder.glob("visit-*.npy") if p.name not in kept)]:
        remove_file(path, REFERENCE)
    return ReferenceErrors(folder, manifest, content=False)


def _merge_visit(
    folder: Path, visit: int, before: VisitRecord | None, parts: Sequence[Path], num_pairs: int
) -> VisitRecord:
    known = np.empty((0, 2), np.float32)
    if before is not None:
        known = _map_table(folder, before, content=False)
    found, rows = [_read_part(path) for path in parts], max(num_pairs, len(known))
    for positions, _ in found:  # a run with a larger data.limit may have left it
        rows = max(rows, int(positions.max()) + 1)
    table = np.full((rows, 2), np.nan, dtype=np.float32)
    table[: len(known)] = known
    for positions, errors in found:
        table[positions] = errors
    computed = int((~np.isnan(table[:, 0])).sum())
    name = f"visit-{visit:05d}-{computed}.npy"

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, table)

    file = write_recorded(folder / name, write)
    return VisitRecord(name=name, pairs=len(table), computed=computed, file=file)


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns a block's positions `(n,)` int64 and errors `(n, 2)` float32.

    Raises:
        CacheError: It is not what was written, as its name tells.
    """
    try:
        data = path.read_bytes()
        digest = path.stem.split("-")[3:]  # none in names of before
        if digest and digest[0] != xxhash.xxh3_64_hexdigest(data):
            raise ValueError("its checksum is another than its name says")
        part = load(data)
        return part["positions"], part["errors"]
    except Exception as error:  # safetensors raises its own type
        raise CacheError(f"{path} is damaged ({one_line(error)}); delete it") from error


def _map_table(folder: Path, record: VisitRecord, *, content: bool) -> np.ndarray:
    path, again = folder / record.name, "`fastpo prepare CONFIG --reference K` computes it again"
    what = damage_of(path, record.file, content=content)
    if what is not None:
        raise CacheError(f"{what}; {again}")
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({one_line(error)}); {again}") from None
    if table.shape != (record.pairs, 2) or table.dtype != np.float32:
        raise CacheError(f"{path} is damaged: it holds {table.dtype} of shape {table.shape}")
    return table
