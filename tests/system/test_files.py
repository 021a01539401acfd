"""Files and folders are whole or not there, and what killed processes leave is swept up."""

import ast
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.errors import StorageError
from fastpo.system import files

PACKAGE = Path(files.__file__).parents[1]
# Calls that put bytes on the disk past `system/files.py`, and why they may.
ALLOWED = {
    ("data/cache/parts.py", "write_text"): "in a whole_folder, which flushes it",
    ("demo/base.py", "write_text"): "in a whole_folder, which flushes it",
    ("models/export.py", "open"): "in a whole_folder, which flushes it",
    ("reference_cache/store.py", "open"): "in a whole_file, which flushes it",
    ("review/relabel.py", "open"): "in a whole_folder, which flushes it",
    ("study/emoji/base.py", "write_text"): "in a whole_folder, which flushes it",
    ("study/rivals.py", "open"): "in a whole_file, which flushes it",
    ("system/locks.py", "open"): "a lock file holds no bytes",
    ("system/writer_lock.py", "open"): "who holds a lock does not outlive a power cut",
    ("system/manifest.py", "write_text"): "in a whole_folder, which flushes it",
    ("system/ownership.py", "write_text"): "in a whole_folder, which flushes it",
    ("testing/datasets.py", "write_bytes"): "inputs of tests, written anew each time",
    ("testing/datasets.py", "write_text"): "inputs of tests, written anew each time",
    ("train/checkpoint.py", "write_text"): "in a whole_folder, which flushes it",
}


@pytest.fixture
def steps(monkeypatch):
    """The durable steps taken, as `(step, name)`."""
    taken = []
    monkeypatch.setattr(files, "_commit", lambda step, path: taken.append((step, path.name)))
    return taken


def leave(folder, name):
    """What a process that is dead by now left, of a name as `files` gives it."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=1)
    path = folder / f"{name}-{socket.gethostname()}+{int(dead.stdout)}+0"
    path.mkdir()
    (path / "file").write_text("old")
    return path


def test_a_file_is_flushed_before_its_rename_and_its_folder_after(tmp_path, steps):
    files.write_text(tmp_path / "a.txt", "ä\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\r\n".encode()
    (first, _), second, third = steps
    assert (first, second, third) == ("flush", ("rename", "a.txt"), ("flush", tmp_path.name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_flushed_with_all_it_holds_before_its_rename(tmp_path, steps):
    with files.whole_folder(tmp_path / "deep" / "target") as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_text("a")
        (folder / "inner" / "b").write_text("b")
        temporary = folder.name
    assert steps == [
        ("make", "deep"),
        ("flush", tmp_path.name),
        ("flush", "a"),
        ("flush", temporary),
        ("flush", "b"),
        ("flush", "inner"),
        ("rename", "target"),
        ("flush", "deep"),
    ]


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    files.write_json(tmp_path / "file", {"a": 1})
    with files.whole_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), files.whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), files.whole_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "folder"]
    assert (tmp_path / "file").read_text() == '{\n "a": 1\n}\n'
    assert (tmp_path / "folder" / "a").read_text() == "first"


def test_a_replacement_that_fails_between_its_renames_puts_the_old_folder_back(
    tmp_path, monkeypatch
):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()

    def fail(step, path):
        if step == "rename" and not (tmp_path / "target").exists():
            raise OSError("disk full")

    monkeypatch.setattr(files, "_commit", fail)
    with pytest.raises(OSError, match="disk full"):
        files.replace_folder(tmp_path / "new", tmp_path / "target")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "new", "target", "target"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_is_for_the_umask_to_say(tmp_path, monkeypatch, umask, mode):
    monkeypatch.setattr(files, "_umask", umask)

    def private(path):  # as safetensors writes
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    with files.whole_file(tmp_path / "file") as file:
        private(file)
    with files.whole_folder(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        private(folder / "deep" / "file")
    with files.whole_file(tmp_path / "odd") as file:
        private(file)
        file.chmod(0o640)
    found = [tmp_path / name for name in ("file", "folder/deep/file", "odd")]
    assert [path.stat().st_mode & 0o777 for path in found] == [mode, mode, 0o640]


def test_an_existing_folder_stays_where_none_may_be_replaced(tmp_path):
    for text in ("first", "second"):
        try:
            with files.whole_folder(tmp_path / "target", replace=False) as folder:
                (folder / "a").write_text(text)
        except OSError:
            assert text == "second"
    assert (tmp_path / "target" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_sweep_removes_what_dead_processes_left_and_restores_what_they_replaced(tmp_path):
    leave(tmp_path, ".a.partial")
    leave(tmp_path, ".b.old")
    leave(tmp_path, ".c.old")
    (tmp_path / "c").mkdir()
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b" / "file").read_text() == "old"


def test_sweep_leaves_what_may_be_in_use(tmp_path):
    ours, parent = (f"{socket.gethostname()}+{pid}+0" for pid in (os.getpid(), os.getppid()))
    kept = [f".a.partial-{parent}", ".a.partial-0123456789abcdef", ".a.partial", ".gitignore", "a"]
    others = [
        ".a.partial-elsewhere+1+0",
        ".a.partial-elsewhere-1",
        ".a.old-1",
        f".b.partial-{ours}",
    ]
    for name in (*kept, *others):
        (tmp_path / name).touch()
    with files.whole_file(tmp_path / "c") as temporary:
        temporary.touch()
        files.sweep(tmp_path)
        assert temporary.exists(), "it is being written"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*kept, *others[:-1], "c"}
    files.sweep(tmp_path, sole_writer=True)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "c"}


def test_a_removed_folder_is_gone_before_its_first_file(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").touch()

    def stop(path):
        assert not target.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", stop)
        files.remove(target)
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    files.remove(target)  # it may be gone already


def writes(tree):
    """The names of calls that write, rename or open for writing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        method = isinstance(node.func, ast.Attribute)
        if name in ("write_text", "write_bytes", "rename", "renames", "symlink_to") and method:
            yield name
        elif name == "replace" and (
            owner == "os" or (method and len(node.args) == 1 and not node.keywords)
        ):
            yield name
        elif name == "move" and owner == "shutil":
            yield name
        elif name == "open":
            modes = [*node.args[: 1 if method else 2], *(k.value for k in node.keywords)]
            modes = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
            if any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes):
                yield name


