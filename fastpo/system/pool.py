"""Processes that do jobs, such as runs of a study, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol

from fastpo.errors import FastPOError
from fastpo.system.library_log import add_waiting, kept_apart, shows_messages, take_waiting
from fastpo.system.storage import storage_errors

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
Job = Callable[..., str | None]
whole_life = ExitStack()
"""What a process that does jobs has entered and leaves when it ends."""


class Workers(Protocol):
    """Does a job on each of several lists of arguments."""

    def __call__(
        self, job: Job, items: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, str | None]]:
        """Yields the number of each item that is done, as they end, with what failed or None."""
        ...


def told(job: Callable[..., None]) -> Job:
    """Lets a job return a user error's text: its exception may not pass between processes."""

    @wraps(job)
    def call(*arguments: object) -> str | None:
        try:
            with storage_errors():
                job(*arguments)
        except FastPOError as error:
            return str(error)
        return None

    return call


@contextmanager
def workers(processes: int) -> Iterator[Workers]:
    """Gives what does jobs in processes; with one process, in this one.

    If the block ends by an exception, or by a signal, the processes are asked to end: a run that
    is being trained saves its state first.
    """
    import torch

    if processes == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield _here
        finally:
            torch.set_num_threads(before)
        return
    others = set(multiprocessing.active_children())
    with _one_thread():
        pool = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(shows_messages(),),
        )

        def there(job: Job, items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, str | None]]:
            numbers = {pool.submit(_done, job, *item): n for n, item in enumerate(items)}
            for future in as_completed(numbers):
                failure, warnings_ = future.result()
                add_waiting(warnings_)
                yield numbers[future], failure

        try:
            yield there
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(shown: bool | None) -> None:
    """Starts a process: one thread, and other libraries' messages treated as in the caller."""
    import torch

    torch.set_num_threads(1)
    if shown is not None:
        whole_life.enter_context(kept_apart(shown=shown))


def _done(job: Job, *item: object) -> tuple[str | None, int]:
    """Does a job; returns what failed, and how many of other libraries' warnings no file has."""
    return job(*item), take_waiting()


def _here(job: Job, items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, str | None]]:
    for number, item in enumerate(items):
        yield number, job(*item)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets processes that are started now have one thread each."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
