"""A preference set in Pick-a-Pic v2's schema: of two scans of one digit, the bolder is preferred.

The labels written here are what the simulated annotators meant. Wrong labels are made where every
data set's are: by `data.flip_rate`, a fixed subset chosen by a hash.
"""

from __future__ import annotations

import hashlib
import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpo.demo.digits import Gray, Scans, ink, load_scans, prompts, to_image
from fastpo.system.files import make_folder, whole_file
from fastpo.system.ownership import Kind, claim

JUST_NOTICEABLE = 0.01  # of ink; an annotator who sees no difference calls it a tie
FILE = "train-00000-of-00001.parquet"
MODEL = "a person's hand"
SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)


def _holds_scans(folder: Path) -> bool:
    """Pick-a-Pic's own files have this name and schema too, but other models."""
    try:
        models = pq.read_table(folder / "data" / FILE, columns=["model_0"])["model_0"]
    except (OSError, ValueError, KeyError):
        return False
    return set(models.unique().to_pylist()) == {MODEL}


PREFERENCES = Kind("the demo's preferences", re.escape(f"data/{FILE}"), _holds_scans)


def write_preferences(folder: Path, *, n_pairs: int, seed: int) -> Path:
    """Writes `data/train-00000-of-00001.parquet`.

    Each pair holds two different scans of one digit, drawn at random from those that are not held
    out, at random places, with one of the digit's captions. Two scans whose ink differs by less
    than `JUST_NOTICEABLE` are a tie (0.5 and 0.5): about three pairs in ten.

    Args:
        folder: The data set's folder; the file is replaced if it is there.
        n_pairs: Rows to write.
        seed: Seed of the draw.

    Returns:
        `folder`.

    Raises:
        ValueError: `n_pairs` is not positive.
        ForeignPathError: The folder holds other things.
    """
    if n_pairs < 1:
        raise ValueError(f"n_pairs must be positive, got {n_pairs}")
    rng = np.random.default_rng(seed)
    scans = load_scans()
    rows = [_row(i, scans, rng) for i in range(n_pairs)]
    claim(folder, PREFERENCES)
    make_folder(folder / "data")
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with whole_file(folder / "data" / FILE) as path:
        pq.write_table(table, path)
    return folder


def _row(number: int, scans: Scans, rng: np.random.Generator) -> dict[str, Any]:
    digit = int(rng.integers(10))
    first, second = rng.choice(np.flatnonzero(scans.labels == digit), size=2, replace=False)
    wordings = prompts()[digit::10]
    images = [scans.images[first], scans.images[second]]
    encoded = [_png(image) for image in images]
    uids = [hashlib.sha256(data).hexdigest()[:32] for data in encoded]
    amounts = [ink(to_image(image)) for image in images]
    tie = abs(amounts[0] - amounts[1]) < JUST_NOTICEABLE
    label = 0.5 if tie else float(amounts[0] > amounts[1])
    return {
        "are_different": not tie,
        "best_image_uid": "tie" if tie else uids[int(label == 0.0)],
        "caption": wordings[int(rng.integers(len(wordings)))],
        "created_at": datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
        + timedelta(minutes=number),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"scan://{first}",
        "image_1_uid": uids[1],
        "image_1_url": f"scan://{second}",
        "jpg_0": encoded[0],
        "jpg_1": encoded[1],
        "label_0": label,
        "label_1": 1.0 - label,
        "model_0": MODEL,
        "model_1": MODEL,
        "ranking_id": number,
        "user_id": int(rng.integers(50)),
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    }


def _png(gray: Gray) -> bytes:
    buffer = io.BytesIO()
    to_image(gray).save(buffer, "PNG")
    return buffer.getvalue()
