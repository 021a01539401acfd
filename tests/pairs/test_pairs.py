"""`fastpo pairs`: from a model's samples, from ranked lists, from likes; read by `prepare`."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.cli import main
from fastpo.config import Config
from fastpo.data.sources import open_source
from fastpo.errors import ConfigError, DataError, ForeignPathError
from fastpo.evaluate.many import Candidate
from fastpo.evaluate.sampling import ImageSampler
from fastpo.evaluate.scorers import ScorerEntry, WeightedScorer
from fastpo.evaluate.scorers.registry import SCORERS
from fastpo.pairs.choose import Choice, choose_pairs
from fastpo.pairs.sample import pairs_from_model
from fastpo.pairs.tables import pairs_from_table
from fastpo.system.process import Rank
from fastpo.testing import image_bytes, tiny_sdxl_folder
from tests.evaluate.test_evaluate import export_lora, make_config

SIDES = ("chosen", "rejected")


class Sparse(WeightedScorer):
    """Says of the second half of the images that they are better."""

    name = "halves"

    def score(self, images: Any, prompts: Any) -> dict[str, list[float]]:
        return {"halves": [float(i >= len(images) / 2) for i in range(len(images))]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl_folder(folder / "sdxl")
    export_lora(folder / "sdxl", folder / "lora")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    red = ScorerEntry("tests.evaluate.test_evaluate:Red", takes_argument=False)
    monkeypatch.setitem(SCORERS, "red", red)
    monkeypatch.setitem(SCORERS, "halves", ScorerEntry("tests.pairs.test_pairs:Sparse"))
    options = {"prompts": ["a cat", "seven"], "num_inference_steps": 1, "batch_size": 8}
    options |= {"scorers": ["red"], "seeds_per_prompt": 3}
    return make_config(models / "sdxl", tmp_path / "run", **options)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_by_prepare(path: Path) -> list[tuple[str, str, bytes, bytes]]:
    """What `fastpo prepare` sees of a folder or listing."""
    raw = {"source": "folder", "path": str(path)}
    config = make_config(path, path).model_copy()
    config = config.model_copy(update={"data": config.data.model_validate(raw)})
    source = open_source(config.data)
    return [(p.pair_id, p.prompt, p.winner(), p.loser()) for p in source.pairs(0, len(source))]


def test_choices_by_hand() -> None:
    values = [0.2, 0.9, 0.5, 0.9]
    assert choose_pairs(values, "extremes") == [Choice(1, 0, pytest.approx(0.7))]
    assert [(c.winner, c.loser) for c in choose_pairs(values, "once")] == [(1, 0), (3, 2)]
    assert [(c.winner, c.loser) for c in choose_pairs(values, "all")] == [
        *((1, 2), (1, 0), (3, 2), (3, 0), (2, 0))
    ]
    assert [(c.winner, c.loser) for c in choose_pairs(values, "all", gap=0.5)] == [(1, 0), (3, 0)]
    assert choose_pairs([1.0, 1.0], "all") == choose_pairs([1.0], "once") == []


def test_best_and_worst_of_a_model_s_samples(config: Config, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    model = Candidate("lora", models / "lora")
    said = pairs_from_model(config, out, model=model)
    assert said == f"2 pairs of 2 prompts in {out}"
    rows = rows_of(out / "pairs.jsonl")
    assert [row["prompt"] for row in rows] == ["a cat", "seven"]
    assert {row["winner"].rpartition("/")[0] for row in rows} == {"images/lora/prompts"}
    scores = json.loads(next(out.glob("scores/lora/prompts/red-*.json")).read_text())["metrics"]
    for number, row in enumerate(rows):
        own = scores["red"][3 * number : 3 * number + 3]
        assert row["scores_winner"]["red"] == max(own) and row["scores_loser"]["red"] == min(own)
        assert row["gap"] == max(own) - min(own)
        seed = row["seed_winner"]
        assert own[seed - 3 * number] == max(own) and f"-{seed}.png" in row["winner"]
    seen = read_by_prepare(out)
    assert [name for name, *_ in seen] == [row["id"] for row in rows]
    assert seen[1][2] == (out / rows[1]["winner"]).read_bytes()


def test_a_second_call_keeps_the_images_and_chooses_anew(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs"
    assert pairs_from_model(config, out, process=Rank(1, 2)) is None
    assert not (out / "pairs.jsonl").exists()

    def nothing(*_: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(ImageSampler, "_sample", nothing)
    assert pairs_from_model(config, out, pick="all") == f"6 pairs of 2 prompts in {out}"
    gaps = sorted(row["gap"] for row in rows_of(out / "pairs.jsonl"))
    pairs_from_model(config, out, pick="all", gap=gaps[3])
    assert sorted(row["gap"] for row in rows_of(out / "pairs.jsonl")) == gaps[3:]
    with pytest.raises(DataError, match="no pair with a gap of 1000"):
        pairs_from_model(config, out, gap=1000.0)
    both = config.evaluate.model_copy(update={"scorers": ("red", "halves")})
    said = pairs_from_model(config.model_copy(update={"evaluate": both}), out, pick="all")
    rows = rows_of(out / "pairs.jsonl")
    assert all(r["scores_winner"]["halves"] >= r["scores_loser"]["halves"] for r in rows)
    assert said is not None and (len(rows) == 6 or "on which the scorers disagree" in said)


def test_what_cannot_be_sampled_is_one_line(config: Config, tmp_path: Path) -> None:
    def changed(**options: Any) -> Config:
        return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=options)})

    with pytest.raises(ConfigError, match=r"give evaluate\.scorers"):
        pairs_from_model(changed(scorers=()), tmp_path / "pairs")
    with pytest.raises(ConfigError, match="two images of a prompt"):
        pairs_from_model(changed(seeds_per_prompt=1), tmp_path / "pairs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pairs.jsonl").write_text('{"prompt": "a", "winner": "w", "loser": "l"}')
    with pytest.raises(ForeignPathError):
        pairs_from_model(config, tmp_path / "mine")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_ranked_lists_of_every_kind(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2]},
        {"prompt": "b", "images": ["3.png", "4.png"], "ranking": [1, 2]},
    ]
    (tmp_path / "data").mkdir()
    for number in range(5):
        (tmp_path / "data" / f"{number}.png").write_bytes(image_bytes(number))
    table = tmp_path / "data" / f"table{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        table.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                cells = (row["images"], row["ranking"])
                writer.writerow([row["prompt"], *map(json.dumps, cells)])
    said = pairs_from_table(table, tmp_path / "pairs.jsonl")
    assert said == f"3 pairs of 2 prompts in {tmp_path / 'pairs.jsonl'}"
    found = [(r["prompt"], r["winner"], r["loser"]) for r in rows_of(tmp_path / "pairs.jsonl")]
    assert found == [
        ("a", "data/1.png", "data/0.png"),
        ("a", "data/1.png", "data/2.png"),
        ("b", "data/3.png", "data/4.png"),
    ]
    assert [prompt for _, prompt, *_ in read_by_prepare(tmp_path)] == ["a", "a", "b"]


def test_flow_factorys_records_of_preference(tmp_path: Path) -> None:
    def record(**changes: object) -> str:
        media = {side: {"media": [{"type": "image", "path": f"{side}.png"}]} for side in SIDES}
        told = {"type": "preference", **media}
        given = {"prompt": "A clean typographic poster.", "media": [], **changes}
        return json.dumps({"schema_version": 2, "input": given, "supervision": told})

    table = tmp_path / "train.jsonl"
    table.write_text(record() + "\n")
    pairs_from_table(table, tmp_path / "pairs.jsonl")
    (row,) = rows_of(tmp_path / "pairs.jsonl")
    assert (row["winner"], row["loser"]) == ("chosen.png", "rejected.png")
    assert row["prompt"] == "A clean typographic poster."
    table.write_text(record(media=[{"type": "image", "path": "source.png"}]) + "\n")
    with pytest.raises(DataError, match="line 1: it has input media"):
        pairs_from_table(table, tmp_path / "other.jsonl")


def test_scores_likes_and_lists_best_first(tmp_path: Path) -> None:
    rows = [
        {"caption": "a", "file_path": ["x", "y", "z"], "scores": [0.1, 0.5, 0.2]},
        {"prompt": "b", "ranked": ["best", "good", "bad"]},
        {"prompt": "c", "image": "c0", "liked": True},
        {"prompt": "d", "image": "d0", "liked": 1},
        {"prompt": "c", "image": "c1", "label": "exclusive_lose"},
        {"prompt": "c", "image": "c2", "label": "intersections"},
        {"prompt": "c", "image": "c3", "liked": False},
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs_from_table(table, tmp_path / "all.jsonl", gap=0.25)
    found = [(r["winner"], r["loser"]) for r in rows_of(tmp_path / "all.jsonl")]
    assert found == [
        *(("y", "z"), ("y", "x"), ("best", "good"), ("best", "bad"), ("good", "bad")),
        *(("c0", "c1"), ("c0", "c3")),
    ]
    pairs_from_table(table, tmp_path / "few.jsonl", pick="extremes")
    found = [(r["winner"], r["loser"]) for r in rows_of(tmp_path / "few.jsonl")]
    assert found == [("y", "x"), ("best", "bad"), ("c0", "c3")]
    (tmp_path / "deep").mkdir()
    said = pairs_from_table(table, tmp_path / "deep" / "out.jsonl")
    assert said.endswith("8 pairs outside of its folder: data.allow_outside")
    pairs_from_table(table, tmp_path / "no" / "such" / "out.jsonl", gap=0.25)
    assert rows_of(tmp_path / "no" / "such" / "out.jsonl")[0]["winner"] == "../../y"


def test_tables_that_make_no_pairs_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "table.jsonl", tmp_path / "out.jsonl"
    for row, words in (
        ({"images": ["a"], "ranking": [1]}, "line 1: no prompt"),
        ({"prompt": "a", "images": ["a", "b"], "ranking": [1]}, "2 images and 1 ranks"),
        ({"prompt": "a", "images": ["a", "b"]}, "images without ranking or scores"),
        ({"prompt": "a", "images": ["a", "b"], "scores": [1, math.inf]}, "a rank or score is inf"),
        ({"prompt": "a", "images": ["a", "b"], "scores": [1, math.nan]}, "a rank or score is nan"),
        ({"prompt": "a", "images": ["a", "b"], "scores": [1, 10**400]}, "a rank or score is 1000"),
        ({"prompt": "a", "images": ["a", "b"], "ranking": [1, None]}, "a rank or score is None"),
        ({"prompt": "a", "images": ["a", "b"], "ranking": ["1", "x"]}, "a rank or score is 'x'"),
        ({"prompt": "a", "images": ["a", "b"], "scores": [1e308, -1e308]}, "scores differ by more"),
        ({"prompt": "a", "image": "x", "liked": "perhaps"}, "liked is 'perhaps'"),
        ({"prompt": "a", "image": "x", "liked": 1}, "1 prompt, but no pair"),
    ):
        table.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=words):
            pairs_from_table(table, out)
        assert not out.exists()
    with pytest.raises(DataError, match=r"must end with \.jsonl"):
        pairs_from_table(table, tmp_path / "out.csv")
    with pytest.raises(DataError, match="exists and is not replaced"):
        pairs_from_table(table, table)
    with pytest.raises(SystemExit) as ended:
        main(["pairs", str(tmp_path / "none.csv"), str(out)])
    assert ended.value.code == 2 and "no such file" in capsys.readouterr().err
