"""Save and resume: weights, optimizer, averages, ledger, counters, configuration.

A checkpoint is a folder `checkpoints/step-00000100`, written under a temporary name and renamed
when complete: a killed run never leaves a half-written one. `manifest.json` in it has the size and
checksum of each of its files, which are compared before anything is loaded. Noise, timesteps,
dropout and the order of the data come from counters, so the step's number is all there is to say
about them.

Weights, averages and the optimizer's state are stored whole, in float32, by parameter name: any
number of processes goes on from it, under any ZeRO stage or none, if a step keeps its number of
micro-batches. Where processes share them, the main process gathers them one by one into its host
memory: 21 GB at a time for SDXL's 2.57 billion weights under AdamW, and 31 GB on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.serialization import get_crc32_options, set_crc32_options

from fastpo.config import Config, flatten
from fastpo.data.cache.fingerprint import MODEL_KEYS
from fastpo.errors import CheckpointError
from fastpo.system.checksums import Checksum, checksum
from fastpo.system.files import flush
from fastpo.system.manifest import MANIFEST, write_manifest
from fastpo.system.ownership import owned_folder
from fastpo.train.changes import CHANGEABLE, Change, differing_keys
from fastpo.train.checkpoint_folders import (
    CHECKPOINT,
    HISTORY,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    About,
    check_whole,
    checkpoint_folder,
    read_about,
)
from fastpo.train.metrics_log import METRICS
from fastpo.train.optimizer import averaged
from fastpo.train.state import Round, TrainingState

TRAINED = "weights"
BEGAN, TURNED = "began", "turned"


@dataclass(frozen=True)
class Origin:
    """What a run is computed from; only the same origin goes on from its checkpoint.

    Attributes:
        config: The resolved configuration.
        cache: The prepared cache's fingerprint.
        micro_batches_per_step: Micro-batches of one optimizer step, over all processes.
        model: The model's fingerprint, empty if it is not known.
        changes: Keys that were changed on the way, oldest first.
    """

    config: Config
    cache: str
    micro_batches_per_step: int
    model: str = ""
    changes: tuple[Change, ...] = ()


def save_checkpoint(run: Path, step: int, state: TrainingState, origin: Origin) -> Path:
    """Writes a checkpoint after optimizer step `step`, with the checksums of its files.

    All processes must call it, since each may hold a part of the weights; the main one writes. A
    thread computes checksums while the next file is gathered and written, or flushed to the disk.

    Args:
        run: The run's folder.
        step: Number of finished optimizer steps.
        state: What is saved.
        origin: What it is computed from, saved beside it.

    Returns:
        The checkpoint's folder.
    """
    target = checkpoint_folder(run, step)
    if not state.weights.main:
        for _ in _parts(state):
            pass
        return target
    with owned_folder(target, CHECKPOINT) as folder, ThreadPoolExecutor(1, "checksums") as thread:
        checksums: dict[str, Future[Checksum]] = {}
        for name, write in _files(run, step, state, origin):
            write(folder / name)
            checksums[name] = thread.submit(checksum, folder / name)
        for name in checksums:  # the disk writes while the last files are read
            flush(folder / name)
        write_manifest(folder, {name: pending.result() for name, pending in checksums.items()})
    return target


def _files(
    run: Path, step: int, state: TrainingState, origin: Origin
) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """A checkpoint's files, each with a function that writes it, in the order of `_parts`."""
    for name, content in _parts(state):
        save = _save_optimizer if name == OPTIMIZER else save_file
        yield name, partial(save, content)
    yield HISTORY, partial(save_file, _history(state))
    metrics = run / METRICS
    about = About(
        step=step,
        cache=origin.cache,
        group=origin.micro_batches_per_step,
        config=origin.config.model_dump(mode="json"),
        manifest=MANIFEST,
        metrics=checksum(metrics) if metrics.exists() else None,
        model=origin.model or None,
        changes=list(origin.changes),
        best=state.best if state.best.step else None,
        round=None if state.round == Round() else state.round,
    )
    text = about.model_dump_json(indent=1)
    yield STATE, lambda path: path.write_text(text)


def _save_optimizer(content: dict[str, Any], path: Path) -> None:
    """Saves without torch's CRC32, which takes thrice the time of the rest; the manifest has XXH3.

    `torch.load` does not read it; a program that unzips the file may miss it.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        set_crc32_options(before)


def _parts(state: TrainingState) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gathers file after file, so that host memory holds one at a time (collective).

    The largest comes first: its checksum is computed while the others are written.
    """
    weights = state.weights
    yield (
        OPTIMIZER,
        {
            "optimizer": weights.optimizer_state(),
            "schedule": state.schedule.state_dict(),
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            **_own_weights(state),
        },
    )
    with averaged(state.optimizer):
        yield WEIGHTS, weights.gather(weights.local)
    for role, averages in state.averages.items():
        yield f"average-{role}.safetensors", weights.gather(averages.state_dict())


