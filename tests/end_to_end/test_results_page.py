"""docs/results.md: its snippets run on a trained run, its tables name what is there."""

import json
import re
from pathlib import Path

import pytest

from fastpo.config import load_config
from fastpo.evaluate.scorers import SCORERS
from fastpo.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
LORA, FULL, DOUBTFUL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LEDGER = {"objective": {"name": "adaptive_dpo"}, "annotators": {"kind": "ledger"}}
EVERYTHING = {**LEDGER, "backward": "alive", "data": {"held_out": 0.5, "flip_rate": 0.5}}


def table(title):
    """The names in the first column of the table below a heading."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.fixture
def trained(experiment):
    def train_it(**options):
        config = load_config(experiment(max_steps=2, **options))
        train(config, progress=False)
        return {"RUN": str(config.train.output_dir), "BASE": config.model.path}

    return train_it


def test_a_lora_s_files_and_columns_are_those_of_the_page(trained):
    places = trained(method="lora", **EVERYTHING)
    exec(LORA, places)
    assert places["pipeline"].get_active_adapters()
    exec(DOUBTFUL, places)
    assert list(places["rows"][0]) == table("`minority.csv`")
    assert len(places["doubtful"]) == len(places["rows"])
    run = Path(places["RUN"])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert sorted(keys) == sorted(table("`metrics.jsonl`"))
    named = {
        path.removesuffix("/") for path in re.findall(r"^\| `([\w./]+)` \|", PAGE, re.MULTILINE)
    }
    there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert there <= named, there - named


def test_full_weights_load_as_the_page_says(trained):
    places = trained(method="full")
    exec(FULL, places)
    assert places["pipeline"].unet is places["unet"]


def test_every_scorer_is_listed():
    assert table("Scorers") == list(SCORERS)
