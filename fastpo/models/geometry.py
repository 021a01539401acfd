"""The image sizes that training sees: aspect-ratio buckets in steps that the model can halve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError, ModelError

MAX_ASPECT = 2.0
"""Longest side over shortest side of the most extreme bucket."""

GEOMETRY_VERSION = 1
"""Part of the cache's identity: raise it when buckets, resampling or crops change."""

MOST_LEVELS = 10


@dataclass(frozen=True)
class Geometry:
    """The image sizes that training sees.

    Attributes:
        resolution: Side of the square bucket in pixels.
        step: Every bucket side is a multiple of it.
        buckets: `(height, width)` in pixels, all of about `resolution`² pixels.
    """

    resolution: int
    step: int
    buckets: tuple[tuple[int, int], ...]

    def bucket_for(self, aspect: float) -> tuple[int, int]:
        """Returns the bucket nearest to an aspect ratio (width / height) in its logarithm."""
        return min(self.buckets, key=lambda b: (abs(math.log(b[1] / b[0] / aspect)), b))

    def __str__(self) -> str:
        """Returns the rule as it enters the cache's identity."""
        return f"v{GEOMETRY_VERSION}, {len(self.buckets)} bucket(s) in steps of {self.step} px"


def make_geometry(
    resolution: int,
    *,
    use_buckets: bool,
    vae_factor: int,
    denoiser_factor: int,
    denoiser: str = "denoiser",
) -> Geometry:
    """Chooses the step and lists the buckets.

    Sides are multiples of eight latent pixels (64 px for the real models) if the resolution spans
    at least eight such steps; below that, of what VAE and denoiser need.

    Args:
        resolution: Side of the square bucket in pixels.
        use_buckets: False leaves the square only.
        vae_factor: Image pixels per latent pixel.
        denoiser_factor: What the denoiser needs latent sides to be multiples of.
        denoiser: The denoiser in messages.

    Raises:
        ConfigError: The resolution is not a multiple of the smallest possible step.
    """
    smallest = vae_factor * denoiser_factor
    if resolution % smallest:
        raise ConfigError(
            f"prepare.resolution: {resolution} is not a multiple of {smallest} px, which this "
            f"model's VAE (factor {vae_factor}) and {denoiser} (factor {denoiser_factor}) need"
        )
    preferred = math.lcm(8 * vae_factor, smallest)
    fits = resolution % preferred == 0 and resolution >= 8 * preferred
    step = preferred if fits else smallest
    square = (resolution, resolution)
    if not use_buckets:
        return Geometry(resolution, step, (square,))
    found = {square}
    for height in range(step, resolution, step):
        width = round(resolution**2 / height / step) * step
        if width / height <= MAX_ASPECT + 0.05:
            found |= {(height, width), (width, height)}
    return Geometry(resolution, step, tuple(sorted(found)))


def halvings(config: Mapping[str, Any], part: str) -> int:
    """Returns by how much a UNet or VAE reduces a side: 2 for each level but the first.

    Raises:
        ModelError: Its configuration does not list its levels.
    """
    levels = config.get("block_out_channels")
    if not isinstance(levels, list) or not 0 < len(levels) <= MOST_LEVELS:
        raise ModelError(
            f"block_out_channels of {part} must be a list of 1 to {MOST_LEVELS} sizes, got "
            f"{ascii(levels)[:80]}"
        )
    return 2 ** (len(levels) - 1)
