"""Two checkouts of this project, run by turns by one Python with one set of packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkout:
    """A checkout, and how it is called: the result's column `of`."""

    root: Path
    name: str

    def environment(self) -> dict[str, str]:
        """So that its own code is imported, on one thread."""
        folders = (self.root, self.root / "kernels")
        hidden = ("PYTHONPATH", "FASTPO_DEBUG")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        return kept | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}

    def start(self, words: Sequence[str], cwd: Path) -> subprocess.Popen[bytes]:
        """Starts Python with these words."""
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def commit(self) -> str:
        """The commit's short name."""
        command = ["git", "-C", str(self.root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def whole(
    checkout: Checkout, words: Sequence[str], cwd: Path, look: Callable[[int], None] | None = None
) -> float:
    """Seconds of the processor that a process takes in all.

    Args:
        checkout: Whose code runs.
        words: What follows `python`.
        cwd: Its folder.
        look: Called with the process's id, over and over until it ends.

    Raises:
        RuntimeError: It failed.
    """
    process = checkout.start(words, cwd)
    ended, status, used = os.wait4(process.pid, 0 if look is None else os.WNOHANG)
    while look is not None and not ended:
        look(process.pid)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{checkout.root}: {' '.join(words)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def used_seconds(pid: int) -> float:
    """Seconds of the processor, user and system, of a process that still runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def known_checkout(path: Path) -> Checkout:
    """The checkout to compare with.

    Raises:
        ValueError: The folder is none.
    """
    if not (path / "fastpo").is_dir():
        raise ValueError(f"--before {path}: no checkout, for it holds no folder fastpo")
    return Checkout(path.resolve(), "before")
