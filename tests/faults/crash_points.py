"""Ends a process at each of its durable steps in turn, as a kill or a power cut would."""

from itertools import count

from fastpo.selftest.disk import ENDED, end_at
from tests.forked import FORK

FAULTS = {"kill": "nothing", "power cut": "both"}
"""What is lost of what was not flushed: nothing, or the content of files and names in folders."""


def end_everywhere(act, check, place, fault):
    """Ends `act` before its first, its second, ... durable step, and calls `check` after each.

    Args:
        act: `act(number)` runs in a forked process, in the folder `place(number)`.
        check: `check(number)` runs here when `act` was ended at step `number`, and once more when
            it was not ended at all.
        place: `place(number)` is a folder, which is made if it is not there.
        fault: A key of `FAULTS`.

    Returns:
        The number of durable steps.
    """
    for number in count():
        place(number).mkdir(exist_ok=True)
        process = FORK.Process(target=_run, args=(act, number, place(number), FAULTS[fault]))
        process.start()
        process.join(300)
        assert process.exitcode in (0, ENDED), f"step {number}: exit status {process.exitcode}"
        check(number)
        if process.exitcode == 0:
            return number


def _run(act, number, place, loss):
    end_at(number, place, loss)
    act(number)
