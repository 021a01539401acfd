"""Which pairs of a cache are one comparison: labeled again, or labeled both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastpo.data.cache.parts import DIGITS, PartRecord


@dataclass(frozen=True)
class Comparisons:
    """What is known of a cache's pairs by their prompt and their images' bytes.

    Attributes:
        again: `(N,)` bool, pairs whose prompt, winner and loser are those of an earlier one.
        contradicted: `(N,)` bool, one pair of each comparison (a prompt and two images) of which
            some pairs say that the one image won, and some the other.
        first: `(N,)` for each pair the first that compares the same; its own place, if none does.
    """

    again: np.ndarray
    contradicted: np.ndarray
    first: np.ndarray


def image_digests(records: Iterable[PartRecord]) -> np.ndarray | None:
    """Returns the digests of winner and loser by position in the source, `(pairs, 2)` uint64.

    None if a shard is of a version that kept none.
    """
    parts = []
    for record in records:
        pairs = record.span.stop - record.span.start
        if len(record.images) != 2 * DIGITS * pairs:
            return None
        parts.append(np.frombuffer(bytes.fromhex(record.images), ">u8").reshape(-1, 2))
    return np.concatenate(parts).astype(np.uint64) if parts else None


def find_comparisons(prompt: np.ndarray, images: np.ndarray) -> Comparisons:
    """Compares pairs with one another, in the time of a sort.

    Args:
        prompt: `(N,)` the number of each pair's prompt.
        images: `(N, 2)` digests of winner and loser.
    """
    turned = images[:, 0] > images[:, 1]
    low, high = images.min(axis=1), images.max(axis=1)
    order = np.lexsort((turned, high, low, prompt))  # equal ones stay in the pairs' order
    keys = np.stack([prompt.astype(np.uint64), low, high], axis=1)[order]
    same = np.concatenate([[False], (keys[1:] == keys[:-1]).all(axis=1)])[: len(order)]
    way = turned[order]
    changes = np.concatenate([[False], way[1:] != way[:-1]])[: len(order)]
    again = np.zeros(len(order), dtype=bool)
    again[order] = same & ~changes
    contradicted = np.zeros(len(order), dtype=bool)
    contradicted[order] = same & changes
    first = np.empty(len(order), dtype=np.int64)
    if len(order):
        smallest = np.minimum.reduceat(order, np.flatnonzero(~same))
        first[order] = smallest[np.cumsum(~same) - 1]
    return Comparisons(again, contradicted, first)
