"""Moving averages of the trainable weights: annotators, and a model to export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverages:
    """Exponential moving averages of trainable weights, one per decay, in float32.

    After optimiser step s (from 1) each average moves by `1 - min(decay, (1 + s) / (10 + s))`, the
    usual ramp, under which 0.9999 is 0.997 at step 3000. Averages are swapped in by exchanging
    storage pointers: nothing is copied, and nothing passes through host memory.

    Args:
        parameters: The trainable parameters by name.
        decays: One decay per average.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decays: Sequence[float]) -> None:
        self.parameters = parameters
        self.decays = tuple(decays)
        self.shadows = [
            [p.detach().clone().float() for p in parameters.values()] for _ in self.decays
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every average towards the current weights, after optimiser step `step` (from 1)."""
        current = [p.detach() for p in self.parameters.values()]
        pace = [1.0 - min(decay, (1 + step) / (10 + step)) for decay in self.decays]
        if all(p.dtype == torch.float32 for p in current):
            for part, shadow in zip(pace, self.shadows, strict=True):
                torch._foreach_lerp_(shadow, current, part)
            return
        for i, weight in enumerate(current):  # one float32 copy at a time
            exact = weight.float()
            for part, shadow in zip(pace, self.shadows, strict=True):
                shadow[i].lerp_(exact, part)

    @contextmanager
    def applied(self, which: int) -> Iterator[None]:
        """Runs the block with average number `which` in the model's place."""
        self._swap(self.shadows[which])
        try:
            yield
        finally:
            self._swap(self.shadows[which])

    def _swap(self, shadow: list[Tensor]) -> None:
        for i, parameter in enumerate(self.parameters.values()):
            parameter.data, shadow[i] = shadow[i], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages, named `<number>.<parameter>`."""
        return {
            f"{i}.{name}": tensor
            for i, shadow in enumerate(self.shadows)
            for name, tensor in zip(self.parameters, shadow, strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the averages in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
