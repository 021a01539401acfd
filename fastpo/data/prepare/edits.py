"""Edits: the images that pairs begin from, and the texts that are read together with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
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
from fastpo.data.prepare.reuse import EarlierCache
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
        DataError: The family edits and the data set has no source images, or the other way round;
            or a pair has more of them than the family takes.
        TooManyBadRowsError: More rows are bad than `data.max_bad` allows.
    """
    prompts = source.prompt_table()
    if not family.takes_sources:
        family.check_edits(int(source.edits()), source.where)
        return Tables(prompts)
    images = source.source_images()
    family.check_edits(0 if images is None else images.most, source.where)
    if images is None or not family.text_sees_source:
        return Tables(prompts, images)
    both = prompts.numbers.astype(np.int64) * len(images.sets) + images.numbers
    distinct, first, numbers = np.unique(both, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    prompt, seen = np.divmod(distinct[order], len(images.sets))
    texts = PromptTable([prompts.prompts[number] for number in prompt.tolist()], place[numbers])
    return Tables(texts, images, [images.sets[number] for number in seen.tolist()])


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
    config: Config,
    encoders: EditEncoders,
    part: CachePart,
    images: SourceImages,
    earlier: EarlierCache | None = None,
) -> None:
    """Encodes a part's source images, but for those of an earlier cache, and puts it in place."""
    writer = _SourceWriter(config, encoders)
    read = partial(_given, images, encoders, earlier)
    numbers = range(part.span.start, part.span.stop)
    loaded = read_ahead(read, numbers, threads=config.prepare.workers)
    digests, unusable = [], {}
    with closing(loaded):
        for number, (digest, given) in zip(numbers, loaded, strict=True):
            digests.append(digest)
            if isinstance(given, UnusableImageError):
                unusable[number] = Quarantined(pair_id=images.names[number], reason=str(given))
                given = None
            writer.add(images.names[number], given)
    latents, rows = writer.finish()
    writers = {
        LATENTS: tensor_writer(latents),
        ROWS: rows_writer(LATENTS, latents),
        INDEX: table_writer(rows, IMAGE_SCHEMA),
    }
    digested = Digests(contents="".join(digests))
    part.write(config.prepare.cache_dir, writers, unusable, digested)


@dataclass(frozen=True)
class _Source:
    """A source image: as pixels, or as the latents that an earlier cache holds of it."""

    pixels: Tensor | None = None
    latents: Tensor | None = None


