"""How processes of a run compare what they were started with, and watch one another."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastpo.config import load_config
from fastpo.models.folder import ModelFolder
from fastpo.system.alive import ProcessName
from fastpo.system.process import named_ranks
from fastpo.train.agreement import differences, model_sample
from fastpo.train.progress import Place, Progress
from fastpo.train.watch import Beat, Watch


def test_what_differs_is_named_with_all_values():
    values = [{"seed": "7", "lr": "1e-05"}] * 2 + [{"seed": "8", "lr": "1e-05"}] * 2
    assert differences(values) == ["seed is 7 on ranks 0-1, 8 on ranks 2-3"]
    assert differences(values[:2]) == []
    values = [{"seed": "7"}, {"seed": "7", "new": "1"}]
    assert differences(values) == ["new is not set on rank 0, 1 on rank 1"]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 4], "ranks 0, 2, 4")],
)
def test_ranks_are_named_in_short(ranks, text):
    assert named_ranks(ranks) == text


def test_a_copy_of_a_model_is_the_same_and_a_changed_weight_is_not(experiment, tmp_path):
    model = ModelFolder.resolve(load_config(experiment()).model)
    copied = ModelFolder(shutil.copytree(model.path, tmp_path / "copy"))
    assert model_sample(copied) == model_sample(model)
    (weights,) = copied.component(copied.family.denoiser).glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert model_sample(copied) != model_sample(model)


class Clock:
    """Two processes as rank 0's watch sees them; the time moves when told to."""

    def __init__(self, *, timeout=10.0):
        self.now, self.number = 0.0, 0
        self.places = {0: Place(), 1: Place()}
        self.left = None
        self.watch = Watch(self.beat(0), rank=0, count=2, timeout=timeout, now=0.0)

    def beat(self, rank):
        # Of another machine, so that nobody asks the system for it.
        name = ProcessName(f"node{rank}", "", 100 + rank, "")
        return Beat(self.number, name, self.places[rank], self.left if rank else None)

    def pass_by(self, seconds, *, silent=False):
        """Lets time pass, in which rank 1 beats unless it is silent."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.number += 0 if silent else 1
            self.watch.move(self.places[0], self.now)
            self.watch.see([self.beat(0), self.beat(1)], self.now)
        lost = self.watch.lost(self.now, grace=5.0)
        return lost or self.watch.hung(self.now)

    def to(self, *places):
        self.places = dict(enumerate(places))


def at(count, doing, *, step=12, slow=False):
    return Place(count, step, doing, slow)


def test_the_process_furthest_behind_is_named():
    clock = Clock()
    clock.to(at(31, "computing"), at(30, "waiting for data"))
    assert clock.pass_by(10) is None
    told = clock.pass_by(2)
    assert told.startswith("rank 1 (process 101 on node1) has made no progress for 11 s: ")
    assert told.endswith("step 12, waiting for data, while rank 0 is at step 12, computing")


def test_all_are_named_when_nobody_is_behind():
    clock = Clock()
    clock.to(at(31, "computing"), at(31, "computing"))
    told = clock.pass_by(12)
    assert told == "no process has made progress for 11 s: all are at step 12, computing"


def test_a_silent_process_is_named_even_while_saving():
    clock = Clock()
    clock.to(at(31, "saving", slow=True), at(31, "saving", slow=True))
    assert clock.pass_by(3) is None
    told = clock.pass_by(11, silent=True)
    assert told == (
        "rank 1 (process 101 on node1) gives no sign of life for 11 s; last seen at step 12, saving"
    )


def test_silence_is_told_rather_than_the_missing_progress():
    """A stopped process beat once more after its last progress, so its silence is shorter."""
    clock = Clock()
    clock.to(at(31, "computing"), at(30, "computing"))
    assert clock.pass_by(6) is None
    assert clock.pass_by(6, silent=True) is None  # 11 s without progress, 6 s without a beat
    assert "gives no sign of life for 10 s" in clock.pass_by(4, silent=True)


def test_a_process_that_beats_again_is_told_to_be_behind():
    clock = Clock()
    clock.to(at(31, "computing"), at(30, "computing"))
    clock.pass_by(6)
    assert clock.pass_by(6, silent=True) is None
    assert "has made no progress for 12 s" in clock.pass_by(1)


def test_what_is_slow_has_six_times_as_long():
    clock = Clock()
    clock.to(at(31, "saving", slow=True), at(31, "saving", slow=True))
    assert clock.pass_by(60) is None
    assert "all are at step 12, saving" in clock.pass_by(2)


def test_a_wait_for_another_that_is_slow_is_no_hang():
    """An observer of rank 1 evaluates, while rank 0 waits for it within the next step."""
    clock = Clock()
    clock.to(at(31, "computing", step=13), at(30, "an observer's work", slow=True))
    assert clock.pass_by(59) is None


def test_progress_of_others_is_no_hang():
    clock = Clock()
    for count in range(30):
        clock.to(at(31, "computing"), at(count, "computing"))
        assert clock.pass_by(9) is None


def test_time_in_which_this_process_was_stopped_does_not_count():
    clock = Clock()
    clock.to(at(31, "computing"), at(31, "computing"))
    clock.pass_by(5)
    clock.now += 1000.0
    clock.watch.forgive(1000.0)
    assert clock.pass_by(4, silent=True) is None


def test_an_error_is_told_after_the_time_in_which_all_may_find_it():
    clock = Clock()
    clock.pass_by(1)
    clock.left = "no pairs"
    clock.pass_by(1)
    assert clock.pass_by(4, silent=True) is None
    assert clock.pass_by(1, silent=True) == "rank 1 stopped: no pairs"


def test_who_left_in_order_is_not_missed():
    clock = Clock()
    clock.pass_by(1)
    clock.left = ""
    clock.pass_by(1)
    assert clock.pass_by(9, silent=True) is None


def test_a_store_that_no_longer_answers_is_named():
    clock = Clock()
    clock.to(at(31, "computing"), at(31, "computing"))
    clock.pass_by(1)
    told = clock.watch.hung(clock.now + 11.0)
    assert told.startswith("rank 0 (process 100 on node0), which holds the store")


def test_a_process_that_never_came_is_named():
    watch = Clock().watch
    watch.see([], 60.0)
    assert watch.hung(61.0) == "rank 1 did not join within 61 s"


def test_a_process_of_this_machine_is_seen_to_end():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = replace(ProcessName.own(), pid=child.pid, started="")
    name = replace(name, started=Path(f"/proc/{child.pid}/stat").read_text().split()[21])
    assert name.state() == "running"
    assert replace(name, started="1").state() == "ended"  # another process with its number
    assert replace(name, host="elsewhere").state() == "unknown"
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert name.state() == "stopped"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert name.state() == "ended"  # not waited for yet
    child.wait()
    assert name.state() == "ended"


def test_a_beat_is_the_same_behind_the_store():
    beat = Beat(3, ProcessName.own(), at(5, "saving", slow=True), "why", (1, 2))
    assert Beat.unpack(beat.pack().encode()) == beat


def test_places_are_counted_through_a_step():
    progress, places = Progress(), []
    progress.step(4, slow=False)
    for _ in progress.reading(iter("ab")):
        places.append(progress.place)
    assert [place.count for place in places] == [3, 5]
    assert str(places[0]) == "step 4, computing" and not places[0].slow
    assert str(progress.place) == "step 4, waiting for data"
    progress.at("saving")
    assert str(progress.place) == "step 4, saving" and progress.place.slow
