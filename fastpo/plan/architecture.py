"""Which modules a configuration means: from a folder, the hub's local cache, or packaged files.

Nothing is downloaded and no weight is read; a component is its `config.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastpo.config import Config, ModelConfig
from fastpo.errors import ModelError
from fastpo.models.encoders import vae_factor
from fastpo.models.flow import FlowFamily
from fastpo.models.folder import ModelFolder, read_json, resolve_vae_folder
from fastpo.models.hub import is_hub_id
from fastpo.models.registry import detect, load_family
from fastpo.models.trained import holds_an_export
from fastpo.plan import transformers
from fastpo.system.files import user_path

PACKAGED: dict[str, str] = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
}
"""Hub ids whose architecture is known without the hub."""

PACKAGED_FOLDERS: dict[str, str] = {
    "Tongyi-MAI/Z-Image": "z-image",
    "Qwen/Qwen-Image": "qwen-image",
    "Qwen/Qwen-Image-2512": "qwen-image",
    "Qwen/Qwen-Image-Edit": "qwen-image-edit",
    "Qwen/Qwen-Image-Edit-2509": "qwen-image-edit-2509",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein-base-9b",
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux1-kontext-dev",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1.6b",
}
"""The same for flow-matching models, whose packaged files are laid out as a pipeline's folder."""

PACKAGED_VAES: dict[str, str] = {
    "madebyollin/sdxl-vae-fp16-fix": "sdxl",
    "stabilityai/sdxl-vae": "sdxl",
    "stabilityai/sd-vae-ft-mse": "sd15",
    "stabilityai/sd-vae-ft-ema": "sd15",
}
"""The same for VAEs, of which SDXL's and SD1.5's differ in their weights only."""

NAMES = {"sdxl": "SDXL base 1.0", "sd15": "SD1.5"}


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's parts.

    Attributes:
        family: The family's name, as in `fastpo.models.registry`.
        source: Where they come from, in words.
        unet: The denoiser's `config.json`.
        vae: `vae/config.json`, of `model.vae` where that is given.
        texts: `text_encoder/config.json` and those of further text encoders, in order.
        folder: Of a flow-matching model, its folder or a packaged one; None of UNets.
    """

    family: str
    source: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    folder: ModelFolder | None = None

    @property
    def flow(self) -> FlowFamily | None:
        """The family of a flow-matching transformer, else None."""
        family = load_family(self.family)
        return family if isinstance(family, FlowFamily) else None

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel and side."""
        if self.flow is not None and self.folder is not None:
            return self.flow.vae_factor(self.folder)
        return vae_factor(self.vae)

    @property
    def denoiser_factor(self) -> int:
        """What the latents' sides must be multiples of."""
        if self.flow is not None and self.folder is not None:
            return self.flow.denoiser_factor(self.folder)
        return 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the cache holds."""
        if self.flow is not None and self.folder is not None:
            return transformers.channels(self.flow, self.folder, self.vae)
        return self.vae["latent_channels"]

    @property
    def resolution(self) -> int:
        """Side of the images that the model was made for."""
        return 1024 if self.flow is not None else self.unet["sample_size"] * self.vae_factor

    def text(self, length: int) -> transformers.Text:
        """What a prompt of a number of tokens gives to the denoiser."""
        if self.flow is not None:
            defaults = dict(transformers.empty_transformer(self.flow, self.unet).config)
            return transformers.text_of(self.flow, defaults, length)
        sizes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (length, self.unet["cross_attention_dim"])
        }
        if self.unet.get("addition_embed_type") == "text_time":
            pooled = self.unet["projection_class_embeddings_input_dim"]
            sizes["pooled"] = (pooled - 6 * self.unet["addition_time_embed_dim"],)
        return transformers.Text(sizes)


def resolve_architecture(config: Config) -> Architecture:
    """Finds the architecture that `model` names.

    A local folder comes first, then the hub's cache on this machine, then the packaged files.

    Raises:
        ModelError: The folder is not a pipeline that FastPO trains, or a hub id is neither in the
            local cache nor packaged.
    """
    model = config.model
    folder, cached = user_path(model.path), False
    known = folder.is_file() or holds_an_export(folder)
    whole = ModelFolder.resolve(model) if known else ModelFolder(folder)
    folder = whole.path
    if not folder.is_dir():
        found = _cached(model.path, "model_index.json", model.revision)
        if found is not None:
            folder, cached = found.parent, True
            whole = ModelFolder(folder)
    packaged = {name.lower(): place for name, place in PACKAGED_FOLDERS.items()}
    if not folder.is_dir() and model.path.lower() in packaged:
        own = Path(str(resources.files("fastpo.models"))) / "architectures"
        place = own / packaged[model.path.lower()]
        source = f"the packaged architecture of {place.name} ({model.path} is not here)"
        return _flow_architecture(config, ModelFolder(place), source)
    if folder.is_dir() and isinstance(detect(folder), FlowFamily):
        source = f"the hub's copy on this machine, {folder}" if cached else str(folder)
        if not cached:
            whole.family  # noqa: B018  its parts are checked when it is first asked for
        return _flow_architecture(config, whole, source)
    if folder.is_dir():
        # Of a hub's model only the files that were asked for are here; its parts are not checked.
        family = (detect(folder) if cached else whole.family).name
        unet = read_json(whole.place("unet") / "unet" / "config.json")
        parts = ("text_encoder", "text_encoder_2")[: 2 if family == "sdxl" else 1]
        texts = tuple(read_json(folder / part / "config.json") for part in parts)
        source = f"the hub's copy on this machine, {folder}" if cached else str(folder)
        own_vae = folder
    else:
        family = _packaged_family(model)
        unet = _packaged(family, "unet")
        texts = tuple(_packaged(family, part) for part in _text_parts(family))
        source = f"the packaged architecture of {NAMES[family]} ({model.path} is not here)"
        own_vae = None
    return Architecture(family, source, unet, _vae_config(model, own_vae, family), texts)


def _flow_architecture(config: Config, folder: ModelFolder, source: str) -> Architecture:
    """The configurations of a flow-matching model's folder."""
    family = detect(folder.path)
    texts = tuple(
        read_json(folder.path / part / "config.json")
        for part in family.encoder_parts
        if part.startswith("text_encoder")
    )
    denoiser = read_json(folder.component(family.denoiser) / "config.json")
    vae = _vae_config(config.model, folder.path, family.name)
    return Architecture(family.name, source, denoiser, vae, texts, folder)


