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
        lane: of each program, one lane of which more is known, or -1: mostly there is but one.
        upto: the accesses of that lane up to this time.
        others: further such lanes, and times.
    """

    before: np.ndarray
    lane: np.ndarray
    upto: np.ndarray
    others: dict[int, int] = field(default_factory=dict)

    @classmethod
    def none(cls, programs: int) -> Knowledge:
        zeros = np.zeros(programs, np.int64)
        return cls(zeros, zeros - 1, zeros.copy())

    def learn(self, program: int, lane: int, time: int) -> None:
        """Of a lane, accesses up to a time."""
        if self.lane[program] in (-1, lane):
            self.lane[program] = lane
            self.upto[program] = max(time, self.upto[program])
        else:
            self.others[lane] = max(time, self.others.get(lane, 0))

    def join(self, other: Knowledge, threads: int) -> None:
        """Learns what the other knows."""
        np.maximum(self.before, other.before, out=self.before)
        new = self.lane < 0
        self.lane[new] = other.lane[new]
        same = (self.lane == other.lane) & (other.lane >= 0)
        self.upto[same] = np.maximum(self.upto[same], other.upto[same])
        for program in np.flatnonzero((other.lane >= 0) & ~same):
            self.learn(int(program), int(other.lane[program]), int(other.upto[program]))
        for lane, time in other.others.items():
            self.learn(lane // threads, lane, time)

    def copy(self) -> Knowledge:
        return Knowledge(self.before.copy(), self.lane.copy(), self.upto.copy(), dict(self.others))

    def covers(self, lane: np.ndarray, time: np.ndarray, threads: int) -> np.ndarray:
        """Which accesses are known."""
        program = np.minimum(lane // threads, len(self.before) - 1)
        known = time < self.before[program]
        known |= (lane == self.lane[program]) & (time <= self.upto[program])
        for k in np.flatnonzero(~known) if self.others else ():
            known[k] = time[k] <= self.others.get(int(lane[k]), 0)
        return known


class Clocks:
    """Who knows what, in one launch of `programs` programs of `threads` threads."""

    def __init__(self, programs: int, threads: int) -> None:
        self.programs, self.threads = programs, threads
        self.time = 1
        self.barrier = np.zeros(programs, np.int64)  # the time of each program's last
        self._shared: dict[int, Knowledge] = {}  # by program: of all its threads
        # By program and lane: acquired since the last barrier.
        self._single: dict[int, dict[int, Knowledge]] = {}
        self._released: dict[int, Knowledge] = {}  # by address

    def tick(self) -> int:
        """The number of the next access."""
        self.time += 1
        return self.time

    def pass_barrier(self, program: int) -> None:
        """All threads of the program know what each knew."""
        self.barrier[program] = self.tick()
        for told in self._single.pop(program, {}).values():
            self._of_program(program).join(told, self.threads)

    def _of_program(self, program: int) -> Knowledge:
        if program not in self._shared:
            self._shared[program] = Knowledge.none(self.programs)
        return self._shared[program]

    def release(self, lane: int, address: int, *, fresh: bool = False) -> None:
        """What the lane knows goes with the address; `fresh` forgets what went with it before."""
        program = lane // self.threads
        told = Knowledge.none(self.programs)
        for part in (self._shared.get(program), self._single.get(program, {}).get(lane)):
            if part is not None:
                told.join(part, self.threads)
        told.before[program] = max(told.before[program], self.barrier[program])
        told.learn(program, lane, self.time)
        if not fresh and address in self._released:
            self._released[address].join(told, self.threads)
        else:
            self._released[address] = told

    def acquire(self, lane: int, address: int) -> None:
        """The lane learns what went with the address."""
        told = self._released.get(address)
        if told is None:
            return
        single = self._single.setdefault(lane // self.threads, {})
        if lane in single:
            single[lane].join(told, self.threads)
        else:
            single[lane] = told.copy()

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
            told = self._single.get(int(thread) // self.threads, {}).get(int(thread))
            if told is not None:
                ask = np.flatnonzero(~known & (mine == thread))
                known[ask] = told.covers(lane[ask], time[ask], self.threads)
        bad[at] = ~known
        return bad


def stamp(time: int, lanes: np.ndarray, *, atomic: bool = False) -> np.ndarray:
    """Accesses as one number each: time, a bit for atomics, lane."""
    return lanes | ((time << TIME_SHIFT) | (ATOMIC if atomic else 0))
