"""The ledger's benchmark runs as published, in short, and its tables come from its rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(folder, *options):
    command = [sys.executable, "benchmarks/bench_ledger.py", "--short", "--work", folder]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [*map(str, command), "--out", str(folder / "ledger.csv"), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "ledger.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_part_runs_and_a_finished_run_is_not_repeated(tmp_path):
    options = ["--seeds", "0", "--flips", "0.2", "--methods", "ledger, gate", "dpo"]
    rows = bench(tmp_path, *options, "--parts", "methods", "cost", "cases")
    runs = {(r["method"], r["flip_rate"]): r for r in rows if r["part"] == "methods"}
    assert runs.keys() == {("dpo", "0.0"), ("dpo", "0.2"), ("ledger, gate", "0.2")}
    for (_, rate), row in runs.items():
        assert float(row["wrong"]) == pytest.approx(float(rate), abs=0.1)
        assert (row["auroc"] != "") == (rate != "0.0")
    costs = {r["method"]: float(r["step_ratio"]) for r in rows if r["part"] == "cost"}
    assert costs["moving averages"] > costs["dpo"], "two more forward passes"
    assert len([r for r in rows if r["part"] == "cases"]) == 3
    assert (tmp_path / "short" / "votes" / "dpo-0.2-0.npz").is_file()
    written = (tmp_path / "ledger.csv").read_bytes()
    bench(tmp_path, *options, "--parts", "methods")
    assert (tmp_path / "ledger.csv").read_bytes() == written