def _text_parts(family: str) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)


def _packaged_family(model: ModelConfig) -> str:
    known: dict[str, str] = {name.lower(): family for name, family in PACKAGED.items()}
    if model.path.lower() in known:
        return known[model.path.lower()]
    if not is_hub_id(model.path):
        raise ModelError(f"model.path: no such folder: {model.path} (and no hub id either)")
    raise ModelError(
        f"model.path: {model.path!r} is neither a folder nor in the hub's cache on this machine, "
        f"and a plan downloads nothing; known without it: "
        f"{', '.join([*PACKAGED, *PACKAGED_FOLDERS])}. Download it once, "
        "or plan with one of these if the architecture is the same (--set model.path=...)"
    )


def _vae_config(model: ModelConfig, own: Path | None, family: str) -> dict[str, Any]:
    """The VAE's configuration: of `model.vae`, else the pipeline's own (`own`: its folder)."""
    if model.vae is None:
        return (
            _packaged(family, "vae")
            if own is None
            else read_json(resolve_vae_folder(str(own)) / "config.json")
        )
    if own is not None and user_path(model.vae).is_file():
        return read_json(resolve_vae_folder(str(own)) / "config.json")
    if user_path(model.vae).is_dir():
        return read_json(resolve_vae_folder(model.vae) / "config.json")
    for name in ("vae/config.json", "config.json"):
        found = _cached(model.vae, name, None)
        if found is not None:
            return read_json(found)
    named = PACKAGED | PACKAGED_VAES
    known: dict[str, str] = {name.lower(): family for name, family in named.items()}
    if model.vae.lower() in known:
        return _packaged(known[model.vae.lower()], "vae")
    raise ModelError(
        f"model.vae: {model.vae!r} is neither a folder nor in the hub's cache on this machine, and "
        f"a plan downloads nothing; known without it: {', '.join(PACKAGED_VAES)}"
    )


def _packaged(family: str, part: str) -> dict[str, Any]:
    file = resources.files("fastpo.models").joinpath("architectures", family, f"{part}.json")
    return json.loads(file.read_text())


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository in the hub's cache on this machine; None where it is not there."""
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None
