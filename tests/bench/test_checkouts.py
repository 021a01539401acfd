"""Benchmarks of whole processes, of two checkouts: what they count, and what their tables say."""

import json
import os
from importlib import import_module
from pathlib import Path

import pytest

from fastpo.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module


def test_a_process_is_timed_by_what_it_used(script, tmp_path):
    checkouts = script("checkouts")
    here, seen = checkouts.Checkout(ROOT, "now"), []
    busy = ["-S", "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    assert 0.2 <= checkouts.whole(here, busy, tmp_path, seen.append) < 10.0
    assert seen[0] > 0
    idle = ["-S", "-c", "import time; time.sleep(0.5)"]
    assert checkouts.whole(here, idle, tmp_path) < 0.45
    with pytest.raises(RuntimeError, match="ended with 3"):
        checkouts.whole(here, ["-S", "-c", "raise SystemExit(3)"], tmp_path)
    assert 0.0 < checkouts.used_seconds(os.getpid()) <= sum(os.times()[:2]) + 1.0


def test_another_checkout_must_be_one(script, tmp_path):
    with pytest.raises(ValueError, match="it holds no folder fastpo"):
        script("checkouts").known_checkout(tmp_path)
    assert script("checkouts").known_checkout(ROOT).root == ROOT


def test_what_starting_costs_is_compared_turn_by_turn(script):
    start = script("bench_start")
    found = {
        (start.TORCH, "before"): [2.0, 4.0, 2.0],
        (start.TORCH, "now"): [1.0, 2.0, 3.0],
        (start.LOSS, "now"): [1.5, 2.0, 3.3],
        (start.UNET, "now"): [10.0, 10.0, 20.0],
        (start.PLAN, "now"): [20.0, 30.0, 40.0],
    }
    rows = {(r["case"], r["of"]): r for r in start.rows(found, {"before": "abc"})}
    assert rows[start.TORCH, "before"]["times_before"] == ""
    assert rows[start.TORCH, "now"]["times_before"] == 0.5  # the median of 0.5, 0.5 and 1.5
    assert rows[start.LOSS, "now"]["times_import"] == 1.1
    assert rows[start.PLAN, "now"]["times_import"] == 2.0
    about = {"device": "cpu", "torch": "2", "commit": "def", "date": "today", "before": "abc"}
    text = start.table([row | about for row in rows.values()])
    assert f"| `{start.LOSS}` |  | 2.0 (1.7 to 2.78) |  | 1.1 (`import torch`) | 3 |" in text


@pytest.fixture
def run(script):
    return script("bench_run")


def row(run, name, epoch, gain, cpu_s, **more):
    """A row of a whole run."""
    cells = (name, 0, epoch, gain, cpu_s, more.get("reference", ""), 4.0 * epoch, 100)
    return dict(zip(run.COLUMNS, cells, strict=True))


def test_the_price_of_a_gain_lies_between_two_epochs(run):
    rows = [
        row(run, "x", 4, 0.05, 10.0),
        row(run, "x", 5, 0.09, 20.0),
        row(run, "x", 6, 0.08, 30.0),
    ]
    assert run.reached(rows, 0.07, "cpu_s") == pytest.approx(15.0)
    assert run.reached(rows, 0.07, "passes") == pytest.approx(18.0)
    assert run.reached(rows, 0.05, "cpu_s") == 10.0  # no earlier epoch was looked at
    assert run.reached(rows, 0.091, "cpu_s") is None


def test_a_run_is_compared_with_the_other_checkouts_of_its_seed(run):
    base = row(run, "before", 6, 0.08, 40.0)
    ours = [row(run, "x", 4, 0.06, 20.0), row(run, "x", 6, 0.10, 60.0, reference=10.0)]
    found = run.compared(ours, base)
    assert found["time"] == pytest.approx(1.0) and found["all"] == pytest.approx(1.25)
    assert found["passes"] == pytest.approx(20.0 / 24.0) and found["peak"] == 1.0
    assert found["gain"] == pytest.approx(1.0)
    about = {"device": "cpu", "torch": "2", "commit": "def", "date": "today", "before": "abc"}
    text = run.summary([r | about for r in (base, *ours)])
    assert "| x | 1 of 1 | 1.00 (1.00 to 1.00) | 1.25 (1.25 to 1.25) |" in text
    never = run.compared([row(run, "y", 6, 0.01, 10.0)], base)
    assert "time" not in never


def test_files_are_seen_when_they_appear(run, tmp_path):
    there = tmp_path / "there"  # a checkpoint is a folder
    there.mkdir()
    watch = run.Watch({4: there, 5: tmp_path / "missing"}, {})
    watch(os.getpid())
    assert watch.used.keys() == {4} and watch.peak > 10


@pytest.mark.parametrize("number", range(6))
def test_each_way_is_the_demos_configuration_with_its_own_keys(run, number, tmp_path):
    kind = (run.BEFORE, *run.OURS)[number]
    bench = run.Bench(tmp_path, tmp_path / "base", 0)
    bench.folder.mkdir()
    checkouts = import_module("checkouts")
    config = load_config(bench.file(kind, checkouts.Checkout(ROOT, "now")))
    assert config.train.objective.weight_kind == "gate" and config.train.objective.beta == 100
    assert config.data.flip_rate == 0.2 and config.train.epochs == kind.epochs
    assert config.train.backward == kind.keys.get("train.backward", "all")
    assert config.train.output_dir == bench.config(kind).train.output_dir


def test_passes_count_a_live_reference(run, tmp_path):
    lines = [{"step": n, "epoch": n / run.STEPS, "backward/cost": 2.0} for n in range(1, 67)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    live = run.cumulative_passes(tmp_path, run.OURS[1])
    cached = run.cumulative_passes(tmp_path, run.OURS[4])
    assert live[-1] == pytest.approx(6.0) and cached[-1] == pytest.approx(4.0)
