"""An earlier LoRA as the first values of the adapters that a run trains (`model.lora`).

The reference stays the base: training goes on as if the earlier run had not ended, and `final/`
holds the whole LoRA. Names are read by diffusers' own conversion, so its files, peft's and kohya's
are taken alike; rank, alpha and adapted layers must be those of `train.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from fastpo.errors import ConfigError
from fastpo.models.export import LORA_FILE
from fastpo.models.folder import loading, read_json
from fastpo.system.files import listing

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser, ModelFamily

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_ALPHA = ".alpha"


def start_from_lora(family: ModelFamily, denoiser: Denoiser, source: Path) -> None:
    """Sets a denoiser's adapters to those of a file.

    Args:
        family: The denoiser's family.
        denoiser: It has fresh adapters, named `default`.
        source: A `.safetensors` file of diffusers, peft or kohya, or a folder that holds
            `pytorch_lora_weights.safetensors` or `adapter_model.safetensors`, such as `RUN/final`.

    Raises:
        ConfigError: There is no such file, or its layers, ranks or alphas are not `train.lora`'s.
        ModelError: It cannot be read.
    """
    file = _find(source)
    with loading(f"model.lora: {file} could not be read as a LoRA"):
        layers, scales = _read(family, denoiser, file)
    expected = get_peft_model_state_dict(denoiser)
    _check_layers(file, layers, expected)
    modules = dict(denoiser.named_modules())
    for name, tensor in layers.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        module = modules[layer]
        assert isinstance(module, LoraLayer)
        found, here = scales.get(layer, 1.0), module.scaling["default"]
        if abs(found - here) > 1e-6 * here:
            rank = tensor.shape[0]
            raise ConfigError(
                f"model.lora: {file} multiplies {layer} by {found:g} (alpha {found * rank:g} at "
                f"rank {rank}), train.lora by {here:g}; set train.lora.alpha to {found * rank:g}"
            )
    set_peft_model_state_dict(denoiser, layers)


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    for name in (LORA_FILE, PEFT_FILE):
        if (source / name).is_file():
            return source / name
    found = f"found: {listing(source)}" if source.is_dir() else "there is no such file or folder"
    raise ConfigError(
        f"model.lora: {source} holds no LoRA: expected {LORA_FILE} or {PEFT_FILE}, or such a file "
        f"itself ({found})"
    )


def _read(
    family: ModelFamily, denoiser: Denoiser, file: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns a file's tensors by peft's names, and the factors of layers that it tells."""
    tensors = load_file(file)
    if any(name.startswith(PEFT_PREFIX) for name in tensors):
        plain = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        config = file.parent / PEFT_CONFIG
        return plain, _scales(plain, read_json(config) if config.is_file() else {})
    prefix = f"{family.denoiser}."
    if all(name.startswith(prefix) and (".lora_" in name or _ALPHA in name) for name in tensors):
        if any(name.endswith(_ALPHA) for name in tensors):
            return _named_as_here(tensors, prefix)
    read = family.pipeline_class.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        local_files_only=True,
        unet_config=denoiser.config,
        return_lora_metadata=True,
    )
    of_unet = len(read) == 3  # pipelines of transformers put alpha into the weights
    layers, alphas, metadata = read if of_unet else (read[0], None, read[1])
    other = sorted(name for name in layers if not name.startswith(prefix))
    if other:
        raise ConfigError(
            f"model.lora: {file} also adapts {other[0].partition('.')[0]} ({len(other)} tensors); "
            f"FastPO trains the {family.title} alone"
        )
    plain = {name.removeprefix(prefix): tensor for name, tensor in layers.items()}
    if of_unet:
        plain = convert_unet_state_dict_to_peft(plain)
        alphas = convert_unet_state_dict_to_peft(alphas or {})
    told = {
        key.removeprefix(prefix): value
        for key, value in (metadata or {}).items()
        if key.startswith(prefix)
    }
    scales = _scales(plain, told)
    for name, alpha in (alphas or {}).items():
        down = name.removeprefix(prefix).removesuffix(".alpha").removesuffix(".lora_A.weight")
        if f"{down}.lora_A.weight" in plain:
            scales[down] = float(alpha) / plain[f"{down}.lora_A.weight"].shape[0]
    return plain, scales


def _named_as_here(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A file of a transformer with alphas beside peft's names, as `fastpo export` writes it.

    diffusers' pipelines take the alphas for a sign of other programs' names.
    """
    plain, scales = {}, {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        if own.endswith(_ALPHA):
            layer = own.removesuffix(_ALPHA)
            scales[layer] = float(tensor) / tensors[f"{prefix}{layer}.lora_A.weight"].shape[0]
        else:
            plain[own] = tensor
    return plain, scales


def _scales(layers: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """The factor of each layer by a peft configuration; none where it has no alpha."""
    from peft.utils.other import get_pattern_key

    if "lora_alpha" not in config:
        return {}
    pattern = config.get("alpha_pattern") or {}
    power = 0.5 if config.get("use_rslora") else 1.0
    scales = {}
    for name, tensor in layers.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            alpha = pattern.get(get_pattern_key(list(pattern), layer), config["lora_alpha"])
            scales[layer] = float(alpha) / tensor.shape[0] ** power
    return scales


def _check_layers(file: Path, layers: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses other layers or ranks than the adapters have."""
    for title, names in (
        ("does not hold", sorted(expected.keys() - layers.keys())),
        ("also holds", sorted(layers.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"model.lora: {file} {title} {names[0]}{more}; set train.lora.target_modules (and "
                "use_dora) to what it was trained with"
            )
    for name, tensor in layers.items():
        if tensor.shape != expected[name].shape:
            rank = tensor.shape[0] if ".lora_A." in name else tensor.shape[-1]
            raise ConfigError(
                f"model.lora: {file} has {tuple(tensor.shape)} for {name}, the adapters "
                f"{tuple(expected[name].shape)}; set train.lora.rank to {rank} if this is the "
                "LoRA's model"
            )
