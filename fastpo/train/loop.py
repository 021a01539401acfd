"""Preference alignment of diffusion models, read from top to bottom.

    fastpo train CONFIG [--set a.b=c] [--resume]
    python -m fastpo.train CONFIG
    torchrun --nproc_per_node 2 -m fastpo.train CONFIG
    accelerate launch -m fastpo.train CONFIG
    deepspeed --num_gpus 2 --module fastpo.train CONFIG

An optimiser step s takes micro-batches `[s W A, (s + 1) W A)` of one endless stream (W processes,
A accumulation steps); process r takes those whose number is r modulo W. The host reads the device
once a step: one table with a row per pair, from which every metric and the ledger are made. (fp16
adds the gradient scaler's own check.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastpo.config import Config, EmaAnnotators
from fastpo.data.cache import PairCache
from fastpo.data.loader import Waits, make_loader
from fastpo.data.sampler import PairSampler, count_steps
from fastpo.errors import CheckpointError, NonFiniteLossError
from fastpo.ledger import PairLedger
from fastpo.models.denoisers import (
    Denoisers,
    setup_denoisers,
)
from fastpo.models.export import export_policy
from fastpo.models.folder import ModelFolder
from fastpo.noise import PairNoise, setup_noise
from fastpo.precision import autocast
from fastpo.reference_cache.compute import open_for_run
from fastpo.reference_cache.store import ReferenceErrors
from fastpo.train.annotators import Judges
from fastpo.train.banner import show_banner
from fastpo.train.batch_statistics import RunningStatistics, make_statistics
from fastpo.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fastpo.train.distributed import (
    all_reduce_sum,
    choose_optimizer,
    gather,
    gradient_norm,
    joined,
    prepare_policy,
)
from fastpo.train.ema import exported_weights, setup_averages
from fastpo.train.metrics import StepTable, table_rows
from fastpo.train.objective import LossFunction, build_loss
from fastpo.train.optimizer import has_moved, setup_schedule
from fastpo.train.run_folder import RunFolder, step_progress
from fastpo.train.state import TrainingState
from fastpo.types import PairBatch, PairPredictions, pair_key


@dataclass(frozen=True)
class Trainer:
    """What a training step uses.

    Attributes:
        config: The resolved configuration.
        accelerator: Processes, device and precision.
        cache: The prepared pairs.
        sampler: The endless stream of micro-batches.
        noise: Shared timesteps and noise.
        denoisers: Policy and reference.
        policy: The policy as the launcher wrapped it.
        state: Everything a checkpoint holds.
        loss: The objective.
        empty_prompt: The conditions that the empty prompt gives, each `(1, ...)`.
        reference_errors: The reference's errors, where they were computed before.
    """

    config: Config
    accelerator: Accelerator
    cache: PairCache
    sampler: PairSampler
    noise: PairNoise
    denoisers: Denoisers
    policy: nn.Module
    state: TrainingState
    loss: LossFunction
    empty_prompt: dict[str, Tensor]
    reference_errors: ReferenceErrors | None = None

    @property
    def group(self) -> int:
        """Micro-batches of one optimiser step, over all processes."""
        return self.accelerator.num_processes * self.config.train.accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return count_steps(self.config, self.sampler, self.group)

    def training_step(self, batch: PairBatch, step: int) -> tuple[Tensor, Tensor]:
        """Noise, policy, reference, annotators, loss.

        Args:
            batch: B pairs in host memory.
            step: Finished optimiser steps.

        Returns:
            The loss to differentiate, and `(micro_batch_size, K)` float64 rows of `COLUMNS`; rows
            that a short micro-batch leaves over hold the index -1.
        """
        judges = Judges(self.config.train, self.accelerator, self.denoisers, self.state)
        minority = judges.minority(batch, step)
        known = None if self.reference_errors is None else self.reference_errors.lookup(batch)
        batch = batch.to(self.accelerator.device)
        noised = self.noise.noised_pair(batch)
        rate = self.config.train.empty_prompt_rate
        batch = self.noise.drop_captions(batch, rate, self.empty_prompt)
        reference, annotators = judges.judge(noised, batch, step, known)
        with autocast(self.accelerator.device, self.config.train.precision):
            policy = self.denoisers.predict(self.policy, noised, batch.conditions)
        predictions = PairPredictions(policy, reference, annotators)
        weight = self.noise.snr_weight(noised.index, self.config.train.snr_gamma)
        out = self.loss(predictions, noised.target, minority, weight)
        rows = table_rows(batch, noised.index, out, self.config.train.micro_batch_size)
        # A short micro-batch weighs by its pairs, so that every pair weighs the same.
        return out.loss * (len(batch) / self.config.train.micro_batch_size), rows


def setup_trainer(config: Config, accelerator: Accelerator) -> Trainer:
    """Loads the cache and the models and puts everything together, in the order data flows."""
    train = config.train
    model = ModelFolder.resolve(config.model)
    cache = PairCache.open(config, model=model)
    sampler = PairSampler(cache.bucket, train.micro_batch_size, config.seed)
    noise = setup_noise(config, model, accelerator.device)
    known = open_for_run(config, model, cache, noise, sampler, accelerator.num_processes)
    torch.manual_seed(config.seed)  # the adapters' first values
    denoiser = model.family.load_denoiser(model)
    denoisers = setup_denoisers(model.family, denoiser, train, needs_reference=train.runs_reference)
    if denoisers.frozen is not None:
        denoisers.frozen.to(accelerator.device)
    trainable = denoisers.trainable
    optimizer = choose_optimizer(accelerator, trainable, train, seed=config.seed)
    steps = count_steps(config, sampler, accelerator.num_processes * train.accumulation_steps)
    schedule = setup_schedule(optimizer, train.optim, steps)
    policy, prepared, weights = prepare_policy(accelerator, denoisers.policy, trainable, optimizer)
    span = partial(all_reduce_sum, accelerator) if accelerator.num_processes > 1 else None
    reduce = make_statistics(train, span)
    state = TrainingState(
        trainable=trainable,
        weights=weights,
        optimizer=prepared,
        schedule=schedule,
        ledger=PairLedger(
            len(cache), min_visits=train.ledger_min_visits, num_timesteps=len(noise.schedule)
        ),
        metric=torch.full((len(cache),), math.nan),
        averages=setup_averages(train, weights),
        scaler=accelerator.scaler,
        statistics=reduce if isinstance(reduce, RunningStatistics) else None,
    )
    return Trainer(
        config=config,
        accelerator=accelerator,
        cache=cache,
        sampler=sampler,
        noise=noise,
        denoisers=denoisers,
        policy=policy,
        state=state,
        loss=build_loss(train, reduce),
        empty_prompt=cache.empty_prompt(accelerator.device),
        reference_errors=known,
    )


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> Path:
    """Trains, and writes `final/` (and `ema/`), `metrics.jsonl`, `minority.csv` and checkpoints.

    Args:
        config: The experiment.
        resume: Go on from the newest checkpoint of the run's folder, if it has one; a finished run
            is left as it is.
        overwrite: Replace an earlier run in the same folder.
        progress: Show the banner and a progress bar.

    Returns:
        The run's folder.

    Raises:
        FastPOError: Anything the user can mend: the configuration, the cache, the model, a
            checkpoint of another run or of more steps, a run already in the folder, or a
            non-finite loss.
    """
    with joined(config.train) as accelerator:
        return _train(config, accelerator, resume=resume, overwrite=overwrite, progress=progress)


def _train(
    config: Config, accelerator: Accelerator, *, resume: bool, overwrite: bool, progress: bool
) -> Path:
    main = accelerator.is_main_process
    run = RunFolder(config.train.output_dir, main=main)
    run.check_free(resume=resume, overwrite=overwrite)
    trainer = setup_trainer(config, accelerator)
    if overwrite and not resume:
        run.clear()
    checkpoints = list_checkpoints(run.path) if resume else []
    start = 0
    if checkpoints:
        start = load_checkpoint(
            checkpoints[-1], trainer.state, config, trainer.cache.fingerprint, trainer.group
        )
    check_steps(config, start, trainer.total_steps)
    run.sweep()
    accelerator.wait_for_everyone()
    if start == trainer.total_steps and has_results(trainer, run):
        if main:
            print(f"{run.path} is finished: all {start} steps are done")
        return run.path
    run.begin(config, start)
    if main and config.data.flip_rate > 0:
        mask = trainer.cache.write_flip_mask(otherwise=run.path)
        if mask.parent != trainer.cache.folder:
            print(f"{trainer.cache.folder} is read-only; the flipped labels: {mask}")
    if main and progress:
        show_banner(trainer, start)
    accelerator.init_trackers("fastpo")
    run_steps(trainer, run, start, progress=progress and main)
    finish(trainer, run)
    accelerator.wait_for_everyone()
    return run.path


def check_steps(config: Config, start: int, total: int) -> None:
    """Refuses to go on with a run that has done more than is asked for.

    Raises:
        CheckpointError: The text names the key that asks for too little.
    """
    if start > total:
        key = "train.epochs" if config.train.max_steps is None else "train.max_steps"
        raise CheckpointError(
            f"{config.train.output_dir} has done {start} steps, {key} asks for {total}: raise it "
            "to go on, or set another train.output_dir"
        )


def has_results(trainer: Trainer, run: RunFolder) -> bool:
    """Whether the main process finds what `finish` writes; every process gets its answer."""
    exports = exported_weights(trainer.state.weights, trainer.state.averages)
    found = torch.zeros(1, device=trainer.accelerator.device)
    found += run.main and run.has_results(exports)
    return bool(all_reduce_sum(trainer.accelerator, found))


def run_steps(trainer: Trainer, run: RunFolder, start: int, *, progress: bool) -> None:
    """The loop over optimiser steps `start..total_steps-1`."""
    config = trainer.config.train
    total = trainer.total_steps
    loader = make_loader(
        trainer.cache,
        trainer.sampler,
        rank=trainer.accelerator.process_index,
        world_size=trainer.accelerator.num_processes,
        accumulation_steps=config.accumulation_steps,
        start_step=start,
        total_steps=total,
        workers=config.loader_workers,
        pin_memory=trainer.accelerator.device.type == "cuda",
    )
    with Waits(loader) as batches, step_progress(total, start, show=progress) as advance:
        for step in range(start, total):
            began = time.perf_counter()
            moved = has_moved(trainer.state.schedule)
            table = optimizer_step(trainer, batches, step)
            check_finite(trainer, run, table, step)
            record(trainer, table, moved=moved)
            metrics = table.metrics(
                step=step + 1,
                epoch=(step + 1) * trainer.group / trainer.sampler.micro_batches_per_epoch,
                seconds=time.perf_counter() - began,
                waited=batches.taken(),
            )
            run.log(metrics)
            trainer.accelerator.log(metrics, step=step + 1)
            advance(metrics)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                checkpoint(trainer, run, step + 1)


def check_finite(trainer: Trainer, run: RunFolder, table: StepTable, step: int) -> None:
    """Stops at a NaN or infinite loss or gradient, before anything of this step is kept."""
    bad, what = table.non_finite(), "loss"
    # fp16 gradients overflow now and then; the scaler leaves such a step out.
    if not bad and not math.isfinite(table.grad_norm) and trainer.state.scaler is None:
        bad, what = table.index.tolist(), "gradient"
    if not bad:
        return
    names = [trainer.cache.pair_ids[i] for i in bad[:8]]
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    kept = sorted((run.path / "checkpoints").glob("step-*"))
    raise NonFiniteLossError(
        f"the {what} of step {step + 1} is not finite, in micro-batches with the pairs "
        f"{', '.join(names)}{more}; "
        + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet")
        + ". A lower train.optim.lr or slope usually helps."
    )


def optimizer_step(trainer: Trainer, batches: Iterator[PairBatch], step: int) -> StepTable:
    """Forward and backward over the step's micro-batches, then one update of the weights."""
    accelerator, config, state = trainer.accelerator, trainer.config.train, trainer.state
    rows: list[Tensor] = []
    norm: Any = 0.0
    for micro in range(config.accumulation_steps):
        with accelerator.accumulate(trainer.policy):
            if config.lora.dropout > 0.0:
                seed_dropout(trainer, step * config.accumulation_steps + micro)
            loss, table = trainer.training_step(next(batches), step)
            accelerator.backward(loss)
            rows.append(table)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(
                    state.trainable.values(), config.optim.max_grad_norm
                )
            state.optimizer.step()
            state.optimizer.zero_grad()
    if state.statistics is not None:
        state.statistics.finish_step(partial(all_reduce_sum, accelerator))
    rate = float(state.schedule.get_last_lr()[0])
    if not accelerator.optimizer_step_was_skipped:  # only the fp16 scaler leaves steps out
        state.schedule.step()
        for averages in state.averages.values():
            averages.update(step + 1)
    return StepTable.read(gather(accelerator, torch.cat(rows)), gradient_norm(norm), rate)


