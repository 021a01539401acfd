"""A machine for PTX: kernels by their text, launches on memory of this process."""

from __future__ import annotations

import numpy as np

from .counts import Counts
from .errors import OrderMatters
from .memory import LARGE, GlobalMemory, Space
from .parser import parse
from .scheduler import Scheduler
from .steps import Kernel
from .translate import translate


class Machine:
    """Executes launches.

    Args:
        seed: of the device, which says how approximate instructions err and which products and sums
            are rounded once, and of the order in which programs and warps run.
        schedules: how often a launch is executed, in another order each time, from the same memory.
            The first runs all programs in step, which is the fastest.

    Attributes:
        launches: how many there were.
        counts: what was executed, by kernel, in the first of the orders.
        counters: words that atomics changed, as addresses with their values before and after, of
            the last launch.
    """

    def __init__(self, seed: int = 0, *, schedules: int = 1) -> None:
        self.seed, self.schedules = seed, schedules
        self.launches = 0
        self.counts: dict[str, Counts] = {}
        self.counters: dict[int, tuple[int, int]] = {}
        self._kernels: dict[tuple[str, int], Kernel] = {}

    def kernel(self, text: str) -> Kernel:
        """Translated, once for every device."""
        key = (text, self.seed)
        if key not in self._kernels:
            self._kernels[key] = translate(parse(text), self.seed)
        return self._kernels[key]

    def launch(
        self,
        text: str,
        grid: tuple[int, int, int],
        threads: int,
        parameters: list[bytes],
        spaces: list[Space],
        shared_bytes: int,
    ) -> None:
        """Executes one launch to its end.

        Args:
            text: of a kernel.
            grid: programs in x, y and z.
            threads: of a program.
            parameters: their bytes, in order.
            spaces: memory that may be accessed.
            shared_bytes: of dynamic shared memory.

        Raises:
            PtxError: The text is not known here, or the kernel did what it must not.
        """
        kernel = self.kernel(text)
        widths = kernel.parsed.parameters
        values = {
            name: np.frombuffer(given, f"u{width}")
            for (name, width), given in zip(widths.items(), parameters, strict=True)
        }
        self.launches += 1
        again = [s for s in spaces if len(s.data) <= LARGE] if self.schedules > 1 else []
        before = [space.data.copy() for space in again]
        after: list[np.ndarray] = []
        for k in range(self.schedules):
            for space, data in zip(again, before, strict=True):
                space.data[:] = data
            for space in spaces:
                space.watch = None
            rng = np.random.default_rng((self.seed, self.launches, k)) if k else None
            scheduler = Scheduler(
                kernel, grid, threads, values,
                lambda clocks: GlobalMemory(spaces, clocks, kernel.piece), shared_bytes, rng,
            )  # fmt: skip
            scheduler.run()
            if k == 0:
                after = [space.data.copy() for space in again]
                counts = self.counts.setdefault(kernel.parsed.name, Counts())
                counts.add(scheduler.counts())
            self.counters = scheduler.memory.counters()
            for space, data in zip(again, after, strict=True):
                if not np.array_equal(space.data, data):
                    raise OrderMatters(f"{kernel.parsed.name}: {space.name}, order {k}")
