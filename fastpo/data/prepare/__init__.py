"""Encodes every image and prompt once: data set -> cache."""

from fastpo.data.prepare.latents import prepare

__all__ = [
    "prepare",
]
