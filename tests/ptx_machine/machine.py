"""A machine for PTX: kernels by their text, launches on memory of this process."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .memory import GlobalMemory, Space
from .parser import parse
from .scheduler import Scheduler
from .steps import Kernel
from .translate import translate


class Machine:
    """Executes launches.

    Attributes:
        seed: of the device, which says how approximate instructions err and which products and sums
            are rounded once, and of the order in which programs and warps run.
        in_step: whether all programs run in step instead, which is faster.
        launches: how many there were.
        executed: how often threads executed each opcode, by kernel.
    """

    def __init__(self, seed: int = 0, *, in_step: bool = False) -> None:
        self.seed, self.in_step = seed, in_step
        self.order_seed = seed
        self.launches = 0
        self.executed: dict[str, Counter[str]] = {}
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
        rng = None
        if not self.in_step:
            rng = np.random.default_rng((self.order_seed, self.launches))
        scheduler = Scheduler(
            kernel, grid, threads, values, 
            lambda clocks: GlobalMemory(spaces, clocks, kernel.piece), shared_bytes, rng,
        )  # fmt: skip
        scheduler.run()
        self.executed.setdefault(kernel.parsed.name, Counter()).update(scheduler.counts())
