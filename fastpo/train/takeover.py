"""Whose is the run's folder, and what becomes of an earlier run in it.

Other things may lie in the folder and stay: only what a run writes is ever replaced, and only if it
is proven to be a run's. `--overwrite` moves an earlier run's files into `.overwritten/`, in the
folder, so that it works for the current folder and for one on a file system of its own; they are
removed when the new run has done its first step. If it ends before, they are put back, at once or,
after a kill, by the next training in the folder.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import yaml

from fastpo.config import Config, load_config
from fastpo.config.load import read_yaml
from fastpo.errors import CheckpointError, ConfigError, ForeignPathError
from fastpo.evaluate.folders import EVALUATION, SAMPLES, TRAINING_SAMPLES
from fastpo.models.export import EXPORT
from fastpo.system import files
from fastpo.system.ownership import (
    MARKER,
    Kind,
    check_replaceable,
    is_ours,
    is_protected,
    read_marker,
    strangers,
)
from fastpo.system.writer_lock import sole_writer
from fastpo.train.checkpoint_folders import CHECKPOINT, was_renamed
from fastpo.train.history import RECORD
from fastpo.train.metrics_log import METRICS
from fastpo.train.votes_log import VOTES, is_votes

MINORITY, CONFIG = "minority.csv", "config.yaml"
RESULTS = (METRICS, VOTES, CONFIG, MINORITY, RECORD)
FOLDERS = ("checkpoints", "final", "ema", "best", "samples", "evaluation")
EXPORTS = ("final", "ema", "best")
# Where earlier versions let trackers write; beside a checkout it is the package's own folder.
TRACKERS = ("tensorboard", "fastpo")
# Their moves are under way; all are done, and everything else in the folder is the new run's.
MOVING, ASIDE = ".overwriting", ".overwritten"
_METRIC_KEYS = {"step", "epoch", "loss", "lr", "grad_norm"}
_SECTIONS = {"seed", "model", "data", "prepare", "train", "evaluate"}


def _has_a_runs_files(folder: Path) -> bool:
    """Whether metrics and configuration are a run's; before its first step the latter."""
    try:
        with (folder / METRICS).open(encoding="utf-8") as file:
            first = file.readline(1 << 16)
    except FileNotFoundError:
        first = ""
    except (OSError, UnicodeDecodeError):
        return False
    if not first:
        return is_written_config(folder / CONFIG)
    try:
        return _METRIC_KEYS <= json.loads(first).keys() and _SECTIONS <= _sections(folder / CONFIG)
    except (ValueError, AttributeError):
        return False


RUN = Kind("a run", "", _has_a_runs_files)
EVENTS = Kind(
    "a tracker's folder",
    r"(.*/)?(events\.out\.tfevents\..*|hparams\.yml)",
    lambda folder: not strangers(folder, EVENTS),
)
CHECKPOINTS = Kind(
    "a run's folder of checkpoints",
    r"step-\d{8}/.*",
    lambda folder: not strangers(folder, CHECKPOINTS),
)
KINDS = {
    "checkpoints": CHECKPOINTS,
    "final": EXPORT,
    "ema": EXPORT,
    "best": EXPORT,
    "evaluation": EVALUATION,
    "samples": TRAINING_SAMPLES,
}


def is_written_config(path: Path) -> bool:
    """Whether a file is a resolved configuration as a run writes it: every section, no comment."""
    try:
        raw, text = read_yaml(path), path.read_text(encoding="utf-8")
    except (ConfigError, OSError):
        return False
    return raw.keys() >= _SECTIONS and text == yaml.safe_dump(raw, sort_keys=False)


def _sections(path: Path) -> set[str]:
    """The sections of a configuration's file; none if it cannot be read."""
    try:
        return set(read_yaml(path))
    except ConfigError:
        return set()


