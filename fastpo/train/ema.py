"""Moving averages of the trainable weights: annotators, and a model to export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastpo.config import EmaAnnotators, TrainConfig
from fastpo.train.weights import PolicyWeights


class MovingAverages:
    """Exponential moving averages of trainable weights, one per decay, in float32.

    After optimizer step s (from 1) each average moves by `1 - min(decay, (1 + s) / (10 + s))`, the
    usual ramp, under which 0.9999 is 0.997 at step 3000. Averages are swapped in by exchanging
    storage pointers: nothing is copied, and nothing passes through host memory.

    Args:
        parameters: The tensors that hold the trainable weights by name: the parameters, or, where
            processes share them, this one's parts.
        decays: One decay per average.
        release_gathered: Called before each exchange; must drop all other copies of the weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decays: Sequence[float],
        release_gathered: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters = parameters
        self.release_gathered = release_gathered
        self.decays = tuple(decays)
        self.shadows = [
            [p.detach().clone().float() for p in parameters.values()] for _ in self.decays
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every average towards the current weights, after optimizer step `step` (from 1)."""
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
        self.release_gathered()
        for i, parameter in enumerate(self.parameters.values()):
            parameter.data, shadow[i] = shadow[i], parameter.data

    def named(self, which: int) -> dict[str, Tensor]:
        """Returns average number `which`, by the parameters' names."""
        return dict(zip(self.parameters, self.shadows[which], strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages, named `<number>.<parameter>`."""
        return {
            f"{i}.{name}": tensor
            for i, shadow in enumerate(self.shadows)
            for name, tensor in zip(self.parameters, shadow, strict=True)
        }


def setup_averages(config: TrainConfig, weights: PolicyWeights) -> dict[str, MovingAverages]:
    """The averages that a run keeps, by role: `annotators`, and `export` for `train.ema_decay`."""
    decays: dict[str, Sequence[float]] = {}
    if isinstance(config.annotators, EmaAnnotators):
        decays["annotators"] = config.annotators.decays
    if config.ema_decay is not None:
        decays["export"] = (config.ema_decay,)
    return {
        role: MovingAverages(weights.local, several, weights.release_gathered)
        for role, several in decays.items()
    }


def exported_weights(
    weights: PolicyWeights, averages: Mapping[str, MovingAverages]
) -> dict[str, dict[str, Tensor]]:
    """This process's parts of what a run exports, by folder: `final`, and `ema` if it keeps one."""
    folders = {"final": weights.local}
    if "export" in averages:
        folders["ema"] = averages["export"].named(0)
    return folders
