"""What other libraries log and warn of: kept off the console, and in a file of the run.

Other libraries' loggers print by handlers of their own, some while they are imported. So a filter
lies on every logger, those to come included: it keeps a record and lets errors alone through.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from fastpo.system.files import append_text
from fastpo.system.process import Rank
from fastpo.system.words import counted

LOG = "libraries.log"
OURS = ("fastpo", "fastpo_kernels")
MOST_KEPT = 10_000
"""Lines that wait for a file; further ones are dropped, the file has no bound."""
_active: LibraryLog | None = None


class LibraryLog:
    """The messages of a command.

    Attributes:
        waiting: How many warnings are in no file yet.
        shown: Whether this process prints them.
    """

    def __init__(self, *, shown: bool) -> None:
        """Starts with none.

        Args:
            shown: Whether they are printed too, in the process of rank 0.
        """
        self.waiting = 0
        self._rank = Rank.of_launch().rank
        self.shown = shown and self._rank == 0
        self._lines: list[str] = []
        self._file: Path | None = None
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps a record, from warnings on, and tells whether it is printed as well."""
        if record.name.partition(".")[0] in OURS:
            return True
        if record.levelno >= logging.WARNING:
            self._keep(record.levelname, record.name, record.getMessage())
        return self.shown or record.levelno >= logging.ERROR

    def warn(self, category: type[Warning], message: object, place: str) -> bool:
        """As `filter`, of a Python warning."""
        self._keep(category.__name__, place, str(message))
        return self.shown

    def told(self) -> str:
        """Says that warnings are in no file, in a line."""
        return f"{counted(self.waiting, 'message')} of other libraries not shown (see --verbose)"

    def write_to(self, folder: Path) -> None:
        """Puts what there is, and what comes, into a folder: `libraries.log`, of rank 0."""
        with self._lock:
            name = LOG if self._rank == 0 else LOG.replace(".", f"-rank{self._rank}.")
            self._file, lines = folder / name, self._lines
            self._lines, self.waiting = [], 0
            if lines:
                append_text(self._file, "".join(lines))

    def _keep(self, kind: str, place: str, message: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{when} {kind} {place}: {' '.join(message.split())}\n"
        with self._lock:
            if self._file is not None:
                append_text(self._file, line)
            elif len(self._lines) < MOST_KEPT:
                self._lines.append(line)
                self.waiting += 1


@contextmanager
def kept_apart(*, shown: bool) -> Iterator[LibraryLog]:
    """Keeps other libraries' messages below errors off the console inside of the block.

    Args:
        shown: Show them all the same.
    """
    global _active
    log, before = LibraryLog(shown=shown), _active
    plain, show = logging.getLoggerClass(), warnings.showwarning
    found = [find_spec(name) for name in OURS]
    roots = {Path(spec.origin).parent for spec in found if spec is not None and spec.origin}

    class Watched(plain):
        def __init__(self, name: str, level: int = logging.NOTSET) -> None:
            super().__init__(name, level)
            self.addFilter(log)

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        ours = not roots.isdisjoint(Path(filename).parents)
        if ours or file is not None or log.warn(category, message, f"{filename}:{lineno}"):
            show(message, category, filename, lineno, file, line)

    for logger in _loggers():
        logger.addFilter(log)
    logging.setLoggerClass(Watched)
    warnings.showwarning, _active = show_warning, log
    try:
        yield log
    finally:
        logging.setLoggerClass(plain)
        warnings.showwarning, _active = show, before
        for logger in _loggers():
            logger.removeFilter(log)


def write_library_log(folder: Path) -> None:
    """Puts the messages of the command that runs, if one does, into a run's folder."""
    if _active is not None and folder.is_dir():
        _active.write_to(folder)


def shows_messages() -> bool | None:
    """Whether the command that runs shows other libraries' messages; None: none runs."""
    return None if _active is None else _active.shown


def take_waiting() -> int:
    """How many warnings of this process are in no file and have not been asked for before."""
    if _active is None:
        return 0
    waiting, _active.waiting = _active.waiting, 0
    return waiting


def add_waiting(warnings_: int) -> None:
    """Counts those of another process, which did a part of the command's work."""
    if _active is not None:
        _active.waiting += warnings_


def is_of_use(record: logging.LogRecord) -> bool:
    """transformers tells at every start of image processors that nothing here uses."""
    return "requires torchvision" not in record.getMessage()


def _loggers() -> list[logging.Logger]:
    known: dict[str, Any] = logging.root.manager.loggerDict
    return [logging.root, *(one for one in known.values() if isinstance(one, logging.Logger))]
