"""A run's folder: only what a run has written is replaced, and nothing before another has begun."""

import json

import pytest
import yaml

from fastpo.config import dump_config, load_config
from fastpo.errors import CheckpointError, ForeignPathError
from fastpo.system.ownership import protecting
from fastpo.train import Observer, takeover, train
from fastpo.train.consolidate import consolidate
from fastpo.train.takeover import FOLDERS, RESULTS, check_folder


def everything(folder):
    """Every file's path and bytes, and every folder; not the marker and the lock."""
    hidden = (".fastpo", ".writer")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name not in hidden
    }


@pytest.fixture(scope="module")
def finished(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A finished run's folder, made once; copy it."""
    from tests.conftest import raw_config

    folder = tmp_path_factory.mktemp("finished")
    raw = raw_config("sdxl", light_pipelines["sdxl"], tiny_data, tiny_caches, folder / "run")
    raw["train"] |= {"max_steps": 2, "checkpoint_every": 1}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    train(load_config(path), progress=False)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run: its configuration, and in the last part of it the folder."""
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    return load_config(
        tmp_path / "copy" / "mine.yaml", [f"train.output_dir={tmp_path / 'copy' / 'run'}"]
    )


def make_old(folder):
    """Takes the markers away: a run of a version that wrote none."""
    for marker in folder.rglob(".fastpo"):
        marker.unlink()


def refuse(config, match, **flags):
    """Checks the refusal, and that nothing has changed."""
    folder = config.train.output_dir
    before = everything(folder)
    with pytest.raises(ForeignPathError, match=match):
        train(config, progress=False, **flags)
    assert everything(folder) == before


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_no_run_has_written_is_refused(experiment, tmp_path, name, flags):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "mine").write_text("kept")
    config = load_config(experiment())
    with pytest.raises(ForeignPathError, match=rf"{name} is there, but no metrics\.jsonl"):
        check_folder(
            config.train.output_dir, config, **{"resume": False, "overwrite": False} | flags
        )


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("name", RESULTS)
def test_a_file_that_no_run_has_written_is_refused(experiment, tmp_path, name, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("model: mine # by hand\n")
    refuse(load_config(experiment()), "is there, but no", **flags)


def test_current_folder_with_a_package_keeps_everything_that_is_not_the_runs(
    experiment, tmp_path, monkeypatch
):
    """As in a checkout: the trackers' folder has the package's name, and notes lie about."""
    root = tmp_path / "checkout"
    (root / "fastpo").mkdir(parents=True)
    (root / "fastpo" / "__init__.py").write_text("kept")
    (root / "fastpo" / "events.out.tfevents.1").write_text("somebody's")
    (root / "notes").write_text("kept")
    monkeypatch.chdir(root)
    before = everything(root)
    config = load_config(experiment(), ["train.output_dir=.", "train.max_steps=1"])
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"trackers": ("tensorboard",)})}
    )
    for _ in range(2):
        train(config, overwrite=True, progress=False)
        after = everything(root)
        assert {name: after[name] for name in before} == before
        assert len([n for n in after if n.startswith("tensorboard/") and "tfevents" in n]) == 1


@pytest.mark.parametrize("old", [False, True], ids=["marked", "of an earlier version"])
def test_overwriting_replaces_a_run_and_nothing_beside_it(run, old):
    folder = run.train.output_dir
    (folder / "notes").write_text("kept")
    (folder / "minority.csv").write_text("the old one's")
    if old:
        make_old(folder)
    train(run, overwrite=True, progress=False)
    assert (folder / "notes").read_text() == "kept"
    assert (folder / "minority.csv").read_text() != "the old one's"
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2
    assert not [p for p in folder.iterdir() if p.name.startswith(".overwrit")]
    assert json.loads((folder / ".fastpo").read_text())["kind"] == "a run"


@pytest.mark.parametrize("old", [False, True], ids=["marked", "of an earlier version"])
@pytest.mark.parametrize(
    "name",
    [
        "final/notes",
        "checkpoints/best/weights",
        "checkpoints/step-00000002/notes",
        "checkpoints/step-00000002-mine/state.json",
        "evaluation/notes",
        "evaluation/base/mine.png",
    ],
)
def test_a_users_file_among_a_runs_is_named_and_kept(run, name, old):
    file = run.train.output_dir / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("kept")
    if old:
        make_old(run.train.output_dir)
    refuse(run, name.partition("/")[0], overwrite=True)


def test_rotation_keeps_a_checkpoint_with_a_users_file(run):
    folder = run.train.output_dir
    (folder / "checkpoints" / "step-00000001" / "notes").write_text("kept")
    longer = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 4})})
    train(longer, resume=True, progress=False)
    names = [p.name for p in sorted((folder / "checkpoints").iterdir())]
    assert names == ["step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", [*FOLDERS, *RESULTS])
def test_links_are_never_followed(run, tmp_path, name):
    folder, elsewhere = run.train.output_dir, tmp_path / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "weights").write_text("kept")
    (folder / name).symlink_to(elsewhere)
    before = everything(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    refuse(run, "is a link", overwrite=True)
    assert before == (everything(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes())


def test_a_run_behind_a_link_is_not_overwritten(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run.train.output_dir)
    config = run.model_copy(update={"train": run.train.model_copy(update={"output_dir": link})})
    refuse(config, "is a link, and --overwrite follows none", overwrite=True)


class Ends(Observer):
    """Ends a run before its first step, or after it."""

    def __init__(self, after):
        self.after = after

    def on_start(self, trainer, start):
        if self.after == 0:
            raise RuntimeError("out of memory")

    def on_step(self, step, table, metrics):
        if step == self.after:
            raise RuntimeError("out of memory")


def test_the_old_run_is_back_if_the_new_one_does_no_step(run):
    folder = run.train.output_dir
    (folder / "fastpo").mkdir()
    (folder / "fastpo" / "events.out.tfevents.1").write_text("an earlier version's")
    before = everything(folder)
    with pytest.raises(RuntimeError):
        train(run, overwrite=True, progress=False, observers=[Ends(0)])
    assert everything(folder) == before
    with pytest.raises(RuntimeError):
        train(run, overwrite=True, progress=False, observers=[Ends(1)])
    names = {"checkpoints", "config.yaml", "metrics.jsonl", "run.json", "votes.csv"}
    assert {n.partition("/")[0] for n in everything(folder)} == names
    assert (folder / "metrics.jsonl").read_text().count("\n") == 1


def test_the_file_that_a_run_is_configured_from_is_not_touched(run):
    folder = run.train.output_dir
    file = folder / "config.yaml"
    file.write_text("# by hand\n" + dump_config(run))
    before = file.read_bytes()
    for flags in ({"resume": True}, {"overwrite": True}):
        with protecting([file]):
            train(load_config(file), progress=False, **flags)
        assert file.read_bytes() == before
    with protecting([file]):
        refuse(load_config(file, ["train.max_steps=5"]), "configured from", resume=True)


def test_the_folders_that_a_run_reads_are_not_overwritten(run):
    final = run.train.output_dir / "final"
    config = run.model_copy(update={"data": run.data.model_copy(update={"path": str(final)})})
    refuse(config, "this command reads", overwrite=True)


@pytest.mark.parametrize("state", [takeover.MOVING, takeover.ASIDE])
def test_what_a_killed_overwriting_left_is_put_back(run, state):
    folder = run.train.output_dir
    before = everything(folder)
    takeover.set_aside(folder)
    if state == takeover.MOVING:
        (folder / takeover.ASIDE).rename(folder / takeover.MOVING)
        (folder / takeover.MOVING / "config.yaml").rename(folder / "config.yaml")
    else:
        (folder / "config.yaml").write_text(dump_config(run))
        (folder / "metrics.jsonl").write_text("")
    train(run, resume=True, progress=False)
    assert everything(folder) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link", "run"])
def test_consolidating_replaces_nothing(run, tmp_path, kind):
    target, models = tmp_path / "out", tmp_path / "models"
    models.mkdir()
    (models / "weights").write_text("kept")
    folder = run.train.output_dir
    before = everything(folder)
    if kind == "link":
        target.symlink_to(models)
    else:
        target = {"folder": models, "file": models / "weights", "run": folder}[kind]
    with pytest.raises(CheckpointError, match="is there and is not an empty folder"):
        consolidate(folder, target)
    assert (models / "weights").read_text() == "kept"
    assert everything(folder) == before
