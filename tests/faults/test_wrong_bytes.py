"""Wrong bytes in a checkpoint are found, named, and passed over for the newest that is whole."""

import json
import shutil

import pytest
import torch

from fastpo.config import load_config
from fastpo.errors import CheckpointError
from fastpo.system.checksums import checksum
from fastpo.train import train
from fastpo.train.checkpoint import load_checkpoint, save_checkpoint
from fastpo.train.checkpoint_folders import Rotation, check_whole, list_checkpoints, newest_whole
from fastpo.train.consolidate import consolidate
from fastpo.train.metrics_log import check_metrics, kept_metrics
from tests.faults.test_checkpoint import make_state, origin_of

FILES = ("trainable.safetensors", "ledger.safetensors", "optimizer.pt", "state.json")


def save(run, *steps):
    rotation = Rotation(run, keep=2, main=True)
    for step in steps:
        rotation.begin(save_checkpoint(run, step, make_state(step), origin_of(run)))
    rotation.close()
    return list_checkpoints(run)


def flip(file, part):
    """Exchanges one bit, `part` of the way through a file."""
    content = bytearray(file.read_bytes())
    content[min(int(part * len(content)), len(content) - 1)] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole checkpoint; tests leave it as it was."""
    return save(tmp_path_factory.mktemp("saved"), 1)[0]


def refusal(checkpoint):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(checkpoint, make_state(9), origin_of(checkpoint))
    return str(error.value)


def test_a_manifest_names_every_file(saved):
    recorded = json.loads((saved / "manifest.json").read_text())["files"]
    assert sorted(recorded) == sorted(FILES)
    names = {p.name for p in saved.iterdir()}
    assert names - {".fastpo"} == {*FILES, "manifest.json"}  # the mark of whose the folder is


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_named(saved, name):
    whole = (saved / name).read_bytes()
    for part in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        flip(saved / name, part)
        assert name in refusal(saved)
        (saved / name).write_bytes(whole)


def test_a_flipped_bit_in_the_manifest_is_found(saved):
    """It makes the manifest unreadable, or another file's checksum wrong."""
    file = saved / "manifest.json"
    whole = file.read_bytes()
    for part in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        flip(file, part)
        assert "is not a whole checkpoint" in refusal(saved)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_file_cut_off_anywhere_or_missing_is_named(saved, name):
    """A manifest that is gone does not make a checkpoint one of a version without manifests."""
    whole = (saved / name).read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 2):
        (saved / name).write_bytes(whole[:kept])
        assert name in refusal(saved)
    (saved / name).unlink()
    assert name in refusal(saved)
    (saved / name).write_bytes(whole)


def test_a_checkpoint_of_an_earlier_version_is_loaded_and_said_to_be_unverified(
    saved, tmp_path, capsys
):
    checkpoint = shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)
    (checkpoint / "manifest.json").unlink()
    about = json.loads((checkpoint / "state.json").read_text())
    about = {key: about[key] for key in ("step", "cache", "group", "config")}
    (checkpoint / "state.json").write_text(json.dumps(about))
    assert newest_whole(tmp_path) == checkpoint
    assert "step-00000001 has no manifest.json" in capsys.readouterr().err
    state = make_state(9)
    assert load_checkpoint(checkpoint, state, origin_of(tmp_path)).step == 1
    assert torch.equal(state.trainable["weight"], make_state(1).trainable["weight"])
    for name in FILES:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=name):
            check_whole(checkpoint)
        (checkpoint / name).write_bytes(content)


def test_the_newest_whole_one_is_taken_and_each_other_named(tmp_path, capsys):
    one, two = save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 3, make_state(3), origin_of(tmp_path))
    flip(two / "optimizer.pt", 0.5)
    (tmp_path / "checkpoints" / "step-00000003" / "trainable.safetensors").write_bytes(b"")
    assert newest_whole(tmp_path) == one
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "passed over" in lines[0] and "step-00000003/trainable.safetensors has 0" in lines[0]
    assert "passed over" in lines[1] and "step-00000002/optimizer.pt is damaged" in lines[1]
    flip(one / "ledger.safetensors", 0.9)
    with pytest.raises(CheckpointError, match=r"is whole; .*0003.*trainable.*0002.*0001.*ledger"):
        newest_whole(tmp_path)


