"""Ends a process at each of its durable steps in turn, as a kill or a power cut would."""

from itertools import count

from fastpo.selftest.disk import ENDED, end_at
from tests.forked import FORK

FAULTS = {"kill": ("nothing", 3), "power cut": ("both", 1)}
"""What is lost of what was not flushed, nothing, or the content of files and names in folders; and
how many steps lie between two that are tried. A kill loses less than a power cut at its step.
"""


def end_everywhere(act, check, place, fault):
    """Ends `act` before its durable steps in turn, and calls `check` after each end.

    Args:
        act: `act(number)` runs in a forked process, in the folder `place(number)`; ends are
            numbered from 0.
        check: `check(number)` runs here when `act` was ended, and once more when it was not ended
            at all.
        place: `place(number)` is a folder, which is made if it is not there.
        fault: A key of `FAULTS`.

    Returns:
        The number of durable steps, or up to as many more as lie between two that are tried.
    """
    loss, apart = FAULTS[fault]
    for number in count():
        place(number).mkdir(exist_ok=True)
        process = FORK.Process(target=_run, args=(act, number, apart, place(number), loss))
        process.start()
        process.join(300)
        step = number * apart
        assert process.exitcode in (0, ENDED), f"step {step}: exit status {process.exitcode}"
        check(number)
        if process.exitcode == 0:
            return step


def _run(act, number, apart, place, loss):
    end_at(number * apart, place, loss)
    act(number)
