"""The checkpoint benchmark runs as published, in short."""

import csv

import pytest


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, script):
    file = tmp_path / "checkpoint.csv"
    options = ["--gigabytes", "0.01", "--runs", "2", "--folder", tmp_path, "--out", file]
    script("benchmarks/bench_checkpoint.py", *options)
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["measure"] for row in rows] == [
        *["save, flushes included"] * 2,
        *["save, flushes excluded"] * 2,
        *["verify"] * 2,
    ]
    assert all(float(row["gb_per_s"]) > 0 for row in rows)
    assert not list(tmp_path.glob("tmp*")), "what it wrote is gone"
