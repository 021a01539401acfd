"""The slope of a step's logits: one number, or one for each timestep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slope:
    """The slope of a step's logits.

    Attributes:
        value: That of all pairs, or, with `train.slope_by_timestep`, where margins have the size
            that they have on average.
        sizes: `(K,)` float32, how large margins are in each bin of the timesteps, or None.
        bins: From timesteps to bins.
    """

    value: float
    sizes: Tensor | None = None
    bins: Callable[[Tensor], Tensor] = Tensor.long

    def at(self, timesteps: Tensor) -> Tensor | float:
        """One number, or one a pair, float32, on the timesteps' device."""
        if self.sizes is None:
            return self.value
        slopes = (self.value / self.sizes).to(timesteps.device, non_blocking=True)
        return slopes[self.bins(timesteps)]
