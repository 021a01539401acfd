"""Model folders: where they are, of which family they are, and which weights they hold.

A command resolves its model once, as a `ModelFolder`, and hands it on: a hub repository may change
between two questions, and weights of one snapshot must not meet a fingerprint of another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fastpo.config import ModelConfig
from fastpo.errors import FastPOError, ModelError
from fastpo.models.headers import check_single_file, check_vae_file, holds, usual_config
from fastpo.models.hub import download_configurations, download_pipeline, download_vae
from fastpo.models.hub import is_hub_id as is_hub_id
from fastpo.models.quiet import without_bars
from fastpo.models.registry import detect
from fastpo.models.trained import base_of, holds_an_export
from fastpo.system import json_text
from fastpo.system.files import listing, user_path

if TYPE_CHECKING:
    from fastpo.models.family import ModelFamily

WEIGHTS = ("*.safetensors", "*.bin")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
MOST_JSON_BYTES = 1 << 26
"""Of a model's JSON file."""
MOST_REASON = 600
"""Characters of a library's message that are passed on."""
_VOLATILE_KEYS = ("transformers_version", "torch_dtype", "dtype", "architectures")


class DigestMemo(BaseModel):
    """A component's digest, valid while its files keep name, size and time of change."""

    model_config = ConfigDict(extra="forbid")

    stamp: str
    sha256: str


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline on this machine: one snapshot for everything that a command reads of the model.

    Attributes:
        path: The pipeline's folder, with `model_index.json`.
        variant: Weight variant such as `fp16`, preferred where a component has it.
        other_vae: `model.vae`: a folder, file or hub id of a VAE that replaces the pipeline's own.
        checkpoint: The single file with the weights, where `path` gives the configurations alone.
        trained: A folder with the denoiser alone, as a run exports it, which replaces `path`'s own.
    """

    path: Path
    variant: str | None = None
    other_vae: str | None = None
    checkpoint: Path | None = None
    trained: Path | None = None
    _digests: dict[Path, DigestMemo] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def resolve(cls, config: ModelConfig) -> ModelFolder:
        """Finds the folder that a configuration names, downloading it from the hub if needed.

        Raises:
            ModelError: As `resolve_model_folder`.
        """
        file = user_path(config.path)
        if file.is_file():
            check_single_file(file)
            path = resolve_config_folder(config.config, file, config.revision)
            return cls(path, config.variant, config.vae, file)
        if holds_an_export(file):
            base = cls.resolve(base_of(file))
            return replace(base, trained=file, other_vae=config.vae or base.other_vae)
        path = resolve_model_folder(config.path, config.revision, config.variant)
        if config.config is not None:
            raise ModelError(
                f"model.config is for a model in one file; {config.path} is a pipeline, with its "
                "own configurations"
            )
        return cls(path, config.variant, config.vae)

    @cached_property
    def family(self) -> ModelFamily:
        """The family, read from the folder when it is first asked for.

        Raises:
            ModelError: As `fastpo.models.registry.detect`, and the family's own `check`.
        """
        family = detect(self.path)
        family.check(self)
        return family

    @cached_property
    def vae(self) -> Path:
        """The folder of the VAE in use: `model.vae` if given, else the pipeline's own.

        Raises:
            ModelError: It is missing or holds no VAE.
        """
        file = self.weights_file("vae")
        if file is not None and file != self.checkpoint:
            check_vae_file(file)
        named = None if file is not None else self.other_vae
        return resolve_vae_folder(named or str(self.path), variant=self.variant)

    def weights_file(self, name: str) -> Path | None:
        """Returns the single file with a component's weights, or None: they lie in its folder."""
        if name == "vae" and self.other_vae is not None:
            file = user_path(self.other_vae)
            return file if file.is_file() else None
        if self.place(name) != self.path:
            return None
        held = self.checkpoint is not None and holds(self.checkpoint, name)
        return self.checkpoint if held else None

    def files(self, name: str) -> list[Path]:
        """Returns the files that decide what a component computes, as `component_files`."""
        file = self.weights_file(name)
        if file is None:
            return component_files(self.component(name), self.variant)
        return [*configurations(self.component(name)), file]

    def component(self, name: str) -> Path:
        """Returns the folder of a component by its name in the pipeline, such as `text_encoder`."""
        return self.vae if name == "vae" else self.place(name) / name

    def place(self, name: str) -> Path:
        """Returns the folder in which a component's own folder lies, but the VAE's."""
        own = self.trained
        return own if own is not None and (own / name).is_dir() else self.path

    def digest(self, name: str, memo: DigestMemo | None = None) -> DigestMemo:
        """Hashes what a component computes with, once.

        Args:
            name: The component, as in `component`.
            memo: An earlier answer; it is given again while the files are untouched.

        Raises:
            ModelError: The component's folder is missing or empty.
        """
        folder = self.component(name)
        if folder not in self._digests:
            self._digests[folder] = digest_of(self.files(name), self.weights_file(name), memo)
        return self._digests[folder]


