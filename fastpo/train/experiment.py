"""One run's parts, and what ends it where numbers are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastpo.config import Config
from fastpo.errors import NonFiniteLossError, NonFiniteWeightsError
from fastpo.train.checkpoint import Origin
from fastpo.train.checkpoint_folders import Rotation, list_checkpoints, step_of
from fastpo.train.data import TrainingData
from fastpo.train.distributed import Processes
from fastpo.train.finite import non_finite_weights
from fastpo.train.held_out import HeldOut
from fastpo.train.metrics import StepTable
from fastpo.train.resume import ResumePoint
from fastpo.train.run_folder import RunFolder
from fastpo.train.samples import TrainingSamples
from fastpo.train.trainer import Trainer


@dataclass(frozen=True)
class Experiment:
    """One run's parts, from its configuration to its folder.

    Attributes:
        config: The resolved configuration.
        processes: The processes that train.
        folder: Where results go.
        data: What is read, and how many steps that makes.
        trainer: What a step uses.
        held_out: Measures on the pairs that are held out.
        samples: Sample images while it trains.
        rotation: Removes old checkpoints.
        model: The model's fingerprint.
        point: Where the run goes on; None if it begins.
    """

    config: Config
    processes: Processes
    folder: RunFolder
    data: TrainingData
    trainer: Trainer
    held_out: HeldOut
    samples: TrainingSamples
    rotation: Rotation
    model: str
    point: ResumePoint | None

    @property
    def origin(self) -> Origin:
        """What a checkpoint of this run is computed from."""
        data = self.data
        changes = () if self.point is None else self.point.changes
        return Origin(
            self.config, data.cache.fingerprint, data.micro_batches_per_step, self.model, changes
        )

    @property
    def stopped(self) -> bool:
        """Whether `train.early_stop` has ended the run."""
        return self.trainer.state.best.is_exhausted(self.config.train.early_stop)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` finished steps, once it is measured."""
        train, best = self.config.train, self.trainer.state.best
        due = step % train.checkpoint_every == 0 or step == self.data.total_steps
        return due or self.stopped or (train.keep_best and best.step == step)


def check_finite(run: Experiment, table: StepTable, step: int) -> None:
    """Stops at a NaN or infinite loss or gradient, before anything of this step is kept.

    Raises:
        NonFiniteLossError: The text names the pairs and the last good checkpoint.
    """
    bad, what = table.non_finite(), "loss"
    # fp16 gradients overflow now and then; the scaler leaves such a step out.
    if not bad and not math.isfinite(table.grad_norm) and run.processes.scaler is None:
        bad, what = table.index.tolist(), "gradient"
    if not bad:
        return
    names = [run.data.cache.pair_ids[i] for i in bad[:8]]
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    raise NonFiniteLossError(
        f"the {what} of step {step + 1} is not finite, in micro-batches with the pairs "
        f"{', '.join(names)}{more}; {_way_back(run, step + 1)}"
    )


def check_finite_weights(run: Experiment, step: int) -> None:
    """Stops before weights or averages that are not finite are written (collective).

    Raises:
        NonFiniteWeightsError: The text names the first of them and the last good checkpoint.
    """
    bad = non_finite_weights(run.trainer.state, run.processes)
    if not bad:
        return
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise NonFiniteWeightsError(
        f"after step {step}, {bad[0]}{more} is not finite and was not saved; {_way_back(run, step)}"
    )


def _way_back(run: Experiment, step: int) -> str:
    """What helps after NaN in step `step`."""
    kept = [path for path in list_checkpoints(run.folder.path) if step_of(path) < step]
    lower = f"--change train.optim.lr={run.config.train.optim.lr / 2:g}"
    if not kept:
        return "no checkpoint was written yet. A lower train.optim.lr or slope usually helps."
    return (
        f"the last good checkpoint is {kept[-1]}. A lower rate usually helps: go on from there "
        f"with --resume {lower} (a lower slope needs a new run)."
    )
