"""One of two processes is killed: before a durable step of its own, or at a random moment.

Plain data parallelism and ZeRO 1 to 3, with LoRA and full fine-tuning. The other process must end
with one line, and the same two commands, given again, must go on from the last save and make what
two processes make that nobody disturbs.
"""

import dataclasses
import os
import random
import signal
import threading
from functools import partial

import yaml

from fastpo.config import dump_config, parse_config
from fastpo.config.load import with_keys
from fastpo.selftest.child import Call, Interruption
from fastpo.selftest.disk import ENDED, count_steps, end_at
from fastpo.selftest.endings import TITLES
from fastpo.selftest.results import differing, results
from fastpo.selftest.trials import Trial, Verdict, act
from fastpo.selftest.world import TRAININGS
from tests.faults.two_ranks import free_port, launched

MODES = ("plain", "zero1", "zero2", "zero3")
LIMIT = 300.0
"""Seconds that two processes on the small world may take; DeepSpeed's engines are slow to start."""
LAUNCHER_WAITS = 20.0
OTHER_ENDED = 76
"""What a process ends with when another one of its run has ended."""

_undisturbed = {}
_one_at_a_time = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What two processes make: digests, durable steps of each process, seconds."""

    expected: dict
    steps: tuple[int, int]
    seconds: float


def rank_trials(count):
    """Yields kills of one of two processes; modes, methods, processes and moments take turns."""
    for number in range(count):
        mode, stage = MODES[number % 4], TRAININGS[number // 4 % 2]
        victim, at_step = number // 8 % 2, bool(number // 16 % 2)
        moment = "before a durable step" if at_step else "at a random moment"
        row = f"kill of one of two processes {moment} of {TITLES[stage]}, {mode}"
        name = f"kill of rank {victim} of {stage}, {mode} {number}"
        yield Trial("kill", row, name, partial(_killed, stage, mode, victim, at_step, number))


def _killed(stage, mode, victim, at_step, number, bench, folder):
    plain = _without_a_fault(bench, stage, mode, folder / "undisturbed")
    place, chance = folder / "place", random.Random(f"{stage} {mode} {number}")
    _lay_out(bench, stage, mode, place)
    if at_step and not plain.steps[victim]:
        return Verdict("missed")  # the main process alone writes
    if at_step:
        faults = {victim: (end_at, chance.randrange(plain.steps[victim]), place, "nothing")}
        calls, interruptions = _start(bench, stage, place, faults), {}
    else:
        after = chance.uniform(0.0, plain.seconds)
        calls = _start(bench, stage, place, {})
        interruptions = {victim: Interruption(after, signal.SIGKILL)}
    endings = _results(calls, interruptions)
    ended, other = endings[victim], endings[1 - victim]
    if ended.how != "ended" or ended.status not in (ENDED, -signal.SIGKILL):
        return Verdict("missed" if ended.how == "returned" else "failed", _told(ended))
    if other.status == -signal.SIGKILL and other.last("start", -1) < 0:
        return _finish(bench, stage, place, plain, 0)  # ended by the launcher
    if other.how == "hung" or (other.status and other.status != OTHER_ENDED):
        return Verdict("hung" if other.how == "hung" else "failed", _told(other))
    if other.status and (other.output.count("error:") != 1 or f"rank {victim}" not in other.output):
        return Verdict("unclear", _told(other))
    saved = max(ending.last("saved") for ending in endings)
    return _finish(bench, stage, place, plain, saved)


def _finish(bench, stage, place, plain, saved):
    """Gives both commands again, and compares what they make."""
    endings = _results(_start(bench, stage, place, {}), {})
    for ending in endings:
        if ending.how != "returned":
            return Verdict("hung" if ending.how == "hung" else "failed", _told(ending))
    if (start := min(ending.last("start", saved) for ending in endings)) < saved:
        return Verdict("lost", f"{saved} steps were saved, it went on from {start}")
    names = differing(plain.expected, results(stage, place))
    return Verdict("different", ", ".join(names)) if names else Verdict("equal")


def _without_a_fault(bench, stage, mode, place):
    """Runs both processes once for each mode and method."""
    with _one_at_a_time:
        if (stage, mode) not in _undisturbed:
            _lay_out(bench, stage, mode, place)
            endings = _results(_start(bench, stage, place, {}, counted=True), {})
            for ending in endings:
                assert ending.how == "returned", _told(ending)
            steps = tuple(ending.last("step", -1) + 1 for ending in endings)
            seconds = max(ending.seconds for ending in endings)
            found = Undisturbed(results(stage, place), steps, seconds)
            _undisturbed[stage, mode] = found
        return _undisturbed[stage, mode]


def _lay_out(bench, stage, mode, place):
    """A place with the configuration that both processes read."""
    bench.world.lay_out(stage, place)
    raw = yaml.safe_load(dump_config(bench.world.config(stage, place)))
    if mode != "plain":
        raw = with_keys(raw, {"train.deepspeed": mode})
    (place / f"{stage}.yaml").write_text(dump_config(parse_config(raw)))


def _start(bench, stage, place, faults, counted=False):
    port = free_port()
    return [
        Call(_as_rank, rank, port, counted, bench.world, stage, place, *faults.get(rank, ()))
        for rank in (0, 1)
    ]


def _as_rank(tell, rank, port, counted, world, stage, place, *fault):
    """Runs the command as one of two processes of one machine."""
    os.environ |= launched(rank, port)
    act(tell, world, stage, place, *((count_steps, tell) if counted else fault))


def _results(calls, interruptions):
    """Waits for both, each in a thread of its own: one may hang until the other has ended.

    As a launcher does, it ends the other where one has ended before they could come together: torch
    waits ten minutes for a process that is still to come, and nobody can name it.
    """
    endings = {}

    def wait(rank):
        ending = calls[rank].result(limit=LIMIT, interruption=interruptions.get(rank))
        endings[rank] = ending
        if ending.how == "ended" and not any(name == "start" for name, _ in ending.notes):
            threads[1 - rank].join(LAUNCHER_WAITS)
            calls[1 - rank].send(signal.SIGKILL)

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [endings[rank] for rank in (0, 1)]


def _told(ending):
    return f"{ending.how}, status {ending.status}: {(ending.text or ending.output)[-800:]}"
