"""How processes of any number of launches and machines share work through a folder's locks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from fastpo.system.locks import FolderLocks
from fastpo.system.process import Rank

POLL_SECONDS = 0.5
"""How long to wait between two looks at items that other processes are working on."""

Item = TypeVar("Item")


def share_work(
    items: Mapping[int, Item], locks: FolderLocks, do: Callable[[Item], None], *, process: Rank
) -> None:
    """Does each item that no other process is at work on, and waits for the others.

    The processes of a launch begin at different items and help with what is left. An item whose
    process was killed is done by another one.

    Args:
        items: The work, in order, by the number of each item's lock; the same in every process.
        locks: The locks of the folder in which the results appear.
        do: Does one item, unless its result exists; called once for each, under its lock.
        process: Chooses the item to begin with.
    """
    numbers = list(items)
    first = process.rank * len(numbers) // process.world_size
    left = numbers[first:] + numbers[:first]
    while left:
        busy = [number for number in left if not _try(number, items[number], locks, do)]
        if len(busy) == len(left):
            time.sleep(POLL_SECONDS)
        left = busy


def _try(number: int, item: Item, locks: FolderLocks, do: Callable[[Item], None]) -> bool:
    """Does an item under its lock; False if another process holds it."""
    if not locks.acquire(number):
        return False
    try:
        do(item)
    finally:
        locks.release(number)
    return True
