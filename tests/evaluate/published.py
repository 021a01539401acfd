"""The networks of published scorers in plain torch, with the tensors' published names.

They are written from the papers' and the checkpoints' descriptions and share nothing with what they
are compared with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.testing.language_pipelines import chat_tokenizer


class Block(nn.Module):
    """A pre-norm transformer block under OpenCLIP's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width: int, heads: int, side: int, patch: int, joint: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads)
        self.proj = nn.Parameter(torch.randn(width, joint))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's `CLIP`: a vision transformer with heads of 16, a text transformer of one head."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual = Vision(32, 2, 16, 8, 12)
        self.transformer = Transformer(16, 1)
        self.token_embedding = nn.Embedding(words, 16)
        self.positional_embedding = nn.Parameter(torch.randn(20, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 12))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


def write_hps(folder: Path, name: str, words: int) -> OpenClip:
    """Writes a checkpoint as the authors of HPSv2 publish it: `{"state_dict": ...}`."""
    torch.manual_seed(3)
    model = OpenClip(words).eval()
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 1, "name": "tiny", "state_dict": model.state_dict()}, folder / name)
    told = {"model_cfg": {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 1}}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return model


class Attention(nn.Module):
    """timm's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(joined(nn.functional.scaled_dot_product_attention(q, k, v)))


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class VisionEncoder(nn.Module):
    """timm's vision transformer without a head: all tokens after the last norm."""

    def __init__(self, width: int, heads: int, side: int, patch: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList([VisionBlock(width, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertAttention(nn.Module):
    """BERT's attention with its output, under BERT's names; to the image where `seen` is wide."""

    def __init__(self, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.Module()
        self.self.query = nn.Linear(width, width)
        self.self.key, self.self.value = nn.Linear(seen, width), nn.Linear(seen, width)
        self.output = nn.Module()
        self.output.dense = nn.Linear(width, width)
        self.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, other: Tensor, keep: Tensor | None) -> Tensor:
        inner = self.self
        q, k, v = (
            split(t, self.heads) for t in (inner.query(x), inner.key(other), inner.value(other))
        )
        mask = None if keep is None else keep[:, None, None, :].bool()
        mixed = joined(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return self.output.LayerNorm(self.output.dense(mixed) + x)


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        self.crossattention = BertAttention(width, heads, seen)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(width, 2 * width)
        self.output.dense = nn.Linear(2 * width, width)
        self.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, keep: Tensor, seen: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, keep), seen, None)
        y = self.output.dense(nn.functional.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(y + x)


class TextEncoder(nn.Module):
    """BLIP's text encoder."""

    def __init__(self, words: int, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.position_embeddings = nn.Embedding(40, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(40).expand(1, -1))
        self.encoder.layer = nn.ModuleList([BertLayer(width, heads, seen) for _ in range(2)])

    def forward(self, tokens: Tensor, keep: Tensor, seen: Tensor) -> Tensor:
        places = self.embeddings.position_embeddings.weight[: tokens.shape[1]]
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(tokens) + places)
        for layer in self.encoder.layer:
            x = layer(x, keep, seen)
        return x


class ImageReward(nn.Module):
    """ImageReward's module: `blip` with its unused projections, and `mlp`."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder = VisionEncoder(128, 2, 32, 16)
        self.blip.text_encoder = TextEncoder(words, 48, 3, 128)
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(128, 8), nn.Linear(48, 8)
        self.mlp.layers = nn.Sequential(
            nn.Linear(48, 16), nn.Dropout(0.2), nn.Linear(16, 4), nn.Dropout(0.1), nn.Linear(4, 1)
        )

    def forward(self, pixels: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
        first = self.blip.text_encoder(tokens, keep, self.blip.visual_encoder(pixels))[:, 0]
        reward = self.mlp.layers(first)[:, 0]
        return (reward - 0.16717362830052426) / 1.0333394966054072


def write_image_reward(folder: Path) -> ImageReward:
    """Writes `ImageReward.pt`, `med_config.json` and a tokenizer of single letters."""
    torch.manual_seed(4)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    model = ImageReward(len(words) + 2).eval()  # [DEC] and [ENC] have rows of their own
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({"num_attention_heads": 3}))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def write_hps3(folder: Path) -> tuple[nn.Module, nn.Module, Any]:
    """Writes a tiny HPSv3: Qwen2-VL under the names of transformers 4.45, and its head.

    Returns:
        transformers' own network, the head, and the tokenizer without the reward's token.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tokenizer = chat_tokenizer()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder)
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"rope_parameters": sections, "bos_token_id": None, "eos_token_id": None},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image)
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config.text_config.vocab_size += 1
        network = Qwen2VLModel(config).eval()
        for weight in network.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.15)
        first = [nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16), nn.ReLU()]
        head = nn.Sequential(*first, nn.Linear(16, 2)).eval()
    state = {n.replace("language_model.", "model."): t for n, t in network.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    return network, head, tokenizer


def split(x: Tensor, heads: int) -> Tensor:
    """`(B, T, D)` to `(B, heads, T, D / heads)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `split`."""
    return x.transpose(1, 2).flatten(-2)
