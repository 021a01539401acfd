"""Named emoji in two styles as one file, and the variants that stand for a style's domain.

The two packages draw the same things by the same names: style A is Google's Noto Emoji (shades,
highlights), style B is Twemoji (flat areas). `write_pictures` puts both on white paper, in 32 or 64
pixels, into one Parquet file.

A name has one picture a style, which is no domain to prefer within. `vary` makes more: the colors
stronger or weaker, the picture a little smaller, and moved.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastpo.errors import DataError
from fastpo.study.emoji.text import HELD_OUT, NAMES
from fastpo.system.files import make_folder, whole_file
from fastpo.system.ownership import Kind, claim

STYLES = ("google", "twitter")  # A, which the base knows, and B
SIZES = (32, 64)
FILE = "pictures.parquet"
SCALES = (0.8, 1.0)  # range of a variant's size
STRENGTHS = (0.5, 1.5)  # range of a variant's colors, 1 being the picture's own
SHIFT = 0.06  # of the width, at most, to any side
Pixels = NDArray[np.uint8]
SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "category": pa.string(),
        "subcategory": pa.string(),
        "drawn": pa.bool_(),
        "held_out": pa.bool_(),
        **{style: pa.binary() for style in STYLES},
    }
)
PICTURES = Kind(
    "a set of emoji pictures",
    FILE.replace(".", r"\."),
    lambda folder: (
        (folder / FILE).is_file() and set(STYLES) <= set(pq.read_schema(folder / FILE).names)
    ),
)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Both styles of some names.

    Attributes:
        names: N names in lower case.
        styles: For each style `(N, S, S, 3)` uint8.
    """

    names: list[str]
    styles: dict[str, Pixels]

    def __len__(self) -> int:
        """Returns N."""
        return len(self.names)


class Variation(NamedTuple):
    """How N variants differ from their pictures: each `(N,)` float32.

    Attributes:
        strength: Factor of the colors' distance from gray.
        scale: Factor of the size.
        right, down: Shift as a share of the width.
    """

    strength: Tensor
    scale: Tensor
    right: Tensor
    down: Tensor


def write_pictures(out: Path, packages: dict[str, Path], *, size: int = 32) -> Path:
    """Writes both styles of all names that both packages have, of one size, as one Parquet file.

    Args:
        out: The data set's folder; its file is replaced.
        packages: For each style the unpacked package's folder: `emoji.json` and
            `img/<style>/64/*.png`.
        size: Width and height in pixels, 32 or 64.

    Returns:
        `out`.

    Raises:
        DataError: A package's folder lacks a file or a name, or holds what is no such file.
        ForeignPathError: `out` holds other things.
        ValueError: The size is neither 32 nor 64.
    """
    if size not in SIZES:
        raise ValueError(f"size must be 32 or 64, got {size}")
    entries = {style: _entries(folder, style) for style, folder in packages.items()}
    rows = []
    for name, entry in entries[STYLES[0]].items():
        if any(name not in entries[style] for style in STYLES):
            continue
        files = {s: packages[s] / "img" / s / "64" / entries[s][name]["image"] for s in STYLES}
        rows.append(
            {
                "name": name,
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "drawn": name in NAMES,
                "held_out": name in HELD_OUT,
                **{style: _on_paper(path, size) for style, path in files.items()},
            }
        )
    missing = set(NAMES) - {row["name"] for row in rows}
    if missing:
        raise DataError(
            f"{', '.join(map(str, packages.values()))}: no picture in both of {min(missing)!r} "
            f"and {len(missing) - 1} other names that the base draws"
        )
    claim(out, PICTURES)
    make_folder(out)
    with whole_file(out / FILE) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return out


