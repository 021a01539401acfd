"""Whole steps in groups: what is measured together, what happens without memory, what is drawn."""

import sys
import weakref
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch

from fastpo.plan.planner import make_plan

ROOT = Path(__file__).parents[2]
MAPO, MAPO_RECIPE = "FastPO MaPO", "recipe MaPO"
LIVE, CACHED = "FastPO DPO, live reference", "FastPO DPO, cached reference"
ONE_BY_ONE = "FastPO Adaptive-DPO, averages one by one, live reference"
ONE_PASS = "FastPO Adaptive-DPO, averages in one pass, live reference"
HUB = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
SECONDS = {"bare policy": 1.0, MAPO: 1.1, MAPO_RECIPE: 2.2, LIVE: 1.5, CACHED: 1.0}
WHERE = {"device": "a GPU", "threads": 1, "torch": "2", "commit": "abc1234", "date": "2026-11-21"}


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("bench_step")


@pytest.fixture
def case(bench):
    return bench.Case("tiny", "lora", 2, "fp32", False)


@pytest.fixture
def machine(bench, monkeypatch):
    """Steps that take `SECONDS` of a clock which slows down for every model; `fits` says which fit.

    No model may be built while more than `others` are there.
    """
    built, clock = [], [0.0]

    class Model:
        others, fits = 0, staticmethod(lambda case, names: True)

        def __init__(self, case, names):
            assert sum(model() is not None for model in built) <= self.others
            built.append(weakref.ref(self))
            self.circle = self
            if not self.fits(case, names):
                raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
            self.parts = import_module("step_timing").Parts()
            self.steps = {n: lambda n=n: self.step(SECONDS[n]) for n in names}

        def step(self, seconds):
            seconds *= len(built)
            clock[0] += seconds
            if self.parts.on:
                self.parts.seconds["backward"] = seconds

    monkeypatch.setattr(bench, "Bench", Model)
    monkeypatch.setattr(bench.Parts, "now", staticmethod(lambda: clock[0]))
    return Model


def rows_by_name(found):
    *_, rows = found
    return {row["provider"]: row for row in rows}


def test_ours_share_a_model_with_the_recipe_of_their_objective(bench):
    lora, full = (bench.groups(method, bench.providers_of("sdxl")) for method in ("lora", "full"))
    assert [group[0] for group in lora] == ["bare policy"] * 3
    assert [group[-1] for group in lora] == [
        "recipe MaPO",
        "recipe Diffusion-DPO",
        "recipe Adaptive-DPO",
    ]
    assert sorted(sum((g[1:] for g in lora), ())) == sorted(bench.providers_of("sdxl")[1:])
    assert full[3] == ("bare policy", ONE_BY_ONE)
    assert set(sum(full, ())) == set(bench.providers_of("sdxl")) - {ONE_PASS}
    assert bench.groups("lora", ["bare policy"]) == [("bare policy",)]


def test_columns_agree_though_every_group_meets_another_load(bench, case, machine):
    rows = rows_by_name(bench.measure_providers(case, SECONDS, 3))
    assert set(rows) == set(SECONDS)
    for name, row in rows.items():
        assert row["times_floor"] == pytest.approx(SECONDS[name], abs=1e-3)
        slowdown = row["floor_pairs_per_s"] / row["pairs_per_s"]
        assert slowdown == pytest.approx(row["times_floor"], rel=1e-3)
        assert row["share_backward"] == pytest.approx(1.0)
    assert rows[MAPO]["floor_pairs_per_s"] != rows[LIVE]["floor_pairs_per_s"]
    assert [rows[MAPO][key] for key in ("faster_p20", "faster_than_recipe")] == [2.0, 2.0]
    assert rows[MAPO_RECIPE]["faster_than_recipe"] == ""


def test_an_option_stands_beside_the_floor_of_its_own_rounds(bench, case, machine, capsys):
    machine.others = 1
    machine.fits = staticmethod(lambda case, names: case.option != "torch.compile")
    options = ["channels-last", "torch.compile", "Adafactor"]
    rows = rows_by_name(bench.measure_options(case, options, 3))
    names = [f"{MAPO}, {name}" for name in options[::2]]
    assert list(rows) == ["bare policy", MAPO, *names]
    for row in rows.values():
        slowdown = row["floor_pairs_per_s"] / row["pairs_per_s"]
        assert slowdown == pytest.approx(row["times_floor"], rel=1e-3)
    speeds = {row["floor_pairs_per_s"] for row in rows.values()}
    assert len(speeds) == 3  # the first two rows come from the same rounds
    assert "torch.compile: tried to allocate" in capsys.readouterr().err


def test_a_group_without_memory_falls_apart(bench, case, machine, capsys):
    machine.fits = staticmethod(lambda case, names: len(names) == 2 and LIVE not in names)
    lengths = [len(rows) for rows in bench.measure_providers(case, SECONDS, 3)]
    assert lengths == [2, 3, 4]  # rows come one by one
    rows = rows_by_name(bench.measure_providers(case, SECONDS, 3))
    assert list(rows) == ["bare policy", MAPO, MAPO_RECIPE, CACHED]
    # The ratio of two models' medians over the floor has no spread.
    assert rows[MAPO]["faster_than_recipe"] == pytest.approx(2.0, abs=2e-3)
    assert rows[MAPO]["faster_p20"] == rows[MAPO]["faster_p80"] == ""
    assert rows[CACHED]["faster_than_recipe"] == ""  # its recipe was not asked for
    told = " ".join(capsys.readouterr().err.split())
    assert f"{LIVE}: does not fit in memory, no row" in told
    assert f"{MAPO}: does not fit" not in told


