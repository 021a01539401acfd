"""Memory with a watch on each access: bounds, alignment, what was written, and races.

Addresses of global memory are those of the process. Which ranges a kernel may touch is said before
the launch; which of them hold nothing yet is told by the pattern they were filled with. Addresses
in shared memory begin at `SHARED_BASE`.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np

from .errors import Misaligned, OutOfBounds, Race, ReadOfUnwritten
from .order import ATOMIC, LANES, MANY, TIME_SHIFT, Clocks, stamp

SHARED_BASE = 1024
POISON = 0x7FA5  # of 16 bits: a NaN in every float, which no arithmetic gives
LARGE = 1 << 26  # bytes: not filled with the pattern, nor compared between orders
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Watch:
    """Who accessed what last, in pieces of `piece` bytes."""

    def __init__(self, n_bytes: int, piece: int, clocks: Clocks, *, crowds: bool) -> None:
        self.piece, self.clocks, self.crowds = piece, clocks, crowds
        self.writes = np.zeros(-(-n_bytes // piece), np.int64)
        self.reads = np.zeros_like(self.writes)

    def _places(self, offsets: np.ndarray, width: int) -> np.ndarray:
        return offsets[:, None] // self.piece + np.arange(max(1, width // self.piece))

    def load(self, offsets: np.ndarray, width: int, lanes: np.ndarray, time: int) -> np.ndarray:
        """Notes reads; returns which come after a write they do not know."""
        places = self._places(offsets, width)
        lanes = np.broadcast_to(lanes[:, None], places.shape)
        flat, who = places.ravel(), lanes.ravel()
        bad = self.clocks.unordered(self.writes[flat], who)
        code = stamp(time, who)
        if self.crowds:
            before = self.reads[flat]
            program = who // self.clocks.threads
            recent = (before >> TIME_SHIFT) >= np.maximum(self.clocks.barrier[program], 1)
            crowd = recent & ((before & LANES) != who)
            code = np.where(crowd, stamp(time, np.full_like(who, MANY)), code)
            self.reads[flat] = code
            crowd = self.reads[flat] != code
            self.reads[flat[crowd]] = (time << TIME_SHIFT) | MANY
        else:
            self.reads[flat] = code
        return bad.reshape(places.shape).any(1)

    def store(
        self,
        offsets: np.ndarray,
        width: int,
        lanes: np.ndarray,
        time: int,
        before: np.ndarray,
        after: np.ndarray,
        *,
        atomic: bool = False,
    ) -> np.ndarray:
        """Notes writes; returns which race.

        Two writes of the same value do no harm: `before` says where memory held it already, `after`
        where it holds it when all lanes have stored.
        """
        places = self._places(offsets, width)
        lanes = np.broadcast_to(lanes[:, None], places.shape)
        flat, who = places.ravel(), lanes.ravel()
        earlier = self.writes[flat]
        if atomic:  # two atomics never race
            earlier = np.where(earlier & ATOMIC, 0, earlier)
        bad = self.clocks.unordered(earlier, who) & ~np.repeat(before & after, places.shape[1])
        bad |= self.clocks.unordered(self.reads[flat], who)
        code = stamp(time, who, atomic=atomic)
        self.writes[flat] = code
        bad |= (self.writes[flat] != code) & ~np.repeat(after, places.shape[1])
        return bad.reshape(places.shape).any(1)


class Space:
    """A range of addresses that may be accessed."""

    def __init__(self, base: int, data: np.ndarray, name: str) -> None:
        self.base, self.data, self.end, self.name = base, data, base + len(data), name
        self.poisoned = False
        self.watch: Watch | None = None
        self._views: dict[int, np.ndarray] = {}

    def view(self, width: int) -> np.ndarray:
        """The range as unsigned integers; a last one that is not whole is left out."""
        if width not in self._views:
            whole = len(self.data) // width * width
            self._views[width] = self.data[:whole].view(_UNSIGNED[width])
        return self._views[width]


def host_space(base: int, n_bytes: int, name: str) -> Space:
    """Memory of this process."""
    buffer = (ctypes.c_uint8 * n_bytes).from_address(base)
    return Space(base, np.frombuffer(buffer, np.uint8), name)


class GlobalMemory:
    """The ranges that a launch was given; `piece` is the narrowest access of its kernel."""

    def __init__(self, spaces: list[Space], clocks: Clocks, piece: int) -> None:
        self.spaces = sorted(spaces, key=lambda s: s.base)
        self._bases = [s.base for s in self.spaces]
        self.clocks, self.piece = clocks, piece
        self._first: dict[tuple[int, int], int] = {}

    def _parts(self, addresses: np.ndarray, size: int) -> list[tuple[Space, np.ndarray | slice]]:
        """The accesses by the space they fall into."""
        low, high = int(addresses.min()), int(addresses.max())
        if np.any(addresses & np.uint64(size - 1)):
            at = addresses[np.flatnonzero(addresses & np.uint64(size - 1))[0]]
            raise Misaligned(f"{size} bytes at {int(at):#x}, which {size} does not divide")
        space = self._space(low)
        if space is not None and high + size <= space.end:
            return [(space, slice(None))]
        parts: list[tuple[Space, np.ndarray | slice]] = []
        left = np.ones(len(addresses), bool)
        while left.any():
            first = int(addresses[left].min())
            space = self._space(first)
            inside = left & (addresses < np.uint64(space.end if space else 0))
            if space is None or first + size > space.end:
                raise OutOfBounds(f"{size} bytes at {first:#x}: {self._near(first)}")
            inside &= addresses + np.uint64(size) <= np.uint64(space.end)
            parts.append((space, np.flatnonzero(inside)))
            left &= ~inside
        return parts

    def _space(self, address: int) -> Space | None:
        k = bisect_right(self._bases, address) - 1
        return self.spaces[k] if k >= 0 and address < self.spaces[k].end else None

    def _near(self, address: int) -> str:
        def distance(space: Space) -> int:
            return max(space.base - address, address - space.end + 1)

        if not self.spaces:
            return "no memory was given"
        space = min(self.spaces, key=distance)
        return f"{distance(space)} bytes outside {space.name} of {len(space.data)} bytes"

    def load(self, addresses: np.ndarray, width: int, count: int, lanes: np.ndarray) -> np.ndarray:
        """`count` numbers of `width` bytes each: `[count, lanes]`."""
        found = np.empty((count, len(addresses)), _UNSIGNED[width])
        time = self.clocks.tick()
        for space, part in self._parts(addresses, width * count):
            offsets = (addresses[part] - np.uint64(space.base)).astype(np.int64)
            found[:, part] = space.view(width)[offsets // width + np.arange(count)[:, None]]
            if space.watch is not None:
                _raise_race(space.watch.load(offsets, width * count, lanes[part], time), "load of")
            if space.poisoned:
                _check_written(found[:, part], width, space.name)
        return found

    def store(self, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """Stores `values` `[count, lanes]`."""
        count, width = len(values), values.itemsize
        time = self.clocks.tick()
        for space, part in self._parts(addresses, width * count):
            offsets = (addresses[part] - np.uint64(space.base)).astype(np.int64)
            before, after = _put(space.view(width), offsets // width, values[:, part])
            watch = self._watched(space)
            bad = watch.store(offsets, width * count, lanes[part], time, before, after)
            _raise_race(bad, "store to")
            self.clocks.forget(addresses[part])

    def _watched(self, space: Space) -> Watch:
        """From the first write on; what is only read needs no watch."""
        if space.watch is None:
            space.watch = Watch(len(space.data), self.piece, self.clocks, crowds=False)
        return space.watch

    def exchange(
        self, address: int, width: int, lane: int, *, atomic: bool
    ) -> tuple[np.ndarray, int]:
        """The numbers and the index that an atomic of one lane works on, noted as its write."""
        at = np.array([address], np.uint64)
        ((space, _),) = self._parts(at, width)
        offsets = (at - np.uint64(space.base)).astype(np.int64)
        who = np.array([lane], np.int64)
        watch, time = self._watched(space), self.clocks.tick()
        no = np.zeros(1, bool)
        _raise_race(watch.store(offsets, width, who, time, no, no, atomic=atomic), "atomic on")
        values, index = space.view(width), int(offsets[0]) // width
        if space.poisoned:
            _check_written(values[offsets // width][:, None], width, space.name)
        self._first.setdefault((address, width), int(values[index]))
        return values, index

    def counters(self) -> dict[int, tuple[int, int]]:
        """Words that atomics changed: address to the first value and the last."""
        found = {}
        for (address, width), first in self._first.items():
            ((space, _),) = self._parts(np.array([address], np.uint64), width)
            found[address] = (first, int(space.view(width)[(address - space.base) // width]))
        return found


def _check_written(values: np.ndarray, width: int, name: str) -> None:
    pattern = _UNSIGNED[width](int(f"{POISON:04x}" * 4, 16) & ((1 << 8 * width) - 1))
    if width > 1 and (values == pattern).any():
        raise ReadOfUnwritten(f"a load of {name} where nothing was stored")


def _raise_race(bad: np.ndarray, what: str) -> None:
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise Race(f"{what} memory that another thread accessed, in no order (access {at})")


class SharedMemory:
    """The shared memory of the programs that are at work, each in a slot of its own."""

    def __init__(self, slots: int, n_bytes: int, clocks: Clocks, piece: int) -> None:
        self.n_bytes, self.clocks = n_bytes, clocks
        self.stride = -(-n_bytes // 16) * 16
        self.space = Space(0, np.zeros(slots * self.stride, np.uint8), "shared memory")
        self.watch = Watch(max(1, slots * self.stride), piece, clocks, crowds=True)
        self.slot = np.full(clocks.programs, -1, np.int64)

    def take_slots(self, programs: np.ndarray) -> None:
        """Gives the slots to these programs, with nothing written."""
        self.slot[programs] = np.arange(len(programs))
        self.watch.writes[:] = 0
        self.watch.reads[:] = 0

    def _offsets(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        inside = addresses.astype(np.int64) - SHARED_BASE
        if np.any(inside & (size - 1)):
            raise Misaligned(f"{size} bytes of shared memory, at an address it does not divide")
        if inside.min() < 0 or inside.max() + size > self.n_bytes:
            at = int(inside.min() if inside.min() < 0 else inside.max())
            raise OutOfBounds(f"{size} bytes at {at} of {self.n_bytes} bytes of shared memory")
        return inside + self.slot[lanes // self.clocks.threads] * self.stride

    def load(self, addresses: np.ndarray, width: int, count: int, lanes: np.ndarray) -> np.ndarray:
        """As of global memory."""
        offsets = self._offsets(addresses, width * count, lanes)
        if (self.watch.writes[self.watch._places(offsets, width * count)] == 0).any():
            raise ReadOfUnwritten("a load of shared memory where nothing was stored")
        bad = self.watch.load(offsets, width * count, lanes, self.clocks.tick())
        _raise_race(bad, "load of shared")
        return self.space.view(width)[offsets // width + np.arange(count)[:, None]]

    def store(self, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """As to global memory."""
        count, width = len(values), values.itemsize
        offsets = self._offsets(addresses, width * count, lanes)
        before, after = _put(self.space.view(width), offsets // width, values)
        time = self.clocks.tick()
        bad = self.watch.store(offsets, width * count, lanes, time, before, after)
        _raise_race(bad, "store to shared")


def _put(
    memory: np.ndarray, index: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stores; returns where memory held the values already, and where it holds them now."""
    at = index + np.arange(len(values))[:, None]
    before = (memory[at] == values).all(0)
    memory[at] = values
    return before, (memory[at] == values).all(0)
