"""How many pairs and prompts a run meets, and the bytes their cache takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastpo.config import Config, SourceConfig
from fastpo.data.cache.arrow import open_arrow
from fastpo.data.cache.index import INDEX_FILE
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.cache.parts import MORE_SOURCES
from fastpo.data.mixing import visits_per_epoch
from fastpo.data.sources import open_local
from fastpo.plan.architecture import Architecture
from fastpo.plan.measure import Shapes
from fastpo.plan.schema import CacheSize
from fastpo.precision import DTYPES

PUBLISHED = {
    "yuvalkirstain/pickapic_v2": (851_293, 58_960),
    "ymhao/HPDv2": (645_090, None),
}
"""Labeled pairs and distinct prompts of public training sets, as their papers and cards say."""


@dataclass(frozen=True)
class DataSize:
    """How much data there is.

    Attributes:
        pairs: Usable pairs, if known.
        prompts: Distinct prompts, if known; at most `pairs`.
        source: Where the numbers come from.
        repeats: How often an epoch visits a pair, on average.
        images: Distinct images that edits begin from, if known; at most `pairs`.
        edits: Distinct prompts with such images, if known; at most `pairs`.
        sources: The most images that an edit begins from, as far as known; 0: there are no edits.
    """

    pairs: int | None
    prompts: int | None
    source: str
    repeats: float = 1.0
    images: int | None = None
    edits: int | None = None
    sources: int = 0


def find_size(config: Config, pairs: int | None) -> DataSize:
    """Looks in the prepared cache, in data on this disk, then among public data sets.

    Args:
        config: The experiment.
        pairs: The user's number, which comes first.

    Raises:
        DataError: Data on this disk cannot be read.
    """
    size = _prepared_size(config) or _joined(
        config, [count_source(one) for one in config.data.each()]
    )
    if pairs is None:
        return size
    prompts = pairs if size.prompts is None else min(size.prompts, pairs)
    images, edits = (None if n is None else min(n, pairs) for n in (size.images, size.edits))
    return DataSize(pairs, prompts, "--pairs", size.repeats, images, edits, size.sources)


def _prepared_size(config: Config) -> DataSize | None:
    manifest = load_manifest(config.prepare.cache_dir)
    if manifest is None or not manifest.complete:
        return None
    where = f"the cache {config.prepare.cache_dir}"
    prompts = max((span.stop for span in manifest.texts), default=0)
    pairs = min(manifest.pairs, config.data.limit or manifest.pairs)
    each = [one.pairs for one in manifest.sources]
    repeats = 1.0
    if len(each) == len(config.data.sources) > 0:
        repeats = _repeats(config, each)
    images = min(manifest.images[-1].stop, pairs) if manifest.images else None
    # Where texts see images, the texts that were encoded are the edits.
    edits, sources = None, 0
    if images is not None:
        schema = open_arrow(config.prepare.cache_dir / INDEX_FILE).schema
        more = schema.field(MORE_SOURCES).type.list_size if MORE_SOURCES in schema.names else 0
        edits, sources = min(prompts, pairs), 1 + more
    return DataSize(pairs, min(prompts, pairs), where, repeats, images, edits, sources)


def _joined(config: Config, sizes: Sequence[DataSize]) -> DataSize:
    """The data sets together; one of unknown size leaves the whole unknown."""
    if len(sizes) == 1:
        return replace(sizes[0], repeats=_repeats(config, [sizes[0].pairs or 0]))
    known = [size.pairs for size in sizes if size.pairs is not None]
    if len(known) < len(sizes):
        unknown = next(size for size in sizes if size.pairs is None)
        return DataSize(None, None, unknown.source)
    prompts = [size.prompts or size.pairs or 0 for size in sizes]
    where = ", ".join(size.source for size in sizes)
    counts = ([one.images for one in sizes], [one.edits for one in sizes])
    images, edits = (None if None in n else sum(filter(None, n)) for n in counts)
    most = max(one.sources for one in sizes)
    return DataSize(sum(known), sum(prompts), where, _repeats(config, known), images, edits, most)


def _repeats(config: Config, pairs: Sequence[int]) -> float:
    """Visits of an epoch for each pair of the data."""
    sources = config.data.sources
    if not sources or not sum(pairs):
        return 1.0
    visits = visits_per_epoch(sources, pairs)
    return sum(v * n for v, n in zip(visits, pairs, strict=True)) / sum(pairs)


def count_source(one: SourceConfig) -> DataSize:
    """Counts one data set: its labels are scanned, and its prompts read, if it is on this disk."""
    source = open_local(one)
    if source is not None:
        table = source.prompt_table()
        prompts = len(table.prompts) - 1
        found = source.source_images() if source.edits() else None
        if found is None:
            return DataSize(len(source), prompts, one.path)
        both = np.stack([table.numbers, found.numbers])
        edits = np.unique(both, axis=1).shape[1]
        images = len(found.names)
        size = DataSize(len(source), prompts, one.path, images=images, edits=edits)
        return replace(size, sources=found.most)
    pairs, prompts, where = one.limit, one.limit, "data.limit"
    if one.split == "train" and one.path in PUBLISHED:
        published, prompts = PUBLISHED[one.path]
        pairs, where = min(published, one.limit or published), f"{one.path}, as published"
    if pairs is None:
        return DataSize(None, None, f"{one.path} is not on this disk; give --pairs")
    return DataSize(pairs, min(prompts or pairs, pairs), where)


def count_visits(
    config: Config, size: DataSize, processes: int, *, distinct: bool = False
) -> int | None:
    """Pairs drawn in the whole run, repeats and all rounds included.

    Args:
        config: The run's configuration.
        size: Its data set's.
        processes: How many train.
        distinct: Count draws that later rounds take again (`train.rounds_draws`) once.
    """
    train = config.train
    once = distinct and train.rounds_draws == "same"
    if train.max_steps is not None:
        step = processes * train.accumulation_steps * train.micro_batch_size
        return (1 if once else train.rounds) * train.max_steps * step
    assert train.epochs is not None
    if size.pairs is None:
        return None
    judging = train.round_epochs or train.epochs
    several = train.epochs + (train.rounds - 1) * judging
    epochs = max(train.epochs, judging) if once else several
    return round(epochs * size.pairs * size.repeats * (1.0 - config.data.held_out))


def cache_size(
    config: Config,
    architecture: Architecture,
    shapes: Shapes,
    *,
    size: DataSize,
    visits: int | None,
    hours: float | None,
) -> CacheSize:
    """The files that `fastpo prepare` writes; index and manifest are below a thousandth of them.

    Latents: 2 images x (mean, log-variance) x C x h x w. Text: L x D states and P pooled per
    distinct prompt, the empty one included. Reference: 2 floats per pair and visit. Source: C x h x
    w per distinct image that edits begin from.
    """
    element = DTYPES[config.prepare.store_precision].itemsize
    latents = 4 * architecture.latent_channels * shapes.height * shapes.width * element
    prompt = architecture.text(shapes.tokens)
    text = prompt.bytes(element)
    per_pair = 0
    if config.train.reads_reference_errors and size.pairs and visits:
        per_pair = 8 * math.ceil(visits / size.pairs)
    source = 0
    if shapes.source is not None:
        source = architecture.latent_channels * math.prod(shapes.source) * element
    totals: tuple[int | None, ...] = (None,) * 4
    if size.pairs is not None and size.prompts is not None:
        images = size.pairs if size.images is None else size.images
        texts = size.prompts + 1
        if architecture.flow is not None and architecture.flow.text_sees_source:
            texts = size.pairs if size.edits is None else size.edits
        totals = size.pairs * latents, texts * text, size.pairs * per_pair
        totals = *totals, images * source
    return CacheSize(
        latent_bytes_per_pair=latents,
        text_bytes_per_prompt=text,
        reference_bytes_per_pair=per_pair,
        latents=totals[0],
        text=totals[1],
        text_at_most=bool(prompt.masks),
        reference=totals[2],
        source_bytes_per_image=source,
        sources=totals[3],
        total=None if totals[0] is None else sum(t for t in totals if t is not None),
        prepare_hours=hours,
    )
