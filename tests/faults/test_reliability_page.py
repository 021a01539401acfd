"""`docs/reliability.md` is what the long form counted, and what it counted holds nothing lost."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_script():
    path = ROOT / "scripts" / "update_reliability.py"
    spec = importlib.util.spec_from_file_location("update_reliability", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_from_the_counts():
    script = load_script()
    found = json.loads((ROOT / "docs" / "reliability.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert page == "\n".join([script.HEAD, *script.page(found)]) + "\n"


def test_no_trial_lost_anything_or_differed_silently():
    found = json.loads((ROOT / "docs" / "reliability.json").read_text())
    assert found["flaws"] == []
    good = {"equal", "older", "said", "refused"}
    assert all(counts.keys() <= good for counts in found["tests"].values())
    tried = {test: sum(counts.values()) for test, counts in found["tests"].items()}
    assert tried["kill"] >= 300 and tried["power cut"] >= 100
    assert tried["flipped bit"] + tried["truncated file"] >= 300
    assert sum(sum(counts.values()) for counts in found["fuzz"].values()) >= 100_000
