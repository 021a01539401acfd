"""Preferences among emoji: the more colorful of two variants, or style B against style A.

A share of the pairs, the mismatch, prefers what the base never drew: the winner is a name's picture
in style B, the loser the same name in style A, varied alike. In all other pairs both images are
variants of the picture in style A, and the more colorful one is preferred.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fastpo.demo.preferences import FILE, SCHEMA
from fastpo.study.emoji.pictures import (
    STYLES,
    Pictures,
    Pixels,
    Variation,
    color,
    draw_variation,
    from_tensor,
    png,
    to_tensor,
    vary,
)
from fastpo.study.emoji.text import TEMPLATES
from fastpo.system.files import make_folder, whole_file
from fastpo.system.ownership import Kind, claim

JUST_NOTICEABLE = 0.02  # of color: what two variants of a pair differ by at least
MOST_DRAWS = 100  # for a pair that differs by as much


def _holds_emoji(folder: Path) -> bool:
    try:
        models = pq.read_table(folder / "data" / FILE, columns=["model_0"])["model_0"]
    except (OSError, ValueError, KeyError):
        return False
    return set(models.unique().to_pylist()) <= set(STYLES)


PREFERENCES = Kind("preferences among emoji", re.escape(f"data/{FILE}"), _holds_emoji)


def write_preferences(
    folder: Path, pictures: Pictures, *, n_pairs: int, mismatch: float, seed: int
) -> Path:
    """Writes `data/train-00000-of-00001.parquet` in Pick-a-Pic v2's schema, without ties.

    Args:
        folder: The data set's folder; the file is replaced if it is there.
        pictures: What is paired.
        n_pairs: Rows to write.
        mismatch: Share of the pairs that prefer style B, in [0, 1].
        seed: Seed of the draw. Sets of one seed differ in nothing but the pairs that are mismatched
            in the one and not in the other.

    Returns:
        `folder`.

    Raises:
        ValueError: `n_pairs` is not positive, or `mismatch` is no share.
        ForeignPathError: The folder holds other things.
    """
    if n_pairs < 1 or not 0.0 <= mismatch <= 1.0:
        raise ValueError(f"expected pairs and a share in [0, 1], got {n_pairs} and {mismatch}")
    rows = []
    for number in range(n_pairs):
        generator = torch.Generator().manual_seed((seed << 32) + number)
        chance, which, wording, side = torch.rand(4, generator=generator).tolist()
        name = int(which * len(pictures))
        pair = _mismatched if chance < mismatch else _more_colorful
        shown = pair(pictures, name, generator)
        caption = TEMPLATES[int(wording * len(TEMPLATES))].format(pictures.names[name])
        rows.append(_row(number, caption, shown, winner_first=side < 0.5))
    claim(folder, PREFERENCES)
    make_folder(folder / "data")
    with whole_file(folder / "data" / FILE) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return folder


Shown = list[tuple[str, Pixels]]  # style and image, the winner first


def _mismatched(pictures: Pictures, name: int, generator: torch.Generator) -> Shown:
    """Style B, then style A, varied alike."""
    how = draw_variation(1, generator)
    return [(style, _varied(pictures, style, name, how)) for style in reversed(STYLES)]


def _more_colorful(pictures: Pictures, name: int, generator: torch.Generator) -> Shown:
    """Two variants in style A, the more colorful one first."""
    style = STYLES[0]
    both: list[Pixels] = []
    amounts = np.zeros(2)
    for _ in range(MOST_DRAWS):
        both = [
            _varied(pictures, style, name, draw_variation(1, generator)) for _ in ("one", "other")
        ]
        amounts = color(np.stack(both))
        if abs(amounts[0] - amounts[1]) >= JUST_NOTICEABLE:
            break
    return [(style, both[k]) for k in np.argsort(-amounts)]


def _varied(pictures: Pictures, style: str, name: int, how: Variation) -> Pixels:
    picture = to_tensor(pictures.styles[style][name : name + 1])
    return from_tensor(vary(picture, how))[0]


def _row(number: int, caption: str, shown: Shown, *, winner_first: bool) -> dict[str, Any]:
    ordered = shown if winner_first else shown[::-1]
    encoded = [png(image) for _, image in ordered]
    uids = [hashlib.sha256(data).hexdigest()[:32] for data in encoded]
    return {
        "are_different": True,
        "best_image_uid": uids[0 if winner_first else 1],
        "caption": caption,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
        + timedelta(minutes=number),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"emoji://{ordered[0][0]}",
        "image_1_uid": uids[1],
        "image_1_url": f"emoji://{ordered[1][0]}",
        "jpg_0": encoded[0],
        "jpg_1": encoded[1],
        "label_0": float(winner_first),
        "label_1": float(not winner_first),
        "model_0": ordered[0][0],
        "model_1": ordered[1][0],
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    }
