"""Over which pairs a batch's statistics run: KTO's baseline, Adaptive-DPO's mean margin and scales.

`fastpo.loss` computes one short vector of sums over its batch, the number of pairs last, and hands
it to `reduce` before it goes on. What comes back decides the scope:

* `micro_batch`: nothing is handed out; the statistics are the batch's own, as in released trainers.
* `processes`: the sums of all processes at that moment, one all-reduce of a few floats. KTO's
  baseline is defined so. The number of processes then has a part in the result.
* `running`: an estimate from earlier optimizer steps, fading; the same however the pairs are spread
  over micro-batches, accumulation and processes, and meaningful with one pair a process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.config import TrainConfig

FADING = 0.9  # weight of older sums after each optimizer step: about ten steps count
UNKNOWN_POWER = 1e30  # a scale so large that every margin is nothing: no pair is suspicious yet
PREFIX = "statistics."

Reduce = Callable[[Tensor], Tensor]


class Statistics:
    """Sums of all processes at that moment, for `reduce=` of `fastpo.loss`.

    Args:
        all_reduce: Sums a vector over all processes.

    Attributes:
        latest: The sums `(K,)` that a loss got last, or None.
    """

    def __init__(self, all_reduce: Reduce) -> None:
        self.latest: Tensor | None = None
        self._all_reduce = all_reduce

    def __call__(self, sums: Tensor) -> Tensor:
        """Returns what takes the place of one micro-batch's sums `(K,)`."""
        self.latest = self._all_reduce(sums)
        return self.latest

    def finish_step(self, all_reduce: Reduce) -> None:
        """Ends an optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a checkpoint must hold: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Restores that; entries of other names are left alone."""


class RunningStatistics(Statistics):
    """Sums of earlier optimizer steps, for `reduce=` of `fastpo.loss`.

    With S the sums over all pairs of a step, the estimate afterwards is `0.9 estimate + S`; losses
    divide by its last entry, the number of pairs. Before the first step means are zero and scales
    so large that every margin is nothing, the neutral values. Sums of another length (annotators
    come in after their warm-up) have an estimate of their own.

    Example:
        >>> running = RunningStatistics()
        >>> running(torch.tensor([0.6, 2.0]))  # KTO: sum of gains, pairs
        tensor([0., 1.])
        >>> running.finish_step(lambda sums: sums)
        >>> running(torch.tensor([-1.0, 2.0]))
        tensor([0.6000, 2.0000])
    """

    def __init__(self) -> None:
        super().__init__(self._estimate)
        self._totals: dict[int, Tensor] = {}
        self._step: dict[int, Tensor] = {}

    @torch.no_grad()
    def _estimate(self, sums: Tensor) -> Tensor:
        """Notes one micro-batch's sums `(K,)`, and returns the estimate in their place."""
        size = len(sums)
        noted = sums.detach().double()
        self._step[size] = self._step[size] + noted if size in self._step else noted
        if size not in self._totals:
            neutral = torch.zeros_like(sums)
            neutral[1:-1] = UNKNOWN_POWER
            neutral[-1] = 1.0
            return neutral
        return self._totals[size].to(sums)

    @torch.no_grad()
    def finish_step(self, all_reduce: Reduce) -> None:
        """Moves the estimate on by the step's sums over all processes.

        Args:
            all_reduce: Sums a float64 vector over the processes; called once per kind of sums.
        """
        for size, sums in sorted(self._step.items()):
            sums = all_reduce(sums)
            older = self._totals.get(size)
            if older is not None:
                moved = FADING * older + sums
                sums = torch.where(moved.isfinite().all(), moved, older)  # fp16 overflows at times
            self._totals[size] = sums
        self._step.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the estimates between two steps, for a checkpoint."""
        return {f"{PREFIX}{size}": totals for size, totals in self._totals.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Restores the estimates; entries of other names are left alone."""
        self._step.clear()
        self._totals = {
            int(name.removeprefix(PREFIX)): totals.to(device, torch.float64)
            for name, totals in state.items()
            if name.startswith(PREFIX)
        }


def make_statistics(config: TrainConfig, all_reduce: Reduce | None) -> Statistics | None:
    """Returns what the configured objective's `reduce=` shall be; None: the batch's own sums.

    Args:
        config: The run.
        all_reduce: Sums a vector over all processes; None where there is one.
    """
    if not config.objective.has_batch_statistics:
        return None
    if config.statistics == "running":
        return RunningStatistics()
    if config.statistics == "micro_batch" or all_reduce is None:
        return None
    return Statistics(all_reduce)
