"""The ledger's benchmark runs as published, in short, and its tables come from its rows."""

import csv

import pytest


@pytest.mark.slow
def test_every_part_runs_and_a_finished_run_is_not_repeated(tmp_path, script):
    file = tmp_path / "ledger.csv"
    command = ["benchmarks/bench_ledger.py", "--short", "--work", tmp_path, "--out", file]
    options = ["--seeds", "0", "--flips", "0.2", "--methods", "ledger, gate", "dpo"]
    script(*command, *options, "--parts", "methods", "cost", "cases")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    runs = {(r["method"], r["flip_rate"]): r for r in rows if r["part"] == "methods"}
    assert runs.keys() == {("dpo", "0.0"), ("dpo", "0.2"), ("ledger, gate", "0.2")}
    for (_, rate), row in runs.items():
        assert float(row["wrong"]) == pytest.approx(float(rate), abs=0.1)
        assert (row["auroc"] != "") == (rate != "0.0")
    costs = {r["method"]: float(r["step_ratio"]) for r in rows if r["part"] == "cost"}
    assert costs["moving averages"] > costs["dpo"], "two more forward passes"
    assert len([r for r in rows if r["part"] == "cases"]) == 3
    assert (tmp_path / "short" / "votes" / "dpo-0.2-0.npz").is_file()
    written = file.read_bytes()
    script(*command, *options, "--parts", "methods")
    assert file.read_bytes() == written
