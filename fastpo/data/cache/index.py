"""The merged index: one memory-mapped Arrow file for all pairs, one for all prompts.

Columns of `index.arrow`, one row per usable pair in the order of the source: `pair_id`, `pair_key`,
`position` in the source, number of the `prompt`, `bucket` (number of the latent shape), `shard`,
`slot` (row in the shard's tensor of this shape), `add_time_ids`; `pair_weight`, where the data set
has weights; and of edits the number of the `source_image` that they begin from, with, where pairs
have several, those of `more_sources`, -1 where a pair has fewer. Any Arrow reader opens it. Nothing
is copied to memory when it is opened; processes of one machine share its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastpo.data.cache.arrow import Texts, rows_of, write_arrow
from fastpo.data.cache.checks import ROWS
from fastpo.data.cache.comparisons import find_comparisons, image_digests
from fastpo.data.cache.manifest import Manifest, Quarantined, file_record
from fastpo.data.cache.parts import (
    INDEX,
    MORE_SOURCES,
    PROMPTS,
    RECORD,
    SOURCE_IMAGE,
    SOURCE_IMAGE_TYPE,
    WEIGHT,
    WEIGHT_TYPE,
    CachePart,
    parts_of,
)
from fastpo.data.cache.source_images import IMAGES_FILE, merge_images, shapes_of
from fastpo.data.cache.summary import CUT_PROMPTS
from fastpo.data.sources.base import numbered
from fastpo.errors import CacheError
from fastpo.system.files import write_text
from fastpo.types import pair_key

INDEX_FILE, PROMPTS_FILE, QUARANTINE = "index.arrow", "prompts.arrow", "quarantine.jsonl"
INDEX_TYPES = {
    "pair_id": pa.large_string(),
    "pair_key": pa.int64(),
    "position": pa.int64(),
    "prompt": pa.int64(),
    "bucket": pa.int64(),
    "shard": pa.int32(),
    "slot": pa.int32(),
    "add_time_ids": pa.list_(pa.float32(), 6),
}


def merge(
    folder: Path, manifest: Manifest, bad_rows: Sequence[Quarantined] = ()
) -> list[Quarantined]:
    """Joins the finished parts' indices and enters the result into the manifest (without saving).

    Names that occur several times get their numbered suffix here, where all names are known.

    Args:
        folder: The cache's folder.
        manifest: Its plan.
        bad_rows: Rows of the data set that are no pair.

    Returns:
        The pairs left out, in the order of the source, and the bad rows; they also stand in
        `quarantine.jsonl`.

    Raises:
        CacheError: A part is damaged, or two pairs cannot be told apart.
    """
    records = {part: part.record(folder) for part in parts_of(manifest)}
    shards = [part for part in records if part.kind == "shard"]
    quarantined = {
        position: pair
        for part in shards
        for position, pair in records[part].quarantined.items()
        if position < manifest.source_pairs
    }
    image_parts = [part for part in records if part.kind == "image"]
    images = merge_images(folder, image_parts) if image_parts else None
    index, manifest.shapes, repeated = _merge_index(
        folder, manifest, shards, quarantined, images=images
    )
    for position, pair in quarantined.items():
        if manifest.sources:
            pair.source = manifest.sources[int(manifest.source_of(np.array(position)))].name
    left_out = [quarantined[position] for position in sorted(quarantined)] + list(bad_rows)
    manifest.pairs, manifest.quarantined = index.num_rows, len(left_out)
    _count(manifest, index, repeated, image_digests(records[part] for part in shards), left_out)
    manifest.report.pop(CUT_PROMPTS, None)
    if cut := sum(record.cut for record in records.values()):
        manifest.report[CUT_PROMPTS] = cut
    lines = "".join(pair.model_dump_json() + "\n" for pair in left_out)
    write_text(folder / QUARANTINE, lines)
    prompts = [u.table(folder, PROMPTS)["prompt"] for u in records if u.kind == "text"]
    texts = pa.chunked_array([c for p in prompts for c in p.chunks], pa.string())
    texts = texts.cast(pa.large_string()).combine_chunks()
    recorded = {
        f"{part.name}/{name}": file
        for part, record in records.items()
        for name, file in record.files.items()
    }
    beside = [f"{part.name}/{RECORD}" for part in records] + [QUARANTINE]
    rows = [name for name in recorded if name.endswith(f"/{ROWS}")]
    manifest.files = {name: file for name, file in recorded.items() if name not in set(rows)}
    manifest.beside = {name: recorded[name] for name in rows}
    manifest.beside |= {name: file_record(folder / name) for name in beside}
    manifest.files[INDEX_FILE] = write_arrow(folder / INDEX_FILE, index)
    if images is not None:
        manifest.files[IMAGES_FILE] = write_arrow(folder / IMAGES_FILE, images)
    prompts = pa.record_batch([texts], names=["prompt"])
    manifest.files[PROMPTS_FILE] = write_arrow(folder / PROMPTS_FILE, prompts)
    return left_out


def _merge_index(
    folder: Path,
    manifest: Manifest,
    shards: Sequence[CachePart],
    quarantined: dict[int, Quarantined],
    *,
    images: pa.RecordBatch | None,
) -> tuple[pa.RecordBatch, list[tuple[int, int]], tuple[np.ndarray, int]]:
    """Returns the index, the latent shapes, and what `_number_names` tells of repeated names."""
    tables = [part.table(folder, INDEX) for part in shards]
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(table) for table in tables])
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    position = table["position"].to_numpy()
    kept = position < manifest.source_pairs
    if not kept.all():
        table, shard, position = (
            table.filter(pa.array(kept)).combine_chunks(),
            shard[kept],
            position[kept],
        )
    shapes = [table["height"].to_numpy().astype(np.int64) << 16 | table["width"].to_numpy()]
    more = _more_sources(table)
    if images is not None:  # pairs of a batch have source images of the same shapes, too
        for begins in (table[SOURCE_IMAGE].to_numpy(), *more.T):
            shapes.append(shapes_of(images, begins))
    distinct, bucket = _numbered_rows(shapes)
    names = table["pair_id"].cast(pa.large_string()).combine_chunks()
    names, keys, repeated = _number_names(names, position, quarantined)
    columns = {
        "pair_id": names,
        "pair_key": keys,
        "position": position,
        "prompt": table["prompt"].to_numpy(),
        "bucket": bucket,
        "shard": shard,
        "slot": table["slot"].to_numpy(),
        "add_time_ids": table["add_time_ids"].combine_chunks(),
    }
    types = dict(INDEX_TYPES)
    if WEIGHT in table.column_names:
        types[WEIGHT] = WEIGHT_TYPE
        columns[WEIGHT] = table[WEIGHT].combine_chunks().fill_null(1.0)
    if images is not None:
        types[SOURCE_IMAGE] = SOURCE_IMAGE_TYPE
        columns[SOURCE_IMAGE] = table[SOURCE_IMAGE].combine_chunks()
    if more.shape[1]:
        types[MORE_SOURCES] = pa.list_(pa.int32(), more.shape[1])
        columns[MORE_SOURCES] = pa.FixedSizeListArray.from_arrays(more.ravel(), more.shape[1])
    arrays = [pa.array(columns[name], type=kind) for name, kind in types.items()]
    pairs = [(int(shape >> 16), int(shape & 0xFFFF)) for shape in distinct[0]]
    return pa.record_batch(arrays, names=list(types)), pairs, repeated


def _more_sources(table: pa.Table) -> np.ndarray:
    """Returns `(pairs, K)` int32, the source images behind each pair's first; -1 for none."""
    if MORE_SOURCES not in table.column_names:
        return np.empty((len(table), 0), dtype=np.int32)
    lists = [numbers or [] for numbers in table[MORE_SOURCES].to_pylist()]
    most = max(map(len, lists))
    padded = [numbers + [-1] * (most - len(numbers)) for numbers in lists]
    return np.array(padded, dtype=np.int32).reshape(len(lists), most)


