"""What decides a cache's content: model parts by hash, data and preparation by setting.

Of the data the listing counts; the images' bytes are `prepare`'s to compare, see `contents`.

Settings of training, evaluation, flips, batch sizes and workers play no part. `data.limit` is
compared by its own rule: a cache serves every limit up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.config import Config
from fastpo.data.images import Geometry, make_geometry
from fastpo.data.sources import source_digest
from fastpo.models.encoders import vae_factor
from fastpo.models.folder import Family, ModelFolder, WeightsMemo, read_json, unet_config


@dataclass(frozen=True)
class CacheIdentity:
    """The identity that a configuration gives.

    Attributes:
        fields: Name to value; an empty value could not be determined here.
        weights: Memo of the hashed components, to be kept in the manifest.
        family: The model's family.
        geometry: The image sizes.
    """

    fields: dict[str, str]
    weights: dict[str, WeightsMemo]
    family: Family
    geometry: Geometry


def cache_identity(
    config: Config, model: ModelFolder, memo: dict[str, WeightsMemo] | None = None
) -> CacheIdentity:
    """Works out the identity without loading any model.

    Args:
        config: The configuration.
        model: The folder of its model.
        memo: Earlier digests, reused for components whose files are untouched.

    Raises:
        ModelError: A part of the model folder is missing or not supported.
        ConfigError: The resolution does not fit the model.
    """
    prepare, data = config.prepare, config.data
    weights = {
        name: model.digest(component, (memo or {}).get(name))
        for name, component in _components(model.family).items()
    }
    geometry = make_geometry(
        prepare.resolution,
        use_buckets=prepare.buckets,
        vae_factor=vae_factor(read_json(model.vae / "config.json")),
        unet_factor=2 ** (len(unet_config(model.path)["block_out_channels"]) - 1),
    )
    fields = {
        "model family": model.family,
        **{name: record.sha256 for name, record in weights.items()},
        "data.source": data.source,
        "data.path": data.path,
        "data.split": data.split,
        "data files": source_digest(data) or "",
        "prepare.resolution": str(prepare.resolution),
        "prepare.buckets": str(prepare.buckets).lower(),
        "image geometry": str(geometry),
        "prepare.vae_precision": prepare.vae_precision,
        "prepare.text_precision": prepare.text_precision,
        "prepare.store_precision": prepare.store_precision,
    }
    return CacheIdentity(fields, weights, model.family, geometry)


def _components(family: Family) -> dict[str, str]:
    """The parts that the cached numbers come from: the names errors use, and the pipeline's."""
    parts = {"VAE": "vae"}
    for name in ("text_encoder", "tokenizer"):
        parts[name] = name
        if family == "sdxl":
            parts[f"{name}_2"] = f"{name}_2"
    return parts
