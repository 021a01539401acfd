"""Ends a process at each of its durable steps in turn, as a kill or a power cut would."""

import multiprocessing
import os
from itertools import count
from pathlib import Path

from fastpo.system import files

FORK = multiprocessing.get_context("fork")
ENDED = 86
"""Exit status of a process that was ended at a step."""


def end_everywhere(act, check, *, power_cut=()):
    """Ends `act` before its first, its second, ... durable step, and calls `check` after each.

    Args:
        act: `act(number)` runs in a forked process; each number should have a folder of its own.
        check: `check(number)` runs here when `act` was ended at step `number`, and once more when
            it was not ended at all.
        power_cut: `power_cut(number)` gives folders whose files lose what was not flushed.

    Returns:
        The number of durable steps.
    """
    for number in count():
        folders = power_cut(number) if power_cut else []
        process = FORK.Process(target=_run, args=(act, number, folders))
        process.start()
        process.join(120)
        assert process.exitcode in (0, ENDED), f"step {number}: exit status {process.exitcode}"
        check(number)
        if process.exitcode == 0:
            return number


def _run(act, number, folders):
    """Runs `act(number)`, and ends the process at its durable step of that number."""
    flushed = {file.stat().st_ino: file.stat().st_size for file in _files(folders)}
    steps, last = count(), []

    def commit(step, path):
        for file in last:  # its flush is done by now
            flushed[file.st_ino] = file.st_size
        last[:] = [path.stat()] if step == "flush" else []
        if next(steps) == number:
            for file in _files(folders):
                kept = flushed.get(file.stat().st_ino, 0)
                if file.stat().st_size > kept:
                    os.truncate(file, kept)
            os._exit(ENDED)

    files._commit = commit
    act(number)


def _files(folders):
    return [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