def check_folder(path: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses to mix two runs, and to replace what no run has written.

    Raises:
        CheckpointError: The folder holds a run and neither flag was given.
        ForeignPathError: Something has a name that the run would write, and is not a run's.
    """
    if os.path.lexists(path / MARKER) and read_marker(path) is None:
        raise ForeignPathError(
            f"{path / MARKER} is there and is no marker of FastPO's: set another train.output_dir"
        )
    events = path / TRACKERS[0]
    if TRACKERS[0] in config.train.trackers and os.path.lexists(events):
        check_replaceable(events, EVENTS)
    there = [name for name in (*FOLDERS, *RESULTS) if os.path.lexists(path / name)]
    if not there:
        return
    _check_run(path, there)
    if not (resume or overwrite):
        raise CheckpointError(
            f"{path} already holds a run: go on with --resume, replace it with --overwrite, "
            "or set another train.output_dir"
        )
    _check_config(path, config)
    for name in RESULTS:
        if (path / name).is_symlink():
            raise ForeignPathError(f"{path / name} is a link, which no run made: remove it")
    if (path / VOTES).is_file() and not is_votes(path / VOTES):
        raise ForeignPathError(f"{path / VOTES} is no run's and would be replaced: move it")
    for name in EXPORTS:
        check_replaceable(path / name, EXPORT)
    if resume:
        return
    if path.is_symlink():
        raise ForeignPathError(
            f"train.output_dir {path} is a link, and --overwrite follows none: set it to "
            f"{path.resolve()}"
        )
    _check_removable(path)


def _check_run(path: Path, there: list[str]) -> None:
    if is_ours(path.resolve(), RUN):
        return
    raise ForeignPathError(
        f"{path / there[0]} is there, but no {METRICS} and {CONFIG} of a run that could have "
        "written it, so it would not be replaced: set another train.output_dir"
    )


def _check_config(path: Path, config: Config) -> None:
    """A file that this command was configured from stays, if it says what this run is."""
    file = path / CONFIG
    if may_write_config(path):
        return
    with suppress(ConfigError):
        if load_config(file) == config:
            return
    reason = (
        "the file that this command was configured from, and --set changed something"
        if is_protected(file)
        else "not as a run writes it"
    )
    raise ForeignPathError(
        f"{file} is {reason}, so the run's configuration cannot take its place: move it out of "
        f"{path}, and give its new path"
    )


def may_write_config(path: Path) -> bool:
    """Whether `config.yaml` is new or as a run wrote it, and this command does not read it."""
    file = path / CONFIG
    return not os.path.lexists(file) or (is_written_config(file) and not is_protected(file))


def _check_removable(path: Path) -> None:
    """Refuses to remove an earlier run whose folders hold something that is not a run's."""
    for name, kind in KINDS.items():
        check_replaceable(path / name, kind)
    for folder in sorted((path / "checkpoints").glob("step-*")):
        check_replaceable(folder, CHECKPOINT)
        if was_renamed(folder):
            raise ForeignPathError(
                f"{folder} is a checkpoint under another name than its run gave it, and would be "
                "removed: move it, or set another train.output_dir"
            )
    for name in ("base", "aligned"):
        check_replaceable(path / "evaluation" / name, SAMPLES)


def set_aside(path: Path) -> None:
    """Moves an earlier run's files aside; `check_folder` has found them to be a run's.

    Raises:
        BusyFolderError: Another process evaluates it.
        OSError: One cannot be moved; `put_back` brings back the others.
    """
    moving, evaluation = path / MOVING, path / "evaluation"
    with sole_writer(evaluation) if evaluation.is_dir() else nullcontext():
        files.make_folder(moving)
        for name in _run_names(path):
            files.move(path / name, moving / name)
        files.move(moving, path / ASIDE)


def put_back(path: Path) -> None:
    """Brings back the run that was moved aside, if it still is; the new one has done no step.

    Raises:
        ForeignPathError: Meanwhile something of a run's name was put there that is not a run's.
        OSError: A file cannot be moved.
    """
    if (path / ASIDE).is_dir():
        _check_removable(path)
        for name in _run_names(path):
            files.remove(path / name)
        files.move(path / ASIDE, path / MOVING)
    moving = path / MOVING
    if moving.is_dir():
        _check_removable(path)
        for entry in sorted(moving.iterdir()):
            # A disk that lost power may hold what was being moved under both of its names.
            if os.path.lexists(path / entry.name):
                files.remove(path / entry.name)
            files.move(entry, path / entry.name)
        files.remove(moving)


def drop_aside(path: Path) -> None:
    """Removes the run that was moved aside: the new one has begun."""
    if (path / ASIDE).is_dir():
        files.remove(path / ASIDE)


def _run_names(path: Path) -> list[str]:
    """What lies in a run's folder and is the run's; a configuration that is read now stays."""
    names = [name for name in (*FOLDERS, *RESULTS) if os.path.lexists(path / name)]
    names += [name for name in TRACKERS if is_ours(path / name, EVENTS)]
    return [name for name in names if not is_protected(path / name)]
