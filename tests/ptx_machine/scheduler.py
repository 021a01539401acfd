"""Runs the programs of a launch, in an order drawn from a seed.

Threads at the same instruction go on together until they meet a branch that they take differently,
a barrier, or, by chance, a load or store, where a gang may be left in two. Which gang goes on next
is drawn. What must hold for every order is not left to the draws: see `order.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from .counts import Counts
from .errors import Misaligned, PtxError, UnknownInstruction, Unreached
from .gang import Gang, merged
from .memory import SHARED_BASE, GlobalMemory, SharedMemory
from .order import Clocks
from .parser import Instruction
from .shuffle import row_addresses, shuffled
from .steps import (
    Access,
    Atomic,
    Barrier,
    Branch,
    Compute,
    Exit,
    Kernel,
    MatrixLoad,
    Shuffle,
    Slots,
    Step,
    extended,
)

_AT_WORK = 1 << 16  # threads at once; other programs wait, as they do where a GPU is full


class Scheduler:
    """One launch of `kernel` over a grid of `(x, y, z)` programs of `threads` threads.

    Args:
        values: of the parameters, by their names, as arrays of one element.
        spaces: memory that the launch may access.
        shared_bytes: of shared memory a program.
        rng: draws the order; None runs all in step, the fastest.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        values: dict[str, np.ndarray],
        memory: Callable[[Clocks], GlobalMemory],
        shared_bytes: int,
        rng: np.random.Generator | None,
    ) -> None:
        if threads % 32:
            raise UnknownInstruction(f"a program of {threads} threads")
        self.kernel, self.grid, self.threads, self.rng = kernel, grid, threads, rng
        self.programs = int(np.prod(grid))
        self.clocks = Clocks(self.programs, threads)
        self.memory = memory(self.clocks)
        self.at_once = max(1, min(self.programs, _AT_WORK // threads))
        n_bytes = shared_bytes + sum(kernel.parsed.shared.values())
        self.shared = SharedMemory(self.at_once, n_bytes, self.clocks, kernel.piece)
        self.executed: Counter[int] = Counter()
        self.tally = Counts()
        self._runs: dict[int, tuple[list[Callable[[Slots], None]], int]] = {}
        self._entry = list(kernel.initial)
        for name, slot in kernel.parameters.items():
            self._entry[slot] = values[name]

    def run(self) -> None:
        """To the end of every thread.

        Raises:
            PtxError: The kernel did what it must not.
        """
        order = np.arange(self.programs)
        if self.rng is not None:
            self.rng.shuffle(order)
        with np.errstate(all="ignore"):
            for first in range(0, self.programs, self.at_once):
                self._run_programs(np.sort(order[first : first + self.at_once]))

    def counts(self) -> Counts:
        """What was executed; accesses are counted where all run in step."""
        found = self.tally.executed = Counter()
        for first, threads in self.executed.items():
            _, end = self._run_at(first)
            for step in self.kernel.steps[first : max(end, first + 1)]:
                found[".".join(step.source.opcode)] += threads
        return self.tally

    def _run_programs(self, programs: np.ndarray) -> None:
        self.shared.take_slots(programs)
        self.arrived = np.zeros(self.programs, np.int64)
        self.parked: list[Gang] = []
        self.apart: list[Gang] = []  # at a shuffle that others of their warps have not reached
        lanes = (programs[:, None] * self.threads + np.arange(self.threads)).ravel()
        first = Gang(0, lanes, self._registers(lanes))
        self.ready = [first]
        if self.rng is not None:
            for _ in range(self.rng.integers(4)):
                self.ready += self._in_two(self.ready.pop())
        while self.ready:
            k = 0 if self.rng is None else int(self.rng.integers(len(self.ready)))
            self._advance(self.ready.pop(k))
        if self.parked or self.apart:
            raise self._stuck()

    def _registers(self, lanes: np.ndarray) -> Slots:
        slots = list(self._entry)
        program, x, y = lanes // self.threads, self.grid[0], self.grid[1]
        values = {
            "%tid.x": lanes % self.threads, "%ctaid.x": program % x, "%ctaid.y": program // x % y,
            "%ctaid.z": program // (x * y), "%ntid.x": np.array([self.threads]),
            "%nctaid.x": np.array([x]), "%nctaid.y": np.array([y]),
            "%nctaid.z": np.array([self.grid[2]]),
        }  # fmt: skip
        one = dict.fromkeys(("%ntid.y", "%ntid.z"), 1) | dict.fromkeys(("%tid.y", "%tid.z"), 0)
        for name, slot in self.kernel.special.items():
            slots[slot] = np.asarray(values.get(name, np.array([one.get(name, 0)])), np.uint32)
        return slots

    def _in_two(self, gang: Gang) -> list[Gang]:
        """A gang in two, by warps, drawn."""
        assert self.rng is not None
        warps = np.unique(gang.lanes // 32)
        if len(warps) < 2:
            return [gang]
        first = np.isin(gang.lanes // 32, warps[self.rng.random(len(warps)) < 0.5])
        if first.all() or not first.any():
            return [gang]
        return [gang.part(self.kernel, np.flatnonzero(f)) for f in (first, ~first)]

    def _run_at(self, pc: int) -> tuple[list[Callable[[Slots], None]], int]:
        """What computes from here on, up to the next step that does more."""
        if pc not in self._runs:
            end, steps = pc, self.kernel.steps
            while end < len(steps) and isinstance(steps[end], Compute):
                end += 1
            found = [s.run for s in steps[pc:end] if isinstance(s, Compute)]
            self._runs[pc] = (found, end)
        return self._runs[pc]

    def _advance(self, gang: Gang) -> None:
        """Executes a gang until it is parked, parted or done."""
        steps, slots = self.kernel.steps, gang.slots
        while True:
            runs, end = self._run_at(gang.pc)
            self.executed[gang.pc] += len(gang.lanes)
            try:
                for run in runs:
                    run(slots)
            except Exception as error:
                source = steps[gang.pc + runs.index(run)].source
                raise PtxError(self._message(source, gang, repr(error))) from error
            if end > gang.pc:
                gang.pc = end
                self.executed[end] += len(gang.lanes)
            step = steps[end]
            try:
                goes_on = self._do(gang, step)
            except PtxError as error:
                raise type(error)(self._message(step.source, gang, error)) from error
            if not goes_on:
                return
            slots = gang.slots

    def _do(self, gang: Gang, step: Step) -> bool:
        """A step that is more than computing; False if the gang does not go on as it is."""
        if isinstance(step, Access):
            if self.rng is not None and self.rng.random() < 0.02:
                parts = self._in_two(gang)
                if len(parts) == 2:
                    self.ready += parts
                    return False
            self._access(gang, step)
        elif isinstance(step, Branch):
            return self._branch(gang, step)
        elif isinstance(step, Barrier):
            return self._barrier(gang)
        elif isinstance(step, Shuffle):
            return self._shuffle(gang, step)
        elif isinstance(step, MatrixLoad):
            return self._matrix_load(gang, step)
        elif isinstance(step, Atomic):
            self._atomic(gang, step)
        elif isinstance(step, Exit):
            chosen = self._chosen(gang, step)
            if len(chosen) == len(gang.lanes):
                return False
            rest = np.setdiff1d(np.arange(len(gang.lanes)), chosen)
            gang.pc += 1
            self.ready.append(gang.part(self.kernel, rest))
            return False
        else:
            raise UnknownInstruction(step.source.text)
        gang.pc += 1
        return True

    def _chosen(self, gang: Gang, step: Step) -> np.ndarray:
        """Positions of the threads whose predicate lets them."""
        n = len(gang.lanes)
        if step.guard is None:
            return np.arange(n)
        guard = np.broadcast_to(gang.slots[step.guard], n)
        return np.flatnonzero(~guard if step.negated else guard)

    def _access(self, gang: Gang, step: Access) -> None:
        chosen = self._chosen(gang, step)
        if not len(chosen):
            return
        n, lanes = len(gang.lanes), gang.lanes[chosen]
        slots = gang.slots
        addresses = slots[step.address] + slots[step.address].dtype.type(
            step.offset & (0xFFFFFFFFFFFFFFFF if step.space == "global" else 0xFFFFFFFF)
        )
        addresses = np.broadcast_to(addresses, n)[chosen]
        memory = self.memory if step.space == "global" else self.shared
        self._count(step.space, step, step.width * step.count, addresses, lanes)
        kind = np.dtype(f"u{step.width}")
        if not step.load:
            values = [slots[s].astype(kind) for s in step.reads[1 : 1 + step.count]]
            wide = np.stack([np.broadcast_to(v, n)[chosen] for v in values])
            memory.store(addresses, wide, lanes)
            return
        found = memory.load(addresses, step.width, step.count, lanes)
        for slot, values in zip(step.writes, found, strict=True):
            bits = 8 * slots[slot].itemsize
            new = extended(values, bits, signed=step.signed)
            if len(chosen) < n:
                old = np.broadcast_to(slots[slot], n).copy()
                old[chosen] = new
                new = old
            slots[slot] = new

    def _count(
        self, space: str, step: Step, size: int, addresses: np.ndarray, lanes: np.ndarray
    ) -> None:
        if self.rng is None:
            name, first = step.source.opcode[0], SHARED_BASE if space == "shared" else 0
            offsets = addresses - addresses.dtype.type(first)
            self.tally.access(space, name, size, offsets, lanes // 32)

    def _branch(self, gang: Gang, step: Branch) -> bool:
        chosen = self._chosen(gang, step)
        if len(chosen) == 0:
            gang.pc += 1
        elif len(chosen) == len(gang.lanes):
            gang.pc = step.target
        else:
            rest = np.setdiff1d(np.arange(len(gang.lanes)), chosen)
            for part, pc in ((chosen, step.target), (rest, gang.pc + 1)):
                gang.pc = pc
                self.ready.append(gang.part(self.kernel, part))
            return False
        return True

    def _barrier(self, gang: Gang) -> bool:
        """Parks the gang; programs that are all there go on."""
        programs, count = np.unique(gang.lanes // self.threads, return_counts=True)
        self.arrived[programs] += count
        complete = programs[self.arrived[programs] == self.threads]
        for program in complete:
            self.clocks.pass_barrier(int(program))
        self.arrived[complete] = 0
        if len(complete) == len(programs) and (count == self.threads).all():
            gang.pc += 1
            return True
        self.parked.append(gang)
        if len(complete):
            gone, self.parked = self._taken(self.parked, complete)
            if len({g.pc for g in gone}) > 1:
                lines = sorted({self.kernel.steps[g.pc].source.line for g in gone})
                raise Unreached(f"threads of one program at the barriers of lines {lines}")
            one = merged(self.kernel, gone)
            one.pc += 1
            self.ready.append(one)
        return False

    def _taken(self, gangs: list[Gang], programs: np.ndarray) -> tuple[list[Gang], list[Gang]]:
        """Of gangs, the threads of these programs, and the others."""
        taken, left = [], []
        for gang in gangs:
            mine = np.isin(gang.lanes // self.threads, programs)
            if mine.all() or not mine.any():
                (taken if mine.all() else left).append(gang)
            else:
                taken.append(gang.part(self.kernel, np.flatnonzero(mine)))
                left.append(gang.part(self.kernel, np.flatnonzero(~mine)))
        return taken, left

    def _are_whole(self, gang: Gang) -> bool:
        """Whether all lanes of the warps are in the gang; if not, it waits until they are."""
        whole = gang.whole_warps()
        if whole.all():
            return True
        same = [g for g in self.apart if g.pc == gang.pc]
        self.apart = [g for g in self.apart if g.pc != gang.pc]
        gang = merged(self.kernel, [gang, *same])
        whole = gang.whole_warps()
        if whole.any():
            self.ready.append(gang.part(self.kernel, np.flatnonzero(whole)))
        if not whole.all():
            self.apart.append(gang.part(self.kernel, np.flatnonzero(~whole)))
        return False

    def _matrix_load(self, gang: Gang, step: MatrixLoad) -> bool:
        if not self._are_whole(gang):
            return False
        base = gang.slots[step.reads[0]] + np.uint32(step.offset & 0xFFFFFFFF)
        addresses = np.broadcast_to(base, len(gang.lanes)).reshape(-1, 32)
        if (addresses[:, : 8 * len(step.writes)] % 16).any():
            raise Misaligned("a row of a matrix, which 16 bytes must divide")
        for k, slot in enumerate(step.writes):
            rows = row_addresses(addresses, k).ravel()
            self._count("shared", step, 4, rows, gang.lanes)
            gang.slots[slot] = self.shared.load(rows, 4, 1, gang.lanes)[0]
        gang.pc += 1
        return True

    def _shuffle(self, gang: Gang, step: Shuffle) -> bool:
        if not self._are_whole(gang):
            return False
        n = len(gang.lanes)
        operands = [np.broadcast_to(gang.slots[s], n).reshape(-1, 32) for s in step.reads[:4]]
        for slot, values in zip(step.writes, shuffled(step.mode, *operands), strict=False):
            gang.slots[slot] = values.ravel()
        gang.pc += 1
        return True

    def _atomic(self, gang: Gang, step: Atomic) -> None:
        chosen = self._chosen(gang, step)
        if self.rng is not None:
            self.rng.shuffle(chosen)
        n, width = len(gang.lanes), int(step.kind[1:]) // 8
        operands = [
            np.broadcast_to(gang.slots[s], n) for s in step.reads[: 3 if step.name == "cas" else 2]
        ]
        self._count("global", step, width, operands[0][chosen], gang.lanes[chosen])
        old = np.broadcast_to(gang.slots[step.writes[0]], n).copy() if step.writes else None
        for k in chosen:
            address = int(operands[0][k]) + step.offset & 0xFFFFFFFFFFFFFFFF
            lane = int(gang.lanes[k])
            wide = step.scope != "cta"
            memory, index = self.memory.exchange(address, width, lane, atomic=wide)
            if wide and step.order in ("acquire", "acq_rel"):
                self.clocks.acquire(lane, address)
            if wide and step.order in ("release", "acq_rel"):
                self.clocks.release(lane, address)
            if old is not None:
                old[k] = memory[index]
            memory[index] = _modified(step, memory[index], *(o[k] for o in operands[1:]))
        if old is not None:
            gang.slots[step.writes[0]] = old

    def _stuck(self) -> Unreached:
        gang = (self.parked + self.apart)[0]
        source = self.kernel.steps[gang.pc].source
        program = int(gang.lanes[0] // self.threads)
        here = int((gang.lanes // self.threads == program).sum())
        what = f"of {self.threads} threads of program {program}, {here} wait for the others"
        return Unreached(self._message(source, gang, what))

    def _message(self, source: Instruction, gang: Gang, what: object) -> str:
        programs = np.unique(gang.lanes // self.threads)
        some = ", ".join(map(str, programs[:4])) + (", ..." if len(programs) > 4 else "")
        where = f"{self.kernel.parsed.name}, line {source.line}, `{source.text}`"
        return f"{where}, among programs {some}: {what}"


def _modified(step: Atomic, old: np.generic, *given: np.generic) -> np.generic:
    """What an atomic leaves in memory."""
    signed = step.kind[0] == "s"
    a = [v.view(f"i{v.itemsize}") if signed else v for v in (old, *given)]
    if step.name == "cas":
        return given[1] if old == given[0] else old
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda _, new: new,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return functions[step.name](a[0], a[1]).view(old.dtype)