def strays(folder):
    """What users leave beside checkpoints: notes, an archive, a renamed checkpoint, a link."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step-notes").write_text("mine")
    (folder / "step-00000009.tar").write_text("mine")
    (folder / "step-99999999").mkdir()
    (folder / "step-99999999" / "mine").write_text("mine")
    return {"step-notes", "step-00000009.tar", "step-99999999"}


def test_what_is_not_ours_is_neither_taken_nor_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    foreign = strays(folder)
    save(tmp_path, 1, 2)
    (folder / "step-00000001").rename(folder / "step-best")
    (folder / "step-00000002").rename(folder / "step-00000001")  # whose own name is another
    (folder / "moved").mkdir()
    save(tmp_path / "elsewhere", 3)
    (folder / "step-00000003").symlink_to(tmp_path / "elsewhere/checkpoints/step-00000003")
    assert newest_whole(tmp_path).name == "step-00000003"
    save(tmp_path, 4, 5, 6, 7)
    kept = {"step-best", "moved", "step-00000001", "step-00000003"} | foreign
    assert {p.name for p in folder.iterdir()} == kept | {"step-00000006", "step-00000007"}
    assert (folder / "step-99999999" / "mine").read_text() == "mine"
    assert newest_whole(tmp_path).name == "step-00000007"


def test_old_ones_stay_where_the_new_one_reads_back_differently(tmp_path, capsys):
    save(tmp_path, 1, 2)
    rotation = Rotation(tmp_path, keep=1, main=True)
    three = save_checkpoint(tmp_path, 3, make_state(3), origin_of(tmp_path))
    flip(three / "trainable.safetensors", 0.9)
    rotation.begin(three)
    rotation.wait()
    assert "reads back differently" in capsys.readouterr().err
    assert len(list_checkpoints(tmp_path)) == 3
    # One that was never read back in this process does not count as a newer one that is kept.
    rotation.begin(save_checkpoint(tmp_path, 4, make_state(4), origin_of(tmp_path)))
    rotation.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000004"]


def test_the_best_one_stays_until_a_better_one_is_read_back_whole(tmp_path):
    save(tmp_path, 1)
    rotation = Rotation(tmp_path, keep=1, main=True)
    rotation.prefer(list_checkpoints(tmp_path)[0])

    def add(step, *, best=False, whole=True):
        new = save_checkpoint(tmp_path, step, make_state(step), origin_of(tmp_path))
        if not whole:
            flip(new / "trainable.safetensors", 0.9)
        if best:
            rotation.prefer(new)
        rotation.begin(new)
        rotation.wait()
        return [int(p.name[-1]) for p in list_checkpoints(tmp_path)]

    assert add(2) == [1, 2]
    assert add(3, best=True, whole=False) == [1, 2, 3]
    assert add(4) == [1, 3, 4]
    assert add(5, best=True) == [5]
    assert add(6) == [5, 6]
    rotation.close()


def test_a_broken_newer_one_does_not_push_out_the_whole_one(tmp_path):
    """A run that went back to step 1 saves step 2 while the broken step 3 is still there."""
    save(tmp_path, 1, 3)
    flip(tmp_path / "checkpoints/step-00000003/optimizer.pt", 0.5)
    rotation = Rotation(tmp_path, keep=1, main=True)
    rotation.trust(newest_whole(tmp_path))
    rotation.begin(save_checkpoint(tmp_path, 2, make_state(2), origin_of(tmp_path)))
    rotation.close()
    assert newest_whole(tmp_path).name == "step-00000002"


@pytest.fixture(scope="module")
def trained(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A configuration and its finished run of four steps with checkpoints after two and four."""
    import yaml

    from tests.conftest import raw_config

    folder = tmp_path_factory.mktemp("trained")
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches, folder / "run")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    train(load_config(path), progress=False)
    return path


