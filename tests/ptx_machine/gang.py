"""Threads that are at the same instruction, executed as one vector."""

from __future__ import annotations

import numpy as np

from .steps import Kernel, Slots


class Gang:
    """Some threads of any programs.

    Attributes:
        pc: index of the next step.
        lanes: the threads' numbers among all programs', ascending.
        slots: their registers; an array of one element holds for all of them.
    """

    __slots__ = ("lanes", "pc", "slots")

    def __init__(self, pc: int, lanes: np.ndarray, slots: Slots) -> None:
        self.pc, self.lanes, self.slots = pc, lanes, slots

    def part(self, kernel: Kernel, chosen: np.ndarray) -> Gang:
        """The threads at these positions, with what they still need."""
        slots = list(kernel.initial)
        for s in _live(kernel, self.pc):
            bits = self.slots[s]
            slots[s] = bits if bits.size == 1 else bits[chosen]
        return Gang(self.pc, self.lanes[chosen], slots)

    def whole_warps(self) -> np.ndarray:
        """Which threads are here with all of their warp."""
        if len(self.lanes) % 32 == 0:  # mostly all are: lanes ascend
            warps = self.lanes.reshape(-1, 32)
            if not (warps[:, 0] & 31).any() and (warps[:, 31] - warps[:, 0] == 31).all():
                return np.ones(len(self.lanes), bool)
        _, warp, count = np.unique(self.lanes // 32, return_inverse=True, return_counts=True)
        return count[warp] == 32


def merged(kernel: Kernel, gangs: list[Gang]) -> Gang:
    """Gangs at one instruction as one."""
    if len(gangs) == 1:
        return gangs[0]
    pc = gangs[0].pc
    lanes = np.concatenate([g.lanes for g in gangs])
    order = np.argsort(lanes, kind="stable")
    slots = list(kernel.initial)
    for s in _live(kernel, pc):
        parts = [g.slots[s] for g in gangs]
        if all(p.size == 1 and p[0] == parts[0][0] for p in parts):
            slots[s] = parts[0]
        else:
            wide = [np.broadcast_to(p, len(g.lanes)) for p, g in zip(parts, gangs, strict=True)]
            slots[s] = np.concatenate(wide)[order]
    return Gang(pc, lanes[order], slots)


def _live(kernel: Kernel, pc: int) -> tuple[int, ...]:
    return kernel.steps[pc].live if pc < len(kernel.steps) else ()
