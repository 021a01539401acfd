"""A run's folder may have come from anywhere: what it names and holds is looked at first."""

import json
import re

import pytest

from fastpo.errors import DataError, FastPOError
from fastpo.report import grids
from fastpo.report.grids import build_grids, grid_figure
from fastpo.report.runs import load_run
from fastpo.testing import image_bytes
from tests.faults.fuzz.cases import changed, run_folder


def with_sample(**changes):
    path = run_folder() / "evaluation" / "samples.json"
    about = json.loads(path.read_text())
    about["samples"][0] |= changes
    return changed(path, json.dumps(about))


@pytest.mark.parametrize("kind", ["absolute", "parent", "link"])
def test_samples_lie_in_the_evaluation_s_folder(tmp_path, kind):
    outside = tmp_path / "outside.png"
    outside.write_bytes(image_bytes(0))
    link = run_folder() / "evaluation" / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    name = {"absolute": str(outside), "parent": "../../outside.png", "link": "link.png"}[kind]
    with with_sample(base=name), pytest.raises(DataError) as refusal:
        load_run(run_folder())
    link.unlink()
    assert f"samples.json names '{name}'" in str(refusal.value)
    assert re.search("a link out of it to|which lies outside", str(refusal.value))


@pytest.mark.parametrize("changes", [{"prompt": None}, {"seed": "x"}, {"prompt_index": -1}])
def test_samples_are_what_their_schema_says(changes):
    with with_sample(**changes), pytest.raises(DataError, match=r"samples\.0\.\w+: Input should"):
        load_run(run_folder())


def test_images_are_png_of_bounded_size(monkeypatch):
    image = run_folder() / "evaluation" / "base" / "00000-0.png"
    for content in (image_bytes(0, encoding="BMP"), b"", image.read_bytes()[:60]):
        with changed(image, content), pytest.raises(DataError, match="an evaluated image cannot"):
            build_grids([load_run(run_folder())])
    monkeypatch.setattr(grids, "MOST_PIXELS", 47 * 48)
    with pytest.raises(DataError, match="has 48x48 pixels"):
        build_grids([load_run(run_folder())])


def test_a_price_in_a_prompt_is_no_formula():
    with with_sample(prompt="a hat for $3_{ and one for $4"):
        run = load_run(run_folder())
        assert grid_figure(run.evaluation, "costs $1_{ or $2", "#000000").startswith(b"\x89PNG")


def test_a_configuration_beyond_bounds_is_refused():
    path = run_folder() / "config.yaml"
    for text in ("a: " + "[" * 40, "train: 3", "train: {objective: {name: [1]}}", "- 1"):
        with changed(path, text), pytest.raises(FastPOError, match=r"config\.yaml"):
            load_run(run_folder())
