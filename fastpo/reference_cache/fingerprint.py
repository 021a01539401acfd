"""What the reference's errors depend on, by name; errors made with anything else are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastpo.config import Config, as_text, decided_values
from fastpo.data.cache import PairCache
from fastpo.data.cache.fingerprint import MODEL_KEYS
from fastpo.models.folder import DigestMemo, ModelFolder
from fastpo.noise import PairNoise, drops_to_zeros
from fastpo.reference_cache.store import reference_root
from fastpo.system.files import write_text
from fastpo.system.json_text import read_json, seal, unseal


def reference_identity(
    config: Config, model: ModelFolder, cache: PairCache, noise: PairNoise
) -> dict[str, str]:
    """Names everything on which a visit's reference errors depend, without loading the model.

    Of the configuration these are the keys with `decides("reference")`: the model and the draws by
    their content, all others by their value. What plays no part has an empty value.

    Raises:
        ModelError: The denoiser is missing.
    """
    content = {
        model.family.title: _denoiser_digest(config, model),
        "prepared latents": cache.fingerprint,
        **noise.identity(),
        **({"train.empty_prompt": "zeros"} if drops_to_zeros(config, model) else {}),
    }
    named = (*MODEL_KEYS, "train.empty_prompt", *content)
    values = decided_values(config, "reference", named=named)
    plain = {key: as_text(value) for key, value in values.items()}
    return content | plain | dict.fromkeys(_idle_keys(config), "")


def _idle_keys(config: Config) -> Iterator[str]:
    """Keys that decide the reference's errors in other configurations, but not in this one."""
    # In half precision LoRA and full fine-tuning round the reference's norms differently.
    if config.train.precision == "fp32":
        yield "train.method"
    # The two sides of a flipped pair exchange their draws; without draws no flip matters.
    if not config.train.sample_latents:
        yield from ("data.flip_rate", "data.flip_seed")
    elif config.data.flip_rate == 0.0:
        yield "data.flip_seed"


def _denoiser_digest(config: Config, model: ModelFolder) -> str:
    """Hashes the denoiser, or recalls it from beside the errors while its files are untouched."""
    name = model.family.denoiser
    path, known = reference_root(config.prepare.cache_dir) / f"{name}.json", None
    if config.data.verify != "always":
        with contextlib.suppress(OSError, ValueError):
            known = DigestMemo.model_validate(unseal(read_json(path, most_bytes=1 << 16)))
    memo = model.digest(name, known)
    if memo != known:
        with contextlib.suppress(OSError):  # where it cannot be kept, it is hashed again
            write_text(path, seal(memo.model_dump()))
    return memo.sha256
