"""What a benchmark's rows say about the code that was measured."""

import subprocess

import pytest

from fastpo.bench import measure

CODE = ["kernels/k.py", "fastpo/f.py", "benchmarks/b.py"]
OTHERS = ["benchmarks/results/r.csv", "README.md"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit; gives its folder."""
    for name in CODE + OTHERS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*person, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CODE + OTHERS)
def test_a_commit_is_marked_where_measured_code_differs_from_it(checkout, name):
    clean = measure.environment()["commit"]
    assert clean and not clean.endswith("+")
    (checkout / name).write_text("new")
    assert measure.environment()["commit"] == clean + "+" * (name in CODE)


def test_new_code_counts_and_a_commit_can_be_told(checkout):
    (checkout / "benchmarks" / "new.py").write_text("new")
    assert measure.environment()["commit"].endswith("+")
    assert measure.environment("abc1234")["commit"] == "abc1234"
