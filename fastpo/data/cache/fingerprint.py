"""What decides a cache's content: model parts by hash, data and preparation by setting.

Of the data the listing counts; the images' bytes are `prepare`'s to compare, see `contents`.

Settings of training, evaluation, flips, batch sizes and workers play no part. `data.limit` is
compared by its own rule: a cache serves every limit up to its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastpo.config import Config
from fastpo.data.cache.manifest import WeightsMemo
from fastpo.data.images import Geometry, make_geometry
from fastpo.data.sources import source_digest
from fastpo.models.encoders import vae_factor, vae_folder_of
from fastpo.models.folder import (
    Family,
    component_files,
    detect_family,
    digest_files,
    read_json,
    resolve_model_folder,
    unet_config,
)


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


def cache_identity(config: Config, memo: dict[str, WeightsMemo] | None = None) -> CacheIdentity:
    """Works out the identity without loading any model.

    Args:
        config: The configuration.
        memo: Digests of an earlier call, reused for components whose files are untouched.

    Raises:
        ModelError: The model folder or a part of it is missing or not supported.
        ConfigError: The resolution does not fit the model.
    """
    model, prepare, data = config.model, config.prepare, config.data
    folder = resolve_model_folder(model.path, model.revision, model.variant)
    family = detect_family(folder)
    components = _components(config, folder, family)
    weights = {
        name: component_digest(path, model.variant, (memo or {}).get(name))
        for name, path in components.items()
    }
    geometry = make_geometry(
        prepare.resolution,
        use_buckets=prepare.buckets,
        vae_factor=vae_factor(read_json(components["VAE"] / "config.json")),
        unet_factor=2 ** (len(unet_config(folder)["block_out_channels"]) - 1),
    )
    fields = {
        "model family": family,
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
    return CacheIdentity(fields, weights, family, geometry)


def _components(config: Config, folder: Path, family: Family) -> dict[str, Path]:
    """The folders of the parts that the cached numbers come from, by the names errors use."""
    parts = {"VAE": vae_folder_of(config, folder)}
    for name in ("text_encoder", "tokenizer"):
        parts[name] = folder / name
        if family == "sdxl":
            parts[f"{name}_2"] = folder / f"{name}_2"
    return parts


def component_digest(
    folder: Path, variant: str | None, known: WeightsMemo | None = None
) -> WeightsMemo:
    """Hashes what a component computes with; `known` is answered while its files are untouched.

    Raises:
        ModelError: The folder is missing or empty.
    """
    files = component_files(folder, variant)
    stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    stamp = hashlib.sha256(repr(stats).encode()).hexdigest()
    if known is not None and known.stamp == stamp:
        return known
    return WeightsMemo(stamp=stamp, sha256=digest_files(files))
