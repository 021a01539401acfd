"""One writer a folder: a second one is refused by name, a dead one's place is taken.

The lock is `.writer` in the folder: a lock of the operating system on the file (`flock`), which
ends with its process, and in the file who holds it. Where the file system keeps locks for all of
its hosts (NFS, Lustre with `flock`, GPFS, CephFS) the system's lock alone decides between live
processes. Some keep them for one host only, and some not at all; so

- a holder that the file names and that runs on another host is watched for `SILENCE` seconds before
  its place is taken: while it lives, it touches the file every `BEAT` seconds. Both times are
  measured by one clock, so clocks that differ do not matter. A holder that ended well has emptied
  the file, and a dead one on this host has lost the system's lock: then nobody waits.
- without the system's lock, a holder on this host is looked up by process number and start time.
  Two that take the same dead holder's place at once write their names, and the last one written
  stays; both look again after `SETTLE` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo.errors import BusyFolderError
from fastpo.system.alive import ProcessName, State
from fastpo.system.files import make_folder

LOCK_FILE = ".writer"
BEAT, SILENCE, SETTLE = 15.0, 90.0, 2.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Holder(BaseModel):
    """Who holds a lock.

    Attributes:
        host: The machine's name.
        space: Where the process's number counts, see `ProcessName`.
        pid: The process.
        started: When it began, see `ProcessName`.
        boot: The boot of the machine; empty if unknown.
        since: When it took the lock, as a person reads it.
        token: Tells this taking of the lock from every other.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    space: str = ""
    pid: int
    started: str
    boot: str
    since: str
    token: str

    def __str__(self) -> str:
        """Names it in a message."""
        return f"process {self.pid} on host {self.host} since {self.since}"

    def state(self) -> State:
        """Whether it still runs; `unknown` on another machine, or in another container of this."""
        if self.host == socket.gethostname() and self.boot != boot_id():
            return "ended"
        return ProcessName(self.host, self.space, self.pid, self.started).state()


@contextmanager
def sole_writer(folder: Path, *, tell: Callable[[str], None] = print) -> Iterator[WriterLock]:
    """Holds a folder's lock.

    Args:
        folder: What is written; it is made, and removed again if nothing was put there.
        tell: Is told why it takes long, where another host's holder is watched.

    Raises:
        BusyFolderError: Another process, or another call in this one, writes there.
        OSError: The lock's file cannot be opened or written.
    """
    made = not folder.is_dir()
    make_folder(folder)
    path = folder / LOCK_FILE
    while True:
        with path.open("a+b") as file:
            lock = WriterLock(folder, file.fileno())
            lock.take(tell)
            if not _is_at(file.fileno(), path):  # its last holder has just removed it
                lock.release()
                continue
            try:
                yield lock
            finally:
                if made and not any(entry != path for entry in folder.iterdir()):
                    with contextlib.suppress(OSError):
                        path.unlink()
                        folder.rmdir()
                lock.release()
            return


class WriterLock:
    """This process's hold on a folder; `sole_writer` makes it."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._file = folder, descriptor
        self._mine = Holder(
            **asdict(ProcessName.own()),
            boot=boot_id(),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            token=uuid.uuid4().hex,
        )
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="writer", daemon=True)

    def take(self, tell: Callable[[str], None]) -> None:
        """Takes the lock, or refuses; errors as `sole_writer`."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK, errno.EACCES):
                raise
            if error.errno not in _NO_LOCKS:
                raise self._busy(self._named()) from None
            locked = False
        before = self._read()
        if before is not None:
            self._check_dead(before, locked, tell)
        self._write(self._mine.model_dump_json().encode())
        if not locked:
            time.sleep(SETTLE)
            self.confirm()
        self._beats.start()

    def confirm(self) -> None:
        """Checks that nobody has taken this process for dead, as while it was stopped for long.

        Raises:
            BusyFolderError: Somebody has.
        """
        holder = self._read()
        if holder is None or holder.token != self._mine.token:
            raise self._busy(holder)

    def release(self) -> None:
        """Frees the folder."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()
        holder = self._read()
        if holder is not None and holder.token == self._mine.token:
            self._write(b"")
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _check_dead(self, holder: Holder, locked: bool, tell: Callable[[str], None]) -> None:
        """Refuses unless the holder that the file names is dead."""
        if holder.host == self._mine.host and locked:
            return  # the system has taken the lock from it
        state = holder.state()
        if state in ("running", "stopped"):
            raise self._busy(holder)
        if state == "ended":
            return
        tell(
            f"{self._folder} was being written by {holder}, and not left well: waiting {SILENCE:g} "
            "s for a sign of life"
        )
        beat, began = self._last_beat(), time.monotonic()
        while time.monotonic() - began < SILENCE:
            time.sleep(min(1.0, SILENCE / 4))
            if self._last_beat() != beat:
                raise self._busy(self._read() or holder)

    def _last_beat(self) -> tuple[int, Holder | None]:
        # NFS asks the server when a file is opened; of an open one it may answer from memory
        with (self._folder / LOCK_FILE).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, self._read()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _read(self) -> Holder | None:
        """Who the file names; None if nobody, or what it holds is torn."""
        try:
            return Holder.model_validate_json(os.pread(self._file, 1 << 12, 0))
        except ValidationError:
            return None

    def _named(self) -> Holder | None:
        """Who holds the system's lock; it writes its name right after it has taken it."""
        for _ in range(40):
            if (holder := self._read()) is not None:
                return holder
            time.sleep(0.05)
        return None

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.write(self._file, content)  # at its end, which is its beginning
        os.fsync(self._file)

    def _busy(self, holder: Holder | None) -> BusyFolderError:
        who = "another process" if holder is None else str(holder)
        return BusyFolderError(
            f"{self._folder} is being written by {who}: wait for it, or give another folder"
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def boot_id() -> str:
    """Returns what tells this boot of the machine from its others; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
