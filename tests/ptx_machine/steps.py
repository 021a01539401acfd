"""Steps over a file of registers, and what a translated kernel is made of.

Every register, special register and constant has a slot in a list; a step reads and writes slots.
An array of one element stands for the same bits in all lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .instructions import UNSIGNED
from .parser import Instruction, Parsed

Slots = list[np.ndarray]


@dataclass
class Step:
    """One instruction.

    Attributes:
        source: the statement.
        reads, writes: slots.
        guard: slot of the predicate before it, or None; `negated` if it must be false.
        living: a bit for each slot that is read from here on before it is written: filled in at
            the end.
    """

    source: Instruction
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    guard: int | None = None
    negated: bool = False
    living: int = 0

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The slots of `living`."""
        return tuple(s for s in range(self.living.bit_length()) if self.living >> s & 1)


@dataclass
class Compute(Step):
    """Registers only."""

    run: Callable[[Slots], None] = field(default=lambda _: None)


@dataclass
class Access(Step):
    """A load or store of `count` numbers of `width` bytes; `signed` loads fill with the sign."""

    space: str = ""
    load: bool = True
    width: int = 4
    count: int = 1
    signed: bool = False
    address: int = 0
    offset: int = 0


@dataclass
class Atomic(Step):
    """Read, modify, write: reads[0] is the address, then operands; writes[0] the old number."""

    name: str = "add"
    kind: str = "u32"
    order: str = "relaxed"
    scope: str = "gpu"
    offset: int = 0


@dataclass
class Shuffle(Step):
    """reads: value, lane, clamp, members; writes: result, and whether the source is there."""

    mode: str = "bfly"


@dataclass
class MatrixLoad(Step):
    """`ldmatrix`: reads[0] is the address of a row; as many 8 x 8 matrices as there are writes."""

    offset: int = 0


@dataclass
class Branch(Step):
    """To `target`, an index of a step."""

    target: int = 0


@dataclass
class Barrier(Step):
    """All threads of the program."""


@dataclass
class Exit(Step):
    """The thread is done."""


@dataclass
class Kernel:
    """A translated kernel.

    Attributes:
        parsed: its text.
        steps: in order.
        initial: the slots before a thread begins; constants keep theirs.
        special: slots of `%tid.x` and the like, by name.
        parameters: slots of `ld.param`, by name: given at launch.
        piece: the narrowest access to memory, in bytes.
    """

    parsed: Parsed
    steps: list[Step]
    initial: Slots
    special: dict[str, int]
    parameters: dict[str, int]
    piece: int


def extended(values: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """Unsigned integers in a wider register, filled with zeros or the sign."""
    if signed:
        values = values.view(f"i{values.itemsize}").astype(f"i{bits // 8}")
    return values.astype(UNSIGNED[bits])


def runner(
    function: Callable[..., np.ndarray],
    reads: tuple[int, ...],
    write: int,
    guard: int | None,
    negated: bool,
) -> Callable[[Slots], None]:
    """A step over the slots; by number of operands, since this is where the time goes."""
    if guard is not None:

        def guarded(slots: Slots) -> None:
            new, old = function(*[slots[s] for s in reads]), slots[write]
            first, second = (old, new) if negated else (new, old)
            slots[write] = np.where(slots[guard], first, second)

        return guarded
    if len(reads) == 1:
        (a,) = reads

        def one(slots: Slots) -> None:
            slots[write] = function(slots[a])

        return one
    if len(reads) == 2:
        a, b = reads

        def two(slots: Slots) -> None:
            slots[write] = function(slots[a], slots[b])

        return two

    def more(slots: Slots) -> None:
        slots[write] = function(*[slots[s] for s in reads])

    return more


def fill_live(steps: list[Step]) -> None:
    """Which slots matter before each step: backwards, until nothing changes."""

    def mask(slots: tuple[int, ...]) -> int:
        found = 0
        for s in slots:
            found |= 1 << s
        return found

    reads = [mask(s.reads) for s in steps]
    writes = [mask(s.writes) & ~mask(s.reads) for s in steps]
    live = [0] * (len(steps) + 1)
    changed = True
    while changed:
        changed = False
        for k in range(len(steps) - 1, -1, -1):
            step = steps[k]
            after = live[k + 1]
            if isinstance(step, Branch):
                after = live[step.target] | (after if step.guard is not None else 0)
            elif isinstance(step, Exit) and step.guard is None:
                after = 0
            new = reads[k] | (after & ~writes[k])
            if new != live[k]:
                live[k], changed = new, True
    for step, mask_here in zip(steps, live, strict=False):
        step.living = mask_here
