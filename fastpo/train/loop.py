"""Preference alignment of diffusion models, read from top to bottom: setup, steps, finish.

    fastpo train CONFIG [--set a.b=c] [--resume [--change a.b=c]]
    python -m fastpo.train CONFIG
    torchrun --nproc_per_node 2 -m fastpo.train CONFIG
    accelerate launch -m fastpo.train CONFIG
    deepspeed --num_gpus 2 --module fastpo.train CONFIG

An optimizer step s takes micro-batches `[s W A, (s + 1) W A)` of one endless stream (W processes,
A accumulation steps; with `rounds_draws: same`, s is the step of its round); process r takes those
whose number is r modulo W. The host reads the device once a step: one table with a row per pair,
from which every metric and the ledger are made. (fp16 adds the gradient scaler's own check.)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from fastpo.config import Config, input_paths
from fastpo.data.loader import TimedIterator
from fastpo.errors import CheckpointError, ConfigError
from fastpo.models.export import export_damage, export_policy
from fastpo.models.folder import ModelFolder
from fastpo.system.library_log import write_library_log
from fastpo.system.ownership import protecting
from fastpo.system.signals import EndingSignals, Interrupted, catch_signals
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted
from fastpo.train.agreement import model_sample, require_same, settings_of
from fastpo.train.banner import show_banner
from fastpo.train.checkpoint import load_checkpoint, save_checkpoint
from fastpo.train.checkpoint_folders import Rotation, checkpoint_folder
from fastpo.train.consolidate import export_best
from fastpo.train.data import setup_data
from fastpo.train.distributed import Processes, joined
from fastpo.train.ema import exported_weights
from fastpo.train.experiment import Experiment, check_finite, check_finite_weights
from fastpo.train.held_out import HeldOut
from fastpo.train.history import describe_start, write_record
from fastpo.train.memory import memory_errors
from fastpo.train.metrics_log import METRICS, check_metrics
from fastpo.train.observers import Observer
from fastpo.train.optimizer import averaged
from fastpo.train.resume import ResumePoint, find_resume_point
from fastpo.train.rounds import end_of, hand_over, next_round, take_verdicts
from fastpo.train.run_folder import RunFolder, minority_table, step_progress
from fastpo.train.samples import TrainingSamples
from fastpo.train.trainer import StepLeftError, setup_trainer


@storage_errors()
def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    changes: Sequence[str] = (),
    progress: bool = True,
    observers: Sequence[Observer] = (),
) -> Path:
    """Trains; writes `final/` (and `ema/`), metrics, votes, `minority.csv` and checkpoints.

    Args:
        config: The experiment.
        resume: Go on from the newest whole checkpoint of the run's folder, if it has one; a
            finished run is left as it is.
        overwrite: Replace an earlier run in the same folder.
        changes: Keys to change from there on, each `key=value`; see `fastpo.train.changes`.
        progress: Show the banner and a progress bar.
        observers: Objects that look on, see `fastpo.train.observers.Observer`: `on_start` is
            called before the first step, `on_step` after every one. Each process calls its own; an
            exception of theirs ends the run and reaches the caller.

    Returns:
        The run's folder.

    Raises:
        FastPOError: A user's error: in the configuration, the cache or the model, a checkpoint of
            another run or of more steps, a run already in the folder, or a non-finite loss.
        Interrupted: SIGTERM, SIGHUP, SIGUSR1 or SIGINT ended it, after a save: `resume` goes on.
    """
    if changes and not resume:
        raise ConfigError(f"--change {changes[0]} is for --resume; a run that begins takes --set")
    with (
        catch_signals() as signals,
        joined(config.train) as processes,
        memory_errors(config.train),
    ):
        folder = RunFolder(config.train.output_dir, main=processes.main)
        with (
            protecting(input_paths(config)),
            folder.taken(config, processes, resume=resume, overwrite=overwrite),
        ):
            point = find_resume_point(folder.path, config, changes, processes) if resume else None
            if resume and point is None and folder.main:
                print(f"--resume: {folder.path} has no checkpoint, the run begins at step 1")
            run = setup(config, processes, folder, point)
            if overwrite and not resume:
                folder.set_aside()
            start = restore(run, point) if point is not None else 0
            require_same(processes, {"the steps done before": str(start)})
            folder.sweep()
            processes.wait()
            if is_finished(run, start):
                if folder.main:
                    done = "the step is" if start == 1 else f"all {start} steps are"
                    early = f"it has stopped early, after {counted(start, 'step')}"
                    print(f"{folder.path} is finished: {early if run.stopped else f'{done} done'}")
                return folder.path
            begin(run, start, progress=progress)
            with closing(run.rotation):
                with signals.deferred():
                    run_steps(run, start, signals, observers, progress=progress)
                    while not run.data.round.last:
                        run, start = begin_round(run), run.data.total_steps
                        run_steps(run, start, signals, observers, progress=progress)
                finish(run)
            processes.wait()
            return folder.path


def setup(
    config: Config, processes: Processes, folder: RunFolder, point: ResumePoint | None = None
) -> Experiment:
    """Finds the model, opens the cache, and makes the trainer.

    Raises:
        FastPOError: One of them does not serve the configuration, or differs between processes.
    """
    if point is not None:
        config = point.config
        processes.follow(config.train)
    samples = TrainingSamples(config, folder.path)
    model = ModelFolder.resolve(config.model)
    data = setup_data(config, model, processes, None if point is None else point.about.round)
    require_same(processes, settings_of(config, model, data))
    processes.progress.at("loading the model")
    trainer = setup_trainer(config, model, data, processes)
    if point is None:
        take_verdicts(trainer.state, config.train, data.cache)
    keep = config.train.keep_checkpoints
    rotation = Rotation(folder.path, keep=keep, main=processes.main)
    held_out = HeldOut(trainer, data.cache)
    return Experiment(
        config,
        processes,
        folder,
        data,
        trainer,
        held_out,
        samples,
        rotation,
        model_sample(model),
        point,
    )


def restore(run: Experiment, point: ResumePoint) -> int:
    """Loads the checkpoint from which the run goes on; returns the finished steps.

    Raises:
        CheckpointError: It belongs to another run, or has done more steps than are asked for, or
            the metrics up to it cannot be read; the text names the key or the line.
    """
    about = load_checkpoint(point.checkpoint, run.trainer.state, run.origin, verified=True)
    run.rotation.trust(point.checkpoint)
    if run.config.train.keep_best and about.best is not None:
        run.rotation.prefer(checkpoint_folder(run.folder.path, about.best.step))
    start = about.step
    warning = check_metrics(run.folder.path / METRICS, start, about.metrics)
    if warning and run.folder.main:
        print(warning)
    if start > run.data.total_steps:
        train = run.config.train
        key = "train.epochs" if train.max_steps is None else "train.max_steps"
        raise CheckpointError(
            f"{train.output_dir} has done {counted(start, 'step')}, {key} asks for "
            f"{run.data.total_steps}: raise it to go on, or set another train.output_dir"
        )
    return start


def is_finished(run: Experiment, start: int) -> bool:
    """Whether all steps are done and the results written; every process gets the same answer."""
    if start < run.data.total_steps and not run.stopped:
        return False
    state, folder = run.trainer.state, run.folder
    exports = [*exported_weights(state.weights, state.averages)]
    exports += ["best"] if (folder.path / "best").exists() else []
    whole = folder.main and folder.has_results(exports)
    damage = [text for name in exports if whole and (text := export_damage(folder.path / name))]
    if whole:
        table = minority_table(run.data.cache, state)
        damage += [text] if (text := folder.minority_damage(table)) else []
    for text in damage:
        print(f"{text}: it is written again from the last checkpoint")
    return run.processes.agree(whole and not damage)


def begin(run: Experiment, start: int, *, progress: bool) -> None:
    """Prepares the run's folder, and tells what is about to run."""
    folder, cache = run.folder, run.data.cache
    folder.begin(run.config, start)
    run.processes.wait()  # for the folder, in which every process has a log
    write_library_log(folder.path)
    if folder.main:
        started = describe_start(
            step=start,
            device=run.processes.device,
            processes=run.processes.count,
            cache=cache.fingerprint,
            model=run.model,
        )
        write_record(folder.path, started, list(run.origin.changes))
    if folder.main and run.config.data.flip_rate > 0:
        mask = cache.write_flip_mask(otherwise=folder.path)
        if mask.parent != cache.folder:
            print(f"{cache.folder} is read-only; the flipped labels: {mask}")
    if folder.main and progress:
        show_banner(run.trainer, run.data, start)
    run.processes.start_trackers()
    run.samples.begin(run.processes)


