"""Names the process of a run that hangs or has ended, and ends the others.

One process waits for another in every step, so when one stops all stop. Each process tells the
others every two seconds where it stands, through the process group's store, and looks at where they
stand. It ends, with one line that names the culprit and with exit code 76, when

* a process of its machine is gone (killed, out of host memory): within seconds, on every machine;
* a process has stopped with an error of its own: after ten seconds, since all may raise the same;
* a process has given no sign of life for `train.hang_timeout` seconds (it was stopped, or its
  machine is lost), while this one has made no progress for as long;
* this process has made no progress for that time, and the one furthest behind has not either.

What may take long has six times as long: starting, loading, the first step (and every step with
`train.compile`, which compiles anew for another shape of images), saving, exporting, the work of
observers. A step's progress is counted at every micro-batch, which must arrive within the time
limit: raise `train.hang_timeout` where storage may stall for longer. Time in which this process
itself was stopped does not count, so a whole job may be suspended and continued. A program that
keeps Python's lock for longer than the time limit would be taken for one that was stopped.

A single process has no heartbeat.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from fastpo.errors import FastPOError, LostProcessError
from fastpo.system.alive import ProcessName
from fastpo.train.progress import Progress
from fastpo.train.watch import INTERVAL, PATIENCE, Beat, Watch

_GRACE = 10.0  # seconds
_COMMUNICATION = re.compile(r"gloo|nccl|process ?group|c10d|connection", re.IGNORECASE)


def collective_limit(hang_timeout: float) -> timedelta:
    """The time limit of collectives: longer than the heartbeat's, which says who is missing.

    At least ten minutes, since the same limit holds for the processes to come together.
    """
    return timedelta(seconds=max(600.0, (PATIENCE + 1) * hang_timeout))


def is_communication(error: BaseException) -> bool:
    """Whether an exception says that a collective or the store has failed."""
    if isinstance(error, distributed.DistError):
        return True
    return type(error) is RuntimeError and _COMMUNICATION.search(str(error)) is not None


class Heartbeat:
    """Two threads beside the training: one talks to the store, the other one watches.

    The one that talks may block for ever: torch waits without a limit for a store whose process is
    stopped. So the other one touches no store.

    Args:
        progress: Where this process stands.
        rank: Its number.
        count: Number of processes.
        number: Which run of this process group it is, the same on all.
        timeout: `train.hang_timeout`, in seconds.
    """

    def __init__(
        self, progress: Progress, *, rank: int, count: int, number: int, timeout: float
    ) -> None:
        self._progress, self._rank, self._count = progress, rank, count
        shared: Any = _get_default_store()  # torch's stubs do not list `clone`
        store = shared.clone()  # a connection of its own
        self._store = distributed.PrefixStore(f"fastpo/heartbeat/{number}", store)
        self._interval = max(min(INTERVAL, timeout / 10), count / 32)
        self._grace = min(_GRACE, timeout)
        self._mine = Beat(0, ProcessName.own(), progress.place)
        self._watch = Watch(
            self._mine,
            rank=rank,
            count=count,
            timeout=timeout,
            now=time.monotonic(),
            interval=self._interval,
        )
        self._lock = threading.Lock()  # around `_watch`
        self._left: str | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._first_left = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._observe, name="watch", daemon=True)

    def start(self) -> None:
        """Starts the threads."""
        self._talker.start()
        self._watcher.start()

    def leave(self, why: str = "") -> None:
        """Tells the others that this process leaves, and ends the threads.

        Args:
            why: The error that stops it; empty at the end of the run.
        """
        self._stop.set()
        self._tell(why)

    def wait_for_first(self) -> None:
        """Waits, ten seconds at most, until rank 0 leaves: a launcher ends it with the others."""
        if self._rank > 0:
            self._first_left.wait(_GRACE)

    def blamed(self) -> str | None:
        """Says which process has ended or stopped, when a collective has failed here."""
        end = time.monotonic() + self._grace
        text = None
        while text is None and time.monotonic() < end and not self._stop.wait(self._interval / 4):
            with self._lock:
                self._watch.look(time.monotonic())
                text = self._watch.lost(time.monotonic(), grace=0.0)
        return text

    def _tell(self, why: str) -> None:
        self._left = why
        self._wake.set()
        self._talker.join(2 * self._interval)
        if why and self._rank == 0:
            # The store may end with this process; the others read first why it stops.
            time.sleep(1.5 * self._interval)

    def _talk(self) -> None:
        keys, complete = [str(rank) for rank in range(self._count)], False
        for number in itertools.count(1):
            left = self._left
            with self._lock:
                gone = tuple(self._watch.gone)
            beat = Beat(number, self._mine.name, self._progress.place, left, gone)
            try:
                self._store.set(str(self._rank), beat.pack())
                complete = complete or self._store.check(keys)
                self._take(self._store.multi_get(keys) if complete else [])
            except distributed.DistError:
                with self._lock:
                    self._watch.store_is_lost = True
                return
            if left is not None:
                return
            # Soon, until all have come: one that ends before it was seen could not be named.
            self._wake.wait(self._interval if complete else self._interval / 20)

    def _take(self, texts: list[bytes]) -> None:
        beats = [Beat.unpack(text) for text in texts]
        with self._lock:
            self._watch.see(beats, time.monotonic())
        if beats and beats[0].left is not None:
            self._first_left.set()

    def _observe(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            with self._lock:
                if now - last > 3 * self._interval:
                    self._watch.forgive(now - last)
                last = now
                self._watch.move(self._progress.place, now)
                self._watch.look(now)
                text = self._watch.lost(now, grace=self._grace) or self._watch.hung(now)
            if text is not None and not self._stop.is_set():
                self._tell(text)
                _end(text)


def _end(text: str) -> None:
    """Ends the process from a thread, for the main one may wait for ever."""
    line = f"error: {LostProcessError(text)}\n"
    with suppress(OSError):
        os.write(2, line.encode())
    os._exit(LostProcessError.exit_code)


_runs = itertools.count()


@contextmanager
def beating(progress: Progress, *, rank: int, count: int, timeout: float) -> Iterator[None]:
    """Runs the heartbeat of a run around a block; nothing with one process.

    Args:
        progress: Where this process stands.
        rank: Its number.
        count: Number of processes.
        timeout: `train.hang_timeout`, in seconds.

    Raises:
        LostProcessError: A collective failed; the text names the process that has ended.
    """
    number = next(_runs)  # runs that follow one another in one process group
    if count == 1:
        yield
        return
    heartbeat = Heartbeat(progress, rank=rank, count=count, number=number, timeout=timeout)
    heartbeat.start()
    try:
        yield
    except BaseException as error:
        if not is_communication(error):
            if isinstance(error, FastPOError) and error.everywhere:
                heartbeat.wait_for_first()
            heartbeat.leave(_first_line(error))
            raise
        text = heartbeat.blamed() or f"a collective failed: {_first_line(error)}"
        heartbeat.leave(text)
        raise LostProcessError(text) from error
    heartbeat.leave()


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, FastPOError) else f"{type(error).__name__}: {text}".strip(": ")
