"""Reads what a run left in its folder: configuration, metrics, minority table, evaluation."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from sklearn.metrics import roc_auc_score

from fastpo.config import OBJECTIVES
from fastpo.config.load import read_yaml
from fastpo.errors import DataError, one_line
from fastpo.evaluate.win_rate import MetricSummary
from fastpo.models.export import export_fingerprint
from fastpo.system.json_text import parse_json, read_json

Array = NDArray[np.float64]
MOST_BYTES = 1 << 27
"""Of an evaluation's JSON file."""
MOST_LINE = 1 << 20
"""Characters of a line of metrics."""
MINORITY_COLUMNS = {"ledger": "ledger_minority", "ema": "metric_minority"}
MINORITY_NAMES = {"ledger": "ledger", "ema": "moving averages"}


@dataclass(frozen=True)
class Minority:
    """A run's metrics of its pairs' labels.

    Attributes:
        flipped: `(N,)` bool, labels exchanged on purpose.
        visits: `(N,)` how often each pair was seen.
        metrics: `(N,)` minority metric by annotator (`ledger`, `ema`), NaN where a pair got no
            vote; annotators that saw no pair are left out.
    """

    flipped: NDArray[np.bool_]
    visits: Array
    metrics: dict[str, Array]

    def judged(self, annotator: str) -> tuple[NDArray[np.bool_], Array]:
        """Returns `flipped` and the metric of the pairs that `annotator` voted on."""
        known = ~np.isnan(self.metrics[annotator])
        return self.flipped[known], self.metrics[annotator][known]

    def auroc(self) -> dict[str, float]:
        """Returns the area under the ROC by annotator, where both kinds of label were judged."""
        judged = {annotator: self.judged(annotator) for annotator in self.metrics}
        return {
            annotator: float(roc_auc_score(flipped, metric))
            for annotator, (flipped, metric) in judged.items()
            if flipped.any() and not flipped.all()
        }


class AboutWeights(BaseModel):
    """Which weights an evaluation is about.

    Attributes:
        folder: Where they lay: in the run's folder, or elsewhere.
        weights: `export_fingerprint` of them.
        step: The run's last step at that time.
    """

    folder: str
    weights: str | None
    step: int | None


@dataclass(frozen=True)
class EvaluationData:
    """What `fastpo evaluate` wrote.

    Attributes:
        folder: The folder `evaluation`.
        summary: `summary.json`.
        metrics: Its metrics, the primary one first.
        samples: The rows of `samples.json`.
        base: Fingerprint of the base's images.
        scores: Metrics of an image by (model, prompt index, seed).
        weights: What the images were made with, if the version recorded it.
    """

    folder: Path
    summary: dict[str, Any]
    metrics: dict[str, MetricSummary]
    samples: list[dict[str, Any]]
    base: str
    scores: dict[tuple[str, int, int], dict[str, float]]
    weights: AboutWeights | None = None

    @property
    def primary(self) -> str | None:
        """The metric that the headline is about."""
        return next(iter(self.metrics), None)


@dataclass(frozen=True)
class Run:
    """A run as the page shows it.

    Attributes:
        path: Its folder.
        name: Short name, unlike that of any other run on the page.
        config: The resolved configuration, as nested mappings; empty if absent.
        config_text: The text of `config.yaml`.
        metrics: Columns of `metrics.jsonl`.
        minority: The minority table, or None.
        evaluation: The evaluation, or None.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: dict[str, Array] = field(default_factory=dict)
    minority: Minority | None = None
    evaluation: EvaluationData | None = None

    @property
    def steps(self) -> int | None:
        """The last step of the metrics."""
        steps = self.metrics.get("step")
        return None if steps is None or not np.isfinite(steps[-1:]).any() else int(steps[-1])

    @property
    def stale(self) -> str | None:
        """Which weights the evaluation is of, `step 8`, where the run has others by now."""
        about = None if self.evaluation is None else self.evaluation.weights
        if about is None:
            return None
        folder = self.path / about.folder
        changed = folder.is_dir() and export_fingerprint(folder) != about.weights
        if about.step is not None and self.steps not in (None, about.step):
            return f"step {about.step:,}"
        return "earlier weights" if changed else None

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        section = OBJECTIVES.get(self._objective_name)
        return section is None or section.needs_reference

    @property
    def objective(self) -> str:
        """The objective's name and its annotators'."""
        train = self.config.get("train") or {}
        name = self._objective_name
        kind = (train.get("annotators") or {}).get("kind")
        return f"{name} ({MINORITY_NAMES.get(kind, kind)})" if kind else name

    @property
    def _objective_name(self) -> str:
        train = self.config.get("train") or {}
        return (train.get("objective") or {}).get("name", "unknown objective")


def load_run(path: Path, name: str | None = None) -> Run:
    """Reads a run's folder; what is missing stays empty.

    Raises:
        DataError: The folder is no run, or a file in it is damaged.
    """
    path = Path(path)
    if not (path / "metrics.jsonl").is_file() and not (path / "config.yaml").is_file():
        what = "it is" if path.is_dir() else "there is no such folder, or it is"
        raise DataError(
            f"{path} is no run of FastPO: {what} without config.yaml and metrics.jsonl, which "
            "`fastpo train` writes into train.output_dir"
        )
    text, config = _load_config(path / "config.yaml")
    return Run(
        path=path,
        name=name or path.resolve().name,
        config=config,
        config_text=text,
        metrics=load_metrics(path) if (path / "metrics.jsonl").is_file() else {},
        minority=load_minority(path),
        evaluation=load_evaluation(path),
    )


def _load_config(file: Path) -> tuple[str, dict[str, Any]]:
    """Returns a configuration's text and content, both empty where there is none."""
    if not file.is_file() or not file.stat().st_size:
        return "", {}
    config = read_yaml(file)
    train = config.get("train") or {}
    if isinstance(train, dict):
        parts = [train.get(name) or {} for name in ("objective", "annotators")]
        named = zip(parts, ("name", "kind"), strict=True)
        if all(isinstance(p, dict) and isinstance(p.get(key, ""), str) for p, key in named):
            return file.read_text(encoding="utf-8"), config
    raise DataError(f"{file}: train, its objective and annotators must be mappings with names")


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads several runs under names that tell them apart; errors as in `load_run`."""
    if not paths:
        raise DataError("a report needs at least one run's folder")
    whole = [Path(path).resolve() for path in paths]
    names: list[str] = []
    for path in whole:
        parts = 1
        while parts < len(path.parts) and any(
            other != path and other.parts[-parts:] == path.parts[-parts:] for other in whole
        ):
            parts += 1
        name = "/".join(path.parts[-parts:])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [load_run(Path(path), name) for path, name in zip(paths, names, strict=True)]


def load_metrics(run: Path) -> dict[str, Array]:
    """Reads `metrics.jsonl` into columns, `(steps,)` each, NaN where a line lacks the key.

    A last line that was cut off by a kill is left out.

    Raises:
        DataError: The file is missing or another line is no JSON object.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"no metrics: {path} does not exist; train first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            if len(line) > MOST_LINE:
                raise ValueError(f"more than {MOST_LINE:,} characters")
            row = parse_json(line)
            rows.append({k: _plotted(v) for k, v in row.items() if isinstance(v, int | float)})
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a JSON object ({error})") from None
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: np.array([row.get(key, np.nan) for row in rows], dtype=float) for key in keys}


