"""Calls in processes that may be ended at any moment, each forked from one that has all imports.

The server that forks them is a process of its own, with nothing running in it: no threads, no
progress bar, no device.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from fastpo.errors import FastPOError

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["fastpo.selftest.warm"])

# A process that starts asks how all others have ended, and each answer can be read only once.
_ONE_AT_A_TIME = threading.Lock()

How = Literal["returned", "refused", "failed", "ended", "hung"]
# What a command line means by its exit status, and how it begins to tell an error.
_OF_COMMANDS: dict[int, How] = {0: "returned", 1: "failed", 2: "refused"}
_ERROR = "error: "


@dataclass
class Ending:
    """How a call came to its end.

    Attributes:
        how: It returned, refused (a `FastPOError`, or a command's exit status 2), failed (any
            other exception), was ended from outside or by itself, or did not end in time.
        status: Exit status of the process, negative for a signal.
        text: The message of the error, with its traceback for `failed`.
        notes: What it told on its way, in order.
        output: What it printed.
        seconds: What it took, from when it told `began`; 0 if it did not.
    """

    how: How
    status: int
    text: str = ""
    notes: list[Any] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0

    def last(self, key: str, otherwise: int = 0) -> int:
        """Returns the number told last under a name."""
        return next((value for name, value in reversed(self.notes) if name == key), otherwise)


Tell = Callable[[str, int], None]
"""Tells the process that waits for the call: `tell("saved", 4)`."""


@dataclass(frozen=True)
class Interruption:
    """A signal from outside.

    Attributes:
        after: Seconds after the call has told `began`.
        number: The signal.
    """

    after: float
    number: int


class Call:
    """A call in a process of its own: `Call(act, 1, 2).result(limit=60)`.

    Args:
        act: A function of a module; it gets a `Tell` first.
        arguments: Its other arguments.
    """

    def __init__(self, act: Callable[..., object], *arguments: Any) -> None:
        self._output = tempfile.NamedTemporaryFile(prefix="fastpo-selftest-", suffix=".log")
        self._reading, writing = _SERVER.Pipe(duplex=False)
        self._process = _SERVER.Process(
            target=_run, args=(writing, self._output.name, act, arguments), daemon=True
        )
        with _ONE_AT_A_TIME:
            self._process.start()
        writing.close()
        self._notes: list[Any] = []
        self._began = 0.0

    def result(self, *, limit: float, interruption: Interruption | None = None) -> Ending:
        """Waits for the end.

        Args:
            limit: Seconds after which the process is killed.
            interruption: A signal to send; counted from when the call tells `began`.
        """
        end, due = time.monotonic() + limit, math.inf
        while not self._closed(min(due, end)):
            now = time.monotonic()
            if interruption and self._began and due == math.inf:
                due = self._began + interruption.after
            if interruption and now >= due:
                self.send(interruption.number)
                interruption, due = None, math.inf
            elif now >= end:
                self.send(signal.SIGKILL)
                return self._ending("hung")
        return self._ending("ended")

    def send(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        assert self._process.pid is not None
        with _ONE_AT_A_TIME:
            if self._process.is_alive():
                os.kill(self._process.pid, number)

    def _closed(self, until: float) -> bool:
        """Takes in what was told until a moment; whether the process has let go of its end."""
        ready = wait([self._reading], max(0.0, until - time.monotonic()))
        if not ready:
            return False
        try:
            self._notes.append(json.loads(self._reading.recv_bytes()))
            if self._notes[-1] == ["began", 0]:
                self._began = time.monotonic()
        except (EOFError, OSError, ValueError):  # a message may be cut by a kill
            return True
        return False

    def _ending(self, how: How) -> Ending:
        wait([self._process.sentinel])
        with _ONE_AT_A_TIME:
            self._process.join()
        told = [note for note in self._notes if note[0] == "end"]
        notes = [note for note in self._notes if note[0] != "end"]
        output = Path(self._output.name).read_text(errors="replace")
        status, text = self._process.exitcode or 0, ""
        self._output.close()
        self._reading.close()
        if how == "ended" and told:
            how, text = told[-1][1]
        elif how == "ended" and status in _OF_COMMANDS:
            how = _OF_COMMANDS[status]
            text = output[output.rfind(_ERROR) + len(_ERROR) :] if how == "refused" else output
        seconds = time.monotonic() - self._began if self._began else 0.0
        return Ending(how, status, text.strip(), notes, output, seconds)


def call(act: Callable[..., object], *arguments: Any, limit: float = 120) -> Ending:
    """Calls in a process of its own, and waits for its end."""
    return Call(act, *arguments).result(limit=limit)


def _run(
    told: Connection, output: str, act: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    """What the forked process does."""
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # `nohup` has one ignored, and commands leave it so
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same arithmetic everywhere
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    def tell(key: str, value: object) -> None:
        told.send_bytes(json.dumps([key, value]).encode())

    try:
        act(tell, *arguments)
        end = ("returned", "")
    except FastPOError as error:
        end = ("refused", str(error))
    except SystemExit:
        raise
    except BaseException:
        end = ("failed", traceback.format_exc())
    tell("end", end)
