"""What launches execute, counted: instructions by kind, bytes by width, bank conflicts.

Counted are PTX instructions, which `ptxas` turns into the machine's own; that removes some and adds
others. Bytes and bank conflicts are those of the machine's code as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

BANKS = 32  # of 4 bytes each

_KINDS = {
    "special": "ex2 lg2 rcp sqrt rsqrt sin cos tanh div rem",
    "memory": "ld st atom red ldmatrix",
    "exchange": "shfl bar barrier",
    "control": "bra ret exit",
    "convert": "cvt",
    "move": "mov selp",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
KINDS = ("float", "integer", *_KINDS)


def kind_of(opcode: str) -> str:
    """One of `KINDS`; arithmetic and comparisons are `float` or `integer` by their type."""
    name, *rest = opcode.split(".")
    return _KIND_OF.get(name) or ("float" if "f" in rest[-1] else "integer")


@dataclass
class Counts:
    """Of one kernel, over its launches.

    Attributes:
        executed: how often threads executed each opcode.
        moved: bytes that threads loaded or stored, by space (`global`, `shared`), instruction, and
            bytes of one access.
        requests: warps' accesses to shared memory.
        conflicts: how often such a request had to wait for one more pass over the banks.
    """

    executed: Counter[str] = field(default_factory=Counter)
    moved: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    requests: int = 0
    conflicts: int = 0

    def add(self, other: Counts) -> None:
        """Another launch's."""
        self.executed.update(other.executed)
        self.moved.update(other.moved)
        self.requests += other.requests
        self.conflicts += other.conflicts

    def by_kind(self) -> Counter[str]:
        """Instructions that threads executed, by kind."""
        found = Counter(dict.fromkeys(KINDS, 0))
        for opcode, times in self.executed.items():
            found[kind_of(opcode)] += times
        return found

    def access(
        self, space: str, name: str, size: int, offsets: np.ndarray, warp: np.ndarray
    ) -> None:
        """Notes the access of some threads, `size` bytes each, at these offsets in the space."""
        self.moved[space, name, size] += size * len(offsets)
        if space == "shared":
            requests, conflicts = bank_conflicts(offsets, size, warp)
            self.requests += requests
            self.conflicts += conflicts


def bank_conflicts(offsets: np.ndarray, size: int, warp: np.ndarray) -> tuple[int, int]:
    """Requests of warps, and passes beyond the fewest that their words need.

    A pass serves one word of each bank, to all lanes that ask for that word. So a request takes as
    many passes as the busiest bank has words, and could not take fewer than its words by `BANKS`.
    """
    words = offsets[:, None].astype(np.int64) // 4 + np.arange(max(1, size // 4))
    warps, which = np.unique(warp, return_inverse=True)
    asked = np.unique(which[:, None] << 32 | words)
    which, bank = asked >> 32, asked % BANKS
    load = np.bincount(which * BANKS + bank, minlength=len(warps) * BANKS)
    fewest = -(-np.bincount(which, minlength=len(warps)) // BANKS)
    return len(warps), int((load.reshape(-1, BANKS).max(1) - fewest).sum())
