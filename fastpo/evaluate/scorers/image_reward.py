"""ImageReward (arXiv 2304.05977) from its released checkpoint, without its package.

`ImageReward.pt` holds BLIP's vision transformer (ViT-L/16, timm's names), BLIP's text encoder with
cross-attention to the image, and a head of linear layers on the first token. Both networks are
transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastpo.errors import ModelError
from fastpo.evaluate.scorers.base import Scores, WeightedScorer
from fastpo.evaluate.scorers.head import apply_layers, linear_layers
from fastpo.evaluate.scorers.loading import fill, find_file, load_tokenizer, read_weights
from fastpo.evaluate.scorers.preprocess import cropped
from fastpo.models.folder import read_json
from fastpo.models.reports import complain

HUB, FILE, MED_CONFIG = "THUDM/ImageReward", "ImageReward.pt", "med_config.json"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output, subtracted and divided by, as released."""
PROMPT_TOKENS = 35
HEAD_WIDTH = 64
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|.*\.position_ids")
"""What the checkpoint holds beside the reward model: BLIP's contrastive heads, counters."""

_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm\.", "post_layernorm."),
)


class ImageRewardScorer(WeightedScorer):
    """ImageReward: a reward of about -2 to 2, mean 0 and deviation 1 on the authors' data.

    Args:
        path: `ImageReward.pt`, a folder that holds it, or a hub id. `med_config.json` beside it
            tells the text encoder's heads; its tokenizer is that of the folder if there is one,
            else `bert-base-uncased`'s.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The checkpoint or the tokenizer is not available or not of this format.
    """

    name = "imagereward"

    def __init__(self, path: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        file = find_file(self.name, path or HUB, FILE)
        state = read_weights(self.name, file)
        parts = _parts(state, file)
        vision, text = _vision_model(parts["vision"], file), _text_model(parts, file)
        words = text.config.vocab_size
        self.tokenizer = load_tokenizer(self.name, file.parent, TOKENIZER, most=words)
        self.vision, self.text = (
            model.to(self.dtype).eval().to(self.device) for model in (vision, text)
        )
        try:
            self.layers = linear_layers(parts["head"], text.config.hidden_size)
        except ValueError as error:
            raise ModelError(f"scorer imagereward: the head of {file}: {error}") from None

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"imagereward": (N,)}`."""
        return {self.name: self.batched(self._reward, images, prompts)}

    def _reward(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        side = self.vision.config.image_size
        pixels = torch.stack([cropped(image, side) for image in images])
        seen = self.vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        read = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=PROMPT_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        output = self.text(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            encoder_hidden_states=seen,
        )
        rewards = apply_layers(self.layers, output.last_hidden_state[:, 0])
        return (rewards - MEAN) / STD


def _parts(state: dict[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Splits the checkpoint into `vision`, `text` and `head`, each under the names of its model."""
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    unknown = []
    for name, tensor in state.items():
        if UNUSED.fullmatch(name):
            continue
        if name.startswith("blip.visual_encoder."):
            parts["vision"][_vision_name(name.removeprefix("blip.visual_encoder."))] = tensor
        elif name.startswith("blip.text_encoder."):
            parts["text"][name.removeprefix("blip.text_encoder.")] = tensor
        elif name.startswith("mlp."):
            parts["head"][name.removeprefix("mlp.")] = tensor
        else:
            unknown.append(name)
    empty = [part for part, tensors in parts.items() if not tensors]
    if unknown or empty:
        what = f"lacks its {' and '.join(empty)}" if empty else complain((), unknown, ())
        raise ModelError(f"scorer imagereward: {file} {what}; {FILE} was expected")
    return parts


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _vision_model(state: dict[str, Tensor], file: Path) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    try:
        width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
        positions = state["embeddings.position_embedding"].shape[1] - 1
        inner = len(state["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise _lacking(file, error) from None
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_depth(state, "encoder.layers."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=round(positions**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # of timm's vision transformer, transformers' default is 1e-5
    )
    return _filled(BlipVisionModel(config), state, file)


def _text_model(parts: dict[str, dict[str, Tensor]], file: Path) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    state = parts["text"]
    told = read_json(file.parent / MED_CONFIG) if (file.parent / MED_CONFIG).is_file() else {}
    try:
        words, width = state["embeddings.word_embeddings.weight"].shape
        positions = len(state["embeddings.position_embeddings.weight"])
        inner = len(state["encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise _lacking(file, error) from None
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=parts["vision"]["embeddings.patch_embedding.weight"].shape[0],
        intermediate_size=inner,
        num_hidden_layers=_depth(state, "encoder.layer."),
        num_attention_heads=told.get("num_attention_heads", max(1, width // HEAD_WIDTH)),
        max_position_embeddings=positions,
        layer_norm_eps=told.get("layer_norm_eps", 1e-12),
        is_decoder=True,  # builds the cross-attention; `forward` stays bidirectional
    )
    return _filled(BlipTextModel(config, add_pooling_layer=False), state, file)


def _depth(state: dict[str, Tensor], blocks: str) -> int:
    return len(
        {name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)}
    )


def _filled(model: Any, state: dict[str, Tensor], file: Path) -> Any:
    return fill(model, state, file, "scorer imagereward", f"{FILE} was expected")


def _lacking(file: Path, error: KeyError) -> ModelError:
    return ModelError(f"scorer imagereward: {file} lacks {error}; {FILE} was expected")
