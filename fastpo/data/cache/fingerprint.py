"""What decides a cache's content: model parts by hash, data and preparation by setting.

Of the data the listing counts; the images' bytes are `prepare`'s to compare, see `contents`.

Settings of training, evaluation, flips, batch sizes and workers play no part. `data.limit` is
compared by its own rule: a cache serves every limit up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.config import Config
from fastpo.data.sources import source_digest
from fastpo.models.folder import ModelFolder, WeightsMemo
from fastpo.models.geometry import Geometry


@dataclass(frozen=True)
class CacheIdentity:
    """The identity that a configuration gives.

    Attributes:
        fields: Name to value; an empty value could not be determined here.
        weights: Memo of the hashed components, to be kept in the manifest.
        geometry: The image sizes.
    """

    fields: dict[str, str]
    weights: dict[str, WeightsMemo]
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
        for name, component in _components(model).items()
    }
    geometry = model.family.geometry(model, prepare.resolution, buckets=prepare.buckets)
    fields = {
        "model family": model.family.name,
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
    return CacheIdentity(fields, weights, geometry)


def _components(model: ModelFolder) -> dict[str, str]:
    """The parts that the cached numbers come from: the names errors use, and the pipeline's."""
    return {"VAE": "vae", **{name: name for name in model.family.encoder_parts}}