@pytest.fixture
def run(trained, tmp_path):
    """`(configuration, folder)` of a copy of that run."""
    folder = shutil.copytree(trained.parent / "run", tmp_path / "run")
    return load_config(trained, [f"train.output_dir={folder}"]), folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_resumes_from_the_newest_whole_checkpoint(run, capsys):
    config, folder = run
    weights = contents(folder / "checkpoints" / "step-00000004")["trainable.safetensors"]
    flip(folder / "checkpoints" / "step-00000004" / "trainable.safetensors", 0.5)
    strays(folder / "checkpoints")
    train(config, resume=True, progress=False)
    assert "passed over" in capsys.readouterr().err
    again = contents(folder / "checkpoints" / "step-00000004")["trainable.safetensors"]
    assert again == weights


def test_consolidating_takes_the_newest_whole_checkpoint(run, tmp_path, capsys):
    _, folder = run
    two, four = list_checkpoints(folder)
    flip(four / "trainable.safetensors", 0.5)
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors is damaged"):
        consolidate(four, tmp_path / "four")
    newest = contents(consolidate(folder, tmp_path / "newest"))
    assert "passed over" in capsys.readouterr().err
    assert newest == contents(consolidate(two, tmp_path / "two"))


def test_a_damaged_export_is_written_again_from_the_last_checkpoint(run, capsys):
    config, folder = run
    file = folder / "final" / "pytorch_lora_weights.safetensors"
    whole, exported = file.read_bytes(), contents(folder / "final")
    for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        train(config, resume=True, progress=False)
        assert "final/pytorch_lora_weights.safetensors" in capsys.readouterr().out
        assert contents(folder / "final") == exported
    train(config, resume=True, progress=False)
    assert "is finished" in capsys.readouterr().out


def test_a_damaged_table_of_pairs_is_written_again_from_the_last_checkpoint(run, capsys):
    config, folder = run
    file = folder / "minority.csv"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-3], whole.replace(b",0", b",1", 1)):
        file.write_bytes(damaged)
        train(config, resume=True, progress=False)
        assert "minority.csv is not what the run found out" in capsys.readouterr().out
        assert file.read_bytes() == whole
    train(config, resume=True, progress=False)
    assert "is finished" in capsys.readouterr().out


def test_metrics_are_kept_up_to_the_step_by_what_the_lines_say(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    assert kept_metrics(path, 3).decode() == "".join(lines[:3])
    assert kept_metrics(path, 9).decode() == "".join(lines)
    assert kept_metrics(path, 0) == b""
    assert kept_metrics(tmp_path / "none", 3) == b""
    path.write_text("".join(lines[1:]))  # the first line is missing
    assert kept_metrics(path, 3).decode() == "".join(lines[1:3])
    for broken in ("", "[1]", '{"loss": 1}', '{"step": 2, "lo', '{"step": "2"}'):
        path.write_text(lines[0] + broken + "\n" + "".join(lines[2:]))
        assert kept_metrics(path, 1).decode() == lines[0]
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2 is no metrics"):
            kept_metrics(path, 3)


def test_metrics_that_changed_since_the_checkpoint_are_told_of(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n')
    recorded = checksum(path)
    assert check_metrics(path, 2, recorded) is None
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n')
    assert check_metrics(path, 2, recorded) is None
    assert check_metrics(path, 2, None) is None
    path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.5}\n')
    assert "is not as it was when step 2 was saved" in str(check_metrics(path, 2, recorded))
    path.write_text('{"step": 1, "loss": 0.5}\n{"step"')
    assert "it has 1 whole lines" in str(check_metrics(path, 2, recorded))
    path.unlink()
    assert "it has 0 whole lines" in str(check_metrics(path, 2, recorded))
