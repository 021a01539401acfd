"""OpenCLIP's checkpoints of two transformers as transformers' `CLIPModel`, without `open_clip`.

The names of the tensors differ, the projections are transposed, and queries, keys and values are
one matrix there and three here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpo.errors import ModelError
from fastpo.evaluate.scorers.loading import fill
from fastpo.models.folder import read_json

CONFIG = "open_clip_config.json"
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Width of a vision head where it is not 64: ViT-H-14, ViT-g-14, ViT-bigG-14."""
TEXT_HEAD_WIDTH = 64

_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under the names of `CLIPModel`; those of unknown names keep theirs.

    Args:
        state: A checkpoint of OpenCLIP's `CLIP` with a vision transformer.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(name)
        if name in _WHOLE:
            named[_WHOLE[name]] = tensor
        elif head in _NORMS:
            named[f"{_NORMS[head]}.{kind}"] = tensor
        elif name in _PROJECTIONS:
            named[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif block is not None:
            named |= _block(block, tensor)
        else:
            named[name] = tensor
    return named


def _block(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of one tensor of a transformer's block."""
    visual, number, part, kind = match.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    part = part.rstrip(".")
    if part == "attn.in_proj_":
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{q}_proj.{kind}": t.contiguous() for q, t in parts}
    return {f"{layer}.{_PARTS.get(part, part)}.{kind}": tensor}


def configuration(state: dict[str, Tensor], beside: Path) -> dict[str, Any]:
    """Returns the arguments of `CLIPConfig` that a checkpoint's shapes tell.

    The number of heads is in no shape: it follows from the released models' widths, unless
    `open_clip_config.json` lies beside the checkpoint, as in OpenCLIP's folders on the hub.

    Args:
        state: A checkpoint of OpenCLIP's `CLIP` with a vision transformer.
        beside: The folder of the checkpoint.

    Raises:
        KeyError: A tensor is missing.
        ModelError: The configuration beside it is damaged.
    """
    told = read_json(beside / CONFIG).get("model_cfg", {}) if (beside / CONFIG).is_file() else {}
    vision, text = told.get("vision_cfg", {}), told.get("text_cfg", {})
    width, _, patch, _ = state["visual.conv1.weight"].shape
    words, text_width = state["token_embedding.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * patch
    activation = "quick_gelu" if told.get("quick_gelu") else "gelu"
    return {
        "projection_dim": state["text_projection"].shape[1],
        "vision_config": {
            **_tower(state, "visual."),
            "num_attention_heads": max(
                1, width // vision.get("head_width", HEAD_WIDTHS.get(width, 64))
            ),
            "image_size": side,
            "patch_size": patch,
            "hidden_act": activation,
        },
        "text_config": {
            **_tower(state, ""),
            "num_attention_heads": text.get("heads", max(1, text_width // TEXT_HEAD_WIDTH)),
            "vocab_size": words,
            "max_position_embeddings": len(state["positional_embedding"]),
            "hidden_act": activation,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": words - 1,
        },
    }


def _tower(state: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Width, depth and inner width of one of the two transformers."""
    blocks = f"{prefix}transformer.resblocks."
    inner, width = state[f"{blocks}0.mlp.c_fc.weight"].shape
    depth = len(
        {name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)}
    )
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}


def load_open_clip(scorer: str, state: dict[str, Tensor], file: Path) -> Any:
    """Builds the `CLIPModel` of a checkpoint, of which each tensor comes from the file.

    Args:
        scorer: The scorer's name, for messages.
        state: What the file holds.
        file: Where it was read.

    Raises:
        ModelError: The tensors are not those of such a model.
    """
    from transformers import CLIPConfig, CLIPModel

    expected = "an OpenCLIP checkpoint with a vision transformer was expected"
    try:
        arguments = configuration(state, file.parent)
    except KeyError as error:
        raise ModelError(f"scorer {scorer}: {file} lacks {error}; {expected}") from None
    model = CLIPModel(CLIPConfig(**arguments))
    return fill(model, as_transformers(state), file, f"scorer {scorer}", expected)
