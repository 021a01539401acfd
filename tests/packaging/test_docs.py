"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
TOP = ("fastpo/", "kernels/", "tests/", "benchmarks/", "scripts/", "docs/", "findings/")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_and_linked_pages_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    words = re.findall(r"`([\w./-]+)`", text)
    named = [w for w in words if w.startswith(TOP) and "<" not in w]
    linked = [w for w in re.findall(r"\]\(([^)#:]+)\)", text) if not w.startswith("http")]
    missing = [w for w in named if not (ROOT / w).exists()]
    missing += [w for w in linked if not (page.parent / w).exists()]
    assert not missing


def test_the_map_shows_every_package_and_every_file_of_the_trainer():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {p.parent.name for p in (ROOT / "fastpo").glob("*/__init__.py")}
    flat = {p.name for p in (ROOT / "fastpo").glob("*.py") if not p.name.startswith("_")}
    trainer = {p.name for p in (ROOT / "fastpo" / "train").glob("*.py") if p.name[0] != "_"}
    assert [room for room in sorted(rooms) if f"{room}/" not in text] == []
    assert [name for name in sorted(flat | trainer) if f"{name}`" not in text] == []
    files = re.findall(r"^\| `(fastpo/\w+/(?:\w+/)*)` \|(.*)$", text, re.MULTILINE)
    assert len(files) > 10
    for folder, row in files:
        for name in re.findall(r"`(\w+\.py)`", row):
            assert (ROOT / folder / name).exists(), folder + name


def test_the_index_of_findings_names_every_script():
    folder = ROOT / "findings"
    named = re.findall(r"^\| \[([\w-]+)\]\(\1\.sh\)", (folder / "README.md").read_text(), re.M)
    assert named == sorted(path.stem for path in folder.glob("*.sh"))
