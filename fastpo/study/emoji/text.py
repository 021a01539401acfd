"""Prompts from names, and the base's text encoder, made from the prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastpo.demo.text import MAX_LENGTH
from fastpo.errors import DataError

WIDTH = 64
TEMPLATES = ("an emoji of a {}", "a small picture of a {}", "{}")


def prompts_of(names: Sequence[str]) -> list[str]:
    """Returns every name in every wording, wording by wording."""
    return [template.format(name) for template in TEMPLATES for name in names]


def name_of(prompt: str, names: Sequence[str]) -> int:
    """Returns the index of the name that a prompt ends with: the longest that fits.

    Raises:
        DataError: It ends with none of the names.
    """
    fitting = [k for k, name in enumerate(names) if f" {prompt.lower()}".endswith(f" {name}")]
    if not fitting:
        raise DataError(f"the prompt ends with none of the {len(names)} emoji names: {prompt!r}")
    return max(fitting, key=lambda k: len(names[k]))


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns a CLIP text encoder as drawn from torch's generator; it is used as it is drawn.

    The embeddings have unit size, so that words differ though nothing trains them.
    """
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(
        **special,
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
    )
    encoder = CLIPTextModel(config)
    embeddings: Any = encoder.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Returns `(N, L, D)` states, as SD1.5 reads them."""
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(ids).last_hidden_state
