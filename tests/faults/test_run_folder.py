"""What a run keeps in its folder is whole wherever the run was ended."""

import shutil

import pytest

from fastpo.config import load_config
from fastpo.models.export import EXPORT
from fastpo.system.files import sweep, whole_folder
from fastpo.system.ownership import owned_folder
from fastpo.train import takeover
from fastpo.train.checkpoint_folders import CHECKPOINT
from fastpo.train.run_folder import RunFolder
from tests.faults.crash_points import FAULTS, end_everywhere


def begin(path, config, start):
    """What a run does to its folder before its first step."""
    folder = RunFolder(path, main=True)
    folder.sweep()
    folder.begin(config, start)


@pytest.mark.parametrize("fault", FAULTS)
def test_metrics_up_to_the_checkpoint_last_wherever_a_run_ended(experiment, tmp_path, fault):
    """Two steps are logged and kept by a checkpoint, a third is not, and the run begins again."""
    config = load_config(experiment())

    def act(number):
        folder = RunFolder(tmp_path / str(number), main=True)
        for step in (1, 2):
            folder.log({"step": step})
        folder.flush()
        with whole_folder(folder.path / "checkpoints" / "step-00000002") as checkpoint:
            (checkpoint / "weights").write_text("2")
        folder.log({"step": 3})
        begin(folder.path, config, 2)

    def check(number):
        path = tmp_path / str(number)
        done = 2 if (path / "checkpoints" / "step-00000002").exists() else 0
        begin(path, config, done)
        lines = (path / "metrics.jsonl").read_text()
        assert lines == '{"step": 1}\n{"step": 2}\n'[: 12 * done]
        names = {".fastpo", "checkpoints", "config.yaml", "metrics.jsonl", "votes.csv"}
        assert {p.name for p in path.iterdir()} <= names
        seen.add(done)
        begin(tmp_path / str(number + 1), config, 0)

    seen = set()
    begin(tmp_path / "0", config, 0)
    steps = end_everywhere(act, check, lambda number: tmp_path / str(number), fault)
    assert steps > 15
    assert seen == {0, 2}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_export_is_the_old_or_the_new_one(tmp_path, fault):
    def export(path, text):
        with whole_folder(path / "final") as folder:
            for name in ("a", "b"):
                (folder / name).write_text(text)

    export(tmp_path / "before", "old")

    def check(number):
        path = tmp_path / str(number)
        sweep(path, sole_writer=True)
        assert [p.name for p in path.iterdir()] == ["final"]
        seen.add(tuple(p.read_text() for p in sorted((path / "final").iterdir())))
        shutil.copytree(tmp_path / "before", tmp_path / str(number + 1))

    seen = set()
    shutil.copytree(tmp_path / "before", tmp_path / "0")
    end_everywhere(
        lambda number: export(tmp_path / str(number), "new"),
        check,
        lambda number: tmp_path / str(number),
        fault,
    )
    assert seen == {("old", "old"), ("new", "new")}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_overwriting_leaves_the_old_run_or_the_new_one(experiment, tmp_path, fault):
    """Wherever it was ended: the old run, whole, until the new one has done a step."""
    config = load_config(experiment())

    def act(number):
        folder = RunFolder(tmp_path / str(number), main=True)
        folder.set_aside()
        folder.begin(config, 0)
        folder.log({"step": 1, "loss": 9.0})
        folder.flush()
        folder.begun()

    def everything(path):
        files = (p for p in path.rglob("*") if p.is_file())
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}

    def check(number):
        path = tmp_path / str(number)
        takeover.put_back(path)  # as the next training does
        sweep(path, sole_writer=True)
        seen.append(everything(path) == old)
        if not seen[-1]:
            assert (path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 9.0}\n'
            names = {".fastpo", "config.yaml", "metrics.jsonl", "votes.csv"}
            assert {p.name for p in path.iterdir()} == names
        shutil.copytree(tmp_path / "before", tmp_path / str(number + 1))

    seen = []
    before = RunFolder(tmp_path / "before", main=True)
    before.sweep()
    before.begin(config, 0)
    before.log({"step": 1, "loss": 1.0})
    for name in ("checkpoints/step-00000001", "final"):
        kind = CHECKPOINT if "step" in name else EXPORT
        with owned_folder(before.path / name, kind) as folder:
            (folder / "weights").write_text("old")
    old = everything(before.path)
    shutil.copytree(before.path, tmp_path / "0")
    steps = end_everywhere(act, check, lambda number: tmp_path / str(number), fault)
    assert steps > 15
    assert seen == sorted(seen, reverse=True) and seen[0] and not seen[-1]
