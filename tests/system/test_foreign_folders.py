"""No command writes into a folder that is somebody's: it names it, and leaves all as it was."""

import json
import shutil

import pytest

from fastpo.config import load_config
from fastpo.data.prepare import prepare
from fastpo.demo.base import DEMO_BASE
from fastpo.demo.preferences import write_preferences
from fastpo.demo.run import run_demo
from fastpo.errors import ForeignPathError
from fastpo.evaluate.compare import evaluate
from fastpo.evaluate.folders import EVALUATION, SAMPLES
from fastpo.models.export import EXPORT
from fastpo.reference_cache import prepare_reference
from fastpo.report import write_report
from fastpo.report.page import REPORT
from fastpo.system.ownership import MARKER, is_ours, owned_folder


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def foreign(tmp_path):
    """A folder with somebody's files, under names that commands would use."""
    folder = tmp_path / "mine"
    for name in (
        *("report.html", "curves.png", "summary.json", "base/model_index.json", "notes"),
        *("data/train-00000-of-00001.parquet", "shard-0/latents", "manifest.txt"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("kept")
    return folder


def check_refusal(folder, act, kind):
    before = everything(folder)
    with pytest.raises(ForeignPathError, match=f"not {kind}.*another folder"):
        act()
    assert everything(folder) == before


def make_run(path):
    path.mkdir()
    config = {name: {} for name in ("model", "data", "prepare", "train")}
    (path / "config.yaml").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "rewards/accuracies": 1.0}\n')
    return path


@pytest.mark.parametrize("target", ["folder", "file"])
def test_a_report_is_not_written_into_somebodys_folder(tmp_path, foreign, target):
    run = make_run(tmp_path / "run")
    out = foreign if target == "folder" else foreign / "notes"
    check_refusal(foreign, lambda: write_report([run], out, title="T"), REPORT.name)
    page = write_report([run], tmp_path / "out", title="T")
    (page.parent / MARKER).unlink()  # an earlier version's
    assert write_report([run], tmp_path / "out", title="T") == page


def test_a_demo_is_not_made_in_somebodys_folder(foreign):
    check_refusal(foreign, lambda: run_demo(foreign, short=True), "a demo")
    check_refusal(foreign, lambda: write_preferences(foreign, n_pairs=9, seed=0), "the demo's pref")
    with (
        pytest.raises(ForeignPathError, match="not the demo's base"),
        owned_folder(foreign / "base", DEMO_BASE),
    ):
        pass


def test_a_cache_is_not_made_in_somebodys_folder(config_for, foreign):
    config = config_for(prepare={"cache_dir": str(foreign)})
    check_refusal(foreign, lambda: prepare(config, progress=False), "a cache")


def test_reference_errors_are_not_put_into_somebodys_folder(experiment, tiny_caches, tmp_path):
    cache = shutil.copytree(tiny_caches / "sd15", tmp_path / "cache")
    (cache / "reference").mkdir()
    (cache / "reference" / "mine").write_text("kept")
    config = load_config(experiment(family="sd15"), [f"prepare.cache_dir={cache}"])
    check_refusal(
        cache / "reference",
        lambda: prepare_reference(config, 1, progress=False),
        "a cache of reference errors",
    )


@pytest.mark.parametrize("name", ["notes", "base/notes", "aligned/notes"])
def test_an_evaluation_is_not_written_into_somebodys_folder(experiment, tmp_path, name):
    config = load_config(experiment())
    folder = config.train.output_dir
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (folder / "evaluation" / name).parent.mkdir(parents=True)
    (folder / "evaluation" / name).write_text("kept")
    check_refusal(folder, lambda: evaluate(config, progress=False), EVALUATION.name)
    (folder / "evaluation" / "summary.json").write_text('{"metrics": {}, "comparisons": 0}')
    if name != "notes":
        with pytest.raises(ForeignPathError, match=SAMPLES.name):
            evaluate(config, scorers=[], progress=False)
    assert (folder / "evaluation" / name).read_text() == "kept"


def test_earlier_versions_exports_are_known_beside_a_runs_metrics_alone(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert not is_ours(tmp_path / "final", EXPORT)
    (tmp_path / "metrics.jsonl").write_text("")
    assert is_ours(tmp_path / "final", EXPORT)
