"""What is ordered before what: barriers within a program, release and acquire between programs.

Every access to memory has a number, `time`, and a lane, the thread's number among all programs'. An
earlier access is known to a thread if

- it is the thread's own,
- its thread is of the same program, and a barrier of the program came after it, or
- the thread, or a thread of its program before their last barrier, acquired what was released by
  a thread to which the access was known (a release counts its own thread's accesses too).

Two accesses of one place, one of them a plain write, race unless the earlier is known to the later.
That is the PTX memory model's `happens before`, as far as these instructions go; it does not depend
on which of the orders that a GPU permits an execution happened to take.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LANE_BITS = 31
LANES = (1 << LANE_BITS) - 1
ATOMIC = 1 << LANE_BITS
MANY = LANES  # the lane of reads by several threads of one program
TIME_SHIFT = 32


@dataclass
class Knowledge:
    """Accesses known.

    Attributes:
        before: of each program, those before this time.
        own: of single lanes, those up to this time.
    """

    before: np.ndarray
    own: dict[int, int] = field(default_factory=dict)

    def join(self, other: Knowledge) -> None:
        """Learns what the other knows."""
        np.maximum(self.before, other.before, out=self.before)
        for lane, time in other.own.items():
            self.own[lane] = max(time, self.own.get(lane, 0))

    def copy(self) -> Knowledge:
        return Knowledge(self.before.copy(), dict(self.own))

    def covers(self, lane: np.ndarray, time: np.ndarray, threads: int) -> np.ndarray:
        """Which accesses are known."""
        known = time < self.before[np.minimum(lane // threads, len(self.before) - 1)]
        for k in np.flatnonzero(~known):
            known[k] = time[k] <= self.own.get(int(lane[k]), 0)
        return known


class Clocks:
    """Who knows what, in one launch of `programs` programs of `threads` threads."""

    def __init__(self, programs: int, threads: int) -> None:
        self.programs, self.threads = programs, threads
        self.time = 1
        self.barrier = np.zeros(programs, np.int64)  # the time of each program's last
        self._shared: dict[int, Knowledge] = {}  # by program: of all its threads
        self._single: dict[int, Knowledge] = {}  # by lane: acquired since the last barrier
        self._released: dict[int, Knowledge] = {}  # by address

    def tick(self) -> int:
        """The number of the next access."""
        self.time += 1
        return self.time

    def pass_barrier(self, program: int) -> None:
        """All threads of the program know what each knew."""
        self.barrier[program] = self.tick()
        first = program * self.threads
        for lane in [n for n in self._single if first <= n < first + self.threads]:
            self._of_program(program).join(self._single.pop(lane))

    def _of_program(self, program: int) -> Knowledge:
        if program not in self._shared:
            self._shared[program] = Knowledge(np.zeros(self.programs, np.int64))
        return self._shared[program]

    def release(self, lane: int, address: int, *, fresh: bool = False) -> None:
        """What the lane knows goes with the address; `fresh` forgets what went with it before."""
        program = lane // self.threads
        told = Knowledge(np.zeros(self.programs, np.int64))
        for part in (self._shared.get(program), self._single.get(lane)):
            if part is not None:
                told.join(part)
        told.before[program] = max(told.before[program], self.barrier[program])
        told.own[lane] = self.time
        if not fresh and address in self._released:
            self._released[address].join(told)
        else:
            self._released[address] = told

    def acquire(self, lane: int, address: int) -> None:
        """The lane learns what went with the address."""
        told = self._released.get(address)
        if told is None:
            return
        if lane in self._single:
            self._single[lane].join(told)
        else:
            self._single[lane] = told.copy()

    def forget(self, addresses: np.ndarray) -> None:
        """A plain store ends what was released there."""
        for address in list(self._released):
            if (addresses == np.uint64(address)).any():
                del self._released[address]

    def unordered(self, earlier: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Which earlier accesses, packed as `stamp` does, are unknown to the lanes beside them."""
        lane = earlier & LANES
        time = earlier >> TIME_SHIFT
        bad = (earlier != 0) & (lane != lanes)
        if not bad.any():
            return bad
        program = lanes // self.threads
        at = np.flatnonzero(bad)
        lane, time, program, mine = lane[at], time[at], program[at], lanes[at]
        here = (lane // self.threads == program) | (lane == MANY)
        known = here & (time < self.barrier[program])
        for one in np.unique(program[~known]):
            if one in self._shared:
                ask = np.flatnonzero(~known & (program == one))
                known[ask] = self._shared[one].covers(lane[ask], time[ask], self.threads)
        for thread in np.unique(mine[~known]) if self._single else ():
            if thread in self._single:
                ask = np.flatnonzero(~known & (mine == thread))
                known[ask] = self._single[thread].covers(lane[ask], time[ask], self.threads)
        bad[at] = ~known
        return bad


def stamp(time: int, lanes: np.ndarray, *, atomic: bool = False) -> np.ndarray:
    """Accesses as one number each: time, a bit for atomics, lane."""
    return lanes | ((time << TIME_SHIFT) | (ATOMIC if atomic else 0))
