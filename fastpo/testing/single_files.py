"""Tiny pipelines as one file, under the names of the original code, as A1111 and ComfyUI have them.

The renaming is written from the original modules' order; diffusers' own reading of it is the test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(pipeline: Path, file: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Writes the weights of a folder of `tiny_sd15_folder` or `tiny_sdxl_folder` into one file.

    Args:
        pipeline: The folder.
        file: The file to write.
        without: Components that it leaves out.

    Returns:
        `file`.
    """
    from safetensors.torch import load_file, save_file

    sdxl = (pipeline / "text_encoder_2").is_dir()
    text = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    turns = {
        "unet": lambda w: _named("model.diffusion_model.", unet_names(w)),
        "vae": lambda w: _named("first_stage_model.", vae_names(w)),
        "text_encoder": lambda w: _named(f"{text}text_model.", clip_names(w)),
        "text_encoder_2": lambda w: _named("conditioner.embedders.1.model.", open_clip_names(w)),
    }
    weights: dict[str, Tensor] = {}
    for name, turn in turns.items():
        if (pipeline / name).is_dir() and name not in without:
            [stored] = (pipeline / name).glob("*.safetensors")
            weights |= turn(load_file(stored))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return file


def unet_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet under the original names."""
    found = [re.match(r"down_blocks\.0\.resnets\.(\d+)", name) for name in weights]
    layers = 1 + max(int(m[1]) for m in found if m)
    attended = {m[1] for n in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}
    return {_unet_name(name, layers, attended): tensor for name, tensor in weights.items()}


def clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's text model with the positions' numbers, which transformers saved for long."""
    import torch

    turned = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    places = turned["embeddings.position_embedding.weight"].shape[0]
    return turned | {"embeddings.position_ids": torch.arange(places)[None]}


def vae_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE under the original names; its attention's matrices are convolutions there."""
    levels = 1 + max(int(m[1]) for n in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", n)))
    turned = {}
    for name, tensor in weights.items():
        new = _vae_name(name, levels)
        matrix = ".attn_1." in new and tensor.ndim == 2
        turned[new] = tensor[:, :, None, None] if matrix else tensor
    return turned


def open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP with a projection under OpenCLIP's names, queries, keys and values in one matrix."""
    import torch

    outer = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    turned = {new: weights[old] for old, new in outer.items()}
    turned["text_projection"] = weights["text_projection.weight"].T
    for name, tensor in weights.items():
        found = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if found is None or "k_proj" in name or "v_proj" in name:
            continue
        block = f"transformer.resblocks.{found[1]}."
        if "q_proj" in name:
            rows = [weights[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            turned[f"{block}attn.in_proj_{found[3]}"] = torch.cat(rows)
        else:
            turned[f"{block}{_OPEN_CLIP[found[2]]}.{found[3]}"] = tensor
    return turned


def _named(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _unet_name(name: str, layers: int, attended: set[str]) -> str:
    head, _, leaf = name.rpartition(".")
    if head in _UNET:
        return f"{_UNET[head]}.{leaf}"
    found = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert found is not None, name
    where, level, kind, number, rest = found.groups()
    if kind == "resnets":
        part, leaf = rest.rsplit(".", 1)
        rest = f"{_RESNET[part]}.{leaf}"
    if where == "mid":
        return f"middle_block.{2 * int(number) + (kind == 'attentions')}.{rest}"
    if where == "down":
        first = 1 + int(level) * (layers + 1)
        if kind == "downsamplers":  # behind the level's last layer
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + int(number)}.{int(kind == 'attentions')}.{rest}"
    first = int(level) * (layers + 1)
    if kind == "upsamplers":  # in the level's last block, behind its attention
        return f"output_blocks.{first + layers}.{1 + (level in attended)}.{rest}"
    return f"output_blocks.{first + int(number)}.{int(kind == 'attentions')}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    turned = lambda kind: lambda m: f"up.{levels - 1 - int(m[1])}.{kind}"  # noqa: E731
    name = re.sub(r"up_blocks\.(\d)\.resnets", turned("block"), name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", turned("upsample"), name)
    found = re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name)
    if found is None:
        return name
    return f"{found[1]}mid.attn_1.{_VAE_ATTENTION[found[2]]}.{found[3]}"
