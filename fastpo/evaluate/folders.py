"""The folders that an evaluation makes, and how those of earlier versions are recognized."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastpo.system.json_text import parse_json
from fastpo.system.ownership import Kind, is_ours, strangers

SET = "set.json"
SAMPLES_FOLDER, BASE = "samples", "base"
"""Of a run: images that were sampled while it trained, and those of the base among them."""
SUMMARY, SAMPLE_LIST, SCORES = "summary.json", "samples.json", "scores.csv"


def partial_folder(folder: Path, fingerprint: str) -> Path:
    """Returns where images of a fingerprint are collected until all of them are made."""
    return folder.with_name(f".{folder.name}.partial-{fingerprint[:16]}")


def last_step(run: Path) -> int | None:
    """Returns the step of the last whole line of a run's `metrics.jsonl`; None if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in reversed(lines):
        try:
            step = parse_json(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(step, int):
            return step
    return None


def _holds_images(folder: Path) -> bool:
    if re.fullmatch(r"\..+\.partial-[0-9a-f]{16}", folder.name):
        return True
    return "fingerprint" in _mapping(folder / SET)


def _holds_an_evaluation(folder: Path) -> bool:
    if {"metrics", "comparisons"} <= _mapping(folder / SUMMARY):
        return True
    if "fingerprints" in _mapping(folder / SAMPLE_LIST):
        return True
    return any(is_ours(path, SAMPLES) for path in folder.iterdir())


def _mapping(file: Path) -> set[str]:
    """The keys of a JSON file's mapping; none if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return set(content) if isinstance(content, dict) else set()


SAMPLES = Kind("a set of sampled images", r"set\.json|\d{5,}-\d+\.png", _holds_images)
EVALUATION = Kind(
    "an evaluation",
    r"(base|aligned|\.(base|aligned)\.partial-\w+)/.*|samples\.json|scores\.csv|summary\.json",
    _holds_an_evaluation,
)
TABLE_JSON, TABLE_CSV, TABLE_PAGE = "table.json", "table.csv", "index.html"
TABLE = Kind(
    "a table of evaluations",
    r"(images|scores)/.*|table\.(json|csv)|scores\.csv|index\.html",
    lambda folder: {"rows", "models"} <= _mapping(folder / TABLE_JSON),
)
TRAINING_SAMPLES = Kind(
    "a run's sample images",
    r"(base|\.base\.partial-\w+|step-\d{8})/.*",
    lambda folder: not strangers(folder, TRAINING_SAMPLES),
)


def step_folder(folder: Path, step: int) -> Path:
    """Returns where the policy's images of a step lie in a run's folder of samples."""
    return folder / f"step-{step:08d}"
