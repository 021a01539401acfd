"""What may look on while a run trains: benchmarks, studies and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpo.train.metrics import StepTable
    from fastpo.train.trainer import Trainer


class Observer:
    """Looks on while a run trains; override what is wanted.

    Every process calls its own observers, in the order given to `train`. What they raise ends the
    run there, as a kill would: everything up to the last checkpoint is kept, and `--resume` goes on
    from it.

    Example:
        >>> class Losses(Observer):
        ...     def __init__(self):
        ...         self.seen = []
        ...
        ...     def on_step(self, step, table, metrics):
        ...         self.seen.append(metrics["loss"])
        >>> losses = Losses()
        >>> train(config, observers=[losses])
    """

    def on_start(self, trainer: Trainer, start: int) -> None:
        """Called once, before the first step; a finished run has none.

        Args:
            trainer: The models, the noise, the loss and the state of the run. To change them
                changes the run.
            start: Optimizer steps that the checkpoint resumed from has done; 0 without one.
        """

    def on_step(self, step: int, table: StepTable, metrics: Mapping[str, float]) -> None:
        """Called after a step, when its metrics, and its checkpoint if one is due, are written.

        Args:
            step: Finished optimizer steps, from 1.
            table: A row for every pair of the step, of all processes alike, on the host.
            metrics: The step's line of `metrics.jsonl`.
        """
