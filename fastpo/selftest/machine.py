"""What a folder's disk and file system do with what is written to them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastpo.selftest.child import Tell, call
from fastpo.system.checksums import checksum
from fastpo.system.files import flush, write_bytes
from fastpo.system.locks import FolderLocks

_MEGABYTES = 256


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        what: What was tried.
        found: What came of it.
        good: Whether FastPO can rely on it.
    """

    what: str
    found: str
    good: bool = True


def check_machine(folder: Path) -> list[Finding]:
    """Tries what FastPO relies on, in a folder that is there for nothing else.

    Raises:
        OSError: Nothing can be written there.
    """
    return [*_read_back(folder), *_flushes(folder), *_locks(folder)]


def _read_back(folder: Path) -> Iterator[Finding]:
    """Writes random bytes, drops them from memory as far as the system does, and reads them."""
    file, block = folder / "random", os.urandom(1 << 20)
    with file.open("wb") as stream:
        for _ in range(_MEGABYTES):
            stream.write(block)
    before = checksum(file)
    flush(file)
    began = time.monotonic()
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    same = checksum(file) == before
    rate = _MEGABYTES / 1024 / (time.monotonic() - began)
    found = f"equal, {rate:.1f} GB/s with its checksum" if same else "differs"
    yield Finding(f"{_MEGABYTES} MB written, flushed and read back", found, same)


def _flushes(folder: Path) -> Iterator[Finding]:
    took = []
    for number in range(20):
        began = time.monotonic()
        write_bytes(folder / "small", str(number).encode())
        took.append(time.monotonic() - began)
    same = (folder / "small").read_bytes() == b"19"
    found = f"{1000 * statistics.median(took):.1f} ms each (median)"
    yield Finding("20 small durable writes over one another", found if same else "differs", same)


def _locks(folder: Path) -> Iterator[Finding]:
    with FolderLocks(folder) as locks:
        if not (locks.acquire(0) and locks.supported):
            found = "not supported here: prepare on several processes may do work twice"
            yield Finding("locks between processes", found)
            return
        other = call(_acquire, folder).last("acquired", -1)
    found = {0: "held", 1: "two processes got the same one"}.get(other, "the second process failed")
    yield Finding("locks between processes", found, other == 0)


def _acquire(tell: Tell, folder: Path) -> None:
    with FolderLocks(folder) as locks:
        tell("acquired", int(locks.acquire(0)))