def _numbered_rows(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows in their order, `(columns, distinct)`, and each row's number."""
    if len(columns) == 1:
        distinct, numbers = np.unique(columns[0], return_inverse=True)
        return distinct[None], numbers
    rows = np.stack(columns, axis=1)
    distinct, numbers = np.unique(rows, axis=0, return_inverse=True)
    return distinct.T, numbers.reshape(-1)


def _count(
    manifest: Manifest,
    index: pa.RecordBatch,
    repeated: tuple[np.ndarray, int],
    images: np.ndarray | None,
    left_out: Sequence[Quarantined],
) -> None:
    """Enters into the manifest's reports what is known only now; what is 0 is left away.

    Args:
        manifest: The manifest.
        index: The merged index.
        repeated: See `_number_names`.
        images: `(pairs of the source, 2)`, see `image_digests`.
        left_out: What is in quarantine.
    """
    named_again, duplicates = repeated
    position, prompt = (index.column(name).to_numpy() for name in ("position", "prompt"))
    if SOURCE_IMAGE in index.schema.names:
        begins = [prompt, index.column(SOURCE_IMAGE).to_numpy().astype(np.int64)]
        if MORE_SOURCES in index.schema.names:
            begins += [*rows_of(index, MORE_SOURCES).T.numpy().astype(np.int64)]
        _, prompt = _numbered_rows(begins)
    source = manifest.source_of(position)
    nowhere = np.zeros(len(position), dtype=bool)
    pairs = {"shared": nowhere, "contradictions": nowhere}
    again = nowhere
    if images is not None:
        comparisons = find_comparisons(prompt, images[position])
        pairs["shared"] = source > source[comparisons.first]
        pairs["contradictions"] = comparisons.contradicted
        again = comparisons.again & ~named_again & ~pairs["shared"]
    duplicates += int(again.sum())
    counts = {name: int(found.sum()) for name, found in pairs.items()}
    manifest.report = _counted(manifest.report, left_out, counts | {"duplicates": duplicates})
    for number, one in enumerate(manifest.sources):
        here = source == number
        own = [pair for pair in left_out if pair.source == one.name]
        counts = {name: int(found[here].sum()) for name, found in pairs.items()}
        counts["duplicates"] = int(((again | named_again) & here).sum())
        one.report = _counted(one.report, own, counts)
        one.pairs, one.quarantined = int(here.sum()), len(own)


def _counted(
    report: dict[str, int], left_out: Sequence[Quarantined], counts: dict[str, int]
) -> dict[str, int]:
    """Returns a report with counts in place of its own; of what is 0 only the duplicates."""
    found = {kind: sum(pair.kind == kind for pair in left_out) for kind in ("aspect", "same")}
    found |= counts
    kept = {name: count for name, count in report.items() if name not in found}
    kept["duplicates"] = found.pop("duplicates")
    return kept | {name: count for name, count in found.items() if count}


def _number_names(
    names: pa.Array, position: np.ndarray, quarantined: dict[int, Quarantined]
) -> tuple[pa.Array, np.ndarray, tuple[np.ndarray, int]]:
    """Gives repeated names a suffix, those in quarantine included.

    Returns:
        Names and keys; then which names occurred before, and how many did with those in quarantine.

    Raises:
        CacheError: Two pairs still have the same key.
    """
    keys = np.fromiter(map(pair_key, Texts(names)), dtype=np.int64, count=len(names))
    others = sorted(quarantined)
    all_keys = np.concatenate(
        [keys, np.array([pair_key(quarantined[p].pair_id) for p in others], dtype=np.int64)]
    )
    places = np.concatenate([position, np.array(others, dtype=np.int64)])
    order = np.lexsort((places, all_keys))
    repeats = np.flatnonzero(all_keys[order][1:] == all_keys[order][:-1]) + 1
    renamed: dict[int, str] = {}
    last, occurrence = -1, 1
    for r in repeats.tolist():
        occurrence = occurrence + 1 if r == last + 1 else 2
        last, place = r, int(order[r])
        if place < len(names):
            renamed[place] = numbered(names[place].as_py(), occurrence)
        else:
            pair = quarantined[others[place - len(names)]]
            pair.pair_id = numbered(pair.pair_id, occurrence)
    if renamed:
        listed = names.to_pylist()
        for place, name in renamed.items():
            listed[place], keys[place] = name, pair_key(name)
        names = pa.array(listed, pa.large_string())
    if len(np.unique(keys)) != len(keys):
        raise CacheError("two pairs of the data set have the same key; name them differently")
    again = np.zeros(len(names), dtype=bool)
    again[list(renamed)] = True
    return names, keys, (again, len(repeats))