def test_a_model_is_gone_when_its_group_is_done(bench, case, monkeypatch):
    seen = []

    def look(benches, rounds):
        for step in benches[0].steps.values():
            step()
        seen.append(weakref.ref(benches[0].denoisers.policy))

    monkeypatch.setattr(bench, "measure", look)
    bench._in_turn(case, ("bare policy", ONE_PASS, "recipe Adaptive-DPO"), 1)
    assert seen[0]() is None


def test_the_recipes_averages_are_cast_to_the_run(bench):
    model = torch.nn.Linear(2, 2)
    averages = import_module("step_recipes").make_averages(model, "bf16")
    assert [average.decay for average in averages] == [0.9999, 0.5]
    assert {p.dtype for a in averages for p in a.shadow_params} == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


@pytest.fixture
def plot(bench):
    """The script that draws, as a module."""
    return import_module("plot_step")


def test_medians_stand_beside_their_marks(bench, case, machine, plot, tmp_path):
    rows = rows_by_name(bench.measure_providers(case, SECONDS, 3))
    rows[MAPO]["peak_mib"], rows[MAPO_RECIPE]["peak_mib"] = 100, 200
    bench.write_records(rows.values(), list(rows[MAPO]), tmp_path / "step.csv")
    head, _, mapo, dpo = plot.marks_table(plot.read(tmp_path / "step.csv")).splitlines()
    assert head.startswith("| case | step |")
    mapo = mapo.split(" | ")[2:]
    assert mapo == [
        "1.1, not met (at most 1.03)",
        "2.0x, met (at least 2.0x)",
        "100, met (below 200) |",
    ]
    assert dpo.split(" | ")[2:] == ["1.0, met (at most 1.03)", "", " |"]


def test_several_files_make_one_section(bench, case, machine, plot, tmp_path, monkeypatch):
    files = []
    for k, names in enumerate([[MAPO, MAPO_RECIPE], [LIVE, MAPO]]):
        rows = list(rows_by_name(bench.measure_providers(case, names, 3)).values())
        rows[-1]["method"] = "full"  # a panel of its own, without the others' bars
        rows = [row | WHERE | {"date": f"2026-11-2{k}"} for row in rows]
        files.append(tmp_path / f"step-{k}.csv")
        bench.write_records(rows, list(rows[0]), files[-1])
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- step:begin -->\nold\n<!-- step:end -->\nafter\n")
    command = ["plot_step.py", *map(str, files), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", command)
    plot.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for k, file in enumerate(files):
        assert text.count(f"2026-11-2{k}") == text.count(f"(step-{k}.png)") == 1
        assert file.with_suffix(".png").stat().st_size > 10_000
        table = file.with_suffix(".md").read_text().split("\n\n", 2)[2].strip()
        assert table.count("**tiny, ") == 2 and table in text
    assert "| FastPO MaPO | 1.1 (1.1 to 1.1) | 2.0x (2.0 to 2.0) |" in text


@pytest.fixture
def gpu_cases(bench, script_calls):
    """What `gpu_steps.sh` asks of `bench_step.py`: `gpu_cases(*names) -> options of each case`."""

    def asked(*names):
        calls = script_calls("gpu_steps.sh", "--budget-seconds", "9000", *names)
        return [bench.make_parser().parse_args(words[1:]) for words in calls]

    return asked


def test_every_case_of_the_gpu_script_can_be_asked_for(gpu_cases):
    cases = {options.out.stem: options for options in gpu_cases()}
    assert list(cases)[:3] == ["step-sdxl-lora-16", "step-sdxl-lora-1", "step-sdxl-full-1"]
    assert {options.commit for options in cases.values()} == {"abc1234"}
    first = cases["step-sdxl-lora-1"]
    assert {ONE_BY_ONE, ONE_PASS} <= set(first.providers) and "bare policy" in first.peaks
    assert cases["step-sdxl-full-1"].peaks == []
    some = ["sd15-lora-8", "sdxl-full-options"]
    assert [options.out.stem for options in gpu_cases(*some)] == [f"step-{name}" for name in some]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sdxl", pytest.param("sd15", marks=pytest.mark.long)])
def test_every_case_of_the_gpu_script_fits_80_gb_by_plan(bench, gpu_cases, size):
    cases = {
        bench.Case(size, method, pairs, "bf16", options.checkpointing)
        for options in gpu_cases()
        if options.options is None
        for size, method, pairs in product(options.size, options.method, options.pairs)
    }
    assert len(cases) == 6
    cases = {case for case in cases if case.size == size}
    largest = {replace(case, pairs=0): case for case in sorted(cases, key=lambda c: c.pairs)}
    assert [case.pairs for case in largest.values()].count(16) == (size == "sdxl")
    for case in largest.values():  # fewer pairs of the same need less
        averages = {"objective": {"name": "adaptive_dpo"}, "annotators": {"kind": "ema"}}
        config = case.config(**averages)
        model = config.model.model_copy(update={"path": HUB[case.size]})
        plan = make_plan(config.model_copy(update={"model": model}), pairs=1000)
        for cost in plan.costs:
            assert cost.peak_bytes < 80e9, (case, cost.name)
