"""One optimizer step: noise, policy, reference, annotators, loss, update.

Read `Trainer.training_step` first: it is the whole algorithm on one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpo.config import Config, EmaAnnotators
from fastpo.ledger import PairLedger
from fastpo.models.denoisers import loading_dtype, setup_denoisers
from fastpo.models.folder import ModelFolder
from fastpo.models.lora_start import start_from_lora
from fastpo.noise import dropped_conditions, setup_noise
from fastpo.reference_cache.open import open_for_run
from fastpo.train.annotators import Annotators
from fastpo.train.auto_slope import make_slope
from fastpo.train.batch_statistics import make_statistics
from fastpo.train.data import TrainingData
from fastpo.train.distributed import Processes
from fastpo.train.ema import setup_averages
from fastpo.train.live_share import LiveShare
from fastpo.train.metrics import StepResult, StepTable, with_ending
from fastpo.train.objective import build_loss
from fastpo.train.optimizer import has_moved, setup_schedule
from fastpo.train.sparse import SparseStep, check_dropout
from fastpo.train.state import TrainingState
from fastpo.train.step_parts import StepParts
from fastpo.train.winner_watch import make_watch
from fastpo.types import PairBatch, pair_key


class StepLeftError(Exception):
    """A signal ends the run between two micro-batches; the state is that of before the step."""


@dataclass(frozen=True)
class Trainer(StepParts):
    """The steps, on their parts."""

    def training_step(self, batch: PairBatch, step: int) -> tuple[Tensor, Tensor]:
        """Noise, reference, annotators, policy, loss.

        Args:
            batch: B pairs in host memory.
            step: Finished optimizer steps.

        Returns:
            The loss to differentiate, and `(micro_batch_size, K)` float64 rows of `COLUMNS`; rows
            that a short micro-batch leaves over hold the index -1.
        """
        judged = self.judged(batch, step)
        with self.processes.autocast():
            policy = self.denoisers.predict(self.policy, judged.noised, judged.batch.conditions)
        out = self.pair_loss(judged, policy)
        # A short micro-batch weighs by its pairs, so that every pair weighs the same.
        return out.loss * (len(batch) / self.config.micro_batch_size), self.rows(judged, out)

    def optimizer_step(
        self,
        batches: Iterator[PairBatch],
        step: int,
        must_end: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Forward and backward over the step's micro-batches, then one update of the weights.

        Args:
            batches: This process's micro-batches, in host memory.
            step: Finished optimizer steps.
            must_end: Whether a signal asks this process to end.

        Raises:
            StepLeftError: A single process must end, and has not begun the step's last micro-batch.
                Several processes tell one another in the result instead.
        """
        processes, config, state = self.processes, self.config, self.state
        moved, slope, cost = has_moved(state.schedule), self.slope(), None

        def check() -> None:
            if processes.count == 1 and must_end():
                raise StepLeftError

        if config.backward == "all":
            tables, norm = self._dense_step(batches, step, check)
        else:
            tables, norm, cost = SparseStep(self, step, check).run(batches)
        assert norm is not None, "accelerate exchanges gradients in a step's last micro-batch"
        if state.statistics is not None:
            state.statistics.finish_step(processes.sum)
        rate = float(state.schedule.get_last_lr()[0])
        if not processes.update_was_skipped:
            state.schedule.step()
            for averages in state.averages.values():
                averages.update(step + 1 - state.round.start)
        rows = torch.cat(tables)
        if processes.count > 1:
            rows = processes.gather(with_ending(rows, must_end()))
        return StepResult(rows, norm, rate, moved, slope, cost)

    def _dense_step(
        self, batches: Iterator[PairBatch], step: int, check: Callable[[], None]
    ) -> tuple[list[Tensor], Tensor | float | None]:
        """Every pair with a backward pass; returns the rows and the gradient's norm."""
        config, processes, tables = self.config, self.processes, []
        norm: Tensor | float | None = None
        for micro in range(config.accumulation_steps):
            check()
            with processes.accumulate(self.policy):
                if config.lora.dropout > 0.0:
                    self._seed_dropout(step * config.accumulation_steps + micro)
                loss, rows = self.training_step(next(batches), step)
                processes.backward(loss)
                tables.append(rows)
                norm = self.update()
        return tables, norm

    def _seed_dropout(self, local: int) -> None:
        """Keys dropout by the micro-batch's number in the stream: a resumed run repeats it."""
        number = local * self.processes.count + self.processes.rank
        torch.manual_seed(pair_key(f"dropout {self.seed} {number}"))

    def record(self, table: StepTable) -> None:
        """Keeps what later steps need of this one: the ledger's votes above all."""
        self.state.ledger.update(table.index, table.votes, table["timestep"])
        if self.state.slope is not None:
            self.state.slope.update(table)
        if self.state.live_share is not None:
            self.state.live_share.update(table)
        if isinstance(self.config.annotators, EmaAnnotators):
            self.state.last_minority[table.index] = table["minority"].float()


def setup_trainer(
    config: Config, model: ModelFolder, data: TrainingData, processes: Processes
) -> Trainer:
    """Loads the models and puts everything together, in the order data flows.

    Raises:
        FastPOError: The model, the noise's options or the reference's errors do not serve the run.
    """
    train, device, num_pairs = config.train, processes.device, len(data.cache)
    noise = setup_noise(config, model, device)
    errors = open_for_run(config, model, data.cache, noise, data.sampler, processes.count)
    torch.manual_seed(config.seed)  # the adapters' first values
    denoiser = model.family.load_denoiser(model, dtype=loading_dtype(train))
    denoisers = setup_denoisers(model.family, denoiser, train, needs_reference=train.runs_reference)
    check_dropout(denoisers.policy, train)
    if config.model.lora is not None:
        start_from_lora(model.family, denoisers.policy, config.model.lora)
    if denoisers.frozen is not None:
        nn.Module.to(denoisers.frozen, device)
    trainable = denoisers.trainable
    optimizer = processes.choose_optimizer(trainable, seed=config.seed)
    schedule = setup_schedule(optimizer, train.optim, data.total_steps - data.round.start)
    policy, optimizer, weights = processes.prepare_policy(denoisers.policy, trainable, optimizer)
    reduce = make_statistics(train, processes.sum if processes.count > 1 else None)
    slope = make_slope(train)
    state = TrainingState(
        trainable=trainable,
        weights=weights,
        optimizer=optimizer,
        schedule=schedule,
        ledger=PairLedger(
            num_pairs, min_visits=train.ledger_min_visits, num_timesteps=len(noise.schedule)
        ),
        last_minority=torch.full((num_pairs,), math.nan),
        turned=data.cache.turned,
        round=data.round,
        began=torch.zeros(num_pairs, dtype=torch.bool),
        averages=setup_averages(train, weights),
        scaler=processes.scaler,
        statistics=reduce,
        slope=slope,
        live_share=None if train.backward == "all" else LiveShare(train),
        winners=make_watch(train),
    )
    return Trainer(
        config=train,
        seed=config.seed,
        processes=processes,
        noise=noise,
        empty_prompt=dropped_conditions(config, model, data.cache.empty_prompt(device)),
        denoisers=denoisers,
        policy=policy,
        annotators=Annotators(train, processes, denoisers, state),
        reference_errors=errors,
        loss=build_loss(train, reduce),
        state=state,
    )
