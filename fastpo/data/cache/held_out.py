"""Which pairs are held out of training, to measure on them what it has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def is_held_out(name: str, share: float) -> bool:
    """Tells whether what has this name is held out.

    The first eight bytes of BLAKE2b over `held out:` and the name, read as a fraction of 2**64, are
    compared with the share. So the answer is the same in every run, process and order of the data;
    data that grow leave it as it is, and what one share holds out every greater one does.

    Args:
        name: A pair's stable name, or a prompt.
        share: Expected share, in [0, 1].
    """
    digest = hashlib.blake2b(f"held out:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def held_out_mask(names: Iterable[str], share: float, count: int) -> Tensor:
    """Returns `(count,)` bool, `is_held_out` of each name."""
    if not share:
        return torch.zeros(count, dtype=torch.bool)
    held = (is_held_out(name, share) for name in names)
    return torch.from_numpy(np.fromiter(held, dtype=bool, count=count))
