"""The data benchmark runs as published, in short."""

import csv

import pytest


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, script):
    file = tmp_path / "data.csv"
    sizes = ["--rows", "3000", "--pairs", "2000", "--shards", "2", "--waits", "3"]
    script("benchmarks/bench_data.py", *sizes, "--folder", tmp_path, "--out", file)
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    by = {(row["measure"], row["pairs"]): row for row in rows}
    for measure in ("open cache index", "shuffle an epoch", "resume in the sixth epoch"):
        assert float(by[measure, "2000"]["ratio"]) > 0
    assert float(by["index labels", "3000"]["ms"]) > 0
    assert "% of steps of" in by["wait, 2 reading threads", "8"]["note"]
    assert not list(tmp_path.glob("tmp*")), "what it wrote is gone"
