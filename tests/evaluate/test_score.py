"""`fastpo score` on folders of images as people keep them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpo.cli import main
from fastpo.errors import ConfigError, DataError
from fastpo.evaluate import score
from fastpo.evaluate.image_folder import list_pictures
from fastpo.evaluate.score import score_pictures
from fastpo.evaluate.scorers import ScorerEntry, WeightedScorer
from fastpo.evaluate.scorers.registry import SCORERS


class Length(WeightedScorer):
    """The prompt's length plus the red channel; how many other images share the prompt."""

    name = "length"
    needs_groups = True

    def score(self, images, prompts):
        red = np.array([np.asarray(image)[0, 0, 0] for image in images], dtype=float)
        same = [sum(p == q for q in prompts) for p in prompts]
        return {"length": np.array([len(p) for p in prompts]) + red, "same": np.array(same)}


class Red(Length):
    """Reads no prompt."""

    name, reads_prompts, needs_groups = "red", False, False

    def score(self, images, prompts):
        return {"red": np.array([np.asarray(image)[0, 0, 0] for image in images], dtype=float)}


def put(path: Path, red: int, *, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text + "\n")


def test_prompts_from_each_kind_of_place(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 1)
    put(tmp_path / "b.jpg", 1, text="beside")
    put(tmp_path / "deep" / "c.webp", 1)
    put(tmp_path / "00003" / "samples" / "0000.png", 1)
    put(tmp_path / "z.png", 1)
    put(tmp_path / ".thumbnails" / "a.png", 1)
    put(tmp_path / "ours" / "00000-1.png", 1)
    (tmp_path / "ours" / "set.json").write_text('{"prompts": {"00000-1.png": "sampled"}}')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "listed"}\n')
    (tmp_path / "deep" / "metadata.csv").write_text("file_name,text\nc.webp,in a table\n")
    (tmp_path / "00003" / "metadata.jsonl").write_text('{"tag": "counting", "prompt": "two"}\n')
    found = {picture.file: picture.prompt for picture in list_pictures(tmp_path)}
    assert found == {
        "00003/samples/0000.png": "two",
        "a.png": "listed",
        "b.jpg": "beside",
        "deep/c.webp": "in a table",
        "ours/00000-1.png": "sampled",
        "z.png": None,
    }


def test_scores_are_in_the_files_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCORERS, "length", ScorerEntry("tests.evaluate.test_score:Length"))
    monkeypatch.setattr(score, "SCORE_TOGETHER", 2)
    images = tmp_path / "images"
    for i, text in enumerate(["ab", "a", "ab", "a", "ab"]):
        put(images / f"{i}.png", i, text=text)
    out = tmp_path / "scores.json", tmp_path / "scores.csv"
    arguments = ["score", str(images), "--scorer", "length"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(out[0]), "--out", str(out[1])])
    assert ended.value.code == 0
    assert "length" in capsys.readouterr().out
    found = json.loads(out[0].read_text())["folders"][0]
    assert [row["length"] for row in found["scores"]] == [2, 2, 4, 4, 6]
    assert [row["same"] for row in found["scores"]] == [3, 2, 3, 2, 3]
    assert found["metrics"]["length"]["mean"] == 3.6 and found["images"] == 5
    low, high = found["metrics"]["length"]["interval"]
    assert (low, high) == (3.0, 4.0)  # of two prompts one may be drawn twice
    rows = list(csv.DictReader(out[1].read_text().splitlines()))
    assert [float(row["length"]) for row in rows] == [2, 2, 4, 4, 6]
    assert rows[1]["prompt"] == "a" and rows[1]["file"] == "1.png"
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        score_pictures([images], [Red()], out=out, progress=False)
    deep = tmp_path / "no" / "such" / "scores.json"
    score_pictures([images], [Red()], out=[deep], progress=False)
    assert json.loads(deep.read_text())["folders"][0]["images"] == 5
    out[0].unlink()
    out[0].symlink_to("nowhere.json")  # a link that leads nowhere is somebody's as well
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        score_pictures([images], [Red()], out=out[:1], progress=False)


def test_a_missing_prompt_is_named_where_a_scorer_needs_it(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 5, text="a")
    put(tmp_path / "b.png", 7)
    with pytest.raises(
        DataError, match=r"1 of 2 images have no prompt, which length needs.*b\.png"
    ):
        score_pictures([tmp_path], [Red(), Length()], progress=False)
    found = score_pictures([tmp_path], [Red()], progress=False)[0]
    assert list(found.scores["red"]) == [5, 7]


def test_a_prompt_set_in_the_images_order(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nabc\n")
    for i in range(4):
        put(tmp_path / "images" / f"{i:05d}.png", 10 * i)
    prompts = f"lines:{tmp_path / 'prompts.txt'}"
    found = score_pictures([tmp_path / "images"], [Length()], prompts=prompts, progress=False)
    assert list(found[0].scores["length"]) == [1, 11, 23, 33]
    put(tmp_path / "images" / "9.png", 0)
    with pytest.raises(DataError, match=r"holds 5 images, .* has 2 prompts"):
        score_pictures([tmp_path / "images"], [Length()], prompts=prompts, progress=False)


def test_what_cannot_be_scored_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        score_pictures([tmp_path / "none"], [Red()], progress=False)
    with pytest.raises(DataError, match="holds no images"):
        score_pictures([tmp_path], [Red()], progress=False)
    with pytest.raises(ConfigError, match="nothing to score by"):
        score_pictures([tmp_path], [], progress=False)
    with pytest.raises(ConfigError, match=r"must end with \.json or \.csv"):
        score_pictures([tmp_path], [Red()], out=[tmp_path / "a.txt"], progress=False)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        score_pictures([tmp_path], [Red()], progress=False)
    put(tmp_path / "a.png", 1)
    (tmp_path / "metadata.jsonl").write_text("[1]\n")
    with pytest.raises(
        DataError, match=r"metadata\.jsonl cannot be read: line 1 is no JSON object"
    ):
        score_pictures([tmp_path], [Red()], progress=False)