def resolve_model_folder(
    path: str, revision: str | None = None, variant: str | None = None
) -> Path:
    """Returns the local folder of a diffusers pipeline, downloading it from the hub if needed.

    Args:
        path: A local folder or a hub id.
        revision: Branch, tag or commit on the hub; not for local folders.
        variant: Weight variant such as `fp16`; limits what is downloaded.

    Raises:
        ModelError: Neither a folder nor a reachable repository, or without `model_index.json`.
    """
    local = user_path(path)
    folder = local if local.is_dir() else download_pipeline(path, revision, variant)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json "
            f"(found: {listing(folder)})"
        )
    check_index(folder)
    return folder


def resolve_config_folder(config: str | None, file: Path, revision: str | None) -> Path:
    """Returns the folder with the configurations of a model in one file.

    Args:
        config: `model.config`: a diffusers folder, or a hub id of which no weights are fetched.
        file: The model.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: It was not given, or is no pipeline.
    """
    if config is None:
        with loading(f"model.path: {file} is of no kind that diffusers knows"):
            usual = usual_config(file)
        raise ModelError(
            f"model.path: {file} holds weights alone; set model.config to the diffusers folder, or "
            f"hub id, of the model that it was made from (by its names {usual}): its "
            "configurations, tokenizers and scheduler are read, no weights"
        )
    folder = user_path(config)
    if not folder.is_dir():
        folder = download_configurations(config, revision)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"model.config: {folder} is not a diffusers pipeline: it has no model_index.json "
            f"(found: {listing(folder)})"
        )
    check_index(folder)
    return folder


