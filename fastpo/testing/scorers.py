"""A small stand-in for the CLIP models that scorers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpo.testing.pipelines import clip_tokenizer


def tiny_clip_folder(path: Path, *, seed: int = 0) -> Path:
    """Writes a CLIP of a few thousand random weights with its tokenizer and image processor.

    Args:
        path: Folder to create; an existing one is overwritten file by file.
        seed: Seed of the random weights; the caller's random state is left alone.

    Returns:
        `path`.
    """
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
    )

    tokenizer = clip_tokenizer()
    tower: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config = CLIPConfig(
        text_config=dict(
            **tower,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(**tower, image_size=16, patch_size=8),
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(path)
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(path)
    return path
