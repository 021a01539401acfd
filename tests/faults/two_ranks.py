"""Two processes of one run, forked from the test: no launcher, and nothing to import again."""

import gc
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from fastpo.cli import main
from tests.forked import FORK, print_to


class Ranks:
    """Both processes: `ranks[1]` is the second one, `ranks.text(1)` what it has printed."""

    def __init__(self, processes, folder):
        self._processes, self._folder = processes, folder

    def __getitem__(self, rank):
        return self._processes[rank]

    def text(self, rank):
        return (self._folder / f"rank-{rank}.txt").read_text()

    def exit_codes(self, timeout=300):
        """Waits for both; None for one that is still at work."""
        end = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self._processes]


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launched(rank, port):
    """What a launcher of two processes puts into the environment of one."""
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@contextmanager
def two_ranks(folder: Path, arguments, *, act=main, env=None):
    """Starts both; what is left of them is killed at the end.

    Args:
        folder: Takes what they print.
        arguments: `arguments(rank)` gives the words behind `fastpo`.
        act: Is called with these words in each process.
        env: Further variables of the environment.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in (0, 1):
        names = launched(rank, port) | (env or {})
        words = list(map(str, arguments(rank)))
        output = folder / f"rank-{rank}.txt"
        processes.append(FORK.Process(target=_run, args=(act, words, names, output)))
    for process in processes:
        process.start()
    try:
        yield Ranks(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(act, words, env, output):
    gc.freeze()  # what the test's process has imported is not garbage of this one
    os.environ.update(env)
    print_to(output)
    act(words)
