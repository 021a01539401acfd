"""A run of the trainer whose steps are of another kind: what a study's own methods train with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fastpo.config import Config
from fastpo.system.signals import catch_signals
from fastpo.train.distributed import joined
from fastpo.train.experiment import Experiment
from fastpo.train.loop import begin, finish, run_steps, setup
from fastpo.train.run_folder import RunFolder
from fastpo.train.trainer import Trainer


def train_with(config: Config, make: Callable[[Experiment], Trainer]) -> Path:
    """Trains with steps of another kind, unless the run's folder holds a finished run.

    Args:
        config: The run's configuration.
        make: Returns what makes the steps, from a run that is set up with a trainer of its own.

    Returns:
        The run's folder.
    """
    path = config.train.output_dir
    if (path / "final").is_dir() and (path / "minority.csv").is_file():
        return path
    with catch_signals() as signals, joined(config.train) as processes:
        folder = RunFolder(path, main=processes.main)
        with folder.taken(config, processes, resume=False, overwrite=True):
            run = setup(config, processes, folder)
            run = replace(run, trainer=make(run))
            folder.set_aside()
            folder.sweep()
            begin(run, 0, progress=False)
            with closing(run.rotation):
                with signals.deferred():
                    run_steps(run, 0, signals, (), progress=False)
                finish(run)
    return path
