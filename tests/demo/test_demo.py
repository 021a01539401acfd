"""The demo's parts: scans, scorer, preferences, base; and all of it together, in short."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastpo.config import DataConfig
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source
from fastpo.demo import run as demo
from fastpo.demo.base import FAMILIES, SHORT, build_base
from fastpo.demo.base_training import BaseRecipe
from fastpo.demo.digits import WORDS, digit_of, ink, load_scans, prompts, to_image
from fastpo.demo.preferences import SCHEMA, write_preferences
from fastpo.demo.run import OBJECTIVES, demo_config, run_demo
from fastpo.demo.scorer import NOTHING, DigitScorer, non_digits, thickened
from fastpo.errors import ConfigError, DataError, FastPOError
from fastpo.train import train


@pytest.fixture(scope="module")
def scorer():
    return DigitScorer()


def images(grays):
    return [to_image(gray) for gray in grays]


def captions(labels):
    return [f"the digit {WORDS[label]}" for label in labels]


def test_held_out_scans_and_prompts_are_kept_apart():
    seen = {image.tobytes() for image in load_scans().images}
    held_out = load_scans(held_out=True)
    assert not seen & {image.tobytes() for image in held_out.images}
    assert len(seen) + len(held_out) > 1790
    assert not set(prompts()) & set(prompts(held_out=True))
    assert {digit_of(p) for p in prompts(held_out=True)} == set(range(10))


def test_a_prompt_without_a_digit_is_refused():
    with pytest.raises(DataError, match="a cat"):
        digit_of("a cat")


def test_the_scorer_reads_scans_it_was_not_fitted_on(scorer):
    scans = load_scans(held_out=True)
    right = scorer.score(images(scans.images), captions(scans.labels))
    assert right["legible"].mean() > 0.96
    bold = images(thickened(scans.images, 1.0))
    assert scorer.score(bold, captions(scans.labels))["legible"].mean() > 0.96
    wrong = scorer.score(images(scans.images), captions((scans.labels + 1) % 10))
    assert wrong["ink_reward"].mean() < 0.02


def test_the_scorer_recognizes_nothing_where_there_is_nothing(scorer):
    held_out = non_digits(load_scans(held_out=True).images, seed=9)
    assert (scorer.read(images(held_out)) == NOTHING).mean() > 0.97
    static = np.random.default_rng(0).integers(0, 256, (50, 32, 32), dtype=np.uint8)
    assert (scorer.read(images(static)) == NOTHING).all()


def test_a_black_square_earns_nothing_and_boldness_pays(scorer):
    black, white = Image.new("RGB", (32, 32), 0), Image.new("RGB", (32, 32), (255, 255, 255))
    for sheet in (black, white):
        for word in WORDS:
            assert scorer.score([sheet], [word])["ink_reward"][0] == 0.0
    scans = load_scans(held_out=True)
    few = scans.images[:50]
    plain = scorer.score(images(few), captions(scans.labels[:50]))["ink_reward"].mean()
    bold = scorer.score(images(thickened(few, 0.7)), captions(scans.labels[:50]))["ink_reward"]
    assert bold.mean() > plain + 0.03


def test_preferences_have_pick_a_pics_schema_and_prefer_the_bolder(tmp_path):
    folder = write_preferences(tmp_path, n_pairs=60, seed=3)
    table = pq.read_table(next((folder / "data").glob("*.parquet")))
    assert table.schema.equals(SCHEMA)
    assert 10 < sum(label == 0.0 for label in table["label_0"].to_pylist()) < 50
    for pair in open_source(DataConfig(source="pickapic", path=str(folder))):
        import io

        winner, loser = (ink(Image.open(io.BytesIO(side()))) for side in (pair.winner, pair.loser))
        assert winner > loser


def test_preferences_are_the_same_for_the_same_seed(tmp_path):
    tables = [
        pq.read_table(
            next((write_preferences(tmp_path / str(i), n_pairs=9, seed=s)).rglob("*.parquet"))
        )
        for i, s in enumerate((1, 1, 2))
    ]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])
    with pytest.raises(ValueError, match="positive"):
        write_preferences(tmp_path, n_pairs=0, seed=0)


def test_the_base_is_a_stock_pipeline_and_is_kept(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    base = build_base(tmp_path / "base", recipe=SHORT, progress=False)
    written = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    build_base(base, recipe=SHORT, progress=False)
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == written
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a handwritten seven", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (32, 32)
    build_base(base, recipe=SHORT, seed=1, progress=False)
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} != written
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_base_of_flow_matching_is_prepared_and_trained_like_any_sd3(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    recipe = BaseRecipe(vae_steps=1, vae_batch=4, unet_steps=1, unet_batch=4)
    base = build_base(tmp_path / "base", recipe=recipe, progress=False, family="sd3")
    data = write_preferences(tmp_path / "pairs", n_pairs=8, seed=0)
    paths = {"base": base, "preferences": data, "work": tmp_path}
    config = demo_config("adaptive_dpo_ledger", paths, seed=0, short=True, family="sd3")
    prepare(config, progress=False)
    folder = train(config, progress=False)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert len(losses) == 4 and np.isfinite(losses).all()
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    loaded = type(pipeline.transformer).from_pretrained(folder / "final" / "transformer")
    pipeline.transformer = loaded
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": config.prepare.text_length, "height": 32, "width": 32}
    image = pipeline("a handwritten seven", num_inference_steps=2, **options).images[0]
    assert image.size == (32, 32)


def test_every_caption_of_the_demo_is_read_whole(tmp_path):
    from fastpo.demo.flow_base import CLIP_LENGTH, TEXT_LENGTH
    from fastpo.demo.text import build_tokenizer, build_word_tokenizer

    captions = [*prompts(), *prompts(held_out=True)]
    words, tokens = build_word_tokenizer(captions), build_tokenizer(captions)
    ids = words(captions)["input_ids"]
    assert max(map(len, ids)) == TEXT_LENGTH
    assert len({tuple(row) for row in ids}) == len(captions)
    assert words.unk_token_id not in {token for row in ids for token in row}
    assert max(map(len, tokens(captions)["input_ids"])) == CLIP_LENGTH


def test_a_family_that_the_demo_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--family: the demo has sdxl and sd3, got 'qwen'"):
        run_demo(tmp_path / "out", family="qwen")
    assert not (tmp_path / "out").exists()


@contextmanager
def backwards(processes):
    """Jobs in the wrong order, as processes end in any."""
    yield lambda job, items: ((k, job(*items[k])) for k in reversed(range(len(items))))


def configs(*, short=False):
    folders = {"base": Path("base"), "preferences": Path("pairs"), "work": Path("work")}
    return {name: demo_config(name, folders, seed=3, short=short) for name in OBJECTIVES}


def test_runs_are_told_of_as_they_end_and_compared_in_their_order(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "workers", backwards)
    monkeypatch.setattr(demo, "make_run", lambda config, samples: None)
    monkeypatch.setattr(demo, "evaluate", lambda config, **_: asked.append(config) or len(asked))
    runs = configs()
    found = demo._evaluations(runs, Path("samples"), 2)
    assert asked == [runs[name] for name in reversed(demo.BEGUN)]
    assert list(found) == list(OBJECTIVES)
    assert found == {name: 5 - k for k, name in enumerate(demo.BEGUN)}


def test_a_run_that_fails_ends_the_demo_by_its_name(monkeypatch):
    monkeypatch.setattr(demo, "workers", backwards)
    monkeypatch.setattr(demo, "make_run", lambda config, samples: "the disk is full")
    with pytest.raises(FastPOError, match=r"^adaptive_dpo_ledger: the disk is full$"):
        demo._evaluations(configs(), Path("samples"), 2)


def test_the_rounds_of_the_demo_take_the_ledgers_verdicts_to_the_base():
    runs = configs()
    rounds, ledger = runs["rounds"], runs["adaptive_dpo_ledger"]
    assert (rounds.train.rounds, rounds.train.rounds_turn) == (2, 0.5)
    assert rounds.train.objective == ledger.train.objective
    assert rounds.train.epochs == ledger.train.epochs > rounds.train.round_epochs
    assert rounds.data == ledger.data and rounds.data.flip_rate == 0.2
    assert {c.train.max_steps for c in configs(short=True).values()} == {4}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_demo_writes_its_page_and_its_summary(tmp_path, family):
    summary = run_demo(tmp_path, short=True, family=family)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert {"base", "objectives", "minority_auroc", "flip_rate", "wall_s"} <= summary.keys()
    assert summary["objectives"].keys() == summary["data_wait"].keys() == OBJECTIVES.keys()
    passes = {name: values["passes"] for name, values in summary["objectives"].items()}
    visits = passes["dpo"] / 4  # forward, backward and the reference's forward pass
    assert passes["dpo_clean"] == passes["dpo"]
    assert passes["adaptive_dpo_released"] == pytest.approx(6 * visits)
    assert 2 * visits <= passes["adaptive_dpo_ledger"] <= 4 * visits
    assert passes["rounds"] > passes["adaptive_dpo_ledger"], "two rounds"
    assert all(0.0 <= share < 1.0 for share in summary["data_wait"].values())
    for values in summary["objectives"].values():
        assert {"reward_mean", "win_rate", "win_rate_interval", "legibility"} <= values.keys()
    work = tmp_path / f"seed-0{FAMILIES[family].suffix}-short"
    page = (work / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page
    again = run_demo(tmp_path, short=True, family=family)
    assert again["objectives"] == summary["objectives"]
