"""A step's parts on the clock: the trainer's own pieces, each timed where it is called."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastpo.bench.measure import device
from fastpo.config import TrainConfig
from fastpo.noise import PairNoise
from fastpo.train.distributed import Processes
from fastpo.types import NoisedPair, PairBatch

DEVICE = device()
CLOCK = "process" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "wall"


class Parts:
    """Seconds by part of a step; counts nothing until `on`."""

    def __init__(self) -> None:
        self.on = False
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    @staticmethod
    def now() -> float:
        """Seconds: after all of a GPU's work, or, with one CPU thread, of work without waits."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if CLOCK == "process" else time.perf_counter()

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, timed as a part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed


class TimedProcesses(Processes):
    """Processes whose backward pass and clipping are timed as parts."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, parts: Parts) -> None:
        super().__init__(accelerator, config)
        self._parts = parts

    def backward(self, loss: Tensor) -> None:
        with self._parts("backward"):
            super().backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor | float | None:
        with self._parts("optimizer"):
            return super().clip(parameters)


class TimedOptimizer(torch.optim.Optimizer):
    """An optimizer whose updates are timed as a part."""

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Parts) -> None:
        self._optimizer, self._parts = optimizer, parts

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with self._parts("optimizer"):
            self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        with self._parts("optimizer"):
            self._optimizer.zero_grad(set_to_none)


@dataclass(frozen=True)
class TimedNoise(PairNoise):
    """A noise source whose draws are timed as a part."""

    parts: Parts = field(default_factory=Parts)

    def noised_pair(self, batch: PairBatch) -> NoisedPair:
        with self.parts("noise"):
            return super().noised_pair(batch)
