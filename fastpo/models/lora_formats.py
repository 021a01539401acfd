"""A LoRA as one file for other programs: ComfyUI, diffusers, and kohya's trainers.

Names of a layer, here SDXL's first query projection:

* diffusers: `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight`;
  alpha stands in the file's metadata, where diffusers and peft read it.
* ComfyUI: `lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`,
  beside it `....alpha`. Automatic1111 and Forge read these too.
* kohya: for SD1.5 the same names; for SDXL those of the original UNet, as sd-scripts trains it:
  `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight`.

Of a transformer ComfyUI reads diffusers' names and finds the original layer by itself, also where
that holds queries, keys and values in one: `transformer.transformer_blocks.0.attn.to_q.lora_A
.weight`, beside it `transformer.transformer_blocks.0.attn.to_q.alpha`. kohya's trainers keep the
original layers, `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`; see
`fastpo.models.lora_original`.

A loader multiplies a layer's product by alpha / rank where alpha is a tensor.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpo._version import __version__
from fastpo.errors import ModelError
from fastpo.models.export import LORA_FILE, sort_metadata
from fastpo.models.lora_original import NAMED, Adapter, kohya_tensors, original_adapters

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser, ModelFamily

LoraFormat = Literal["kohya", "comfyui", "diffusers"]
_BASE_VERSIONS = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}
"""sd-scripts' `ss_base_model_version`, from which programs tell what a file is for."""
_IN_COMFYUI = (*NAMED, "z-image")
"""Transformers whose diffusers' names ComfyUI maps to its own; others it would leave out."""
_NOT_IN_COMFYUI = re.compile(r"(double|single)_stream_modulation|time_guidance_embed")
"""Layers of FLUX.2 that it does not map."""
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down|mid|up)_blocks?\.(?:(?P<block>\d+)\.)?"
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def write_lora(
    family: ModelFamily,
    denoiser: Denoiser,
    weights: Mapping[str, Tensor],
    file: Path,
    form: LoraFormat,
) -> None:
    """Writes adapters as one file; not flushed, see `fastpo.system.files.whole_file`.

    Args:
        family: The model's family.
        denoiser: The policy with its adapters; only its architecture is used.
        weights: The trained weights by name, in any dtype, which is kept.
        file: Where to.
        form: Whose names, see the module. Equal weights give equal bytes.

    Raises:
        ModelError: The family's layers, or one of them, have no names in the format.
    """
    if form == "diffusers":
        with tempfile.TemporaryDirectory() as folder:
            family.save(denoiser, Path(folder), "lora", weights)
            shutil.copyfile(Path(folder, LORA_FILE), file)
    else:
        transformers = _IN_COMFYUI if form == "comfyui" else NAMED
        if family.name not in (*_BASE_VERSIONS, *transformers):
            taken = [*_BASE_VERSIONS, *transformers]
            other = "comfyui or diffusers" if family.name in _IN_COMFYUI else "diffusers"
            raise ModelError(
                f"--format {form} is for LoRA of {', '.join(taken)}, not of {family.name}; use "
                f"--format {other}"
            )
        if any("lora_magnitude_vector" in name for name in weights):
            raise ModelError(
                f"--format {form} is for plain LoRA; this run trained DoRA (train.lora.use_dora), "
                "which diffusers writes under no name that these programs read; use --format "
                "diffusers"
            )
        if family.name in _BASE_VERSIONS:
            original = form == "kohya" and family.name == "sdxl"
            named = other_names(denoiser, weights, original=original)
        elif form == "comfyui":
            named = transformer_names(family.denoiser, denoiser, weights)
        else:
            named = _kohya_names(family.name, denoiser, weights)
        save_file(named, file, _about(family, denoiser))
    sort_metadata(file)


def transformer_names(
    prefix: str, denoiser: Denoiser, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns a transformer's adapters under peft's names, with `.alpha` of each layer, float32.

    Args:
        prefix: Put before each name, with a dot.
        denoiser: The transformer with its adapters.
        weights: The trained weights by name.

    Raises:
        ModelError: ComfyUI reads no adapter of a layer.
    """
    layers = dict(denoiser.named_modules())
    named: dict[str, Tensor] = {}
    for name, tensor in get_peft_model_state_dict(denoiser, dict(weights)).items():
        layer = re.split(r"\.lora_[AB]\.", name, maxsplit=1)[0]
        if _NOT_IN_COMFYUI.match(layer):
            raise ModelError(
                f"--format comfyui: ComfyUI reads no adapter of {layer}; use --format diffusers"
            )
        named[f"{prefix}.{name}"] = tensor.contiguous()
        named[f"{prefix}.{layer}.alpha"] = torch.tensor(_alpha(layer, layers[layer]))
    return named


def _kohya_names(
    family: str, denoiser: Denoiser, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns a transformer's adapters as `original_adapters` names and joins them."""
    layers: dict[str, Any] = dict(denoiser.named_modules())
    tensors = get_peft_model_state_dict(denoiser, dict(weights))
    adapters = {}
    for name, down in tensors.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            adapters[layer] = Adapter(down, up, _alpha(layer, layers[layer]))
    rows = {name: module.out_features for name, module in layers.items() if _is_linear(module)}
    return kohya_tensors(original_adapters(family, adapters, rows.__getitem__))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LoraLayer)


