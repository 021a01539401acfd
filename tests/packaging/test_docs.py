"""What the documentation names is there."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from fastpo.config.objectives import ObjectiveConfig
from scripts.draw_objectives import PANELS, REFERENCE, SLOPE, pulls

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


def test_the_site_leads_to_every_page():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = []
    for entry in settings["nav"]:
        (value,) = entry.values()
        named += [value] if isinstance(value, str) else [page for e in value for page in e.values()]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_page_of_objectives_has_a_row_for_each():
    page = (ROOT / "docs" / "objectives.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    sections = get_args(get_args(ObjectiveConfig)[0])
    assert sorted(listed) == sorted(
        get_args(s.model_fields["name"].annotation)[0] for s in sections
    )


def test_the_picture_shows_the_derivatives_by_both_errors():
    logits = torch.tensor([-2.0, 0.0, 3.0])
    (_, dpo), (_, smooth) = PANELS["dpo"]
    p = torch.sigmoid(logits.double())
    for loss, expected in ((dpo, 1 - p), (smooth, 0.9 - p)):
        winner, loser = pulls(loss, logits)
        torch.testing.assert_close(winner, SLOPE * expected)
        torch.testing.assert_close(loser, -SLOPE * expected)
    winner, loser = pulls(PANELS["sft"][0][1], logits)
    assert winner.tolist() == pytest.approx([1.0] * 3) and loser.tolist() == [0.0] * 3
    (_, sdpo), _ = PANELS["sdpo"]
    winner, loser = pulls(sdpo, logits[1:2])  # equal errors: the loser keeps 1 - mu of its pull
    assert float(-loser / winner) == pytest.approx(0.1)
    winner, loser = pulls(sdpo, logits[1:2], opposed=True)
    assert float(-loser / winner) == pytest.approx(1.0)
    assert REFERENCE > 3.0