def resolve_vae_folder(path: str, *, variant: str | None = None) -> Path:
    """Returns the folder that holds a VAE's `config.json`: `path` itself or its `vae` subfolder.

    Raises:
        ModelError: Neither a folder nor a reachable repository, or it holds no VAE.
    """
    local = user_path(path)
    folder = local if local.is_dir() else download_vae(path, variant)
    for candidate in (folder / "vae", folder):
        config = candidate / "config.json"
        if config.is_file() and "Autoencoder" in str(read_json(config).get("_class_name")):
            return candidate
    raise ModelError(
        f"model.vae: {folder} holds no VAE: expected a config.json of AutoencoderKL in it or in "
        f"its vae/ subfolder (found: {listing(folder)})"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping a JSON file of a model folder holds.

    Raises:
        ModelError: The file is missing, too large, is not JSON or is not a mapping.
    """
    try:
        content = json_text.read_json(path, most_bytes=MOST_JSON_BYTES)
    except FileNotFoundError:
        raise ModelError(f"missing file: {path}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever a library raises over a broken folder into a `ModelError` of one line.

    Args:
        what: Which part, and that it could not be loaded; the reason is put behind it.

    Raises:
        ModelError: The block failed.
    """
    try:
        with without_bars():
            yield
    except (FastPOError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:MOST_REASON]
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{what}: {kind}{text}") from error


def check_index(folder: Path) -> None:
    """Checks which libraries `model_index.json` names: the loader would import any.

    Raises:
        ModelError: It names another than diffusers' and transformers' own, or code of its own.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{path}: _class_name must be the name of one of diffusers' pipelines")
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        known = len(value) == 2 and all(part is None or isinstance(part, str) for part in value)
        if not known or value[0] not in (None, *_LIBRARIES):
            raise ModelError(
                f"{path}: {name} is {ascii(value)[:80]}; expected a class of "
                f"{', '.join(_LIBRARIES)}: FastPO runs no code of a model's own"
            )


def component_variant(folder: Path, variant: str | None) -> str | None:
    """Returns `variant` if the component's folder has weights of it, else None (the plain ones)."""
    if variant and any(folder.glob(f"*.{variant}.*")):
        return variant
    return None


def component_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Returns the files that decide what a component computes: its configuration and its weights.

    Weights in safetensors hide the same weights in `.bin`; those of other variants are left out.
    A tokenizer's folder has no weights and counts in full.

    Raises:
        ModelError: The folder is missing or empty.
    """
    if not folder.is_dir():
        raise ModelError(f"missing folder: {folder}")
    weights = weight_files(folder, component_variant(folder, variant))
    files = sorted([*weights, *configurations(folder)])
    if not files:
        raise ModelError(f"{folder} holds no configuration or weights")
    return files


def configurations(folder: Path) -> list[Path]:
    """Returns a component's files but its weights, by name.

    Raises:
        ModelError: The folder is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"missing folder: {folder}")
    found = [f for f in folder.iterdir() if f.suffix in (".json", ".txt", ".model")]
    return sorted(f for f in found if not f.name.endswith(".index.json"))


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Returns a component's weights of exactly this variant (None: the plain ones), by name."""
    kinds = ([f for f in folder.glob(kind) if variant_of(f) == variant] for kind in WEIGHTS)
    return sorted(next((files for files in kinds if files), []))


def digest_files(files: list[Path]) -> str:
    """Returns the SHA-256 over names and contents; configurations count without version notes."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        if path.name == "config.json":
            digest.update(_stable_config(path))
        else:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def component_digest(
    folder: Path, variant: str | None, memo: DigestMemo | None = None
) -> DigestMemo:
    """Hashes what a component computes with; `memo` is the answer while its files are untouched.

    Raises:
        ModelError: The folder is missing or empty.
    """
    return digest_of(component_files(folder, variant), None, memo)


def digest_of(files: list[Path], unnamed: Path | None, memo: DigestMemo | None) -> DigestMemo:
    """Hashes files as `component_digest`; the name of `unnamed` does not count."""
    stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    stamp = hashlib.sha256(repr(stats).encode()).hexdigest()
    if memo is not None and memo.stamp == stamp:
        return memo
    if unnamed is None:
        return DigestMemo(stamp=stamp, sha256=digest_files(files))
    named = digest_files([file for file in files if file != unnamed])
    both = f"{named} {_file_digest(unnamed, stamp_of(unnamed))}"
    return DigestMemo(stamp=stamp, sha256=hashlib.sha256(both.encode()).hexdigest())


def stamp_of(file: Path) -> tuple[int, int]:
    """Size and time of change."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=4)
def _file_digest(file: Path, stamp: tuple[int, int]) -> str:
    """SHA-256 of a file that several components lie in."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stable_config(path: Path) -> bytes:
    """The configuration without the keys that a mere re-save changes."""
    config = read_json(path)
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _VOLATILE_KEYS}
    return json.dumps(kept, sort_keys=True).encode()


def variant_of(path: Path) -> str | None:
    """`fp16` for `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors`."""
    parts = re.sub(r"-\d+-of-\d+", "", path.name).split(".")
    return parts[1] if len(parts) == 3 else None
