"""`fastpo init`: what it writes is taken by `fastpo plan`, says why, and replaces nobody's file."""

import re

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import load_config
from fastpo.data.sources import recognize
from fastpo.errors import ConfigError, DataError, ForeignPathError
from fastpo.plan import make_plan
from fastpo.plan.choose import WAYS, choose
from fastpo.plan.fit import last_true
from fastpo.plan.gpus import Gpu
from fastpo.plan.init import Wanted, write_config
from fastpo.testing import pickapic_row, write_folder, write_pickapic
from fastpo.testing.flow import tiny_flux_kontext_folder


@pytest.fixture(scope="module")
def written(tiny_pipelines, tmp_path_factory):
    base = tmp_path_factory.mktemp("init")
    write_folder(base / "pairs", 40)
    wanted = Wanted(str(tiny_pipelines["sd15"]), str(base / "pairs"), gpu="rtx4060")
    config = write_config(base / "mine.yaml", wanted)
    return base / "mine.yaml", config, wanted


def test_the_file_holds_what_was_chosen_and_plan_takes_it(written):
    path, config, _ = written
    assert load_config(path) == config
    assert (config.data.source, config.train.method) == ("folder", "full")
    assert (config.train.micro_batch_size, config.train.accumulation_steps) == (4, 1)
    assert (config.train.epochs, config.train.max_steps) == (4, None)
    plan = make_plan(config, gpu="rtx4060")
    assert plan.costs[0].fits and plan.assumptions.pairs == 40 and plan.assumptions.visits == 160
    assert config.prepare.cache_dir.name == "mine"


def test_each_key_is_explained_by_its_section_and_the_choice(written):
    text = written[0].read_text()
    plain = re.sub(r"\n *# ", " ", text)
    assert "Low-rank adapters beside frozen weights, or all of the denoiser's weights." in plain
    assert re.search(r"The first way that fits into 8 GB of .*RTX 4060, .* GB at the peak", plain)
    assert "Slope" not in plain and "name: dpo" in text
    assert "SD15: " in plain and "40 pairs." in plain
    assert max(map(len, text.splitlines())) <= 100 or "tmp" in text


def test_a_file_of_somebody_else_or_edited_is_left(written, tmp_path):
    path, config, wanted = written
    own = path.read_text()
    copy = tmp_path / "copy.yaml"
    for text in ("seed: 0\n", own + "# mine\n", own.replace("epochs: 4", "epochs: 9")):
        copy.write_text(text)
        with pytest.raises(ForeignPathError, match=r"copy\.yaml exists and .*; it is left"):
            write_config(copy, wanted)
        assert copy.read_text() == text
    assert write_config(path, wanted) == config and path.read_text() == own


def test_the_first_way_that_fits_is_taken_and_the_others_are_told(written):
    """Cards from small to large: nothing, LoRA, full; a method that was asked for is kept."""
    from fastpo.plan.architecture import resolve_architecture

    _, config, _ = written
    raw = config.model_dump(mode="json")
    raw["train"] |= {"micro_batch_size": 1, "accumulation_steps": 1}
    architecture = resolve_architecture(config)

    def chosen(gigabytes, method=None):
        gpu = Gpu("a card", 1.0, 1.0, 1.0, gigabytes)
        return choose(raw, architecture, gpu, method=method, batch=8, status=str)

    with pytest.raises(
        ConfigError, match=r"has 1 GB, .* \(lora, grad.*: true, .*: 4bit\) needs 1\.0 GB"
    ):
        chosen(1)
    whole = chosen(8)
    assert whole.values == {"train.method": "full", "train.gradient_checkpointing": False}
    assert whole.pairs == 8 and whole.passed_over == ()
    assert chosen(8, "lora").values["train.method"] == "lora"
    between = (chosen(8).bytes / 1e9 - 0.001) / 0.9
    less = chosen(between, "full")
    assert less.pairs < 8 and less.bytes <= 0.9e9 * between
    assert [*WAYS["full"][0]] == ["gradient_checkpointing"]


