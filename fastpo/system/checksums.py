"""Checksums that find wrong bytes: XXH3 with 128 bits, about 10 GB/s on one core.

They find what disks, memory and networks do to a file, not what an attacker does. A folder's
checksums are a mapping from each file's path in the folder to its `Checksum`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

_BLOCK = 1 << 22


class Checksum(BaseModel):
    """Size and checksum of one file.

    Attributes:
        bytes: Its size.
        xxh3: XXH3 of its content, 128 bits as 32 hexadecimal digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    xxh3: str


def checksum(path: Path) -> Checksum:
    """Reads a file once, and returns its checksum.

    Raises:
        OSError: It cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Checksum(bytes=size, xxh3=digest.hexdigest())


def checksum_of(content: bytes) -> Checksum:
    """Returns the checksum of bytes in memory."""
    return Checksum(bytes=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))


def forget(path: Path) -> None:
    """Drops the system's copy of a flushed file, so that the next read comes from the disk.

    Does nothing where the system has no such call, or the file cannot be opened.
    """
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def folder_checksums(folder: Path) -> dict[str, Checksum]:
    """Returns the checksums of all files below a folder, by their path in it.

    Raises:
        OSError: One cannot be read.
    """
    return {
        file.relative_to(folder).as_posix(): checksum(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def first_difference(folder: Path, recorded: Mapping[str, Checksum]) -> str | None:
    """Compares a folder's files with their recorded checksums; sizes first, which cost nothing.

    Files that were not recorded are not looked at.

    Returns:
        What is wrong with the first file that differs, with its path; None if all are as recorded.
    """
    for name, expected in recorded.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            return f"{folder / name} is missing ({error.strerror})"
        if size != expected.bytes:
            return f"{folder / name} has {size} bytes, expected {expected.bytes}"
    for name, expected in recorded.items():
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if found != expected:
            return (
                f"{folder / name} is damaged: its checksum is {found.xxh3[:12]}, "
                f"expected {expected.xxh3[:12]}"
            )
    return None
