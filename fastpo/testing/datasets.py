"""Small preference data sets with the schema of the published ones."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def image_bytes(seed: int, size: tuple[int, int] = (48, 48), *, encoding: str = "PNG") -> bytes:
    """Returns an encoded image of smooth random colors.

    Args:
        seed: Seed of the colors.
        size: Width and height in pixels.
        encoding: Name of a PIL format.
    """
    import numpy as np
    from PIL import Image

    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(buffer, encoding)
    return buffer.getvalue()


def pickapic_row(number: int, label_0: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """Returns a row in Pick-a-Pic's schema; `changes` replaces columns."""
    row = {
        "caption": f"caption {number % 3}",
        "jpg_0": image_bytes(2 * number, encoding="JPEG"),
        "jpg_1": image_bytes(2 * number + 1, encoding="JPEG"),
        "label_0": label_0,
        "label_1": None if label_0 is None else 1 - label_0,
        "has_label": True,
        "ranking_id": 1000 + number,
        "image_0_uid": f"uid-{2 * number}",
        "image_1_uid": f"uid-{2 * number + 1}",
    }
    return row | changes


def write_pickapic(path: Path, rows: Sequence[dict[str, Any]], *, group_size: int = 4) -> Path:
    """Writes rows as a parquet file with `group_size` rows per row group; returns `path`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group_size)
    return path


def write_pickapic_columns(
    path: Path, rows: int, *, files: int, prompts: int, group_size: int = 1000, image: bytes = b"x"
) -> Path:
    """Writes a data set of Pick-a-Pic's schema and size whose images are all the same few bytes.

    Args:
        path: Folder to create.
        rows: Comparisons in all; about an eighth are ties.
        files: Number of files of equal length; what does not divide evenly is left out.
        prompts: Number of distinct captions.
        group_size: Rows per row group.
        image: Content of every image.

    Returns:
        `path`.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir(parents=True, exist_ok=True)
    captions = pa.array(
        [f"prompt {i}: {'a castle in the fog, ' * (i % 7)}" for i in range(prompts)]
    )
    images = pa.array([image] * (rows // files), pa.binary())
    generator = np.random.default_rng(0)
    for k in range(files):
        numbers = np.arange(k * len(images), (k + 1) * len(images))
        label = generator.choice([0.0, 0.5, 1.0], len(images), p=[0.44, 0.12, 0.44])
        columns = {
            "caption": captions.take(pa.array(generator.integers(0, prompts, len(images)))),
            "jpg_0": images,
            "jpg_1": images,
            "label_0": label,
            "label_1": 1 - label,
            "has_label": np.ones(len(images), dtype=bool),
            "ranking_id": numbers,
            "image_0_uid": [f"{2 * n:032x}" for n in numbers],
            "image_1_uid": [f"{2 * n + 1:032x}" for n in numbers],
        }
        name = f"train-{k:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table(columns), path / name, row_group_size=group_size)
    return path


def write_index(folder: Path, pairs: int, *, shard_size: int = 1024, prompts: int = 38_000) -> Any:
    """Writes the index of an SDXL cache of many pairs without their tensors.

    Args:
        folder: Folder to create.
        pairs: Number of pairs, of nine latent shapes.
        shard_size: Pairs per shard.
        prompts: Number of distinct prompts.

    Returns:
        The manifest, for `PairCache(folder, manifest, config)`.
    """
    import numpy as np
    import pyarrow as pa

    from fastpo.data.cache.arrow import write_arrow
    from fastpo.data.cache.index import INDEX_FILE, INDEX_TYPES, PROMPTS_FILE
    from fastpo.data.cache.manifest import Manifest
    from fastpo.data.prepare.partition import partition_ranges

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    number = np.arange(pairs)
    columns = {
        "pair_id": [f"{n:09d}:{n:032x}" for n in range(pairs)],
        "pair_key": generator.permutation(pairs),
        "position": number,
        "prompt": generator.integers(0, prompts, pairs),
        "bucket": generator.integers(0, 9, pairs),
        "shard": number // shard_size,
        "slot": number % shard_size,
        "add_time_ids": pa.FixedSizeListArray.from_arrays(np.zeros(6 * pairs, dtype=np.float32), 6),
    }
    arrays = [pa.array(columns[name], type=kind) for name, kind in INDEX_TYPES.items()]
    write_arrow(folder / INDEX_FILE, pa.record_batch(arrays, names=list(INDEX_TYPES)))
    texts = pa.array(["", *(f"prompt {n}" for n in range(1, prompts))], pa.large_string())
    write_arrow(folder / PROMPTS_FILE, pa.record_batch([texts], names=["prompt"]))
    return Manifest(
        identity={"model family": "sdxl"},
        complete=True,
        shards=partition_ranges(pairs, shard_size, [], []),
        texts=partition_ranges(prompts, shard_size, [], []),
        shapes=[(128 + 8 * k, 128 - 8 * k) for k in range(9)],
        source_pairs=pairs,
        pairs=pairs,
    )


def write_folder(
    path: Path,
    pairs: int,
    *,
    sizes: Sequence[tuple[int, int]] = ((48, 48),),
    prompts: int = 3,
    sources: Sequence[tuple[int, int]] = (),
    together: int = 1,
) -> Path:
    """Writes a plain folder with `pairs.jsonl`; returns `path`.

    Args:
        path: Folder to create.
        pairs: Number of pairs, named `p0`, `p1`, ...
        sizes: Width and height, taken in turn.
        prompts: Number of distinct prompts, taken in turn.
        sources: Width and height of source images, taken in turn; default: the pairs are no edits.
        together: How many source images a pair takes.
    """
    path.mkdir(parents=True, exist_ok=True)
    for k, size in enumerate(sources):
        (path / f"source{k}.png").write_bytes(image_bytes(1000 + k, size))
    lines = []
    for i in range(pairs):
        entry: dict[str, Any] = {"id": f"p{i}", "prompt": f"prompt {i % prompts}"}
        for offset, side in enumerate(("winner", "loser")):
            entry[side] = f"{side}{i}.png"
            image = image_bytes(2 * i + offset, sizes[i % len(sizes)])
            (path / entry[side]).write_bytes(image)
        if sources:
            first = i * together
            turn = [f"source{k % len(sources)}.png" for k in range(first, first + together)]
            entry["source"] = turn if together > 1 else turn[0]
        lines.append(json.dumps(entry) + "\n")
    (path / "pairs.jsonl").write_text("".join(lines))
    return path
