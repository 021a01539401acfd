"""From where a run goes on, and with which configuration: chosen before anything is set up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastpo.config import Config
from fastpo.errors import CheckpointError
from fastpo.train.changes import Change, resumed_config
from fastpo.train.checkpoint_folders import About, agree_on_newest_whole, read_about
from fastpo.train.history import RECORD, read_record

if TYPE_CHECKING:
    from fastpo.train.distributed import Processes


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest whole checkpoint; its files were compared with their checksums.
        about: What it says of itself.
        config: The configuration from here on.
        changes: Keys that were changed on the way, up to here.
    """

    checkpoint: Path
    about: About
    config: Config
    changes: tuple[Change, ...]


def find_resume_point(
    run: Path, config: Config, asked: Sequence[str], processes: Processes
) -> ResumePoint | None:
    """Chooses the checkpoint, the same on all processes, and the configuration (collective).

    Args:
        run: The run's folder.
        config: The user's configuration.
        asked: Changes asked for by `--change`.
        processes: The processes of the run.

    Returns:
        None if the run has no checkpoint.

    Raises:
        CheckpointError: No checkpoint is whole, or there is none to change something from.
        ConfigError: A change is not possible.
    """
    checkpoint = agree_on_newest_whole(run, processes)
    if checkpoint is None:
        if asked:
            raise CheckpointError(
                f"{run} has no checkpoint to go on from with --change {asked[0]}; "
                "a run that begins takes it by --set"
            )
        return None
    about = read_about(checkpoint)
    say = print if processes.main else _say_nothing
    recorded = _recorded_changes(run, about, processes)
    resumed, changes = resumed_config(
        config, about.config, recorded, asked, step=about.step, tell=say
    )
    for change in changes[len(recorded) :]:
        say(f"{change.key}: {change.before} up to step {change.step}, {change.after} from there on")
    return ResumePoint(checkpoint, about, resumed, changes)


def _say_nothing(line: str) -> None:
    pass


def _recorded_changes(run: Path, about: About, processes: Processes) -> tuple[Change, ...]:
    """The changes up to a checkpoint: those in it, and those made when it was resumed from before.

    A change behind it, where a later checkpoint is damaged, is not made at another step.
    """
    later: list[Change] = []
    if processes.main:
        record = read_record(run)
        if record is None and (run / RECORD).exists():
            print(f"{run / RECORD} cannot be read: a new one is begun")
        changes = [] if record is None else record.changes
        later = [change for change in changes if change not in about.changes]
        for change in [change for change in later if change.step > about.step]:
            print(
                f"{change.key} was changed at step {change.step}, behind {about.step}: "
                "ask for it again with --change if it is meant to hold from here"
            )
    later = processes.gather_objects(later)[0]
    return (*about.changes, *(change for change in later if change.step <= about.step))
