"""The signals with which schedulers, terminals and people end a command.

SIGTERM and SIGHUP end it, and SIGUSR1, with which schedulers warn that the time is nearly over. A
command ends cleanly, with exit code 75 ("try again", EX_TEMPFAIL of sysexits.h): what is done by
then is kept, and the same command goes on from there. Ctrl-C (SIGINT) does the same where there is
something to save first, and a second one ends the command at once, with exit code 130.

A signal that is ignored (`nohup`) stays ignored, and a handler that the caller has set stays set.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_KEYBOARD = 75, 130
_HANDLED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")


class Interrupted(BaseException):
    """A signal ends the command; nothing is lost, and the same command goes on.

    Like `KeyboardInterrupt` it is no `Exception`: a pair that was being read when the signal came
    is no bad pair.
    """


class EndingSignals:
    """What has been received; `catch_signals` makes one.

    Attributes:
        received: Name of the first signal, e.g. `SIGTERM`; None before.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = True
        self._keyboard = 0

    def asked(self) -> bool:
        """Whether a signal has asked this process to end."""
        return self.received is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block look for signals itself; a second Ctrl-C still ends it at once.

        Raises:
            Interrupted: Or KeyboardInterrupt: a signal came before.
        """
        if self.received is not None:
            self._end()
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal, and ends the command unless the block saves something first."""
        first = self.received is None
        self.received = self.received or signal.Signals(number).name
        self._keyboard += number == signal.SIGINT
        if self._keyboard > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one needs no help of ours
            raise KeyboardInterrupt
        if self._at_once and first:
            self._end()
        if first:
            again = "; Ctrl-C again ends at once, without" if number == signal.SIGINT else ""
            line = f"{self.received}: saving, then ending{again}\n"
            os.write(2, line.encode())  # print() may be what the signal has interrupted

    def _end(self) -> None:
        if self.received == "SIGINT":
            raise KeyboardInterrupt
        raise Interrupted(f"ended by {self.received}; what was done is kept")


@contextmanager
def catch_signals() -> Iterator[EndingSignals]:
    """Ends the block cleanly when a signal asks for it: an exception where the program stands.

    In another thread than the main one, where Python sets no handlers, it does nothing.

    Yields:
        What has been received; its `deferred` lets a block save first.
    """
    signals = EndingSignals()
    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _HANDLED:
            number = getattr(signal, name, None)
            if number is not None and _is_free(signal.getsignal(number)):
                before[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


def _is_free(handler: object) -> bool:
    """Whether a handler is the system's, Python's or one of ours, and not the caller's own."""
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return True
    return isinstance(getattr(handler, "__self__", None), EndingSignals)