def test_the_last_of_which_something_holds():
    assert [last_true(lambda n, most=most: n <= most, 9) for most in (0, 1, 8, 9, 99)] == [
        *(0, 1, 8, 9, 9)
    ]


def test_the_kind_of_data_is_told_by_what_lies_there(tmp_path):
    write_pickapic(tmp_path / "picks" / "data" / "train-0.parquet", [pickapic_row(0)])
    write_folder(tmp_path / "folder", 1)
    (tmp_path / "hpd").mkdir()
    (tmp_path / "hpd" / "train.json").write_text("[]")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train-000000.tar").write_bytes(b"")
    found = [recognize(str(tmp_path / name)) for name in ("picks", "folder", "hpd", "tars")]
    assert found == ["pickapic", "folder", "hpdv2", "folder"]
    assert recognize(str(tmp_path / "picks" / "data" / "train-0.parquet")) == "pickapic"
    assert [recognize(name) for name in ("a/pickapic_v2", "a/Pick-Style")] == [
        *("pickapic", "pickstyle")
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none holds no preferences .*empty folder"):
        recognize(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no such file or folder: /no"):
        recognize("/no/such/place")


def test_without_a_terminal_nothing_is_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, missing in ((["init"], "OUT"), (["init", "a.yaml", "--data", "x"], "--model")):
        with pytest.raises(SystemExit) as end:
            main(words)
        told = " ".join(capsys.readouterr().err.split())
        assert end.value.code == 2 and f"{missing} is missing, and there is no terminal" in told
    with pytest.raises(SystemExit):
        main(["init", "a.yaml", "--objective", "foo", "--model", "m", "--data", "d"])
    assert "'foo' is none of dpo," in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_command_writes_for_the_method_that_was_asked_for(written, tmp_path, capsys):
    wanted = written[2]
    out = tmp_path / "lora.yaml"
    with pytest.raises(SystemExit) as end:
        plain = ["init", str(out), "--model", wanted.model, "--data", wanted.data, "--lora"]
        main([*plain, "--gpu", "a10", "--objective", "adaptive_dpo"])
    assert end.value.code == 0
    made = yaml.safe_load(out.read_text())
    assert (made["train"]["method"], made["train"]["objective"]) == (
        "lora",
        {"name": "adaptive_dpo"},
    )
    assert f"Next: fastpo plan {out} --gpu a10" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    return tiny_flux_kontext_folder(tmp_path_factory.mktemp("models") / "kontext")


@pytest.mark.parametrize(
    ("objective", "slope", "share"), [("dpo", 1000.0, 0.1), ("linear_dpo", 100.0, 0.1)]
)
def test_a_flow_model_gets_a_slope_that_follows_the_margins(
    kontext, tmp_path, objective, slope, share
):
    write_folder(tmp_path / "edits", 2, sources=((48, 48),))
    wanted = Wanted(str(kontext), str(tmp_path / "edits"), objective=objective)
    config = write_config(tmp_path / "run.yaml", wanted)
    assert config.train.objective.logit_slope() == slope
    assert config.train.auto_slope == share
    plain = re.sub(r"\n *# ", " ", (tmp_path / "run.yaml").read_text())
    assert "Flow models differ in the size of their margins by far." in plain


def test_data_that_prepare_would_refuse_are_refused_before_a_file_is_written(
    kontext, written, tmp_path
):
    write_folder(tmp_path / "edits", 2, sources=((48, 48),))
    plain, edits = written[2].data, str(tmp_path / "edits")
    for model, data, text in (
        (str(kontext), plain, "pairs: flux-kontext edits source images, and none are given"),
        (written[2].model, edits, "edits: source images are given, and sd15 edits no images"),
    ):
        with pytest.raises(DataError, match=text):
            write_config(tmp_path / "run.yaml", Wanted(model, data))
        assert not (tmp_path / "run.yaml").exists()