class _SourceWriter:
    """Encodes images in batches of one size, in the order in which they come."""

    def __init__(self, config: Config, encoders: EditEncoders) -> None:
        self._config, self._encoders = config, encoders
        self._dtype = DTYPES[config.prepare.store_precision]
        self._waiting: dict[tuple[int, int], list[_Source]] = defaultdict(list)
        self._slots: dict[str, int] = defaultdict(int)
        self._latents: dict[str, list[Tensor]] = defaultdict(list)
        self._rows: list[dict[str, Any]] = []

    def add(self, name: str, source: _Source | None) -> None:
        if source is None:
            self._rows.append({"name": name, "height": 0, "width": 0, "slot": 0})
            return
        if source.pixels is not None:
            sides = source.pixels.shape[1:]
            height, width = (side // self._encoders.vae_factor for side in sides)
        else:
            assert source.latents is not None, "it has one or the other"
            height, width = source.latents.shape[1:]
        size = height, width
        key = f"{height}x{width}"
        slot = self._slots[key]
        self._rows.append({"name": name, "height": height, "width": width, "slot": slot})
        self._slots[key] += 1
        self._waiting[size].append(source)
        new = sum(one.pixels is not None for one in self._waiting[size])
        if new >= self._config.prepare.batch_size:
            self._encode(size)

    def finish(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        for size in list(self._waiting):
            self._encode(size)
        latents = {key: torch.cat(parts).contiguous() for key, parts in self._latents.items()}
        return latents, self._rows

    def _encode(self, size: tuple[int, int]) -> None:
        """Encodes the waiting images of one size of latents that no earlier cache has."""
        waiting = self._waiting.pop(size)
        pixels = [one.pixels for one in waiting if one.pixels is not None]
        encoded: Iterator[Tensor] = iter(())
        if pixels:
            images = torch.stack(pixels).to(self._encoders.device)
            what = f"{len(pixels)} source images of {images.shape[3]}x{images.shape[2]}"
            with enough_memory(what, self._config.prepare.batch_size):
                latents = self._encoders.encode_sources(images)
            encoded = iter(store(latents, self._dtype, "source latent"))
        rows = [next(encoded) if one.latents is None else one.latents for one in waiting]
        self._latents[f"{size[0]}x{size[1]}"].append(torch.stack(rows))


def _given(
    images: SourceImages, encoders: EditEncoders, earlier: EarlierCache | None, number: int
) -> tuple[str, _Source | UnusableImageError]:
    """Returns an image's digest and what is encoded or known of it, or why there is nothing."""
    data = _read(images, number)
    digest = image_digest(data)
    known = earlier.source(digest) if earlier else None
    if known is not None:
        return digest, _Source(latents=known)
    try:
        return digest, _Source(encoders.source_pixels(source_image(data, encoders)))
    except UnusableImageError as error:
        return digest, error


def _read(images: SourceImages, number: int) -> bytes | OSError:
    """Reads an image; a fault of the machine that did not pass names it."""
    try:
        return read_image(lambda: images.read(number))
    except OSError as error:
        raise DataError(
            f"source image {images.names[number]}: reading it failed: {error}"
        ) from error


def write_edit_texts(
    config: Config,
    encoders: EditEncoders,
    part: CachePart,
    tables: Tables,
    earlier: EarlierCache | None = None,
) -> None:
    """Encodes a part's prompts, each with its source images, and puts it in place.

    Those that an earlier cache holds with the same images are copied.
    """
    prompts = tables.texts.prompts[part.span.start : part.span.stop]
    assert tables.images is not None and tables.seen is not None, "texts see images"
    seen = tables.seen[part.span.start : part.span.stop]
    dtype, encoded = DTYPES[config.prepare.store_precision], defaultdict(list)
    unusable: dict[int, Quarantined] = {}
    for place, (prompt, numbers) in enumerate(zip(prompts, seen, strict=True)):
        given = [_read(tables.images, number) for number in numbers]
        conditions = earlier.edit(prompt, map(image_digest, given)) if earlier else None
        if conditions is None:
            images = []
            for number, data in zip(numbers, given, strict=True):
                try:
                    images.append(source_image(data, encoders))
                except UnusableImageError as error:
                    images.append(Image.new("RGB", STAND_IN, "gray"))
                    name = tables.images.names[number]
                    unusable[part.span.start + place] = Quarantined(pair_id=name, reason=str(error))
            with enough_memory("a prompt with its source images", 1):
                conditions = encoders.encode_edit(prompt, images)
        for name, values in conditions.items():
            encoded[name].append(store(values, dtype, name))
    text = without_padding({name: _joined(parts) for name, parts in encoded.items()})
    rows = [{"prompt": prompt} for prompt in prompts]
    writers = {
        TEXT: tensor_writer(text),
        ROWS: rows_writer(TEXT, text),
        PROMPTS: table_writer(rows, PROMPT_SCHEMA),
    }
    part.write(config.prepare.cache_dir, writers, unusable, cut=encoders.count_cut(prompts))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Joins texts `(1, L, ...)`; L depends on how many images they see, and the longest counts."""
    longest = max(part.shape[1] for part in parts)
    padded = torch.zeros((len(parts), longest, *parts[0].shape[2:]), dtype=parts[0].dtype)
    for row, part in zip(padded, parts, strict=True):
        row[: part.shape[1]] = part[0]
    return padded


def numbers_of(tables: Tables, start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the numbers of text and source images of pairs `start` to `stop` - 1."""
    texts = tables.texts.numbers[start:stop].tolist()
    images: Sequence[tuple[int, ...]] = [()] * len(texts)
    if tables.images is not None:
        sets = tables.images.numbers[start:stop].tolist()
        images = [tables.images.sets[number] for number in sets]
    return zip(texts, images, strict=True)
