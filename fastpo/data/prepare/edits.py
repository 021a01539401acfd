"""Edits: what pairs begin from, and the texts that are read together with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpo.config import Config
from fastpo.data.cache.checks import ROWS
from fastpo.data.cache.manifest import Quarantined
from fastpo.data.cache.parts import (
    INDEX,
    LATENTS,
    PROMPT_SCHEMA,
    PROMPTS,
    TEXT,
    CachePart,
    Digests,
    rows_writer,
    table_writer,
    tensor_writer,
)
from fastpo.data.cache.source_images import IMAGE_SCHEMA
from fastpo.data.cache.texts import without_padding
from fastpo.data.images import UnusableImageError, decode
from fastpo.data.prepare.encode import enough_memory, store
from fastpo.data.prepare.partition import Tables
from fastpo.data.prepare.verify_source import image_digest, read_image
from fastpo.data.sources import PairSource
from fastpo.data.sources.base import PromptTable, SourceImages
from fastpo.errors import DataError
from fastpo.models.edits import EditEncoders
from fastpo.models.family import ModelFamily
from fastpo.precision import DTYPES
from fastpo.system.read_ahead import read_ahead

STAND_IN = (64, 64)
"""Size of a gray image in place of one that cannot be read, whose pairs are in quarantine."""


def tables_of(family: ModelFamily, source: PairSource) -> Tables:
    """Reads what the pairs of a data set share.

    Raises:
        DataError: The family edits and the data set has no source images, or the other way round.
        TooManyBadRowsError: More rows are bad than `data.max_bad` allows.
    """
    prompts = source.prompt_table()
    if not family.takes_sources:
        family.check_edits(source.edits(), source.where)
        return Tables(prompts)
    images = source.source_images()
    family.check_edits(images is not None, source.where)
    if images is None or not family.text_sees_source:
        return Tables(prompts, images)
    both = prompts.numbers.astype(np.int64) * len(images.names) + images.numbers
    distinct, first, numbers = np.unique(both, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    prompt, image = np.divmod(distinct[order], len(images.names))
    texts = PromptTable([prompts.prompts[number] for number in prompt.tolist()], place[numbers])
    return Tables(texts, images, image.tolist())


def source_image(data: bytes | OSError, encoders: EditEncoders) -> Image.Image:
    """Decodes the image that a pair begins from.

    Raises:
        UnusableImageError: It cannot be read, or is none that the model's pipeline takes.
    """
    if isinstance(data, OSError):
        raise UnusableImageError(f"source: unreadable: {data}")
    try:
        image = decode(data)
        encoders.check_source(image)
        return image
    except UnusableImageError as error:
        raise UnusableImageError(f"source: {error}") from None


def write_source_images(
    config: Config, encoders: EditEncoders, part: CachePart, images: SourceImages
) -> None:
    """Encodes a part's source images, and puts it in place."""
    writer = _SourceWriter(config, encoders)
    read = partial(_pixels, images, encoders)
    numbers = range(part.span.start, part.span.stop)
    loaded = read_ahead(read, numbers, threads=config.prepare.workers)
    digests, unusable = [], {}
    with closing(loaded):
        for number, (digest, pixels) in zip(numbers, loaded, strict=True):
            digests.append(digest)
            if isinstance(pixels, UnusableImageError):
                unusable[number] = Quarantined(pair_id=images.names[number], reason=str(pixels))
                pixels = None
            writer.add(images.names[number], pixels)
    latents, rows = writer.finish()
    writers = {
        LATENTS: tensor_writer(latents),
        ROWS: rows_writer(LATENTS, latents),
        INDEX: table_writer(rows, IMAGE_SCHEMA),
    }
    digested = Digests(contents="".join(digests))
    part.write(config.prepare.cache_dir, writers, unusable, digested)