def read_pictures(
    folder: Path, *, drawn: bool | None = True, held_out: bool | None = None
) -> Pictures:
    """Reads some of the pictures that `write_pictures` wrote.

    Args:
        folder: The data set's folder.
        drawn: Only names that the base draws, or only others; None for both.
        held_out: Only names that preferences leave out, or only others; None for both.

    Raises:
        DataError: There is no such file.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{path}: no emoji pictures there; `write_pictures` makes them")
    rows = pq.read_table(path).to_pylist()
    rows = [
        row for row in rows if drawn in (None, row["drawn"]) and held_out in (None, row["held_out"])
    ]
    styles = {style: np.stack([_decode(row[style]) for row in rows]) for style in STYLES}
    return Pictures([row["name"] for row in rows], styles)


def _entries(folder: Path, style: str) -> dict[str, dict[str, Any]]:
    """A package's emoji that have a picture of the style, by their names in lower case."""
    path = folder / "emoji.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(e["name"] or e["short_name"]).lower(): e
            for e in listed
            if e[f"has_img_{style}"] and Path(e["image"]).name == e["image"]
        }
    except OSError as error:
        raise DataError(
            f"{path} is missing: expected the unpacked npm package emoji-datasource-{style}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no list of emoji as in the npm package emoji-datasource-{style}: "
            f"{type(error).__name__} {error}"
        ) from error


def _on_paper(path: Path, size: int) -> bytes:
    """A picture with its transparent parts white, at the wanted size, as a PNG."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except OSError as error:
        raise DataError(f"{path}: no picture there that can be read ({error})") from error
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    small = paper.convert("RGB")
    if small.size != (size, size):
        small = small.resize((size, size), Image.Resampling.BOX)
    return png(np.asarray(small))


def png(pixels: Pixels) -> bytes:
    """Encodes `(S, S, 3)` uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def to_pixels(images: Sequence[Image.Image], size: int) -> Pixels:
    """Stacks images as `(N, size, size, 3)` uint8, averaged to the size where theirs differs."""
    fitted = [
        i if i.size == (size, size) else i.resize((size, size), Image.Resampling.BOX)
        for i in (image.convert("RGB") for image in images)
    ]
    return np.stack([np.asarray(image) for image in fitted])


def color(pixels: Pixels) -> NDArray[np.float64]:
    """How colorful `(N, S, S, 3)` uint8 images are: `(N,)` float64.

    The mean over all pixels of the largest channel minus the smallest, in [0, 1]: 0 is gray.
    """
    values = pixels.astype(np.float64) / 255.0
    return (values.max(axis=-1) - values.min(axis=-1)).mean(axis=(1, 2))


def to_tensor(pixels: Pixels) -> Tensor:
    """`(N, S, S, 3)` uint8 as `(N, 3, S, S)` float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def from_tensor(images: Tensor) -> Pixels:
    """The way back from `to_tensor`."""
    scaled = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def draw_variation(count: int, generator: torch.Generator | None = None) -> Variation:
    """Draws how N variants differ, each property evenly over its range."""
    strength, scale, right, down = torch.rand(4, count, generator=generator)
    low, high = STRENGTHS
    small, large = SCALES
    return Variation(
        low + (high - low) * strength,
        small + (large - small) * scale,
        (2.0 * right - 1.0) * SHIFT,
        (2.0 * down - 1.0) * SHIFT,
    )


def vary(images: Tensor, how: Variation) -> Tensor:
    """Returns variants of `(N, 3, S, S)` images in [-1, 1] on white paper, one an image."""
    gray = images.mean(dim=1, keepdim=True)
    colored = torch.lerp(gray.expand_as(images), images, how.strength[:, None, None, None])
    zero = torch.zeros_like(how.scale)
    across = torch.stack([1.0 / how.scale, zero, -2.0 * how.right / how.scale], dim=1)
    along = torch.stack([zero, 1.0 / how.scale, -2.0 * how.down / how.scale], dim=1)
    grid = F.affine_grid(torch.stack([across, along], dim=1), list(images.shape), False)
    paper = F.grid_sample(colored - 1.0, grid, align_corners=False)  # outside: 0, white
    return (paper + 1.0).clamp(-1.0, 1.0)
