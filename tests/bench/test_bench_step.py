"""The benchmark of whole steps runs as published, and its table and figure come from its rows."""

import csv

import pytest


@pytest.mark.slow
def test_options_are_measured_beside_the_step_without_them(tmp_path, script):
    file = tmp_path / "options.csv"
    options = ["--options", "bf16 weights", "gradient checkpointing", "channels-last"]
    sizes = ["--size", "tiny", "--method", "lora", "--rounds", 2, "--out", file]
    text = script("benchmarks/bench_step.py", *sizes, *options, "--peaks", "bare policy")
    assert "bf16 weights: " in text  # LoRA's own weights stay float32
    with file.open() as lines:
        rows = {row["provider"]: row for row in csv.DictReader(lines)}
    names = ["bare policy", "FastPO MaPO"]
    names += [f"FastPO MaPO, {name}" for name in options[2:]]
    assert list(rows) == names
    assert [row["checkpointing"] for row in rows.values()] == ["False", "False", "True", "False"]
    assert float(rows[names[2]]["times_floor"]) > 0 < float(rows[names[2]]["floor_pairs_per_s"])
    assert float(rows[names[0]]["peak_mib"]) > 0
    assert [row["peak_mib"] for row in rows.values()][1:] == ["", "", ""]
    script("benchmarks/plot_step.py", file)
    assert file.with_suffix(".md").read_text().count("**tiny, lora") == 1


@pytest.mark.slow
def test_every_step_is_timed_part_by_part_and_drawn(tmp_path, script):
    file = tmp_path / "step.csv"
    options = ["--size", "tiny", "--method", "lora", "--rounds", 2, "--out", file]
    script("benchmarks/bench_step.py", *options, "--peaks")  # each would be a process of its own
    with file.open() as lines:
        rows = {row["provider"]: row for row in csv.DictReader(lines)}
    assert len(rows) == 13
    for name, row in rows.items():
        shares = {k.removeprefix("share_"): float(v) for k, v in row.items() if "share_" in k}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
        recipe = name.startswith("recipe")
        assert (shares["VAE"] > 0) == recipe == (shares["text"] > 0), name
        assert (row["faster_p20"] != "") == name.startswith("FastPO")
        live = "live reference" in name or name in ("recipe Diffusion-DPO", "recipe Adaptive-DPO")
        assert (shares["reference"] > 0 or shares["annotators"] > 0) == live, name
        assert shares["policy_forward"] > 0
        assert shares["backward"] > 0 or "sampled" in name  # of one pair perhaps no draw
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- step:begin -->\nold\n<!-- step:end -->\nafter\n")
    script("benchmarks/plot_step.py", file, "--readme", readme)
    text = readme.read_text()
    assert "FastPO MaPO" in text
    assert "old" not in text
    assert text.endswith("after\n")
    assert (tmp_path / "step.png").stat().st_size > 10_000