class _SourceWriter:
    """Encodes images in batches of one size, in the order in which they come."""

    def __init__(self, config: Config, encoders: EditEncoders) -> None:
        self._config, self._encoders = config, encoders
        self._dtype = DTYPES[config.prepare.store_precision]
        self._waiting: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._slots: dict[str, int] = defaultdict(int)
        self._latents: dict[str, list[Tensor]] = defaultdict(list)
        self._rows: list[dict[str, Any]] = []

    def add(self, name: str, pixels: Tensor | None) -> None:
        if pixels is None:
            self._rows.append({"name": name, "height": 0, "width": 0, "slot": 0})
            return
        size = pixels.shape[1], pixels.shape[2]
        height, width = (side // self._encoders.vae_factor for side in size)
        key = f"{height}x{width}"
        slot = self._slots[key]
        self._rows.append({"name": name, "height": height, "width": width, "slot": slot})
        self._slots[key] += 1
        self._waiting[size].append(pixels)
        if len(self._waiting[size]) >= self._config.prepare.batch_size:
            self._encode(size)

    def finish(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        for size in list(self._waiting):
            self._encode(size)
        latents = {key: torch.cat(parts).contiguous() for key, parts in self._latents.items()}
        return latents, self._rows

    def _encode(self, size: tuple[int, int]) -> None:
        pixels = torch.stack(self._waiting.pop(size))
        what = f"{len(pixels)} source images of {size[1]}x{size[0]}"
        with enough_memory(what, self._config.prepare.batch_size):
            latents = self._encoders.encode_sources(pixels.to(self._encoders.device))
        key = f"{latents.shape[2]}x{latents.shape[3]}"
        self._latents[key].append(store(latents, self._dtype, "source latent"))


def _pixels(
    images: SourceImages, encoders: EditEncoders, number: int
) -> tuple[str, Tensor | UnusableImageError]:
    """Returns an image's digest and its pixels, or why there are none."""
    data = _read(images, number)
    try:
        return image_digest(data), encoders.source_pixels(source_image(data, encoders))
    except UnusableImageError as error:
        return image_digest(data), error


def _read(images: SourceImages, number: int) -> bytes | OSError:
    """Reads an image; a fault of the machine that did not pass names it."""
    try:
        return read_image(lambda: images.read(number))
    except OSError as error:
        raise DataError(
            f"source image {images.names[number]}: reading it failed: {error}"
        ) from error


def write_edit_texts(
    config: Config, encoders: EditEncoders, part: CachePart, tables: Tables
) -> None:
    """Encodes a part's prompts, each together with its source image, and puts it in place."""
    prompts = tables.texts.prompts[part.span.start : part.span.stop]
    assert tables.images is not None and tables.seen is not None, "texts see images"
    seen = tables.seen[part.span.start : part.span.stop]
    dtype, encoded = DTYPES[config.prepare.store_precision], defaultdict(list)
    unusable = {}
    for place, (prompt, number) in enumerate(zip(prompts, seen, strict=True)):
        try:
            image = source_image(_read(tables.images, number), encoders)
        except UnusableImageError as error:
            image = Image.new("RGB", STAND_IN, "gray")
            name = tables.images.names[number]
            unusable[part.span.start + place] = Quarantined(pair_id=name, reason=str(error))
        with enough_memory("a prompt with its source image", 1):
            conditions = encoders.encode_edit(prompt, image)
        for name, values in conditions.items():
            encoded[name].append(store(values, dtype, name))
    text = without_padding({name: torch.cat(parts) for name, parts in encoded.items()})
    rows = [{"prompt": prompt} for prompt in prompts]
    writers = {
        TEXT: tensor_writer(text),
        ROWS: rows_writer(TEXT, text),
        PROMPTS: table_writer(rows, PROMPT_SCHEMA),
    }
    part.write(config.prepare.cache_dir, writers, unusable, cut=encoders.count_cut(prompts))


def numbers_of(tables: Tables, start: int, stop: int) -> Iterator[tuple[int, int | None]]:
    """Yields the numbers of text and source image of pairs `start` to `stop` - 1."""
    texts = tables.texts.numbers[start:stop].tolist()
    images: Sequence[int | None] = [None] * len(texts)
    if tables.images is not None:
        images = tables.images.numbers[start:stop].tolist()
    return zip(texts, images, strict=True)
