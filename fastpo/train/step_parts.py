"""What a step is made of: models, noise, loss, state, and what each pass needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastpo.config import Objective, TrainConfig
from fastpo.loss import PairLoss
from fastpo.models.denoisers import Denoisers
from fastpo.noise import PairNoise
from fastpo.train.annotators import Annotators
from fastpo.train.distributed import Processes
from fastpo.train.logits import logit_sizes
from fastpo.train.metrics import SparseColumns, table_rows
from fastpo.train.objective import LossFunction
from fastpo.train.slope import Slope
from fastpo.train.state import TrainingState
from fastpo.types import NoisedPair, PairBatch, PairPredictions


class ErrorLookup(Protocol):
    """The reference's errors, computed before; `ReferenceErrors` is one."""

    def lookup(self, batch: PairBatch) -> Tensor:
        """Returns the errors on this visit of the pairs, `(2B,)` float32, in host memory."""
        ...

    @property
    def visits(self) -> int:
        """Visits of the pairs that it covers, from the first."""
        ...


@dataclass(frozen=True)
class JudgedBatch:
    """All that the loss of a micro-batch needs besides the policy's predictions, on the device.

    Attributes:
        batch: B pairs, some of them without their caption.
        noised: What the policy sees and should answer.
        reference: The reference's predictions `(2B, C, h, w)`, its errors `(2B,)`, or None.
        annotators: The moving averages' predictions, each `(2B, C, h, w)`.
        minority: `(B,)` minority metric in the annotators' place, or None.
        weight: `(B,)` what multiplies each pair's loss: its min-SNR weight, the weight that the
            data set gives it, the product of both, or None.
    """

    batch: PairBatch
    noised: NoisedPair
    reference: Tensor | None
    annotators: tuple[Tensor, ...]
    minority: Tensor | None
    weight: Tensor | None


@dataclass(frozen=True)
class StepParts:
    """What an optimizer step uses, and the state that it changes.

    Attributes:
        config: The training's section.
        seed: The run's seed; keys the dropout.
        processes: Device, precision, and what processes exchange.
        noise: Shared timesteps and noise.
        empty_prompt: The conditions of a dropped caption, each `(1, ...)`.
        denoisers: Policy and reference.
        policy: The policy as the launcher wrapped it.
        annotators: The passes without gradients.
        reference_errors: The reference's errors, where they were computed before.
        loss: The objective.
        state: Everything a checkpoint holds.
    """

    config: TrainConfig
    seed: int
    processes: Processes
    noise: PairNoise
    empty_prompt: dict[str, Tensor]
    denoisers: Denoisers
    policy: nn.Module
    annotators: Annotators
    reference_errors: ErrorLookup | None
    loss: LossFunction
    state: TrainingState

    @property
    def objective(self) -> Objective:
        """The objective with the slope of the moment."""
        slope, objective = self.state.slope, self.config.objective
        return objective if slope is None else objective.with_slope(slope.value)

    def judged(self, batch: PairBatch, step: int) -> JudgedBatch:
        """Noise, reference and annotators of a micro-batch: everything but the policy.

        Args:
            batch: B pairs in host memory.
            step: Finished optimizer steps.
        """
        minority = self.annotators.minority(batch, step)
        errors = None if self.reference_errors is None else self.reference_errors.lookup(batch)
        batch, noised = self.noised(batch)
        reference, annotators = self.annotators.predict(noised, batch, step, errors)
        weight = self.noise.snr_weight(noised.index, self.config.snr_gamma)
        if batch.pair_weight is not None:
            weight = batch.pair_weight if weight is None else weight * batch.pair_weight
        return JudgedBatch(batch, noised, reference, annotators, minority, weight)

    def noised(self, batch: PairBatch) -> tuple[PairBatch, NoisedPair]:
        """Brings pairs to the device, draws their noise, and takes captions that are dropped."""
        batch = batch.to(self.processes.device)
        noised = self.noise.noised_pair(batch)
        rate = self.config.empty_prompt_rate
        return self.noise.drop_captions(batch, rate, self.empty_prompt), noised

    def pair_loss(self, judged: JudgedBatch, policy: Tensor) -> PairLoss:
        """The objective of a micro-batch, from the policy's predictions `(2B, C, h, w)`."""
        predictions = PairPredictions(policy, judged.reference, judged.annotators)
        target, beta = judged.noised.target, self._beta(judged.noised.index)
        return self.loss(predictions, target, judged.minority, judged.weight, beta)

    def rows(
        self, judged: JudgedBatch, out: PairLoss, sparse: SparseColumns | None = None
    ) -> Tensor:
        """The micro-batch's rows of the step's table, from the loss just made; see `table_rows`."""
        statistics = self.state.statistics
        totals = None if statistics is None else statistics.latest
        logits = logit_sizes(self.config.objective, out, totals)
        size = self.config.micro_batch_size
        return table_rows(judged.batch, judged.noised.index, out, size, logits, sparse)

    def slope(self) -> Slope | None:
        """The slope of this step's logits, None where there is no logit."""
        beta, ledger = self.objective.logit_slope(), self.state.ledger
        if beta is None or not self.config.slope_by_timestep:
            return None if beta is None else Slope(beta)
        return Slope(beta, ledger.bin_sizes(), ledger.bins)

    def fresh_slope(self, timesteps: Tensor) -> Tensor | float:
        """The unit of gradient scales: `|dloss/de|` where policy and reference agree.

        With `train.slope_by_timestep` each pair's own, as its beta is: `(B,)` float64.

        Args:
            timesteps: `(B,)`, the pairs' places in the noise schedule.
        """
        objective, slope = self.objective, self.slope()
        if slope is None or slope.sizes is None:
            return objective.fresh_slope()
        sizes = slope.sizes.double().tolist()
        units = [objective.with_slope(slope.value / size).fresh_slope() for size in sizes]
        of_bins = torch.tensor(units, dtype=torch.float64).to(timesteps.device, non_blocking=True)
        return of_bins[slope.bins(timesteps)]

    def _beta(self, timesteps: Tensor) -> Tensor | float | None:
        """What takes the objective's beta's place; None where that is what holds."""
        if self.state.slope is None and not self.config.slope_by_timestep:
            return None
        slope = self.slope()
        return None if slope is None else slope.at(timesteps)

    def update(self) -> Tensor | float | None:
        """Behind each backward pass: in a step's last one the weights move.

        Returns:
            The gradient's norm before clipping; None in other passes.
        """
        norm = self.processes.clip(self.state.trainable.values())
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        return norm
