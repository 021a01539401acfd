"""`docs/reliability.md` is what the long form counted, and what it counted holds nothing lost."""

import importlib.util
import json
from pathlib import Path

from tests.faults.long_form.run import Log, merged, summarize

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


def test_a_part_of_the_trials_replaces_its_own_rows_alone(tmp_path):
    def trial(name, test, row, outcome):
        return {"name": name, "test": test, "row": row, "outcome": outcome, "detail": ""}

    log = Log(tmp_path / "results.jsonl")
    log.add(trial("a", "kill", "of rank 1", "equal"))
    log.add(trial("b", "kill", "at a step", "equal"))
    log.add(trial("c", "kill", "of rank 0", "missed"))
    before = summarize(log) | {
        "commits": {"0000000": 8},
        "tests": {"kill": {"equal": 3, "older": 1}, "signal": {"equal": 4}},
        "rows": {"at a step": {"equal": 2, "older": 1}, "random": {"equal": 1}},
        "files": {},
        "fuzz": {"override": {"ok": 5}},
    }
    found = merged(before, summarize(log) | {"files": {}}, log)
    assert found["tests"] == {"kill": {"equal": 3}, "signal": {"equal": 4}}
    assert found["rows"] == {
        "at a step": {"equal": 1},
        "of rank 1": {"equal": 1},
        "random": {"equal": 1},
    }
    assert found["fuzz"] == {"override": {"ok": 5}}
    assert found["commits"] == {"0000000": 8, log.commit: 3}
    assert found["flaws"] == []
