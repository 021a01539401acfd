"""The families that FastPO trains, by name: a new one is one line here and one file beside it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpo.errors import ModelError
from fastpo.system.files import listing
from fastpo.system.json_text import read_json

if TYPE_CHECKING:
    from fastpo.models.family import ModelFamily

FAMILIES = {
    "sdxl": "fastpo.models.unet:SDXL",
    "sd15": "fastpo.models.unet:SD15",
    "sd3": "fastpo.models.sd3:SD3",
    "flux": "fastpo.models.flux:Flux",
    "flux-kontext": "fastpo.models.flux_kontext:FluxKontext",
    "sana": "fastpo.models.sana:Sana",
    "z-image": "fastpo.models.z_image:ZImage",
    "qwen-image": "fastpo.models.qwen_image:QwenImage",
    "qwen-image-edit": "fastpo.models.qwen_image_edit:QwenImageEdit",
    "qwen-image-edit-plus": "fastpo.models.qwen_image_edit:QwenImageEditPlus",
    "flux2-klein": "fastpo.models.flux2:Flux2Klein",
    "flux2-dev": "fastpo.models.flux2:Flux2Dev",
}
"""Name to `module:class`; a module is imported when one of its models is looked for."""


def load_family(name: str) -> ModelFamily:
    """Returns a family by its name.

    Raises:
        ModelError: There is none of that name.
    """
    if name not in FAMILIES:
        raise ModelError(f"no model family is called {name!r}; there are {', '.join(FAMILIES)}")
    return _load(FAMILIES[name])


def detect(folder: Path) -> ModelFamily:
    """Returns the family of a pipeline's folder.

    Raises:
        ModelError: FastPO trains no such model; the text says why.
    """
    for name in FAMILIES:
        family = load_family(name)
        if family.recognizes(folder):
            return family
    denoisers = dict.fromkeys(load_family(name).denoiser for name in FAMILIES)
    wanted = " or ".join(f"{denoiser}/config.json" for denoiser in denoisers)
    index = folder / "model_index.json"
    found: Any = read_json(index, most_bytes=1 << 20) if index.is_file() else {}
    raise ModelError(
        f"{folder} has no {wanted} of a model that FastPO trains ({', '.join(FAMILIES)}): its "
        f"model_index.json names {ascii(found.get('_class_name'))[:80]} (found: {listing(folder)})"
    )


@lru_cache
def _load(place: str) -> ModelFamily:
    module, _, kind = place.partition(":")
    return getattr(import_module(module), kind)()
