"""What lanes of a warp do together: `shfl.sync`, and whose rows `ldmatrix` loads."""

from __future__ import annotations

import numpy as np

from .errors import Unreached


def shuffled(
    mode: str, values: np.ndarray, by: np.ndarray, clamp: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of whole warps, `[warps, 32]`: the values fetched, and whether each source was in range.

    Raises:
        Unreached: The members are not all of the warp, as everything here supposes.
    """
    if (members != 0xFFFFFFFF).any():
        raise Unreached("a shuffle among some lanes of a warp, executed by all")
    lane = np.arange(32)
    if (by == by[0, 0]).all() and (clamp == clamp[0, 0]).all():  # mostly constants: one row of all
        by, clamp = by[:1, :1], clamp[:1, :1]
    by, clamp = by.astype(np.int64), clamp.astype(np.int64)
    segment = clamp >> 8 & 31
    largest = (lane & segment) | (clamp & 31 & ~segment)
    smallest = lane & segment
    if mode == "up":
        source = lane - (by & 31)
        found = source >= largest
    elif mode == "down":
        source = lane + (by & 31)
        found = source <= largest
    elif mode == "bfly":
        source = lane ^ (by & 31)
        found = source <= largest
    else:
        source = smallest | (by & 31 & ~segment)
        found = source <= largest
    at = np.where(found, source, lane)
    if len(at) == 1:
        return values[:, at[0]], np.broadcast_to(found, values.shape)
    return np.take_along_axis(values, at, 1), found


def row_addresses(addresses: np.ndarray, which: int) -> np.ndarray:
    """Where each lane of whole warps, `[warps, 32]`, loads its four bytes of one 8 x 8 matrix.

    The rows of matrix k are at the addresses of lanes 8 k to 8 k + 7; four lanes share a row.
    """
    lane = np.arange(32)
    return addresses[:, 8 * which + lane // 4] + (lane % 4 * 4).astype(addresses.dtype)