def test_every_durable_write_goes_through_one_module():
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        # the selftest's faults go below the durable write on purpose, in a folder of its own
        if path != Path(files.__file__) and path.parent.name != "selftest"
        for name in writes(ast.parse(path.read_text()))
    }
    assert found <= set(ALLOWED), sorted(found - set(ALLOWED))
    assert found == set(ALLOWED), "an exception that nothing needs any more"


def test_a_missing_folder_is_told_by_the_name_that_the_user_knows(tmp_path):
    with pytest.raises(FileNotFoundError) as told:
        files.write_text(tmp_path / "none" / "a.txt", "a")
    assert told.value.filename == str(tmp_path / "none" / "a.txt")


def test_json_is_strict_where_numbers_are_not_finite(tmp_path):
    value = {"a": [math.nan, 1.5, {"b": -math.inf}], "c": (math.inf, 2), "d": "NaN"}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": [None, 1.5, {"b": None}], "c": [None, 2], "d": "NaN"}


def test_a_folder_is_looked_at_and_not_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    files.check_folder(tmp_path)
    files.check_folder(tmp_path / "deep" / "er")
    files.check_folder(Path("."))
    with pytest.raises(StorageError, match=r"file/deep.*a part of its path is a file"):
        files.check_folder(tmp_path / "file" / "deep")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"link.*a part of its path is a file"):
        files.check_folder(tmp_path / "link")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="permission denied"):
        files.check_folder(tmp_path / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_home_of_nobody_is_a_mere_name():
    assert files.user_path("~/x") == Path.home() / "x" and files.user_path("x") == Path("x")
    assert files.user_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    raises = [p for p in PACKAGE.rglob("*.py") if ".expanduser()" in p.read_text()]
    assert raises == []  # it ends in a RuntimeError for such a user
