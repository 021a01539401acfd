"""The benchmarks: one quick run, the CSV's schema, what is generated from it, order and budget."""

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastpo.bench import cases, losses, measure, noise, run, script, table, tune
from fastpo.bench.run import Options, Run
from fastpo.cli import main
from fastpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICK = Options(seconds=0.02, providers=("eager", "reference", "ours"), commit="abc1234")
ENVIRONMENT = {
    "clock": "events", "device": "A GPU", "threads": 1, "version": "0", "torch": "2", "triton": "3",
    "driver": "580", "commit": "abc1234", "date": "2026-11-21",
}  # fmt: skip


def small(name="dpo", pairs=1, op="pair_loss"):
    return cases.Case(op, name, "sd15", "fp32", pairs)


def plot_module():
    spec = importlib.util.spec_from_file_location("plot", ROOT / "benchmarks" / "plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(provider, ms, *, direction="both", pairs=16, note="", share=0.9):
    numbers = dict.fromkeys(table.NUMBERS, "") if note else dict.fromkeys(table.NUMBERS, 1.0)
    if not note:
        numbers |= {"ms_p50": ms, "share_of_copy": share, "copy_gb_per_s": 4000.0}
    return table.Row(
        op="pair_loss", case="dpo", latents="sdxl", dtype="bf16", pairs=pairs, provider=provider,
        direction=direction, runs=9, note=note, **numbers, **ENVIRONMENT,
    )  # fmt: skip


def written(rows, tmp_path):
    table.write_csv(rows, tmp_path / "pair_loss.csv")
    return table.read_csv(tmp_path / "pair_loss.csv")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_the_command_prints_a_table_and_writes_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "rows.csv"
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--quick", "--objective", "mapo", "--out", str(out)])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "no GPU: eager and compiled CPU path" in text
    assert "mapo, sd15, fp32, 1 pair" in text and "vs best" in text and "…" not in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [f.name for f in dataclasses.fields(table.Row)]
    assert {(r["direction"], r["provider"]) for r in rows} == {
        (d, p) for d in cases.DIRECTIONS for p in ("eager", "reference", "ours")
    }
    for r in rows:
        assert float(r["ms_p20"]) <= float(r["ms_p50"]) <= float(r["ms_p80"])
        least = losses.least_bytes(small("mapo"))[r["direction"]]
        assert float(r["gb_per_s"]) == pytest.approx(least / float(r["ms_p50"]) / 1e6, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--objective", "dpp"], "got dpp; did you mean dpo?"),
        (["--op", "noises"], "--op must be one of loss, noise"),
        (["--op", "noise", "--objective", "dpo"], "must be one of epsilon"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--latents", "sd3"], "--latents must be one of sdxl, sd15, video"),
        (["--budget-seconds", "0"], "must be positive, got 0"),
    ],
)
def test_the_command_names_a_mistake(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_eager_is_the_objective_itself(name):
    case = small(name, pairs=3)
    x = losses.inputs(case)
    eager, reference, ours = (
        loss() for loss in losses.losses(case, x, ("eager", "reference", "ours")).values()
    )
    torch.testing.assert_close(eager, reference, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    assert losses.disagreement(case, x) == ""


@pytest.mark.parametrize("name", noise.PREDICTIONS)
def test_noise_has_rows_of_the_forward_pass_only(name):
    options = dataclasses.replace(QUICK, providers=("randn", "reference"))
    going = Run([small(name, op="pair_noise")], options)
    ((_, rows),) = going
    assert [(r.direction, r.provider) for r in rows] == [("fwd", "randn"), ("fwd", "reference")]


def test_important_rows_come_first_and_none_is_lost():
    names = list(losses.OBJECTIVES)
    found = cases.grid("pair_loss", names)
    assert len(found) == len(set(found)) == len(names) * 3 * 2 * 5
    assert [(c.name, c.latents, c.dtype, c.pairs) for c in found[:4]] == [
        ("dpo", "sdxl", "bf16", 16), ("adaptive_dpo", "sdxl", "bf16", 16),
        ("dpo", "sdxl", "bf16", 256), ("adaptive_dpo", "sdxl", "bf16", 256),
    ]  # fmt: skip
    assert {c.latents for c in found[4:6]} == {"video"}


def test_a_run_stops_before_the_case_that_would_pass_its_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    going = Run(
        [small(pairs=b) for b in (1, 2, 3, 4)], dataclasses.replace(QUICK, budget_seconds=25)
    )

    def ten_seconds(case):
        now[0] += 10
        return [row("ours", 1.0)]

    monkeypatch.setattr(going, "_measure", ten_seconds)
    assert [case.pairs for case, _ in going] == [1, 2]
    assert [case.pairs for case in going.unmeasured] == [3, 4] and len(going.rows) == 2


def test_a_run_goes_on_from_the_rows_of_an_earlier_one(tmp_path, monkeypatch):
    first = Run([small(pairs=1)], QUICK)
    list(first)
    table.write_csv(first.rows, tmp_path / "rows.csv")
    rows = table.read_rows(tmp_path / "rows.csv")
    assert rows == first.rows
    going = Run([small(pairs=1), small(pairs=2)], QUICK)
    going.go_on_from(rows)
    assert [case.pairs for case, _ in going] == [2]
    assert going.rows[: len(rows)] == rows and len(going.rows) == 2 * len(rows)
    other = Run([small()], dataclasses.replace(QUICK, commit="f00d"))
    with pytest.raises(ConfigError, match="rows whose commit is 'abc1234'; this is 'f00d'"):
        other.go_on_from(rows)


def test_the_gpu_script_asks_for_what_there_is(script_calls):
    calls = script_calls("gpu.sh")
    assert [Path(c[1] if c[0] == "-m" else c[0]).name for c in calls] == [
        "pytest", "bench_pair_loss.py", "launch_table.py",
        "bench_pair_noise.py", "fastpo.bench.tune", "bench_pair_loss.py",
    ]  # fmt: skip
    for words in calls:
        if words[0].endswith("pair_loss.py"):
            options = script._parser("pair_loss", None).parse_args(words[1:])
            assert options.append and options.commit == "abc1234" and options.budget_seconds < 530
        elif words[0].endswith("pair_noise.py"):
            script._parser("pair_noise", None).parse_args(words[1:])
        elif words[:2] == ["-m", "pytest"]:
            assert all((ROOT / w).exists() for w in words if w.startswith("tests/"))
    (rest,) = script_calls("gpu.sh", "--rest", "--budget-seconds", "100")
    assert rest[0].endswith("bench_pair_loss.py")
    assert 20 < int(rest[rest.index("--budget-seconds") + 1]) <= 85  # less what starting took


def test_what_does_not_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "free_bytes", lambda: 1 << 20)
    going = Run([small(pairs=64)], QUICK)
    ((_, (found,)),) = going
    assert found.note.startswith("skipped, needs about") and found.ms_p50 == ""
    rows = written([row("ours", 1.0), row("eager", 2.0), found], tmp_path)
    assert "skipped, needs about" in table.summary(rows) and "skipped" in table.full_table(rows)


def test_a_provider_that_fails_is_noted_and_the_others_are_timed(monkeypatch):
    def broken(name, x):
        def loss():
            raise RuntimeError("no compiler\nat all")

        return loss

    monkeypatch.setattr(losses, "trainer_loss", broken)
    going = Run([small()], dataclasses.replace(QUICK, directions=("fwd",)))
    ((_, rows),) = going
    assert [(r.provider, r.note) for r in rows if r.note] == [
        ("eager", "RuntimeError: no compiler")
    ]
    assert {r.provider for r in rows if not r.note} == {"reference", "ours"}
    assert going.failures == ["dpo sd15 fp32 B=1, eager: RuntimeError: no compiler"]


def test_what_the_compiler_cannot_do_is_a_note_and_no_failure(monkeypatch):
    def no_compiler(function, **_):
        def call():
            raise RuntimeError("Scalar 3528531795 is out of range for type int32")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    providers = ("eager", "reference", "compile", "ours")
    options = dataclasses.replace(QUICK, directions=("fwd",), providers=providers)
    going = Run([small()], options)
    ((_, rows),) = going
    noted = [(r.provider, r.note) for r in rows if r.note]
    assert noted == [("compile", "RuntimeError: Scalar 3528531795 is out of range for type int32")]
    assert {r.provider for r in rows if not r.note} == {"eager", "reference", "ours"}
    assert going.failures == []


def test_wrong_numbers_are_not_timed(monkeypatch):
    wrong = dataclasses.replace(
        losses.OBJECTIVES["dpo"],
        call=lambda x, impl: losses.fl.dpo(
            x.policy, x.reference, x.target, beta=1.0 if impl else 2.0, impl=impl
        ),
    )
    monkeypatch.setitem(losses.OBJECTIVES, "dpo", wrong)
    going = Run([small()], QUICK)
    ((_, (found,)),) = going
    assert "departs from the reference" in found.note and going.failures


def test_the_readme_section_is_generated(tmp_path):
    rows = [
        row("eager", 8.0), row("compile", 3.0), row("ours", 2.0), row("ours-graph", 1.0),
        row("eager", 1.0, direction="fwd"), row("compile", 0.5, direction="fwd"),
        row("ours", 1.0, direction="fwd", share=1.01),
    ]  # fmt: skip
    text = table.summary(written(rows, tmp_path))
    assert "| dpo | sdxl | bf16 | 16 | 8.00x | 3.00x | 101 % |  |" in text
    assert "Slower than eager on 0 of 2 rows" in text
    assert "Slower than `torch.compile` on 1 of 2 rows" in text
    assert "0.50 (dpo, sdxl, bf16, 16 pairs, fwd)" in text
    assert "A GPU, torch 2, Triton 3, driver 580, FastPO 0, commit abc1234, 2026-11-21" in text
    plot = plot_module()
    page = f"before\n{plot.MARKS[0]}old{plot.MARKS[1]}\nafter\n"
    once = plot.readme_with(page, [text])
    assert text in once and "old" not in once and once.startswith("before\n")
    assert plot.readme_with(once, [text]) == once
    with pytest.raises(ValueError, match="must hold the marks"):
        plot.readme_with("no marks", [text])


def test_a_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns"):
        table.read_csv(path)


def test_ratio_compares_with_the_best_of_another_kind():
    samples = {"eager": 4.0, "compile": 2.0, "compile-max": 1.0, "ours": 0.5, "ours-graph": 0.25}
    timings = {
        name: measure.Timing([measure.Sample(ms, ms, 1e3 * ms)] * 3, "")
        for name, ms in samples.items()
    }
    labels = {"op": "pair_loss", "case": "dpo", "latents": "sdxl", "pairs": 1, "dtype": "bf16",
              "direction": "both", **ENVIRONMENT}  # fmt: skip
    found = {r.provider: r for r in table.timed_rows(timings, 10**6, 4.0, labels)}
    assert found["ours"].ratio_to_best_other == 2.0
    assert found["compile-max"].ratio_to_best_other == 0.25
    assert found["eager"].gb_per_s == 0.25 and found["eager"].share_of_copy == 0.0625


class FakeEvent:
    """A CUDA event on a clock that `fake_cuda` moves."""

    def __init__(self, log, enable_timing):
        self.log, self.at = log, None

    def record(self):
        self.at = self.log["now"]

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_gpu_clock_leaves_the_wait_out(monkeypatch):
    log = {"now": 0.0, "slept": []}
    cuda = types.SimpleNamespace(
        Event=lambda enable_timing: FakeEvent(log, enable_timing),
        synchronize=lambda: None,
        _sleep=lambda cycles: (log["slept"].append(cycles), log.update(now=log["now"] + 7.0)),
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 1 << 20,
        max_memory_allocated=lambda: 3 << 20,
    )
    monkeypatch.setattr(measure.torch, "cuda", cuda)
    monkeypatch.setattr(measure.torch, "empty", lambda *a, **k: torch.zeros(1))
    clock = measure.CudaClock()
    found = clock(lambda: log.update(now=log["now"] + 0.5))
    assert found.ms == 0.5
    assert log["slept"][0] >= 100 * clock.CYCLES_PER_US and isinstance(log["slept"][0], int)
    assert 0 <= found.host_us <= 1e3 * found.latency_ms
    assert clock.peak_mib(lambda: None) == 2.0


def test_the_sweep_covers_the_table_and_ranks(tmp_path):
    found = list(tune.configurations(16, 65536, "fwd"))
    assert len(found) == len(set(found)) and {b for b, _, _ in found} == set(tune.BLOCKS)
    assert all(1 <= programs <= -(-65536 // block) for block, programs, _ in found)
    backward = list(tune.configurations(16, 65536, "bwd"))
    assert all(programs == -(-65536 // block) for block, programs, _ in backward)
    blank = dict.fromkeys((f.name for f in dataclasses.fields(tune.Trial)), "")
    trials = [tune.Trial(**{**blank, "us_p50": us, "best": False}) for us in (4.0, 2.0, "")]
    ranked = tune._ranked(trials)
    assert [(t.us_p50, t.best, t.of_best) for t in ranked] == [
        (2.0, True, 1.0), (4.0, False, 0.5), ("", False, ""),
    ]  # fmt: skip
    tune.write(ranked, tmp_path / "a" / "trials.csv")
    assert (tmp_path / "a" / "trials.csv").read_text().count("\n") == 4


def test_the_sweep_forces_a_configuration_and_reports_a_failure():
    from fastpo_kernels.pair_loss.gpu import launch

    config = launch.LaunchConfig(64, 3, 4)
    default = launch.forward_config(1, 2, 2)
    seen = []

    def call():
        seen.append(launch.forward_config(1, 2, 2))
        return one

    one = torch.ones(3)
    clock = measure.CpuClock()
    us, note = tune._timed(config, call, one, clock)
    assert float(us) >= 0 and note == ""
    assert set(seen) == {config} != {default}
    assert launch.forward_config(1, 2, 2) == default
    assert tune._timed(config, lambda: 2 * one, one, clock) == ("", "wrong by 1 of 1")
    us, note = tune._timed(config, lambda: 1 / 0, one, clock)
    assert (us, note) == ("", "ZeroDivisionError: division by zero")


def test_a_bare_gpu_machine_can_import_the_scripts():
    """Torch, Triton and numpy only: what `benchmarks/gpu.sh` finds there."""
    code = (
        "import json, sys\n"
        "import fastpo.bench.script, fastpo.bench.tune\n"
        "print(json.dumps([m for m in sys.modules if '.' not in m]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"rich", "typer", "pydantic", "yaml", "diffusers", "accelerate", "matplotlib"}
    assert not heavy & set(json.loads(done.stdout))