def _alpha(layer: str, module: nn.Module) -> float:
    """The alpha by which programs that divide by the rank scale as peft does."""
    if not isinstance(module, LoraLayer):
        raise TypeError(f"{layer} has adapters but is no LoraLayer")
    # rsLoRA divides by the rank's root.
    root = math.sqrt(module.r["default"]) if module.use_rslora["default"] else 1.0
    return float(module.lora_alpha["default"] * root)


def other_names(
    denoiser: Denoiser, weights: Mapping[str, Tensor] | None, *, original: bool
) -> dict[str, Tensor]:
    """Returns a UNet's adapters under `lora_unet_` names, with `.alpha` of each layer, float32.

    Args:
        denoiser: The UNet with its adapters.
        weights: The trained weights by name; default: the UNet's own.
        original: Name blocks as the original UNet does (`input_blocks`), not as diffusers
            (`down_blocks`).
    """
    own = None if weights is None else dict(weights)
    renamed: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    layers = dict(denoiser.named_modules())
    for name, tensor in get_peft_model_state_dict(denoiser, own).items():
        layer, kind, rest = re.split(r"\.(lora_[AB]|lora_magnitude_vector)", name, maxsplit=1)
        alpha = _alpha(layer, layers[layer])
        if original:
            layer = original_name(layer, denoiser)
        flat = f"lora_unet_{layer.replace('.', '_')}"
        alphas[f"{flat}.alpha"] = alpha
        renamed[f"unet.{layer}.{kind}{rest}"] = tensor.contiguous()
    # diffusers writes the rank for alpha, whatever the adapters were trained with.
    return convert_state_dict_to_kohya(renamed) | {
        name: torch.tensor(float(alpha)) for name, alpha in alphas.items()
    }


def original_name(layer: str, unet: nn.Module) -> str:
    """Returns the name of a layer of diffusers' UNet in the original one (LDM's, sgm's).

    The inverse of `diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint`.

    Raises:
        ModelError: The original UNet has no such layer.
    """
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    for mapping in (known["layers"], known["addition_embed_type"]):
        if f"{layer}.weight" in mapping:
            return mapping[f"{layer}.weight"].removesuffix(".weight")
    found = _BLOCK.fullmatch(layer)
    if found is None:
        raise ModelError(f"the original UNet has no layer {layer}: use --format comfyui")
    block, index, rest = int(found["block"] or 0), int(found["index"]), found["rest"]
    if found["part"] == "resnets":
        rest = _RESNET.get(rest, rest)
    if found["side"] == "mid":
        return f"middle_block.{2 * index if found['part'] == 'resnets' else 2 * index + 1}.{rest}"
    blocks = unet.get_submodule(f"{found['side']}_blocks")
    sizes = [len(b.get_submodule("resnets")) for b in blocks.children()]  # pyright: ignore[reportArgumentType]
    here = blocks.get_submodule(str(block))
    if found["side"] == "down":  # a downsampler follows the layers of each block
        first = 1 + sum(sizes[:block]) + block
        if found["part"] == "downsamplers":
            return f"input_blocks.{first + sizes[block]}.0.op"
        return f"input_blocks.{first + index}.{int(found['part'] == 'attentions')}.{rest}"
    first = sum(sizes[:block])
    if found["part"] == "upsamplers":  # it stands in the last layer of its block
        attends = any(name == "attentions" for name, _ in here.named_children())
        return f"output_blocks.{first + sizes[block] - 1}.{1 + attends}.{rest}"
    return f"output_blocks.{first + index}.{int(found['part'] == 'attentions')}.{rest}"


def _about(family: ModelFamily, denoiser: Denoiser) -> dict[str, str]:
    """The metadata that sd-scripts writes and programs show."""
    config = denoiser.peft_config["default"]
    if family.name not in _BASE_VERSIONS:  # sd-scripts has no names for their versions
        return {"format": "pt", "fastpo_version": __version__}
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(float(config.lora_alpha)),
        "ss_base_model_version": _BASE_VERSIONS[family.name],
        "ss_v2": "False",
        "fastpo_version": __version__,
    }
