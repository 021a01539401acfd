"""Reading in threads, a few items before they are asked for, in order.

Reading is nothing but system calls that leave the interpreter's lock free, so threads do it: no
worker processes, no copies through shared memory, nothing to fork after CUDA has started.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

AHEAD = 4
"""Items that each thread may be ahead of the one that is asked for."""
PATIENCE = 10.0
"""Seconds that a process which ends waits for its reading threads: storage may hang."""

Drawn = TypeVar("Drawn")
Read = TypeVar("Read")


def read_ahead(
    read: Callable[[Drawn], Read], stream: Iterable[Drawn], *, threads: int, ahead: int = AHEAD
) -> Generator[Read, None, None]:
    """Yields what `read` returns for each item of a stream, in the stream's order.

    An exception in a thread is raised where its item is asked for. Close the generator (with
    `contextlib.closing`) where it may be left half-way, or its threads end when the garbage
    collector finds it.

    Args:
        read: Called in the threads.
        stream: Drawn from in the threads too, by one at a time: drawing may be slow.
        threads: How many read; 0 draws and reads in the caller's, when it asks.
        ahead: Items that each thread may be ahead.
    """
    if threads == 0:
        yield from map(read, stream)
        return
    items = _Threads(read, iter(stream), threads, ahead)
    try:
        while (future := items.next()) is not None:
            item = future.result()
            items.make_room()
            yield item
    finally:
        items.close()


class _Threads(Generic[Drawn, Read]):
    """Threads that take turns at drawing from a stream, and read what they drew."""

    def __init__(
        self, read: Callable[[Drawn], Read], stream: Iterator[Drawn], threads: int, ahead: int
    ) -> None:
        self._read, self._stream = read, stream
        self._turn, self._room = threading.Lock(), threading.Semaphore(ahead * threads)
        self._order: SimpleQueue[Future[Read] | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"read_{k}", daemon=True)
            for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def _run(self) -> None:
        while self._room.acquire() and not self._closed:
            future: Future[Read] = Future()
            with self._turn:
                try:
                    drawn = next(self._stream)
                except StopIteration:
                    self._order.put(None)
                    return
                except BaseException as error:
                    self._order.put(future)
                    future.set_exception(error)
                    return
                self._order.put(future)
            try:
                future.set_result(self._read(drawn))
            except BaseException as error:
                future.set_exception(error)

    def next(self) -> Future[Read] | None:
        """Returns the next item's future, None behind the last one."""
        return self._order.get()

    def make_room(self) -> None:
        """Lets the threads read one item more."""
        self._room.release()

    def close(self) -> None:
        """Ends the threads, each behind the item it reads; one that is stuck is left behind."""
        self._closed = True
        atexit.unregister(self.close)
        for _ in self._threads:
            self._room.release()
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
