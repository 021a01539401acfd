"""The passes of a step that have no gradients, and what the ledger knows instead of one.

The reference is the model before training. Annotators (`train.annotators`) tell which labels look
wrong: moving averages of the policy, run on the same noisy pairs, or the ledger of past margins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.config import EmaAnnotators, LedgerAnnotators, TrainConfig
from fastpo.models.denoisers import Denoisers, without_dropout
from fastpo.train.distributed import Processes
from fastpo.train.ema import MovingAverages
from fastpo.train.lora_batched import in_one_pass, predict_together
from fastpo.train.optimizer import has_moved
from fastpo.train.state import TrainingState
from fastpo.types import NoisedPair, PairBatch


@dataclass(frozen=True)
class Annotators:
    """Reference and configured annotators, on the models and the state of a run.

    Attributes:
        config: The training's section.
        processes: Device and precision.
        denoisers: The reference, and the policy that averages borrow.
        state: Ledger, averages, and the schedule that tells whether the weights have moved.
    """

    config: TrainConfig
    processes: Processes
    denoisers: Denoisers
    state: TrainingState

    def minority(self, batch: PairBatch, step: int) -> Tensor | None:
        """The minority metric where no annotator runs, `(B,)`: the ledger's, or 0 in a warm-up.

        Args:
            batch: B pairs in host memory.
            step: Finished optimizer steps.
        """
        kind, device = self.config.annotators, self.processes.device
        if isinstance(kind, LedgerAnnotators):
            return self.state.ledger.minority(batch.index).to(device, non_blocking=True)
        if isinstance(kind, EmaAnnotators) and self._averages(step) is None:
            return torch.zeros(len(batch), device=device)
        return None

    def _averages(self, step: int) -> MovingAverages | None:
        """The averages that run in this step; none in the warm-up and before the weights move."""
        kind = self.config.annotators
        if not isinstance(kind, EmaAnnotators) or step < kind.warmup_steps:
            return None
        return self.state.averages["annotators"] if has_moved(self.state.schedule) else None

    def predict(
        self, noised: NoisedPair, batch: PairBatch, step: int, reference_errors: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Runs reference and moving averages without gradients, where the step has any.

        Args:
            noised: B noisy pairs.
            batch: Their conditions, on the device.
            step: Finished optimizer steps.
            reference_errors: The reference's errors `(2B,)` in host memory, if they were computed
                before.

        Returns:
            The reference's predictions `(2B, C, h, w)`, or the errors given, or None; and the
            averages' predictions, each `(2B, C, h, w)`.
        """
        averages = self._averages(step)
        together = in_one_pass(self.config, noised.noisy_latents.numel())
        with torch.no_grad(), self.denoisers.shared_modules():
            if averages is not None and together and self.state.weights.whole:
                reference, predictions = self._in_one_pass(averages, noised, batch)
            else:
                reference = self._reference(noised, batch)
                predictions = self._one_by_one(averages, noised, batch)
        if reference_errors is not None:
            reference = reference_errors.to(noised.target.device, non_blocking=True)
        return reference, predictions

    def _reference(self, noised: NoisedPair, batch: PairBatch) -> Tensor | None:
        if not self.config.runs_reference:
            return None
        with self.denoisers.reference() as model, self.processes.autocast():
            return self.denoisers.predict(model, noised, batch.conditions)

    def _in_one_pass(
        self, averages: MovingAverages, noised: NoisedPair, batch: PairBatch
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        live = self.config.runs_reference
        with without_dropout(self.denoisers.policy), self.processes.autocast():
            predictions = predict_together(
                self.denoisers, averages, noised, batch.conditions, reference=live
            )
        if live:
            return predictions[0], tuple(predictions[1:])
        return None, tuple(predictions)

    def _one_by_one(
        self, averages: MovingAverages | None, noised: NoisedPair, batch: PairBatch
    ) -> tuple[Tensor, ...]:
        if averages is None:
            return ()
        predictions = []
        with without_dropout(self.denoisers.policy) as model:
            for which in range(len(averages.decays)):
                with averages.applied(which), self.processes.autocast():
                    predictions.append(self.denoisers.predict(model, noised, batch.conditions))
        return tuple(predictions)
