"""Storage that fails without losing power, and a second process in the same folder."""

from __future__ import annotations

import errno
import io
import os
import random
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastpo.selftest.child import Call, Ending
from fastpo.selftest.disk import fail_at
from fastpo.selftest.endings import TITLES
from fastpo.selftest.trials import LIMIT, Bench, Trial, Verdict, act, compare, ended_call, finish
from fastpo.selftest.world import STAGES, TRAININGS, Stage

WRITE_ERRORS = {
    errno.ENOSPC: ("no space left on the disk", True),
    errno.EROFS: ("file system became read-only", True),
    errno.EIO: ("one error while writing", False),
    errno.EMFILE: ("no descriptor left, once", False),
}
"""By number: what it is called, and whether it lasts."""


def write_error_trials(bench: Bench) -> Iterator[Trial]:
    """Yields errors of the disk at each durable step of each command, the kinds in turn."""
    kinds = list(WRITE_ERRORS)
    for stage in STAGES:
        for step in range(bench.steps[stage]):
            number = kinds[step % len(kinds)]
            title, _ = WRITE_ERRORS[number]
            name = f"{title}, {stage} {step}"
            yield Trial("write error", title, name, partial(_write_error, stage, step, number))


def _write_error(stage: Stage, step: int, number: int, bench: Bench, folder: Path) -> Verdict:
    def run(place: Path) -> Ending:
        lasting = WRITE_ERRORS[number][1]
        return ended_call(bench, stage, place, _fail_at, step, number, lasting)

    return _refused_then_finished(stage, bench, folder, run)


def _fail_at(step: int, number: int, lasting: bool) -> None:
    fail_at(step, number, lasting=lasting)


def _refused_then_finished(
    stage: Stage, bench: Bench, folder: Path, run: Callable[[Path], Ending]
) -> Verdict:
    """A command that cannot write or read must say so in one line, and go on when it can."""
    place = folder / "place"
    bench.world.lay_out(stage, place)
    ending = run(place)
    if ending.how != "refused":
        return compare(bench, stage, place, ending)
    if "\n" in ending.text:
        return Verdict("unclear", ending.text)
    verdict = finish(bench, stage, place, ending.last("saved"))
    return Verdict("refused", ending.text) if verdict.outcome == "equal" else verdict


def read_error_trials(count: int) -> Iterator[Trial]:
    """Yields single errors while reading, each at a random one of what a command reads."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        title = f"one error while reading, {TITLES[stage]}"
        name = f"read error, {stage} {number}"
        yield Trial("read error", title, name, partial(_read_error, stage, number))


def _read_error(stage: Stage, number: int, bench: Bench, folder: Path) -> Verdict:
    chance = random.Random(f"read {stage} {number}")
    error = chance.choice([errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
    which = chance.randrange({"prepare": 90, "reference": 60, "evaluate": 40}.get(stage, 150))

    def run(place: Path) -> Ending:
        return ended_call(bench, stage, place, _fail_read, bench.world.folder, which, error)

    return _refused_then_finished(stage, bench, folder, run)


def _fail_read(world: Path, which: int, error: int) -> None:
    """Lets one opening for reading, or one read by place, of a file of the world fail."""
    calls = iter(range(1 << 30))

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: Any, *arguments: Any, **options: Any) -> Any:
            of_world = isinstance(file, int) or str(file).startswith(str(world))
            reads = not (arguments and isinstance(arguments[0], str) and arguments[0][0] in "wax")
            if of_world and reads and next(calls) == which:
                raise OSError(error, os.strerror(error), None if isinstance(file, int) else file)
            return real(file, *arguments, **options)

        return wrapped

    io.open, os.preadv = failing(io.open), failing(os.preadv)


def descriptor_trials(count: int) -> Iterator[Trial]:
    """Yields commands that may open only few files at a time."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        title = f"few descriptors, {TITLES[stage]}"
        name = f"few descriptors, {stage} {number}"
        yield Trial("few descriptors", title, name, partial(_few_descriptors, stage, number))


def _few_descriptors(stage: Stage, number: int, bench: Bench, folder: Path) -> Verdict:
    return _refused_then_finished(
        stage,
        bench,
        folder,
        lambda place: ended_call(bench, stage, place, _limit_descriptors, 1 + number),
    )


def _limit_descriptors(more: int) -> None:
    """Allows a few open files more than there are."""
    used = max(int(name) for name in os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 20
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))


def two_writers(count: int) -> Iterator[Trial]:
    """Yields trainings that begin, within a moment, in a folder where another one trains."""
    for number in range(count):
        stage = TRAININGS[number % len(TRAININGS)]
        row = f"two runs in one folder, {TITLES[stage]}"
        name = f"two writers, {stage} {number}"
        yield Trial("two writers", row, name, partial(_two_writers, stage, number))


def _two_writers(stage: Stage, number: int, bench: Bench, folder: Path) -> Verdict:
    place = folder / "place"
    bench.world.lay_out(stage, place)
    chance = random.Random(f"two {stage} {number}")
    first = Call(act, bench.world, stage, place)
    second = Call(act, bench.world, stage, place, _wait, chance.uniform(0.0, bench.seconds[stage]))
    endings = first.result(limit=LIMIT), second.result(limit=LIMIT)
    done = [ending for ending in endings if ending.how == "returned"]
    refused = [ending for ending in endings if ending.how == "refused"]
    if len(done) + len(refused) < 2:
        other = next(ending for ending in endings if ending.how not in ("returned", "refused"))
        return Verdict("hung" if other.how == "hung" else "failed", other.text or other.output)
    if not done:
        return Verdict("lost", f"both were refused: {refused[0].text}")
    if len(done) == 2 and all(ending.last("start", -1) == 0 for ending in done):
        return Verdict("different", "both have trained from the first step")
    verdict = compare(bench, stage, place, done[0])
    return (
        Verdict("refused", refused[0].text) if refused and verdict.outcome == "equal" else verdict
    )


def _wait(seconds: float) -> None:
    import time

    time.sleep(seconds)
