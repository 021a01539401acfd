"""A spread of the faults that `fastpo selftest` and the long form try, and the harness itself."""

import math
import signal
from collections import Counter, defaultdict
from typing import get_args

import pytest

from fastpo.selftest.child import Interruption, call
from fastpo.selftest.disk import ENDED, Disk
from fastpo.selftest.results import differing, results
from fastpo.selftest.run import all_trials, flaws, make_bench, run_trials, spread
from fastpo.selftest.trials import Test, Trial, Verdict, compare, finish, interrupted_call
from fastpo.system import files

PER_TEST = {"kill": 8, "power cut": 10, "flipped bit": 6, "truncated file": 4}
"""Trials of each test; of the others three. The long form runs all."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("world"))


def some_of_each_test(trials):
    """Trials that lie far apart among one of each row, or the first ones where rows are few."""
    tests = defaultdict(list)
    for trial in trials:
        tests[trial.test].append(trial)
    for test, found in tests.items():
        count, rows = PER_TEST.get(test, 3), len({trial.row for trial in found})
        yield from found[: max(rows, count) : max(1, rows // count)][:count]


def test_nothing_is_lost_and_nothing_differs_silently(bench):
    trials = list(some_of_each_test(all_trials(bench, repeats=1)))
    found = run_trials(bench, trials, seconds=math.inf)
    assert not flaws(found)
    counts = Counter(trial.test for trial in trials)
    assert set(counts) == set(get_args(Test))
    assert {test: counts[test] for test in PER_TEST} == PER_TEST
    came_about = Counter(result.test for result in found if result.outcome != "missed")
    assert came_about["kill"] >= 4 and came_about["power cut"] == PER_TEST["power cut"]


def test_a_different_result_is_seen(bench, tmp_path):
    """One bit of one exported weight."""
    place = tmp_path / "place"
    bench.world.copy("whole", "lora", place)
    assert results("lora", place) == bench.expected["lora"]
    file = place / "lora" / "final" / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    name = "final/pytorch_lora_weights.safetensors"
    assert differing(bench.expected["lora"], results("lora", place)) == [name]
    ending = call(_nothing, limit=60)
    assert compare(bench, "lora", place, ending) == Verdict("different", name)


def _nothing(tell):
    pass


def test_an_image_with_wrong_bytes_is_made_again(bench, tmp_path):
    """A PNG with a block of zeros may well be decoded, to other pixels."""
    place = tmp_path / "place"
    bench.world.copy("whole", "lora", place)
    file = place / "lora" / "evaluation" / "aligned" / "00000-0.png"
    content = file.read_bytes()
    file.write_bytes(content[:-300] + bytes(300))
    assert finish(bench, "evaluate", place) == Verdict("equal")


def test_a_signal_from_outside_ends_a_command(bench, tmp_path):
    bench.world.lay_out("full", tmp_path / "place")
    told = Interruption(0.1, signal.SIGKILL)
    ending = interrupted_call(bench, "full", tmp_path / "place", told)
    assert (ending.how, ending.status) == ("ended", -signal.SIGKILL)


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        ("content", {"old": "old", "flushed": "ab", "named": "", "moved": "m", "new/in": ""}),
        ("names", {"old": "old", "flushed": "abc", "gone": "gone", "before": "m"}),
        ("both", {"old": "old", "flushed": "ab", "gone": "gone", "before": "m"}),
    ],
)
def test_a_cut_leaves_what_was_flushed(tmp_path, loss, kept):
    place = tmp_path / "place"
    ending = call(_write_and_cut, place, loss, limit=60)
    assert ending.status == ENDED, ending
    found = {
        path.relative_to(place).as_posix(): path.read_text()
        for path in place.rglob("*")
        if path.is_file()
    }
    assert found == kept
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def _write_and_cut(tell, place, loss):
    """Of `place` no name is flushed after the start; of its files, the first two letters of one."""
    place.mkdir()
    for name, text in {"old": "old", "gone": "gone", "before": "m", "flushed": ""}.items():
        (place / name).write_text(text)
    disk = Disk(place)
    files._commit = disk.before
    (place / "flushed").write_text("ab")
    files.flush(place / "flushed")
    files.append_text(place / "flushed", "c")
    (place / "named").write_text("named")
    (place / "new").mkdir()
    (place / "new" / "in").write_text("in")
    (place / "gone").unlink()
    (place / "before").rename(place / "moved")
    disk.before("append", place / "old")
    disk.cut(loss, None)


def test_the_first_trials_are_spread():
    trials = [Trial("kill", f"row {k % 2}", str(k), None) for k in range(16)]
    trials += [Trial("signal", "row", f"s{k}", None) for k in range(3)]
    first = [trial.name for trial in spread(trials)][:8]
    assert first == ["0", "s0", "1", "s2", "8", "s1", "9", "4"]
    assert len({trial.name for trial in spread(trials)}) == 19
