"""What decides a cache's content: model parts by hash, data and preparation by setting.

Of the configuration these are the keys with `decides("cache")`. Of the data the listing counts;
`prepare` compares the images' bytes, see `fastpo.data.prepare.verify_source`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.config import Config, as_text, decided_values
from fastpo.data.sources import source_digest
from fastpo.models.folder import DigestMemo, ModelFolder
from fastpo.models.geometry import Geometry

# Of these the identity holds the content, the components' digests, instead of the values.
MODEL_KEYS = ("model.path", "model.config", "model.revision", "model.variant", "model.vae")
LIMIT = "data.limit"  # a cache serves every limit up to its own, see `Manifest.covers`


@dataclass(frozen=True)
class CacheFingerprint:
    """The identity that a configuration gives.

    Attributes:
        fields: Name to value; an empty value could not be determined here.
        weights: Memo of the hashed components, to be kept in the manifest.
        geometry: The image sizes.
    """

    fields: dict[str, str]
    weights: dict[str, DigestMemo]
    geometry: Geometry


def cache_fingerprint(
    config: Config, model: ModelFolder, memo: dict[str, DigestMemo] | None = None
) -> CacheFingerprint:
    """Works out the identity without loading any model.

    Args:
        config: The configuration.
        model: The folder of its model.
        memo: Earlier digests, reused for components whose files are untouched.

    Raises:
        ModelError: A part of the model folder is missing or not supported.
        ConfigError: The resolution does not fit the model.
    """
    prepare = config.prepare
    weights = {
        name: model.digest(component, (memo or {}).get(name))
        for name, component in _components(model).items()
    }
    geometry = model.family.geometry(model, prepare.resolution, buckets=prepare.buckets)
    values = decided_values(config, "cache", named=(*MODEL_KEYS, LIMIT))
    fields = {
        "model family": model.family.name,
        **{name: record.sha256 for name, record in weights.items()},
        **model.family.latent_notes(model),
        "data files": source_digest(config.data) or "",
        "image geometry": str(geometry),
        **{key: as_text(value) for key, value in values.items()},
    }
    return CacheFingerprint(fields, weights, geometry)


def _components(model: ModelFolder) -> dict[str, str]:
    """The parts that the cached numbers come from: the names errors use, and the pipeline's."""
    return {"VAE": "vae", **{name: name for name in model.family.encoder_parts}}
