"""Commands that are ended: by a kill, a power cut or a signal, and then run again."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastpo.selftest.child import Interruption
from fastpo.selftest.disk import ENDED, LOSSES, Loss, end_at
from fastpo.selftest.trials import (
    Bench,
    Test,
    Trial,
    Verdict,
    ended_call,
    finish,
    interrupted_call,
)
from fastpo.selftest.world import STAGES, Stage

TITLES: dict[Stage, str] = {
    "prepare": "prepare",
    "reference": "prepare --reference",
    "lora": "train (LoRA)",
    "full": "train (full)",
    "evaluate": "evaluate",
}
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
EXIT_CODES = (75, 130)
"""What a command ends with that was told to stop, and saved what it had."""


def step_trials(bench: Bench, passes: int) -> Iterator[Trial]:
    """Yields a kill, and as many power cuts as `passes` says, at each durable step."""
    for stage in STAGES:
        for step in range(bench.steps[stage]):
            yield _step_trial(stage, step, "nothing")
            for number in range(passes):
                yield _step_trial(stage, step, LOSSES[(step + number) % len(LOSSES)])


def _step_trial(stage: Stage, step: int, loss: Loss) -> Trial:
    kind: Test = "kill" if loss == "nothing" else "power cut"
    row = f"{kind} at each durable step of {TITLES[stage]}"
    return Trial(kind, row, f"{kind} {stage} {step} {loss}", partial(_at_step, stage, step, loss))


def _at_step(stage: Stage, step: int, loss: Loss, bench: Bench, folder: Path) -> Verdict:
    place = folder / "place"
    bench.world.lay_out(stage, place)
    ending = ended_call(bench, stage, place, end_at, step, place, loss)
    if ending.how != "ended" or ending.status != ENDED:
        missed = ending.how == "returned"
        return Verdict("missed" if missed else "failed", ending.text or ending.output[-500:])
    return finish(bench, stage, place, ending.last("saved"))


def random_kills(count: int) -> Iterator[Trial]:
    """Yields kills from outside at random moments of each command in turn."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        row = f"SIGKILL at a random moment of {TITLES[stage]}"
        yield Trial("kill", row, f"SIGKILL {stage} {number}", partial(_at_moment, stage, number))


def _at_moment(stage: Stage, number: int, bench: Bench, folder: Path) -> Verdict:
    place = folder / "place"
    bench.world.lay_out(stage, place)
    after = random.Random(f"{stage} {number}").uniform(0.0, bench.seconds[stage])
    ending = interrupted_call(bench, stage, place, Interruption(after, signal.SIGKILL))
    if ending.how == "returned":
        return Verdict("missed")
    if ending.how != "ended":
        return Verdict("failed", ending.text)
    return finish(bench, stage, place, ending.last("saved"))


def signal_trials(count: int) -> Iterator[Trial]:
    """Yields signals at random moments of each command in turn, the signals in turn."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        name = SIGNALS[number // len(STAGES) % len(SIGNALS)]
        row = f"{name} at a random moment of {TITLES[stage]}"
        run = partial(_signalled, stage, name, number)
        yield Trial("signal", row, f"{name} {stage} {number}", run)


def _signalled(stage: Stage, name: str, number: int, bench: Bench, folder: Path) -> Verdict:
    """Sends a signal to the command line; a training must have saved each finished step."""
    place = folder / "place"
    bench.world.lay_out(stage, place)
    after = random.Random(f"{name} {stage} {number}").uniform(0.0, bench.seconds[stage])
    ending = interrupted_call(bench, stage, place, Interruption(after, signal.Signals[name]))
    if ending.how != "ended":
        return Verdict("missed" if ending.how == "returned" else "failed", ending.text)
    if ending.status not in (*EXIT_CODES, -signal.Signals[name]):
        return Verdict("failed", f"exit status {ending.status}: {ending.output[-500:]}")
    verdict = finish(bench, stage, place, ending.last("done"))
    return Verdict(verdict.outcome, f"exit status {ending.status}; {verdict.detail}")
