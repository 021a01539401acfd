"""Tiny text encoders with tokenizers, made from the captions alone: two of CLIP, and T5."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_LENGTH = 16  # tokens, both ends counted; the longest caption has 9
WIDTH = 32
END_OF_WORD = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: Sequence[str], length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Learns merges until each word of the captions is one token; other text falls to bytes.

    Args:
        captions: What is learned from.
        length: To which texts are padded.
    """
    import json

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    learner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=bytes_,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(list(captions), trainer)
    model = json.loads(learner.to_str())["model"]
    tokens = [*bytes_, *(byte + END_OF_WORD for byte in bytes_)]
    tokens += sorted(set(model["vocab"]) - set(tokens), key=model["vocab"].__getitem__)
    vocab = {token: index for index, token in enumerate([*tokens, BEGIN, END])}
    merges: Any = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build_text_encoders(
    tokenizer: CLIPTokenizer,
    kinds: Sequence[Any] = (CLIPTextModel, CLIPTextModelWithProjection),
    width: int = WIDTH,
) -> list[Any]:
    """Returns CLIP encoders as drawn from torch's generator; they are used as they are drawn.

    CLIP draws its embeddings with a deviation of 0.02, for a long training to spread out; words
    that are never trained must differ from the start, so here the embeddings have unit size.
    """
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = CLIPTextConfig(
        **special,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    encoders = [kind(config) for kind in kinds]
    for encoder in encoders:
        embeddings: Any = encoder.get_input_embeddings()
        torch.nn.init.normal_(embeddings.weight)
        encoder.eval().requires_grad_(False)
    return encoders


def build_word_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """Makes T5's tokenizer with a token for each word of the captions, and for each letter."""
    words = {"▁" + word for caption in captions for word in re.findall(r"\w+", caption.lower())}
    letters = sorted({letter for caption in captions for letter in caption if letter != " "})
    vocab: Any = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(letter, -8.0) for letter in letters] + [(word, -1.0) for word in sorted(words)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_LENGTH)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Returns T5's encoder as drawn from torch's generator, as wide as both of CLIP's together."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * WIDTH,
        d_kv=WIDTH // 2,
        d_ff=4 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Returns `(N, MAX_LENGTH)` int64 tokens of the texts, padded or cut, as pipelines do."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode(
    tokenizer: CLIPTokenizer,
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    captions: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Returns `(N, L, 2D)` states and `(N, D)` pooled states, put together as SDXL does."""
    ids = tokenize(tokenizer, captions)
    one = first(ids, output_hidden_states=True)
    two = second(ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds
