"""A slope that follows the margins: `train.auto_slope`.

How large margins get differs by orders of magnitude between models, rates and stages of a run, and
with them how many pairs a fixed slope leaves with a gradient. Here the slope beta is moved so that
a stated share s of the pairs has a logit `|beta d| > 4`. If `|d|` is distributed exponentially with
mean m, that share is `exp(-4 / (beta m))`, so

    beta = 4 / (m ln(1 / s))

with m a running mean over about ten steps of all processes' pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo.config import TrainConfig
from fastpo.train.metrics import SATURATED, StepTable

FADING = 0.9  # weight of older margins after each step
PACE = 0.1  # part of the way to the wanted slope that is gone in a step, in its logarithm
RANGE = 100.0  # the slope stays within this factor of where it began
NAME = "auto_slope"


class AutoSlope:
    """The slope of the next step, from the margins of those before.

    Each process makes it from the table of all processes' pairs, so it never differs, and a
    checkpoint holds it. Steps before the weights have moved, whose margins are zero, do not count.

    Args:
        start: The slope of the first step.
        share: The share of pairs to be saturated, in (0, 1).

    Attributes:
        value: The slope.

    Example:
        >>> slope = AutoSlope(2500.0, 0.1)
        >>> slope.follow(torch.tensor([0.01, -0.02]))
        >>> round(slope.value)  # a tenth of the way, in the logarithm, to 4 / (0.015 ln 10) = 115.8
        1839
    """

    def __init__(self, start: float, share: float) -> None:
        self.value = start
        self._start, self._share = start, share
        self._total = self._weight = 0.0

    def update(self, table: StepTable) -> None:
        """Moves the slope on by a step's margins."""
        if table.moved:
            self.follow(table["margin"])

    def follow(self, margins: Tensor) -> None:
        """Moves the slope on by margins `(N,)`; those that are not finite are left out."""
        sizes = margins.double().abs()
        sizes = sizes[sizes.isfinite()]
        if not len(sizes) or not sizes.any():
            return
        # Sorted, so that the sum rounds alike however pairs are spread over processes.
        self._total = FADING * self._total + sizes.sort().values.sum().item()
        self._weight = FADING * self._weight + len(sizes)
        wanted = SATURATED * self._weight / (self._total * math.log(1.0 / self._share))
        moved = self.value * (wanted / self.value) ** PACE
        self.value = min(max(moved, self._start / RANGE), self._start * RANGE)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns slope and running mean, for a checkpoint."""
        numbers = [self.value, self._total, self._weight]
        return {NAME: torch.tensor(numbers, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them; entries of other names are left alone."""
        if NAME in state:
            self.value, self._total, self._weight = state[NAME].tolist()


def make_slope(config: TrainConfig) -> AutoSlope | None:
    """Returns the slope that moves, or None where the run's is fixed."""
    start = config.objective.logit_slope()
    if config.auto_slope is None or start is None:
        return None
    return AutoSlope(start, config.auto_slope)
