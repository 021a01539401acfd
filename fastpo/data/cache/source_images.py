"""The images that edits begin from: their latents, stored once for each image.

An `image-k` part holds `latents.safetensors`, per latent shape one tensor `hxw` of `(images, C, h,
w)`: the mean of the VAE's posterior as the transformer sees it; and `index.parquet`, one row for
each image in the order of the data set. `images.arrow` joins these rows. An image that could not be
read has size 0, and the pairs that begin from it are in quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastpo.data.cache.arrow import column, open_arrow
from fastpo.data.cache.manifest import TRY_AGAIN, Manifest
from fastpo.data.cache.parts import INDEX, LATENTS, CachePart, part_name
from fastpo.data.cache.tensors import TensorFiles, bytes_of
from fastpo.errors import CacheError

IMAGES_FILE = "images.arrow"
IMAGE_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("height", pa.int32()),  # of the latent
        ("width", pa.int32()),
        ("slot", pa.int32()),  # row in the latent tensor of this shape and part
    ]
)


def merge_images(folder: Path, parts: Sequence[CachePart]) -> pa.RecordBatch:
    """Returns the joined rows of the `image-k` parts.

    Raises:
        CacheError: A part is damaged.
    """
    rows = pa.concat_tables([part.table(folder, INDEX) for part in parts])
    return rows.combine_chunks().to_batches()[0]


def shapes_of(images: pa.RecordBatch, numbers: np.ndarray) -> np.ndarray:
    """Returns height << 16 | width of the latents of images, int64, by their numbers; 0 of none.

    Raises:
        CacheError: An image has no latents.
    """
    height, width = (images.column(name).to_numpy()[numbers] for name in ("height", "width"))
    some = numbers >= 0
    if not height[some].all():
        raise CacheError(
            "a usable pair begins from an image that could not be read before; "
            f"{TRY_AGAIN} tries it again"
        )
    return np.where(some, height.astype(np.int64) << 16 | width, 0)


class SourceLatents:
    """Reads the latents of source images by their numbers; any number of threads may read."""

    def __init__(self, folder: Path, manifest: Manifest, files: TensorFiles) -> None:
        """Maps `images.arrow`.

        Raises:
            CacheError: It is damaged.
        """
        images = open_arrow(folder / IMAGES_FILE)
        if images.num_rows != manifest.images[-1].stop:
            raise CacheError(f"{folder}: the index does not match the manifest; prepare again")
        self._files = files
        self._starts = np.array([span.start for span in manifest.images])
        self._height, self._width, self._slot = (
            column(images, name) for name in ("height", "width", "slot")
        )

    def stored(self, number: int) -> bool:
        """Tells whether an image has latents; one that could not be read has none."""
        return bool(self._height[number])

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Returns `(B, C, h, w)` of images of one shape, as stored.

        Raises:
            CacheError: A file is damaged.
        """
        key = f"{int(self._height[numbers[0]])}x{int(self._width[numbers[0]])}"
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        names = [f"{part_name('image', part)}/{LATENTS}" for part in parts.tolist()]
        rows = self._files.rows(names[0], key)
        latents = torch.empty((len(names), *rows.shape), dtype=rows.dtype)
        into = bytes_of(latents)
        for row, (name, number) in enumerate(zip(names, numbers, strict=True)):
            self._files.read(name, key, int(self._slot[number]), [into[row]])
        return latents
