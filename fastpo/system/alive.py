"""Whether a process of this machine is still there, asked without its help."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "stopped", "ended", "unknown"]


@dataclass(frozen=True)
class ProcessName:
    """A process, told apart from a later one with the same number.

    Attributes:
        host: Name of its machine.
        space: Where its number counts: containers of one machine number their processes apart.
        pid: Its number.
        started: When it began, in the system's own unit; empty where the system does not tell.
    """

    host: str
    space: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> ProcessName:
        """Names this process."""
        return cls(socket.gethostname(), _space(), os.getpid(), _stat(os.getpid())[1])

    def state(self) -> State:
        """Asks the system; `unknown` for a process of another machine or container."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "ended"
        except PermissionError:
            pass
        letter, started = _stat(self.pid)
        if (started and started != self.started) or letter in ("Z", "X"):
            return "ended"
        return "stopped" if letter in ("T", "t") else "running"

    def __str__(self) -> str:
        """Returns `process 4711 on node3`."""
        return f"process {self.pid} on {self.host}"


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """The state's letter and the start of a process, see proc(5); empty where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # a program's name may hold blanks
    return fields[0], fields[19]
