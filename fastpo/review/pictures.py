"""A run's pairs in its data set again: the prompts and images that a person looks at."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection
from dataclasses import dataclass

from PIL import Image

from fastpo.config import DataConfig
from fastpo.data.images import UnusableImageError, decode
from fastpo.data.sources import open_source
from fastpo.system.retry import retrying
from fastpo.types import PreferencePair

SMALL = 128  # images up to this side stay as they are, and are enlarged by whole pixels
MOST_PAGE = 1 << 26
"""Characters of all images of a page; those beyond are left out."""


@dataclass(frozen=True)
class Thumbnail:
    """An image as a page holds it.

    Attributes:
        url: Its data URL, or None where it cannot be shown.
        fault: Why it cannot.
        size: Width and height of the original.
    """

    url: str | None
    fault: str = ""
    size: tuple[int, int] = (0, 0)


def find_pairs(data: DataConfig, wanted: Collection[str]) -> dict[str, PreferencePair]:
    """Returns pairs of the data set by name, labels as they are there.

    Raises:
        DataError: The data set cannot be read.
    """
    left, found = set(wanted), {}
    if left:
        for pair in open_source(data.with_all_bad()):
            if pair.pair_id in left:
                found[pair.pair_id] = pair
                left.discard(pair.pair_id)
                if not left:
                    break
    return found


def thumbnail(read: Callable[[], bytes], side: int) -> Thumbnail:
    """Returns an image, reduced to `side` pixels unless it is small."""
    try:
        image = decode(retrying(read))
    except (UnusableImageError, OSError) as error:
        return Thumbnail(None, " ".join(str(error).split())[:200])
    size, buffer = image.size, io.BytesIO()
    if max(size) <= SMALL:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=82, optimize=True)
        kind = "jpeg"
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{kind};base64,{text}", size=size)