def seed_dropout(trainer: Trainer, local: int) -> None:
    """Keys dropout by the micro-batch's number in the stream, so that a resumed run repeats it."""
    number = local * trainer.accelerator.num_processes + trainer.accelerator.process_index
    torch.manual_seed(pair_key(f"dropout {trainer.config.seed} {number}"))


def record(trainer: Trainer, table: StepTable, *, moved: bool) -> None:
    """Enters the step's margins into the ledger, on every process alike.

    Before the weights have moved, policy and reference agree. What a margin then holds is the
    rounding of cached errors or of compiled code, and must not count as a vote.
    """
    margin = table["margin"] if moved else torch.zeros_like(table["margin"])
    trainer.state.ledger.update(table.index, margin, table["timestep"])
    if isinstance(trainer.config.train.annotators, EmaAnnotators):
        trainer.state.metric[table.index] = table["minority"].float()


def checkpoint(trainer: Trainer, run: RunFolder, step: int) -> None:
    """Saves after `step` finished steps; called by all processes."""
    config, cache = trainer.config, trainer.cache.fingerprint
    keep = config.train.keep_checkpoints
    run.flush()
    save_checkpoint(run.path, step, trainer.state, config, cache, trainer.group, keep=keep)
    trainer.accelerator.wait_for_everyone()


def finish(trainer: Trainer, run: RunFolder) -> None:
    """Writes what other programs load: the policy, its moving average, the minority table.

    Called by all processes, which give their parts of the weights; the main one writes.
    """
    denoisers, state, method = trainer.denoisers, trainer.state, trainer.config.train.method
    for name, parts in exported_weights(state.weights, state.averages).items():
        whole = state.weights.collect(parts)
        if run.main:
            export_policy(denoisers.family, denoisers.policy, run.path / name, method, whole)
    if run.main:
        run.write_minority(trainer.cache, state.ledger, state.metric)
