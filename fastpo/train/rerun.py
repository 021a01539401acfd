"""Trains a run again from what it recorded, and compares: `fastpo rerun RUN --check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open

from fastpo.config import Config, parse_config, with_keys
from fastpo.errors import CheckpointError, ConfigError, DifferingRunError
from fastpo.models.export import export_damage
from fastpo.system.checksums import checksum
from fastpo.system.files import check_folder
from fastpo.system.process import Rank
from fastpo.system.words import counted
from fastpo.train.changes import Change, done_before
from fastpo.train.checkpoint_folders import STATE, newest_whole, read_about
from fastpo.train.history import read_record
from fastpo.train.loop import train
from fastpo.train.metrics import TIMES, StepTable
from fastpo.train.metrics_log import METRICS
from fastpo.train.observers import Observer
from fastpo.train.run_folder import MINORITY

EXPORTS = ("final", "ema", "best")


class _SegmentDone(Exception):
    """Ends training where the run's configuration changed."""


class _StopAfter(Observer):
    """Ends training after a step, behind its checkpoint."""

    def __init__(self, step: int) -> None:
        self._last = step

    def on_step(self, step: int, table: StepTable, metrics: dict[str, float]) -> None:
        """Raises `_SegmentDone` after the last step."""
        if step == self._last:
            raise _SegmentDone


def rerun(run: Path, out: Path | None = None, *, check: bool = False, progress: bool = True) -> str:
    """Trains a finished run again from its recorded configuration, with its changes on the way.

    Args:
        run: The run's folder.
        out: The folder of the new run, which must hold none; default: `RUN-rerun` beside it.
        check: Compare weights, metrics (but times) and the minority table, bit by bit.
        progress: Show the banner and a progress bar.

    Returns:
        A line that says what was made, and with `check` that it is equal.

    Raises:
        CheckpointError: The run is not finished, or damaged, or `out` holds a run.
        ConfigError: There are not as many processes as trained the run.
        DifferingRunError: With `check`: the first difference.
    """
    target = out or run.with_name(f"{run.name}-rerun")
    check_folder(target.parent)
    _check_finished(run)
    checkpoint = newest_whole(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint, which says how it was trained")
    about = read_about(checkpoint)
    _check_processes(run)
    config = _original(about.config, about.changes, target, where=str(checkpoint / STATE))
    changes: list[str] = []
    for step, together in groupby(about.changes, key=lambda change: change.step):
        _train_to(config, step, changes, progress=progress)
        changes = [f"{change.key}={json.dumps(change.after)}" for change in together]
    train(config, resume=bool(changes), changes=changes, progress=progress)
    if Rank.of_launch().rank or not check:
        return f"{run} was trained again: {target}"
    difference = next(differences(run, target), None)
    if difference:
        raise DifferingRunError(
            f"{target} differs from {run}: {difference}{_circumstances(run, target)}"
        )
    steps = len(_metrics(run))
    return f"{target} equals {run}: weights, minority table and metrics of {counted(steps, 'step')}"


def _check_finished(run: Path) -> None:
    if not all((run / name).exists() for name in (METRICS, MINORITY, EXPORTS[0])):
        raise CheckpointError(
            f"{run} is no finished run: it lacks {METRICS}, {MINORITY} or {EXPORTS[0]}/"
        )
    for name in EXPORTS:
        damage = export_damage(run / name) if (run / name).exists() else None
        if damage:
            raise CheckpointError(damage)


def _check_processes(run: Path) -> None:
    record, here = read_record(run), Rank.of_launch().world_size
    trained = record.starts[-1].processes if record and record.starts else here
    if trained != here:
        raise ConfigError(
            f"{run} was trained by {counted(trained, 'process')}, these are {here}: sums are "
            f"rounded in another order; launch as many"
        )


def _original(saved: dict, changes: list[Change], target: Path, *, where: str) -> Config:
    """The configuration with which the run began, for another folder and without trackers."""
    before = {change.key: change.before for change in reversed(changes)}
    moved = {"train.output_dir": str(target), "train.trackers": []}
    values = {**done_before(saved), **before, **moved}
    return parse_config(with_keys(saved, values), where=where)


def _train_to(config: Config, step: int, changes: list[str], *, progress: bool) -> None:
    """Trains up to a step, with a checkpoint there."""
    values = {"train.checkpoint_every": step}
    if config.data.held_out:
        values["train.held_out_every"] = config.train.measures_every
    raw = with_keys(config.model_dump(mode="json"), values)
    try:
        train(
            parse_config(raw),
            resume=bool(changes),
            changes=changes,
            progress=progress,
            observers=[_StopAfter(step)],
        )
    except _SegmentDone:
        return


def differences(one: Path, two: Path) -> Iterator[str]:
    """Yields what differs between two finished runs: metrics, then weights, then the table."""
    yield from _metric_differences(_metrics(one), _metrics(two))
    for name in EXPORTS:
        yield from _weight_differences(one / name, two / name)
    if (one / MINORITY).read_bytes() != (two / MINORITY).read_bytes():
        yield f"{MINORITY} has other lines"


def _metrics(run: Path) -> list[dict[str, float]]:
    path = run / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _metric_differences(one: list[dict], two: list[dict]) -> Iterator[str]:
    for there, here in zip(one, two, strict=False):
        for key in dict.fromkeys([*there, *here]):
            if there.get(key) != here.get(key):
                where = f"{METRICS}, step {there.get('step')}"
                yield f"{where}: {key} was {there.get(key)} and is {here.get(key)}"
    if len(one) != len(two):
        yield f"{METRICS} had {counted(len(one), 'step')} and has {len(two)}"


def _weight_differences(one: Path, two: Path) -> Iterator[str]:
    names = [
        {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
        for folder in (one, two)
    ]
    if names[0] != names[1]:
        yield f"{one.name}/ had the files {sorted(names[0])} and has {sorted(names[1])}"
        return
    for name in sorted(names[0]):
        if checksum(one / name) != checksum(two / name):
            yield _first_tensor(one / name, two / name, f"{one.name}/{name}")


def _first_tensor(one: Path, two: Path, name: str) -> str:
    """Describes the first tensor that differs between two files of other bytes."""
    with safe_open(one, framework="pt") as there, safe_open(two, framework="pt") as here:
        if sorted(there.keys()) != sorted(here.keys()):
            return f"{name} holds other tensors"
        for key in sorted(there.keys()):
            before, after = there.get_tensor(key), here.get_tensor(key)
            if before.shape != after.shape or before.dtype != after.dtype:
                return f"{name}: {key} has another shape or type"
            if not torch.equal(before, after):
                off = (before.double() - after.double()).abs().max().item()
                return f"{name}: {key} differs by up to {off:.3g}"
    return f"{name}: the metadata differs"


def _circumstances(one: Path, two: Path) -> str:
    """What was different when the two were trained, for the error's text."""
    records = [read_record(path) for path in (one, two)]
    starts = [record.starts[-1] for record in records if record and record.starts]
    if len(starts) < 2:
        return ""
    facts = [
        {**start.versions, "commit": start.commit, "device": start.device, "model": start.model}
        for start in starts
    ]
    texts = [
        f"{name} was {facts[0].get(name)} and is {facts[1].get(name)}"
        for name in dict.fromkeys([*facts[0], *facts[1]])
        if facts[0].get(name) != facts[1].get(name)
    ]
    return f" ({'; '.join(texts)})" if texts else ""
