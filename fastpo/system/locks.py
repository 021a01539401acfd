"""Who works on what, through the file system alone.

Locks on single bytes of one file: they work over NFS and the parallel file systems, need no process
group, and the system frees them when a process dies. They only save double work: a part of the
cache is put in place by one rename, so two processes that made the same one do no harm. On a file
system without locks every lock is granted.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastpo.system.files import sweep

LOCK_FILE = ".claims"
_MANIFEST, _PRESENCE, _FIRST = 0, 1, 2
_PLAN = 1 << 48  # beyond the locks of all pieces of work


class FolderLocks:
    """This process's locks on one folder; at most one instance per process and folder.

    (The system drops all of a process's locks on a file when it closes any descriptor of it.)

    Attributes:
        supported: Whether the file system has locks, so that a lock granted is nobody else's.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder's lock file and makes this process's presence known."""
        self.supported = True
        self._folder = folder
        self._file = (folder / LOCK_FILE).open("a+b")
        self._lock(_PRESENCE, fcntl.LOCK_SH)

    def __enter__(self) -> FolderLocks:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Frees every lock."""
        self._file.close()

    def acquire(self, number: int) -> bool:
        """Tries to lock a piece of work; False if another process is at work on it."""
        return self._lock(_FIRST + number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, number: int) -> None:
        """Unlocks a piece of work."""
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
    def exclusive(self) -> Iterator[bool]:
        """Gives whether no other process has opened this folder, and keeps others waiting."""
        exclusive = self._lock(_PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield exclusive
        finally:
            self._lock(_PRESENCE, fcntl.LOCK_SH)

    def join(self) -> bool:
        """Makes known that this process works by the folder's plan; tells whether no other does.

        Call it with the manifest claimed. Where the file system has no locks, others may.
        """
        first = self._lock(_PLAN, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock(_PLAN, fcntl.LOCK_SH)
        return first and self.supported

    def idle(self) -> bool:
        """Tells whether no process works by the folder's plan, with which it may be changed.

        Call it with the manifest claimed, before `join`. Where the file system has no locks it is
        not known.
        """
        idle = self._lock(_PLAN, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if idle:
            self._lock(_PLAN, fcntl.LOCK_UN)
        return idle and self.supported

    def sweep(self) -> None:
        """Removes what killed processes of this host left, unless others have opened the folder."""
        with self.exclusive() as exclusive:
            if exclusive and self.supported:
                sweep(self._folder)

    def _lock(self, byte: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._file, kind, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.supported = False
        return True