def _plotted(value: float) -> float:
    """Returns a number as the figures take it: infinite where it has no place on an axis."""
    return float(value) if -1e100 < value < 1e100 else math.copysign(math.inf, value)


def load_minority(run: Path) -> Minority | None:
    """Reads `minority.csv`, or returns None where there is none.

    The ledger's metric counts from a pair's first visit on.

    Raises:
        DataError: A column is missing or holds no number.
    """
    path = Path(run) / "minority.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        flipped = np.array([row["flipped"].lower() in ("1", "true") for row in rows], dtype=bool)
        visits = np.array([float(row["visits"]) for row in rows])
        metrics = {
            annotator: np.array([float(row.get(column) or "nan") for row in rows], dtype=float)
            for annotator, column in MINORITY_COLUMNS.items()
        }
    except (OSError, KeyError, ValueError, AttributeError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {one_line(error)}") from None
    metrics["ledger"] = np.where(visits > 0, metrics["ledger"], np.nan)
    return Minority(flipped, visits, {k: v for k, v in metrics.items() if not np.isnan(v).all()})


def minority_auroc(run: Path) -> dict[str, float]:
    """Returns how well the minority metric finds flipped labels: the area under the ROC.

    1 is perfect and 1/2 is chance. It is the chance that a flipped pair got a larger metric than
    one that is not.

    Args:
        run: The run's folder.

    Returns:
        By annotator: `ledger` (the pair's own history), `ema` (moving averages); empty where no
        label was flipped, all were, or no pair got a vote.

    Raises:
        DataError: `minority.csv` is missing or damaged.
    """
    minority = load_minority(run)
    if minority is None:
        raise DataError(f"{Path(run) / 'minority.csv'} does not exist; train first, to the end")
    return minority.auroc()


def load_evaluation(run: Path) -> EvaluationData | None:
    """Reads `evaluation/`, or returns None where there is no finished one.

    Raises:
        DataError: One of its files is missing or damaged.
    """
    folder = Path(run) / "evaluation"
    if not (folder / "summary.json").is_file():
        return None
    try:
        raw = read_json(folder / "summary.json", most_bytes=MOST_BYTES)
        about = _About.model_validate(read_json(folder / "samples.json", most_bytes=MOST_BYTES))
        summary = _Summary.model_validate(raw)
        primary, found = summary.primary, summary.metrics
        metrics = {primary: found[primary], **found} if primary else found
        samples = [sample.model_dump() for sample in about.samples]
        if not samples:
            raise ValueError("samples.json lists no sample")
        for sample in samples:
            for model in ("base", "aligned"):
                _check_inside(folder, sample[model])
        with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
            scores = {
                (row["model"], int(row["prompt_index"]), int(row["seed"])): {
                    metric: float(row[metric]) for metric in metrics
                }
                for row in csv.DictReader(file)
            }
        base = about.fingerprints["base"]
        return EvaluationData(folder, raw, metrics, samples, base, scores, about.aligned)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{folder} is damaged ({text}); evaluate again") from None


class _Sample(BaseModel):
    """A row of `samples.json`: one prompt and seed, and the two images' files."""

    prompt_index: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    prompt: str
    base: str
    aligned: str


class _About(BaseModel):
    """What `samples.json` holds."""

    fingerprints: dict[str, str]
    samples: list[_Sample]
    aligned: AboutWeights | None = None


class _Summary(BaseModel):
    """What `summary.json` holds."""

    primary: str | None
    comparisons: int
    confidence: Annotated[float, Field(gt=0, lt=1)]
    metrics: dict[str, MetricSummary]
    notes: dict[str, str] = {}


def _check_inside(folder: Path, name: str) -> None:
    """Refuses a path that leads out of the evaluation's folder, by its text or by a link.

    Raises:
        ValueError: It does.
    """
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"samples.json names {ascii(name)[:200]}, which lies outside")
    target = os.path.realpath(folder / name)
    if os.path.commonpath((target, os.path.realpath(folder))) != os.path.realpath(folder):
        raise ValueError(f"samples.json names {ascii(name)[:200]}, a link out of it to {target}")
