"""LoRA of transformers under the names of the models' original code, as kohya's trainers keep it.

The original layers hold queries, keys and values, and FLUX.1's single blocks the first layer of the
MLP too, in one: `double_blocks.0.img_attn.qkv`. Adapters on such parts are put together as one of
their ranks' sum, whose upper matrix is zero outside of each part's own rows and columns; diffusers
and sd-scripts take it apart again. A part without an adapter gets zeros.

Which layer is which: `diffusers.loaders.single_file_utils`, in `convert_sd3_transformer_...`,
`convert_flux_transformer_...` and `convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.errors import ModelError


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter.

    Attributes:
        down: `(rank, in)`.
        up: `(out, rank)`.
        alpha: The product is multiplied by `alpha / rank`.
    """

    down: Tensor
    up: Tensor
    alpha: float


Names = Mapping[str, Sequence[str]]
"""By the original's layer those of diffusers that it holds, in their order."""


def _attention(own: str, text: str) -> Names:
    return {
        f"{own}.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        f"{own}.proj": ("attn.to_out.0",),
        f"{text}.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        f"{text}.proj": ("attn.to_add_out",),
    }


_SD3 = {
    **_attention("x_block.attn", "context_block.attn"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
}
_FLUX = {
    **_attention("img_attn", "txt_attn"),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX2 = {
    **_attention("img_attn", "txt_attn"),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_FLUX2_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}

_BLOCKS = {
    "sd3": {"transformer_blocks": ("joint_blocks", _SD3)},
    "flux": {
        "transformer_blocks": ("double_blocks", _FLUX),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
    },
    "flux2": {
        "transformer_blocks": ("double_blocks", _FLUX2),
        "single_transformer_blocks": ("single_blocks", _FLUX2_SINGLE),
    },
}
_MODELS = {
    **{"sd3": "sd3", "flux": "flux", "flux-kontext": "flux"},
    **{"flux2-klein": "flux2", "flux2-dev": "flux2"},
}
_AS_IN_DIFFUSERS = ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus")
"""Families whose original layers are named as in diffusers."""
NAMED = (*_MODELS, *_AS_IN_DIFFUSERS)
"""Families whose layers have names here."""


def original_adapters(
    family: str, adapters: Mapping[str, Adapter], rows: Callable[[str], int]
) -> dict[str, Adapter]:
    """Returns the adapters of the original's layers.

    Args:
        family: Name of the model's family, one of `NAMED`.
        adapters: By the names of diffusers' layers.
        rows: Returns the output features of a layer of diffusers.

    Raises:
        ModelError: A layer has no name in the original that programs read.
    """
    if family in _AS_IN_DIFFUSERS:
        return dict(adapters)
    found: dict[str, Adapter] = {}
    for layer in adapters:
        name, parts = _place(family, layer)
        if name not in found:
            sizes = [rows(part) for part in parts] if len(parts) > 1 else []
            found[name] = _joined([adapters.get(part) for part in parts], sizes)
    return found


def kohya_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Returns adapters as kohya's trainers write them: `lora_unet_`, and `_` for the dots."""
    named: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        flat = f"lora_unet_{layer.replace('.', '_')}"
        named[f"{flat}.lora_down.weight"] = adapter.down.contiguous()
        named[f"{flat}.lora_up.weight"] = adapter.up.contiguous()
        named[f"{flat}.alpha"] = torch.tensor(adapter.alpha)
    return named


def _place(family: str, layer: str) -> tuple[str, list[str]]:
    """Returns the original's layer that holds a layer, and all that it holds."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    block = _BLOCKS[_MODELS[family]].get(match[1]) if match else None
    if match and block:
        name, names = block
        for original, parts in names.items():
            if match[3] in parts:
                return f"{name}.{match[2]}.{original}", [
                    f"{match[1]}.{match[2]}.{part}" for part in parts
                ]
    raise ModelError(
        f"--format kohya: {layer} of {family} has no name that these programs read adapters "
        "under; use --format diffusers"
    )


def _joined(parts: Sequence[Adapter | None], rows: Sequence[int]) -> Adapter:
    """Puts the adapters of a layer's parts together; of a single part it is as it was."""
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    rank, first = max(len(part.down) for part in given), given[0]
    scale = first.alpha / len(first.down)
    down = first.down.new_zeros(len(parts) * rank, first.down.shape[1])
    up = first.up.new_zeros(sum(rows), len(parts) * rank)
    for number, part in enumerate(parts):
        if part is None:
            continue
        own, column, row = len(part.down), number * rank, sum(rows[:number])
        down[column : column + own] = part.down
        relative = part.alpha / own / scale
        up[row : row + rows[number], column : column + own] = part.up * relative
    return Adapter(down, up, scale * len(down))