def _own_weights(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """The weights that schedule-free AdamW goes on from; what is exported is their average."""
    if not state.optimizer.param_groups[0].get("train_mode", False) or not state.weights.main:
        return {}
    return {TRAINED: {name: p.detach().clone() for name, p in state.trainable.items()}}


def _history(state: TrainingState) -> dict[str, Tensor]:
    """What the run has noted about its pairs: votes, last minority metric, statistics, watches."""
    statistics = {} if state.statistics is None else state.statistics.state_dict()
    live = {} if state.live_share is None else state.live_share.state_dict()
    slope = {} if state.slope is None else state.slope.state_dict()
    winners = {} if state.winners is None else state.winners.state_dict()
    ledger = state.ledger.state_dict()
    labels = {BEGAN: state.began, TURNED: state.turned}
    rounds = {} if state.round == Round() and not state.turned.any() else labels
    own = statistics | live | slope | winners
    return {**ledger, **rounds, "metric": state.last_minority, **own}


def _load_history(file: Path, state: TrainingState) -> None:
    history = _read(file, load_file)
    state.last_minority.copy_(history.pop("metric"))
    if BEGAN in history:
        state.began.copy_(history.pop(BEGAN))
        state.turned.copy_(history.pop(TURNED))
    try:
        state.ledger.load_state_dict(history)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if state.statistics is not None:
        device = next(iter(state.trainable.values())).device
        state.statistics.load_state_dict(history, device)
    if state.live_share is not None:
        state.live_share.load_state_dict(history)
    if state.slope is not None:
        state.slope.load_state_dict(history)
    if state.winners is not None:
        state.winners.load_state_dict(history)


def load_checkpoint(
    folder: Path, state: TrainingState, origin: Origin, *, verified: bool = False
) -> About:
    """Restores `state` in place.

    Args:
        folder: The checkpoint.
        state: What is restored.
        origin: What this run is computed from.
        verified: Its files were compared with their checksums just now; else they are here.

    Returns:
        What the checkpoint says of itself.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint belongs to another
            configuration or cache; the text names every key that differs.
    """
    if not verified:
        check_whole(folder)
    about = read_about(folder)
    _check_origin(folder, about, origin)
    weights = _read(folder / WEIGHTS, load_file)
    if weights.keys() != state.trainable.keys():
        raise CheckpointError(f"{folder / WEIGHTS} holds other weights' names")
    state.weights.load(weights)
    _load_history(folder / HISTORY, state)
    for role, averages in state.averages.items():
        whole = _read(folder / f"average-{role}.safetensors", load_file)
        state.weights.scatter(whole, averages.state_dict())
    rest = _read(
        folder / OPTIMIZER,
        lambda path: torch.load(path, map_location="cpu", weights_only=True, mmap=True),
    )
    state.weights.load_optimizer_state(rest["optimizer"])
    if TRAINED in rest:
        state.weights.load(rest[TRAINED])
    _load_schedule(state.schedule, rest["schedule"])
    if state.scaler is not None and rest["scaler"] is not None:
        state.scaler.load_state_dict(rest["scaler"])
    state.best.copy_from(about.best)
    return about


def _load_schedule(schedule: LRScheduler, saved: dict[str, Any]) -> None:
    """Sets how many updates were made; rate and curve are those of the configuration."""
    assert isinstance(schedule, LambdaLR), "diffusers' schedules are factors of the rate"
    counts = {name: saved[name] for name in ("last_epoch", "_step_count")}
    factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [rate * factor(saved["last_epoch"]) for rate, factor in factors]
    schedule.load_state_dict({**schedule.state_dict(), **counts, "_last_lr": rates})
    for options, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        options["lr"] = rate


def _check_origin(folder: Path, about: About, origin: Origin) -> None:
    """Compares what a checkpoint and this run are computed from; errors as `load_checkpoint`."""
    here = flatten(origin.config.model_dump(mode="json"))
    current = {change.key: change.after for change in origin.changes}
    same = {key for key, value in current.items() if here.get(key) == value}
    if about.model and about.model == origin.model:
        same.update(MODEL_KEYS)
    if about.cache == origin.cache:
        same.add("data.path")
    differing = differing_keys(about.config, origin.config, same=same)
    if differing:
        hint = (
            ""
            if not any(text.startswith(CHANGEABLE) for text in differing)
            else (
                "; to go on with another value, restore the old one and give the new one by "
                "--change KEY=VALUE"
            )
        )
        raise CheckpointError(
            f"{folder} belongs to another configuration: {'; '.join(differing)}{hint}"
        )
    if about.model and origin.model and about.model != origin.model:
        raise CheckpointError(
            f"{folder} was trained from other weights than {origin.config.model.path} holds now "
            f"(fingerprint {about.model[:12]}, this one is {origin.model[:12]})"
        )
    if about.cache != origin.cache:
        raise CheckpointError(
            f"{folder} was trained on another prepared cache "
            f"(fingerprint {about.cache[:12]}, this one is {origin.cache[:12]})"
        )
    if about.group != origin.micro_batches_per_step:
        raise CheckpointError(
            f"{folder} was trained with {about.group} micro-batches a step (processes x "
            f"accumulation), this run has {origin.micro_batches_per_step}; resume on as many "
            "processes, or keep the product"
        )


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a whole checkpoint: {path.name} is missing"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
