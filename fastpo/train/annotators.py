"""Who judges a training step's pairs beside the policy: reference, moving averages, ledger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from fastpo.config import EmaAnnotators, LedgerAnnotators, TrainConfig
from fastpo.models.denoisers import Denoisers, without_dropout
from fastpo.precision import autocast
from fastpo.train.ema import MovingAverages
from fastpo.train.lora_batched import in_one_pass, predict_together
from fastpo.train.optimizer import has_moved
from fastpo.train.state import TrainingState
from fastpo.types import NoisedPair, PairBatch


@dataclass(frozen=True)
class Judges:
    """The configured judges, on the models and the state of a run.

    Attributes:
        config: The training's section.
        accelerator: Device and precision.
        denoisers: The reference, and the policy that averages borrow.
        state: Ledger, averages, and the schedule that tells whether the weights have moved.
    """

    config: TrainConfig
    accelerator: Accelerator
    denoisers: Denoisers
    state: TrainingState

    def minority(self, batch: PairBatch, step: int) -> Tensor | None:
        """The metric that stands in for annotators, `(B,)`: the ledger's, or zero in a warm-up.

        Args:
            batch: B pairs in host memory.
            step: Finished optimiser steps.
        """
        annotators, device = self.config.annotators, self.accelerator.device
        if isinstance(annotators, LedgerAnnotators):
            return self.state.ledger.minority(batch.index).to(device, non_blocking=True)
        if isinstance(annotators, EmaAnnotators) and not self._averages_judge(step):
            return torch.zeros(len(batch), device=device)
        return None

    def _averages_judge(self, step: int) -> bool:
        """Whether averages do: past their warm-up, where more than rounding tells them apart."""
        ema = self.config.annotators
        warm = isinstance(ema, EmaAnnotators) and step >= ema.warmup_steps
        return warm and has_moved(self.state.schedule)

    def judge(
        self, noised: NoisedPair, batch: PairBatch, step: int, known: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Runs reference and moving averages without gradients, where the step has any.

        Args:
            noised: B noisy pairs.
            batch: Their conditions, on the device.
            step: Finished optimiser steps.
            known: The reference's errors `(2B,)`, where they were computed before, in host memory.

        Returns:
            The reference's errors, if known, or its predictions, or None; the averages'
            predictions.
        """
        live, averages = self.config.runs_reference, None
        if self._averages_judge(step):
            averages = self.state.averages["annotators"]
        together = in_one_pass(self.config, noised.noisy_latents.numel())
        reference = None
        if known is not None:
            reference = known.to(noised.target.device, non_blocking=True)
        with torch.no_grad(), self.denoisers.shared_modules():
            if averages is not None and together and self.state.weights.whole:
                judges = self._in_one_pass(averages, noised, batch, reference=live)
                return (judges[0] if live else reference), tuple(judges[live:])
            if live:
                with self.denoisers.reference() as model, self._autocast():
                    reference = self.denoisers.predict(model, noised, batch.conditions)
            answers = () if averages is None else self._one_by_one(averages, noised, batch)
        return reference, answers

    def _in_one_pass(
        self, averages: MovingAverages, noised: NoisedPair, batch: PairBatch, *, reference: bool
    ) -> list[Tensor]:
        with without_dropout(self.denoisers.policy), self._autocast():
            return predict_together(
                self.denoisers, averages, noised, batch.conditions, reference=reference
            )

    def _one_by_one(
        self, averages: MovingAverages, noised: NoisedPair, batch: PairBatch
    ) -> tuple[Tensor, ...]:
        answers = []
        with without_dropout(self.denoisers.policy) as model:
            for which in range(len(averages.decays)):
                with averages.applied(which), self._autocast():
                    answers.append(self.denoisers.predict(model, noised, batch.conditions))
        return tuple(answers)

    def _autocast(self) -> torch.autocast:
        return autocast(self.accelerator.device, self.config.precision)