def begin_round(run: Experiment) -> Experiment:
    """Begins anew from the base, with the ledger of the round that has ended (collective).

    The folder, sample images and checkpoints are the run's and stay.
    """
    config, old, processes = run.config, run.trainer.state, run.processes
    current = next_round(old, config.train, run.data.total_steps)
    if run.folder.main:
        what = "the last" if current.last else f"of at most {config.train.rounds}"
        print(f"round {current.number}, {what}: {current.changed:.1%} of the verdicts have changed")
    processes.progress.at("beginning a round")
    processes.release()
    end = end_of(current, config.train, run.data.sampler, run.data.micro_batches_per_step)
    data = replace(run.data, round=current, total_steps=end)
    trainer = setup_trainer(config, ModelFolder.resolve(config.model), data, processes)
    hand_over(trainer.state, old.ledger, config.train)
    trainer.state.best.copy_from(old.best)
    if trainer.state.winners is not None and old.winners is not None:
        trainer.state.winners.begin_round(old.winners)
    held_out = HeldOut(trainer, data.cache)
    return replace(run, data=data, trainer=trainer, held_out=held_out)


def run_steps(
    run: Experiment,
    start: int,
    signals: EndingSignals,
    observers: Sequence[Observer],
    *,
    progress: bool,
) -> None:
    """The loop over optimizer steps `start..total_steps-1`.

    Raises:
        Interrupted: A signal has ended it; the last finished step is saved.
    """
    trainer, data, folder, config = run.trainer, run.data, run.folder, run.config.train
    place, winners = run.processes.progress, trainer.state.winners
    for observer in observers:
        place.at("an observer's work")
        observer.on_start(trainer, start)
    loader = place.reading(data.loader(run.processes, start, workers=config.loader_workers))
    bar = step_progress(data.total_steps, start, show=progress and folder.main)
    with TimedIterator(loader) as batches, bar as advance:
        for step in range(start, start if run.stopped else data.total_steps):
            place.step(step + 1, slow=config.compile or step == start)
            began = time.perf_counter()
            try:
                table = trainer.optimizer_step(batches, step, signals.asked).read()
            except StepLeftError:
                end(run, start, step, signals)
            check_finite(run, table, step)
            trainer.record(table)
            folder.log_votes(step + 1, table, trainer.state)
            metrics = table.metrics(
                step=step + 1,
                epoch=data.epoch(step + 1),
                seconds=time.perf_counter() - began,
                waited=batches.taken(),
            ) | measure(run, step + 1)
            folder.log(metrics)
            if winners and (warning := winners.see(step + 1, table)) and folder.main:
                print(warning, file=sys.stderr)
            if step == 0:
                folder.begun()
            run.processes.log(metrics, step + 1)
            advance(metrics)
            if run.saves_at(step + 1):
                checkpoint(run, step + 1)
            last = step + 1 if run.stopped else data.total_steps
            with averaged(trainer.state.optimizer):
                run.samples.take(trainer, step + 1, last)
            for observer in observers:
                place.at("an observer's work")
                observer.on_step(step + 1, table, metrics)
            if run.stopped:
                break
            if table.ending and step + 1 < data.total_steps:
                end(run, start, step + 1, signals)


