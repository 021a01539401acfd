"""What a command shall write is looked at first: hours of work do not end at a wrong name."""

import os
from pathlib import Path

import pytest

import fastpo
from fastpo.cli import main

CONFIG = str(Path(fastpo.__file__).parent / "configs" / "sdxl-lora-24gb.yaml")
COMMANDS = {
    "init": ["init", "{out}/run.yaml", "--model", "none", "--data", "none", "--gpu", "h100"],
    "convert-args": ["convert-args", "python none.py", "{out}/run.yaml"],
    "rerun": ["rerun", "none", "--out", "{out}/run"],
    "consolidate": ["consolidate", "none", "{out}/weights"],
    "export": ["export", "none", "{out}/lora.safetensors", "--format", "kohya"],
    "evaluate": ["evaluate", CONFIG, "--out", "{out}/table", "--weights", "none"],
    "pairs of samples": ["pairs", CONFIG, "{out}/pairs", "--weights", "none"],
    "pairs of a table": ["pairs", "none.csv", "{out}/pairs.jsonl"],
    "score": ["score", "none", "--scorer", "none", "--out", "{out}/s.csv"],
    "report": ["report", "none", "--out", "{out}/page"],
    "minority": ["minority", "none", "--out", "{out}/page"],
    "relabel": ["relabel", "none", "{out}/copy", "--threshold", "0.9"],
    "relabel by scorers": ["relabel", CONFIG, "{out}/copy", "--by", "none"],
    "demo": ["demo", "--short", "--out", "{out}/demo"],
    "bench": ["bench", "--quick", "--out", "{out}/rows.csv"],
    "study's work": ["study", "quick", "--work", "{out}/work"],
    "study's table": ["study", "quick", "--work", "work", "--csv", "{out}/rows.csv"],
    "study's page": ["study", "quick", "--work", "work", "--page", "{out}/page.md"],
}
"""Nothing that they read is there, so whatever is looked at before the place is what they name."""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_place_below_a_file_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main([part.format(out="notes/deep") for part in command])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    assert "notes/deep" in told and "a part of its path is a file" in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_so_is_a_folder_in_which_this_user_may_not_write(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: "theirs" not in str(path) and access(path, mode)
    )
    with pytest.raises(SystemExit) as ended:
        main([part.format(out="theirs/deep") for part in command])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "theirs" in told and "permission denied" in told, told
    assert not list((tmp_path / "theirs").iterdir())
