"""One trial: a fault, the same command again, and the comparison with what no fault has touched."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastpo.config import dump_config
from fastpo.selftest.child import Call, Ending, Interruption, Tell, call
from fastpo.selftest.results import Results, differing, results
from fastpo.selftest.world import (
    CHECKPOINT_EVERY,
    STEPS,
    TRAININGS,
    Brightness,
    Stage,
    World,
    command_line,
)
from fastpo.train.observers import Observer

Outcome = Literal[
    "equal", "older", "said", "refused", "unclear", "different", "lost", "failed", "hung", "missed"
]
"""How a trial ended:

- `equal`: the command went on and made what it would have made without the fault.
- `older`: the same, from an older checkpoint than the newest, which it said.
- `said`: the damaged file itself, a log, is not as it was; it said so, and all else is equal.
- `refused`: it ended with one clear error that names what is damaged; nothing was replaced.
- `unclear`: it refused without naming the file, or took an older checkpoint without a word.
- `different`: it ended well, with other results.
- `lost`: it did not go on, or went on from before what had been saved.
- `failed`: it ended with an exception that is not FastPO's own.
- `hung`: it did not end in time.
- `missed`: the fault did not come about (the command had ended before); not counted.
"""
Test = Literal[
    "kill",
    "power cut",
    "flipped bit",
    "truncated file",
    "zeroed block",
    "signal",
    "two writers",
    "read error",
    "write error",
    "few descriptors",
]
GOOD: tuple[Outcome, ...] = ("equal", "older", "said", "refused")
LIMIT = 120.0
"""Seconds that a command on the small world may take, on a busy machine."""


@dataclass(frozen=True)
class Verdict:
    """What came of a trial.

    Attributes:
        outcome: See `Outcome`.
        detail: What happened, for those that are not good.
    """

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Trial:
    """A trial that can be run.

    Attributes:
        test: What it tests; a row of the short table.
        row: The same in detail; a row of the long table.
        name: Its own name; the same in each run.
        run: Runs it on the world, in an empty folder.
    """

    test: Test
    row: str
    name: str
    run: Callable[[Bench, Path], Verdict]

    def __call__(self, bench: Bench) -> Verdict:
        """Runs it; its folder is removed."""
        folder = bench.world.folder / "trials" / f"{os.getpid()}-{threading.get_native_id()}"
        with _empty_folder(folder):
            return self.run(bench, folder)


@dataclass(frozen=True)
class Bench:
    """The world, and what each command makes of it.

    Attributes:
        world: The world.
        expected: The results of each command without a fault.
        steps: How many durable steps each command takes.
        seconds: What each command takes.
    """

    world: World
    expected: dict[Stage, Results]
    steps: dict[Stage, int]
    seconds: dict[Stage, float]


@contextmanager
def _empty_folder(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Watch(Observer):
    """Tells from where training began, and what it has done and saved."""

    def __init__(self, tell: Tell, stage: Stage) -> None:
        self._tell, self._steps = tell, STEPS.get(stage)

    def on_start(self, trainer: Any, start: int) -> None:
        """Tells the first step."""
        self._tell("start", start)

    def on_step(self, step: int, table: Any, metrics: Mapping[str, float]) -> None:
        """Tells the finished step, and whether it was saved: a save comes before this call."""
        self._tell("done", step)
        if step % CHECKPOINT_EVERY == 0 or step == self._steps:
            self._tell("saved", step)


def act(
    tell: Tell,
    world: World,
    stage: Stage,
    place: Path,
    fault: Callable[..., object] | None = None,
    *options: Any,
) -> None:
    """Runs a command as `python -m fastpo` does, which ends the process.

    Args:
        tell: Gets what training tells.
        world: The world.
        stage: The command.
        place: What it reads and writes.
        fault: Is called before it, with the `options`; brings the fault about.
        options: See `fault`.
    """
    import fastpo.train
    from fastpo.evaluate.scorers import SCORERS, ScorerEntry
    from fastpo.train.loop import train

    SCORERS[Brightness.name] = ScorerEntry("fastpo.selftest.world:Brightness", takes_argument=False)
    fastpo.train.train = partial(train, observers=[Watch(tell, stage)], progress=False)
    config = place / f"{stage}.yaml"
    if not config.exists():
        config.write_text(dump_config(world.config(stage, place)))
    sys.argv = ["fastpo", *command_line(stage, config)]
    if fault is not None:
        fault(*options)
    tell("began", 0)
    runpy.run_module("fastpo", run_name="__main__")


def ended_call(
    bench: Bench, stage: Stage, place: Path, fault: Callable[..., object], *options: Any
) -> Ending:
    """Runs a command under a fault; see `act`."""
    return call(act, bench.world, stage, place, fault, *options, limit=LIMIT)


def interrupted_call(bench: Bench, stage: Stage, place: Path, interruption: Interruption) -> Ending:
    """Runs a command that gets a signal."""
    return Call(act, bench.world, stage, place).result(limit=LIMIT, interruption=interruption)


def finish(bench: Bench, stage: Stage, place: Path, saved: int = 0) -> Verdict:
    """Runs a command again after a fault, and compares what it made.

    Args:
        bench: What it must make.
        stage: The command.
        place: What the fault has left.
        saved: Steps that had been saved when the fault came: as many must not be done again.
    """
    ending = call(act, bench.world, stage, place, limit=LIMIT)
    if ending.how == "refused":
        nothing_saved = stage in TRAININGS and not saved
        return Verdict("refused" if nothing_saved else "lost", ending.text)
    if (start := ending.last("start", saved)) < saved:
        return Verdict("lost", f"{saved} steps were saved, it went on from {start}")
    return compare(bench, stage, place, ending)


def compare(bench: Bench, stage: Stage, place: Path, ending: Ending) -> Verdict:
    """Compares what a command made that has returned; other endings are not good."""
    if ending.how == "hung":
        return Verdict("hung", ending.output[-2000:])
    if ending.how != "returned":
        status = f"status {ending.status}: {ending.output[-500:]}"
        return Verdict("failed", ending.text or status)
    try:
        names = differing(bench.expected[stage], results(stage, place))
    except Exception as error:  # whatever a library says of a damaged file
        return Verdict("different", f"{type(error).__name__}: {error}")
    return Verdict("different", ", ".join(names)) if names else Verdict("equal")
