"""Faults that pass by themselves: tried again a few times with growing waits, then given up."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

WAITS = (0.1, 0.5, 2.0, 8.0)
"""Seconds before the second, third, ... try."""
_TRANSIENT = frozenset(
    (
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EBUSY,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
    )
)

Result = TypeVar("Result")


def _sleep(seconds: float) -> None:
    """Waits; tests put a function here that does not."""
    time.sleep(seconds)


def retrying(act: Callable[[], Result]) -> Result:
    """Calls `act`, again after each of `WAITS` while it fails by a fault that may pass.

    Raises:
        BaseException: What `act` raises: the last time, or when it is no such fault.
    """
    for wait in WAITS:
        try:
            return act()
        except Exception as error:
            if not is_transient(error):
                raise
        _sleep(wait)
    return act()


def is_transient(error: BaseException) -> bool:
    """Tells whether an error is of the machine and may pass: of a disk, descriptors, memory."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT
    return is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory was wanting, of the host or of a GPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # who did not import it has no such error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
