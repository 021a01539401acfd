"""Who works on what, through the file system alone.

Locks on single bytes of one file: they work over NFS and the parallel file systems, need no process
group, and the system frees them when a process dies. They only save double work: a part of the
cache is put in place by one rename, so two processes that made the same one do no harm. On a file
system without locks every claim is granted.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIMS = ".claims"
_MANIFEST, _PRESENCE, _FIRST = 0, 1, 2


class Claims:
    """This process's locks on one cache folder; at most one instance per process and folder.

    (The system drops all of a process's locks on a file when it closes any descriptor of it.)

    Attributes:
        locks: Whether the file system has locks, so that a claim granted is nobody else's.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder's lock file and makes this process's presence known."""
        self.locks = True
        self._file = (folder / CLAIMS).open("a+b")
        self._lock(_PRESENCE, fcntl.LOCK_SH)

    def __enter__(self) -> Claims:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Frees every lock."""
        self._file.close()

    def take(self, number: int) -> bool:
        """Tries to claim a part of the cache; False if another process is at work on it."""
        return self._lock(_FIRST + number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def give_back(self, number: int) -> None:
        """Frees a claim."""
        self._lock(_FIRST + number, fcntl.LOCK_UN)

    @contextmanager
    def manifest(self) -> Iterator[None]:
        """Waits for, and holds, the right to read and change the manifest."""
        self._lock(_MANIFEST, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(_MANIFEST, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Gives whether no other process is preparing this folder, and keeps others waiting."""
        alone = self._lock(_PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield alone
        finally:
            self._lock(_PRESENCE, fcntl.LOCK_SH)

    def _lock(self, byte: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._file, kind, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.locks = False
        return True
