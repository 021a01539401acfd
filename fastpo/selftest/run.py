"""Runs trials for a while, and keeps what came of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from fastpo.errors import FastPOError
from fastpo.selftest.child import Ending, Tell, call
from fastpo.selftest.damage import damage_trials, stop_runs
from fastpo.selftest.disk import count_steps
from fastpo.selftest.endings import TITLES, random_kills, signal_trials, step_trials
from fastpo.selftest.results import Results, results
from fastpo.selftest.storage import (
    descriptor_trials,
    read_error_trials,
    two_writers,
    write_error_trials,
)
from fastpo.selftest.trials import GOOD, LIMIT, Bench, Trial, Verdict, act
from fastpo.selftest.world import STAGES, Stage, World, make_model_and_data

Item = TypeVar("Item")


class SelftestError(FastPOError):
    """The trials cannot begin: a command does not even run without a fault."""


@dataclass(frozen=True)
class Result:
    """What came of one trial.

    Attributes:
        test: What it tested.
        row: The same in detail.
        name: The trial's name.
        outcome: See `fastpo.selftest.trials.Outcome`.
        detail: What happened, where it was not simply equal.
        seconds: What it took.
    """

    test: str
    row: str
    name: str
    outcome: str
    detail: str
    seconds: float


def make_bench(folder: Path, advance: Callable[[], object] = lambda: None) -> Bench:
    """Makes the world in an empty folder, and runs each command without a fault.

    Args:
        folder: The folder.
        advance: Is called after each of the seven things that are made.

    Raises:
        SelftestError: A command fails.
    """
    world = World(folder)
    world.whole.mkdir()
    _made("a tiny model with its data", _make_parts, folder)
    advance()
    steps: dict[Stage, int] = {}
    seconds: dict[Stage, float] = {}
    expected: dict[Stage, Results] = {}
    for stage in STAGES:
        ending = _made(TITLES[stage], _counting, world, stage)
        steps[stage], seconds[stage] = ending.last("step", -1) + 1, ending.seconds
        expected[stage] = results(stage, world.whole)
        advance()
    stop_runs(world)
    advance()
    return Bench(world, expected, steps, seconds)


def _made(what: str, make: Callable[..., object], *arguments: object) -> Ending:
    """Calls in a process of its own what must succeed."""
    ending = call(make, *arguments, limit=10 * LIMIT)
    if ending.how != "returned":
        last = (ending.text or ending.output).strip().splitlines()[-1:] or [ending.how]
        raise SelftestError(f"{what} does not work here, without any fault: {last[0]}")
    return ending


def _make_parts(tell: Tell, folder: Path) -> None:
    make_model_and_data(folder)


def _counting(tell: Tell, world: World, stage: Stage) -> None:
    act(tell, world, stage, world.whole, count_steps, tell)


def all_trials(bench: Bench, *, repeats: int) -> list[Trial]:
    """Returns every trial, so ordered that any number of the first ones is spread over all kinds.

    Args:
        bench: The world.
        repeats: How often each kind of damage, and how many tens of each random moment.
    """
    groups: list[Iterator[Trial]] = [
        step_trials(bench, min(repeats, 4)),
        random_kills(20 * repeats),
        signal_trials(20 * repeats),
        damage_trials(repeats),
        write_error_trials(bench),
        read_error_trials(20 * repeats),
        descriptor_trials(20 * repeats),
        two_writers(5 * repeats),
    ]
    return spread([trial for group in groups for trial in group])


def spread(trials: Sequence[Trial]) -> list[Trial]:
    """Orders trials by turns: of each test one, of its rows one after the other."""
    tests: dict[str, dict[str, list[Trial]]] = {}
    for trial in trials:
        tests.setdefault(trial.test, {}).setdefault(trial.row, []).append(trial)
    by_test = [_in_turns([_far_apart(row) for row in rows.values()]) for rows in tests.values()]
    return _in_turns(by_test)


def _in_turns(lists: Sequence[Sequence[Item]]) -> list[Item]:
    nothing = object()
    turns = zip_longest(*lists, fillvalue=nothing)
    return [item for turn in turns for item in turn if item is not nothing]  # pyright: ignore


def _far_apart(items: Sequence[Item]) -> list[Item]:
    """Orders a row so that its first items lie far apart: numbers by their bits from behind."""
    width = max(1, (len(items) - 1).bit_length())
    order = (int(format(number, f"0{width}b")[::-1], 2) for number in range(1 << width))
    return [items[number] for number in order if number < len(items)]


def run_trials(
    bench: Bench,
    trials: Iterable[Trial],
    *,
    seconds: float,
    processes: int = 1,
    on_result: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """Runs trials until none is left or the time is over.

    Args:
        bench: The world.
        trials: What to run, in this order.
        seconds: After these no other trial begins.
        processes: How many run at a time.
        on_result: Is called with each result, in this thread.
    """
    end, found, waiting = time.monotonic() + seconds, [], iter(trials)
    running: set[Future[Result]] = set()
    with ThreadPoolExecutor(processes) as pool:
        while True:
            while len(running) < processes and time.monotonic() < end:
                trial = next(waiting, None)
                if trial is None:
                    break
                running.add(pool.submit(_timed, bench, trial))
            if not running:
                return found
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                found.append(future.result())
                on_result(found[-1])


def _timed(bench: Bench, trial: Trial) -> Result:
    began = time.monotonic()
    try:
        verdict = trial(bench)
    except Exception as error:  # one trial that cannot be run does not end the others
        verdict = Verdict("failed", f"the trial itself: {type(error).__name__}: {error}")
    seconds = round(time.monotonic() - began, 2)
    detail = verdict.detail.replace(str(bench.world.folder), "")
    return Result(trial.test, trial.row, trial.name, verdict.outcome, detail, seconds)


def flaws(found: Sequence[Result]) -> list[Result]:
    """Returns the results that should not be."""
    return [result for result in found if result.outcome not in (*GOOD, "missed")]


def append_result(log: Path, result: Result) -> None:
    """Adds a result to a log, one JSON object a line."""
    with log.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results(log: Path) -> list[Result]:
    """Returns what a log holds; of a trial that was run again, the last result."""
    if not log.exists():
        return []
    found = (Result(**json.loads(line)) for line in log.read_text().splitlines())
    return list({result.name: result for result in found}.values())
