"""How many pairs and prompts a run meets, and the bytes their cache takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastpo.config import Config
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.sources.bad_rows import passed_over
from fastpo.data.sources.folder import listed
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
    """

    pairs: int | None
    prompts: int | None
    source: str


def find_size(config: Config, pairs: int | None) -> DataSize:
    """Looks in the prepared cache, in a plain folder, then among public data sets.

    Args:
        config: The experiment.
        pairs: The user's number, which comes first.
    """
    size = _known_size(config)
    if pairs is not None:
        prompts = pairs if size.prompts is None else min(size.prompts, pairs)
        return DataSize(pairs, prompts, "--pairs")
    if size.pairs is None:
        return size
    kept = min(size.pairs, config.data.limit or size.pairs)
    return DataSize(kept, min(size.prompts or kept, kept), size.source)


def _known_size(config: Config) -> DataSize:
    manifest = load_manifest(config.prepare.cache_dir)
    if manifest is not None and manifest.complete:
        source = f"the cache {config.prepare.cache_dir}"
        prompts = max((span.stop for span in manifest.texts), default=0)
        return DataSize(manifest.pairs, prompts, source)
    listing = Path(config.data.path).expanduser() / "pairs.jsonl"
    if config.data.source == "folder" and listing.is_file():
        prompts = [entry["prompt"] for _, _, entry in listed(listing, bad=passed_over)]
        return DataSize(len(prompts), len(set(prompts)), str(listing))
    if config.data.split == "train" and config.data.path in PUBLISHED:
        return DataSize(*PUBLISHED[config.data.path], source=f"{config.data.path}, as published")
    limit = config.data.limit
    return DataSize(limit, limit, "data.limit" if limit else "not known; give --pairs")


def count_visits(config: Config, pairs: int | None, processes: int) -> int | None:
    """Pairs drawn in the whole run, repeats included."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps * processes * train.accumulation_steps * train.micro_batch_size
    assert train.epochs is not None
    return None if pairs is None else round(train.epochs * pairs)


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
    distinct prompt, the empty one included. Reference: 2 floats per pair and visit.
    """
    element = DTYPES[config.prepare.store_precision].itemsize
    latents = 4 * architecture.vae["latent_channels"] * shapes.height * shapes.width * element
    unet = architecture.unet
    pooled = 0
    if unet.get("addition_embed_type") == "text_time":
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    text = (shapes.tokens * unet["cross_attention_dim"] + pooled) * element
    per_pair = 0
    if config.train.reads_reference_errors and size.pairs and visits:
        per_pair = 8 * math.ceil(visits / size.pairs)
    if size.pairs is None or size.prompts is None:
        totals = (None, None, None)
    else:
        totals = (size.pairs * latents, (size.prompts + 1) * text, size.pairs * per_pair)
    return CacheSize(
        latent_bytes_per_pair=latents,
        text_bytes_per_prompt=text,
        reference_bytes_per_pair=per_pair,
        latents=totals[0],
        text=totals[1],
        reference=totals[2],
        total=None if totals[0] is None else sum(t for t in totals if t is not None),
        prepare_hours=hours,
    )
