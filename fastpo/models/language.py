"""Prompts as the states of language models: chats, padding, and what is cut of long ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def chats(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Puts each prompt into the model's chat as the user's message; see `enable_thinking`."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]


def count_longer(tokenizer: Any, texts: Sequence[str], length: int) -> int:
    """Returns how many texts have more tokens than `length`."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    return sum(len(own) > length for own in ids)


def padded(states: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pads texts with zeros behind their last token.

    Args:
        states: N texts, each `(L, D)` with `L <= length`.
        length: Tokens of a padded text.

    Returns:
        `(N, length, D)`, and `(N, length)` bool, true at the texts' own tokens.
    """
    own = torch.tensor([len(text) for text in states], device=states[0].device)
    mask = torch.arange(length, device=own.device) < own[:, None]
    return torch.stack([pad(text, (0, 0, 0, length - len(text))) for text in states]), mask


def longest(mask: Tensor) -> int:
    """Returns the length of the longest of some padded texts; waits for the device."""
    return int(mask.sum(dim=1).max())
