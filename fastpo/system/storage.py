"""What the system says of a file that it cannot write or read, as one line that tells what to do.

Durable writes (`fastpo.system.files`) name the file they were to make. Every public function and
the command line convert what is left. A library's own exception is understood where it hides the
system's: safetensors tells the number in its text, torch its words, or only that a file came out
shorter than it should.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastpo.errors import FastPOError, StorageError

ANOTHER = "make room, or name another folder"
STORAGE = {
    errno.ENOSPC: f"the disk is full; {ANOTHER}",
    errno.EDQUOT: f"your quota on this file system is used up; {ANOTHER}",
    errno.EFBIG: "the file would exceed the size allowed (`ulimit -f`, or the file system's limit)",
    errno.EROFS: "the file system is read-only; name another folder, or mount it for writing",
    errno.EACCES: "permission denied; name another folder, or change its permissions",
    errno.EPERM: "not permitted; name another folder, or change its permissions",
    errno.EMFILE: "this process has too many files open; raise its limit (`ulimit -n`)",
    errno.ENFILE: "this machine has too many files open; close other programs",
    errno.EIO: "the device reports an input/output error; look into the system's log",
    errno.ESTALE: "the file server has lost its handle; mount it again",
    errno.ENOMEM: "this machine has no memory left for it; close other programs",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter folder",
    errno.ETIMEDOUT: "the file server does not answer; look after the network",
}
"""What concerns the place, not the program."""

_FOUND_OTHERWISE = {
    errno.ENOENT: "it does not exist (it was removed, or its folder was)",
    errno.ENOTDIR: "a part of its path is a file, where a folder is expected",
    errno.EISDIR: "it is a folder, where a file is expected",
    errno.EEXIST: "it exists already",
    errno.ENOTEMPTY: "a folder of its name exists and is not empty",
    errno.ELOOP: "its links lead in a circle",
    errno.EBUSY: "another program holds it",
}
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH = re.compile(
    r"inline_container\.cc:\d+\](?:.*strerror: (?P<words>.*))?|basic_ios::clear: iostream error"
)
_SHORT = 0
_CAME_SHORT = "a write came out short; the disk is probably full, or a quota is used up"


@contextmanager
def storage_errors(path: Path | None = None, *, anything: bool = True) -> Iterator[None]:
    """Raises what the system refuses as a `StorageError`; a decorator too.

    Args:
        path: What is written, where the exception does not name it.
        anything: Also what concerns names: a file missing, or there already.

    Raises:
        StorageError: The system refused to write or read; the text names the path, the cause, and
            what to do.
    """
    try:
        yield
    except Exception as error:
        told = explain(error, path, anything=anything)
        if told is None:
            raise
        raise told from error


def explain(
    error: Exception, path: Path | None = None, *, anything: bool = True
) -> StorageError | None:
    """Returns the one line for an exception, or None if it is not about storage.

    Args:
        error: What was raised.
        path: What was written, where the exception does not name it.
        anything: As in `storage_errors`.
    """
    number = _number(error)
    known = {_SHORT: _CAME_SHORT} | STORAGE | (_FOUND_OTHERWISE if anything else {})
    if isinstance(error, FastPOError) or number not in known:
        return None
    if isinstance(error, OSError):
        path = path_of(error) or path
    return StorageError(f"{path or 'a file'} cannot be written or read: {known[number]}", number)


def path_of(error: OSError) -> Path | None:
    """Returns the file that an exception names; of two, as in a rename, the target."""
    name = error.filename2 or error.filename
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None


def _number(error: Exception) -> int | None:
    """The system's number of an error; 0 where a file only came out short, None elsewhere."""
    if isinstance(error, OSError):
        return error.errno
    if match := _RUST.search(str(error)):
        return int(match[1])
    if match := _TORCH.search(str(error)):
        words = {os.strerror(number): number for number in errno.errorcode}
        return words.get((match["words"] or "").strip(), _SHORT)
    return None
