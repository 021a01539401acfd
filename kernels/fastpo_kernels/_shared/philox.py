"""Counter-based noise in plain PyTorch: any element is computable alone, on any device.

Every number is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) of a counter and a key made from what the number is *for*, never from what was drawn
before:

    key     = (seed, stream)
    counter = (element // 4, visit, pair_key mod 2^32, pair_key div 2^32)

so neither the batch's make-up nor the number of processes changes it. Integers are exact
everywhere; normals agree between devices to the rounding of `log`, `sqrt`, `sin` and `cos`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
MAX_SEED = 2**32 - 1


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    NOISE = 0
    TIMESTEP = 1
    POSTERIOR_WINNER = 2
    POSTERIOR_LOSER = 3
    EMPTY_PROMPT = 4
    BACKWARD = 5


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32 with ten rounds.

    Args:
        counter: Four broadcastable int64 tensors (or ints) with values in [0, 2^32).
        key: Two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c) for c in counter))
    k0, k1 = key
    for _ in range(10):
        # The products wrap around 2^64 as signed integers; masking gives back the unsigned halves.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = (product_b >> 32 & _MASK) ^ c1 ^ k0, (product_a >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = product_b & _MASK, product_a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def pair_bits(
    pair_key: Tensor, visit: Tensor, blocks: int, *, seed: int, stream: int = Stream.NOISE
) -> Tensor:
    """Draws `4 * blocks` 32-bit integers per pair.

    Args:
        pair_key: `(B,)` int64 in [0, 2^63), names the pair.
        visit: `(B,)` int64 in [0, 2^32), how often the pair was drawn before.
        blocks: Number of Philox blocks per pair.
        seed: The run's seed in [0, 2^32).
        stream: What the draw is for, see `Stream`.

    Returns:
        `(B, 4 * blocks)` int64 with values in [0, 2^32).

    Raises:
        ValueError: The seed is out of range or the two vectors do not match.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in [0, 2^32), got {seed}")
    if pair_key.shape != visit.shape or pair_key.ndim != 1:
        raise ValueError(
            f"pair_key and visit must be vectors of one length, got {tuple(pair_key.shape)} "
            f"and {tuple(visit.shape)}"
        )
    # The mask changes no value. Inductor would multiply a plain range in its 32-bit indices.
    block = torch.arange(blocks, device=pair_key.device) & _MASK
    key, visit = pair_key[:, None], visit[:, None]
    words = philox((block, visit, key & _MASK, key >> 32), (seed, int(stream)))
    return torch.stack(words, dim=-1).flatten(1)


def pair_uniform(
    pair_key: Tensor, visit: Tensor, *, seed: int, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One uniform number in [0, 1) per pair, a multiple of 2^-24; `(B,)` of `dtype`."""
    word = pair_bits(pair_key, visit, 1, seed=seed, stream=stream)[:, 0]
    return (word >> 8).to(dtype) * 2.0**-24


def pair_integers(
    pair_key: Tensor, visit: Tensor, *, low: int, high: int, seed: int, stream: int
) -> Tensor:
    """One integer in [low, high) per pair, `(B,)` int64: `low + floor(word * (high - low) / 2^32)`.

    The bias against a uniform draw is below `(high - low) / 2^32`.
    """
    word = pair_bits(pair_key, visit, 1, seed=seed, stream=stream)[:, 0]
    return low + (word * (high - low) >> 32)


def pair_normal(
    pair_key: Tensor,
    visit: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    stream: int = Stream.NOISE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals for each pair, by Box and Muller's transform.

    Words `(a, b)` of a block give `r cos(2 pi v)` and `r sin(2 pi v)` where
    `u = (a div 2^8 + 1) 2^-24`, `v = (b div 2^8) 2^-24` and `r = sqrt(-2 ln u)`; so no value
    exceeds sqrt(48 ln 2) = 5.77.

    Args:
        pair_key: `(B,)` int64.
        visit: `(B,)` int64.
        shape: Shape of one sample.
        seed: The run's seed in [0, 2^32).
        stream: What the draw is for, see `Stream`.
        dtype: float32 or float64, of the arithmetic and of the result.

    Returns:
        `(B, *shape)` of `dtype`; element i in row-major order depends on block `i // 4` only.
    """
    count = math.prod(shape)
    bits = pair_bits(pair_key, visit, -(-count // 4), seed=seed, stream=stream)
    unit = (bits >> 8).to(dtype) * 2.0**-24
    u, v = unit[:, 0::2] + 2.0**-24, unit[:, 1::2]
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), (2.0 * math.pi) * v
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normals.flatten(1)[:, :count].reshape(-1, *shape)
