"""The ledger's benchmark runs as published, in short, and its tables come from its rows."""

import csv

import pytest


@pytest.mark.long
@pytest.mark.slow
def test_every_part_runs_and_a_finished_run_is_not_repeated(tmp_path, script):
    file = tmp_path / "ledger.csv"
    command = ["-m", "fastpo.study.ledger", "--short", "--work", tmp_path, "--out", file]
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
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ledger:begin -->\n<!-- ledger:end -->\n")
    replay = ["--work", tmp_path / "short", "--csv", file, "--readme", readme]
    script("-m", "fastpo.study.replay", *replay)
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["part"] == "scale"]
    votes = {row["method"] for row in rows if row["auroc"]}
    assert {"sign", "step rms", "leveled and worth (ours)"} <= votes
    table = file.with_suffix(".md").read_text()
    gate = next(r for r in csv.DictReader(file.open()) if r["case"] == "two tastes, 70/30")
    assert f"{float(gate['auroc']):.3f}" in readme.read_text() and gate["auroc"] in table
    for heading in ("each bin's tenth", "WINDOW = 32", "two bursts of 80"):
        assert f"| {heading} |" in table
