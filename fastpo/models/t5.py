"""Prompts as the states of T5, padded to one length, as diffusers' pipelines encode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.models.folder import ModelFolder, loading
from fastpo.models.weights import load_part


def load_t5(folder: ModelFolder, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads T5's encoder and its tokenizer.

    Args:
        folder: The pipeline.
        name: The encoder's component, such as `text_encoder_3`.
        dtype: Of its weights.

    Returns:
        The tokenizer and the encoder.

    Raises:
        ModelError: One of them cannot be loaded.
    """
    from transformers import T5EncoderModel, T5Tokenizer

    what = f"{folder.path / name} could not be loaded"
    encoder = load_part(T5EncoderModel, folder, name, what=what, dtype=dtype)
    part = folder.path / name.replace("text_encoder", "tokenizer")
    with loading(f"{part} could not be loaded"):
        tokenizer = T5Tokenizer.from_pretrained(part)
    return tokenizer, encoder


def t5_states(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    """The last layer's states `(N, length, D)`; what is longer is cut.

    No mask is given, as in the pipelines of SD3 and FLUX.1: the states of the padding depend on
    the prompt and are part of what the transformer sees.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    return encoder(tokens["input_ids"].to(encoder.device))[0]


def t5_cut(tokenizer: Any, prompts: Sequence[str], length: int) -> int:
    """Returns how many prompts have more tokens than `length`, T5's end token among them."""
    ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    return sum(len(own) > length for own in ids)
