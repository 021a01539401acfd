"""Synthetic minority labels: which pairs have winner and loser exchanged on purpose.

Whether a pair is flipped depends on its name and the seed alone, so the same pairs are flipped in
every epoch, process and run, and one cache serves every rate.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from fastpo.system.files import write_text


def is_flipped(pair_id: str, *, rate: float, seed: int) -> bool:
    """Tells whether the pair's label is exchanged.

    The first eight bytes of BLAKE2b over seed and name, read as a fraction of 2**64, are compared
    with the rate; a pair flipped at one rate is flipped at every higher one.

    Args:
        pair_id: The pair's stable name.
        rate: Expected share of flipped pairs, in [0, 1].
        seed: Chooses the flipped subset.
    """
    digest = hashlib.blake2b(f"{seed}:{pair_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2.0**64


def flip_mask_path(cache_dir: Path, *, rate: float, seed: int) -> Path:
    """Returns where the mask of one rate and seed stands."""
    return cache_dir / f"flips-rate{rate}-seed{seed}.csv"


def write_flip_mask(cache_dir: Path, pair_ids: Iterable[str], *, rate: float, seed: int) -> Path:
    """Writes which pairs are flipped as CSV (`pair_id,flipped`, flipped is 0 or 1).

    Args:
        cache_dir: Folder of the cache.
        pair_ids: Names in the cache's order.
        rate: As for `is_flipped`.
        seed: As for `is_flipped`.

    Returns:
        The file's path.
    """
    path = flip_mask_path(cache_dir, rate=rate, seed=seed)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["pair_id", "flipped"])
    writer.writerows((name, int(is_flipped(name, rate=rate, seed=seed))) for name in pair_ids)
    write_text(path, text.getvalue())
    return path
