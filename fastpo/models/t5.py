"""Prompts as the states of T5, padded to one length, as diffusers' pipelines encode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.models.encoders import load_encoder, load_tokenizer
from fastpo.models.folder import ModelFolder


def load_t5(folder: ModelFolder, name: str, dtype: torch.dtype) -> Any:
    """As `fastpo.models.encoders.load_encoder`, of T5's encoder."""
    from transformers import T5EncoderModel

    return load_encoder(folder, name, T5EncoderModel, dtype)


def load_t5_tokenizer(folder: ModelFolder, name: str) -> Any:
    """As `fastpo.models.encoders.load_tokenizer`, of T5's."""
    from transformers import T5Tokenizer

    return load_tokenizer(folder, name, T5Tokenizer)


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