def measure(run: Experiment, step: int) -> dict[str, float]:
    """Measures on the held-out pairs where that is due (collective); the metrics, or none."""
    if not run.held_out.is_due(step, run.data.total_steps):
        return {}
    best = run.trainer.state.best
    with averaged(run.trainer.state.optimizer):
        metrics = run.held_out.measure()
    best.take(step, metrics["held_out/accuracy"])
    if run.stopped and run.folder.main:
        print(
            f"stopped early after {counted(step, 'step')}: {counted(best.since, 'measurement')} "
            f"without a higher held-out accuracy than {best.accuracy:.4f}, of step {best.step}"
        )
    return metrics


def end(run: Experiment, start: int, step: int, signals: EndingSignals) -> NoReturn:
    """Saves, unless that was done, and ends the run as a signal asks; called by all processes.

    Args:
        run: The experiment.
        start: Steps that were done before this call of the run.
        step: Steps that are done now.
        signals: What this process has received.

    Raises:
        Interrupted: Always; `--resume` goes on.
    """
    if step > start and not run.saves_at(step):
        checkpoint(run, step)
    cause = signals.received or "a signal to another process"
    done = f"after {counted(step, 'step', of=run.data.total_steps)}, saved"
    raise Interrupted(
        f"ended by {cause} {done if step else 'before the first step'}: go on with --resume"
    )


def checkpoint(run: Experiment, step: int) -> None:
    """Saves after `step` finished steps; called by all processes."""
    run.processes.progress.at("saving")
    check_finite_weights(run, step)
    run.folder.flush()
    run.rotation.wait()
    saved = save_checkpoint(run.folder.path, step, run.trainer.state, run.origin)
    run.processes.wait()
    if run.config.train.keep_best and run.trainer.state.best.step == step:
        run.rotation.prefer(saved)
    run.rotation.begin(saved)


def finish(run: Experiment) -> None:
    """Writes what other programs load: the policy, its moving average, the minority table.

    Called by all processes, which give their parts of the weights; the main one writes.
    """
    folder, state, method = run.folder, run.trainer.state, run.config.train.method
    denoisers = run.trainer.denoisers
    run.processes.progress.at("writing the results")
    check_finite_weights(run, run.data.total_steps)
    for name, parts in exported_weights(state.weights, state.averages).items():
        with averaged(state.optimizer):
            whole = state.weights.gather(parts)
            if folder.main:
                export_policy(denoisers.family, denoisers.policy, folder.path / name, method, whole)
    best = state.best.step
    if folder.main and run.config.train.keep_best and best:
        run.rotation.wait()
        export_best(denoisers, checkpoint_folder(folder.path, best), folder.path / "best", method)
    if folder.main:
        folder.write_minority(minority_table(run.data.cache, state))
