"""The sizes of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
    """Sizes of one micro-batch.

    Attributes:
        pairs: Pairs in it.
        height: Latent pixels.
        width: Latent pixels.
        vae_factor: Image pixels per latent pixel and side.
        tokens: Tokens of a prompt, in all of its chunks.
        chunks: How many chunks the text encoders take it in.
        source: Latent pixels, height and width, of an image that an edit begins from.
        sources: How many of them an edit begins from.
    """

    pairs: int
    height: int
    width: int
    vae_factor: int
    tokens: int
    chunks: int = 1
    source: tuple[int, int] | None = None
    sources: int = 1
