"""A run's folder: only what a run has written is replaced."""

import pytest

from fastpo.errors import CheckpointError
from fastpo.train.consolidate import consolidate
from fastpo.train.run_folder import FOLDERS, RESULTS, RunFolder


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_no_run_has_written_is_refused(tmp_path, name, flags):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("kept")
    run = RunFolder(tmp_path, main=True)
    with pytest.raises(CheckpointError, match=f"{name} is there, but no metrics.jsonl"):
        run.check_free(**{"resume": False, "overwrite": False} | flags)
    assert everything(tmp_path) == [name, f"{name}/mine"]


def test_overwriting_removes_a_run_and_nothing_beside_it(tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    for name in RESULTS:
        (tmp_path / name).write_text("")
    for name in ("fastpo/1/events.out.tfevents.1", "fastpo/1/hparams.yml", "fastpo/mine.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "events.out.tfevents.2").write_text("")
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes").write_text("kept")
    run = RunFolder(tmp_path, main=True)
    run.check_free(resume=False, overwrite=True)
    run.clear()
    assert everything(tmp_path) == [
        "elsewhere", "elsewhere/events.out.tfevents.2", "fastpo", "fastpo/mine.py", "notes",
        "tensorboard",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_consolidating_replaces_nothing(tmp_path, kind):
    target, models = tmp_path / "out", tmp_path / "models"
    models.mkdir()
    (models / "weights").write_text("kept")
    if kind == "link":
        target.symlink_to(models)
    else:
        target = models if kind == "folder" else models / "weights"
    with pytest.raises(CheckpointError, match="is there and is not an empty folder"):
        consolidate(tmp_path / "run", target)
    assert (models / "weights").read_text() == "kept"
