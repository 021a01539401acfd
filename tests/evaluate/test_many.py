"""Many models, sets and scorers in one table: numbers, files, what is kept, several processes."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from fastpo.cli import main
from fastpo.cli.judging import named_weights
from fastpo.config import Config
from fastpo.errors import CheckpointError, ConfigError, ForeignPathError
from fastpo.evaluate import many
from fastpo.evaluate.image_folder import list_pictures
from fastpo.evaluate.many import Candidate, evaluate_many
from fastpo.evaluate.prompt_sets import PromptSet
from fastpo.evaluate.published import beside, published_scores
from fastpo.evaluate.sampling import ImageSampler, Sample
from fastpo.evaluate.scorers import ScorerEntry
from fastpo.evaluate.scorers.registry import SCORERS
from fastpo.evaluate.table import compare_models
from fastpo.evaluate.win_rate import bootstrap_mean, holm, sign_flip_test
from fastpo.system import work
from fastpo.system.process import Rank
from fastpo.testing import tiny_sdxl_folder
from tests.evaluate.test_evaluate import export_lora, export_unet, make_config
from tests.forked import FORK


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl_folder(folder / "sdxl")
    export_lora(folder / "sdxl", folder / "lora")
    export_unet(folder / "sdxl", folder / "unet")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    entry = ScorerEntry("tests.evaluate.test_evaluate:Red", takes_argument=False)
    monkeypatch.setitem(SCORERS, "red", entry)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    sets = [f"hpdv2:{tmp_path}"]
    options = {"prompt_sets": sets, "prompts_per_set": 1, "scorers": ["red"]}
    options |= {"prompts": ["a cat", "seven"], "num_inference_steps": 1, "batch_size": 8}
    return make_config(models / "sdxl", tmp_path / "run", **options)


def candidates(models: Path) -> list[Candidate]:
    return [Candidate("lora", models / "lora"), Candidate("unet", models / "unet")]


def test_one_table_of_models_sets_and_metrics(config: Config, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    table = evaluate_many(config, candidates(models), out, progress=False)
    assert table is not None
    assert table.models == ["base", "lora", "unet"] and table.metrics == ["red", "constant"]
    found = json.loads((out / "table.json").read_text())
    rows = found["rows"]
    assert len(rows) == (1 + 5) * 3 * 2  # two sets and four styles
    with (out / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 3 * (4 + 8)
    base, lora = (
        np.array([float(s["red"]) for s in scores if (s["set"], s["model"]) == ("hpdv2", model)])
        for model in ("base", "lora")
    )
    row = table.row("hpdv2", "lora", "red")
    assert row.mean == pytest.approx(lora.mean()) and row.images == 8 and row.prompts == 4
    assert row.gain == pytest.approx((lora - base).mean())
    assert row.gain_interval == bootstrap_mean(lora - base, np.repeat(range(4), 2))
    assert row.win_rate == (lora > base).mean()
    photo = table.row("hpdv2", "lora", "red", "photo")
    assert photo.gain == pytest.approx((lora - base)[6:].mean()) and photo.p is None
    constant = table.row("prompts", "unet", "constant")
    assert (constant.gain, constant.win_rate, constant.p) == (0.0, 0.5, 1.0)
    assert table.row("prompts", "base", "red").gain is None
    with (out / "table.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert listed[0]["gain"] == "" and float(listed[0]["interval_low"]) == rows[0]["interval"][0]
    images = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    assert len(images) == 36 and "images/lora/hpdv2/00003-7.png" in images
    pictures = {p.file: p.prompt for p in list_pictures(out / "images" / "lora")}
    assert pictures["hpdv2/00003-7.png"] == "photo one" and len(pictures) == 12
    page = (out / "index.html").read_text()
    assert "images/unet/prompts/00001-2.png" in page and "concept-art" in page
    assert "{{" not in page and "Made by FastPO" in page


def test_only_what_is_new_is_made(
    config: Config, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "table", []
    sample = ImageSampler._sample
    monkeypatch.setattr(
        ImageSampler,
        "_sample",
        lambda self, folder, missing, *rest: (
            made.append((folder, len(missing))) or sample(self, folder, missing, *rest)
        ),
    )
    first = evaluate_many(config, candidates(models)[:1], out, progress=False)
    assert sum(count for _, count in made) == 2 * (4 + 8)
    made.clear()
    again = evaluate_many(config, candidates(models)[:1], out, progress=False)
    assert made == [] and again is not None and again.rows == first.rows
    evaluate_many(config, candidates(models), out, progress=False)
    assert {folder.parent.name for folder, _ in made} == {"unet"}
    made.clear()
    (out / "images" / "lora" / "prompts" / "00000-0.png").write_bytes(b"damaged")
    evaluate_many(config, candidates(models), out, progress=False)
    assert {folder.parent.name for folder, _ in made} == {"lora"}
    scored = out / "scores" / "base" / "prompts"
    file = next(scored.glob("red-*.json"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"images": "of others"}))
    evaluate_many(config, candidates(models), out, progress=False)
    assert json.loads(file.read_text()) == content


def test_processes_share_the_work_and_the_first_writes_the_table(
    config: Config, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)  # a fork after several is not safe
    monkeypatch.setattr(many, "CHUNK", 2)
    monkeypatch.setattr(work, "POLL_SECONDS", 0.02)
    out, log = tmp_path / "table", tmp_path / "log"
    sample = ImageSampler._sample

    def logged(self: ImageSampler, folder: Path, missing: list[Sample], *rest: Any) -> None:
        with log.open("a") as file:
            file.writelines(f"{os.getpid()} {folder.parent.name} {s.file}\n" for s in missing)
        sample(self, folder, missing, *rest)

    monkeypatch.setattr(ImageSampler, "_sample", logged)
    options = {"out": out, "progress": False}
    other = FORK.Process(
        target=evaluate_many,
        args=(config, candidates(models)[:1]),
        kwargs=options | {"process": Rank(1, 2)},
        daemon=True,
    )
    other.start()
    table = evaluate_many(config, candidates(models)[:1], process=Rank(0, 2), **options)
    other.join(60)
    assert other.exitcode == 0 and table is not None
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 2, "both of them sampled"
    assert len(lines) == 2 * (4 + 8), "each image once"
    assert len(list(out.rglob("*.png"))) == 24 and not list(out.rglob(".*partial*"))
    alone = evaluate_many(config, candidates(models)[:1], tmp_path / "table", progress=False)
    assert alone is not None and alone.rows == table.rows


def test_what_cannot_be_compared_is_one_line(config: Config, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    twice = [Candidate("lora", models / "lora")] * 2
    with pytest.raises(ConfigError, match="two models are named 'lora'"):
        evaluate_many(config, twice, out, progress=False)
    with pytest.raises(ConfigError, match="'a/b' cannot name a model"):
        evaluate_many(config, [Candidate("a/b", models / "lora")], out, progress=False)
    with pytest.raises(CheckpointError, match="no aligned model"):
        evaluate_many(config, [Candidate("x", tmp_path / "none")], out, progress=False)
    silent = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"scorers": ()})}
    )
    with pytest.raises(ConfigError, match="nothing to compare by"):
        evaluate_many(silent, candidates(models), out, progress=False)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ForeignPathError, match="table"):
        evaluate_many(config, candidates(models), out, progress=False)


def test_groups_and_adjusted_p_values_by_hand() -> None:
    """Three prompts, two images each; all gains positive: 2 of 8 sign patterns are as large."""
    prompts = PromptSet("s", ("a", "b", "c"), ("x", "y", "x"))
    samples = [Sample(i, name, 2 * i + k) for i, name in enumerate("abc") for k in range(2)]
    base = {"m": np.zeros(6), "n": np.zeros(6)}
    model = {"m": np.array([1.0, 1, 2, 2, 3, 3]), "n": np.array([1.0, -1, 0, 0, 0, 0])}
    scores = {("base", "s"): base, ("it", "s"): model}
    table = compare_models({"s": (prompts, samples)}, scores)
    row = table.row("s", "it", "m")
    assert (row.gain, row.win_rate, row.p, row.p_holm) == (2.0, 1.0, 0.25, 0.5)
    other = table.row("s", "it", "n")
    assert (other.gain, other.win_rate, other.p, other.p_holm) == (0.0, 0.5, 1.0, 1.0)
    group = table.row("s", "it", "m", "x")
    assert (group.gain, group.p, group.p_holm, group.prompts) == (2.0, 0.5, None, 2)


def test_the_permutation_test_agrees_with_theory() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.2, 1.0, 100)
    found = sign_flip_test(values, np.arange(100))
    z = values.sum() / np.sqrt((values**2).sum())
    assert found == pytest.approx(2 * (1 - NormalDist().cdf(abs(z))), abs=0.01)
    assert found == sign_flip_test(values, np.arange(100))
    assert sign_flip_test(np.full(50, 1.0), np.arange(50)) == pytest.approx(1 / 10_001)
    assert sign_flip_test(np.ones(3), np.zeros(3)) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_published_scores_name_their_source_and_known_metrics() -> None:
    scores = published_scores()
    assert {score.base for score in scores} == {"sdxl", "sd15"}
    assert {score.metric for score in scores} <= set(SCORERS)
    assert all(score.source and score.caveat for score in scores)
    found = {
        (score.source[:4], score.model): score.value
        for score in beside("sdxl", ["pickapic"], ["pickscore"])
    }
    assert found["MaPO", "MaPO"] == 22.5 and found["SPO,", "base"] == 21.95
    assert found["Self", "Diffusion-DPO"] == 22.57 and len(found) == 11
    assert beside("sd15", ["parti"], ["clip"])[0].value == 33.88


def test_models_are_named_after_their_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert named_weights("dpo=runs/x") == ("dpo", Path("runs/x"))
    assert named_weights("runs/x/final")[0] == "x"
    assert named_weights("runs/x/checkpoints/step-00000500")[0] == "x-step-00000500"
    assert named_weights("runs/a=b/x") == ("x", Path("runs/a=b/x"))
    with pytest.raises(SystemExit):
        main(["evaluate", "none.yaml", "--weights", "a", "--weights", "b"])
    assert "--out" in capsys.readouterr().err
