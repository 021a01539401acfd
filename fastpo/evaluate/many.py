"""Many checkpoints, prompt sets, scorers and seeds in one table; shared by any number of processes.

A folder then holds

    images/<model>/<set>/         one PNG per prompt and seed, under the same name for all models
    scores/<model>/<set>/*.json   every image's scores by one scorer
    table.json, table.csv         means, gains over the base, win rates, intervals, p-values
    scores.csv                    every image's scores by all scorers
    index.html                    the same to look at

Images and scores are kept: with another checkpoint, set or scorer only what is new is made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.config import Config
from fastpo.errors import ConfigError
from fastpo.evaluate.compare import score_folder
from fastpo.evaluate.folders import TABLE
from fastpo.evaluate.prompt_sets import PromptSet, configured_sets
from fastpo.evaluate.sampling import (
    ImageSampler,
    Sample,
    check_aligned,
    holds_samples,
    list_samples,
)
from fastpo.evaluate.scorers import Scorer, Scores, build_scorer
from fastpo.evaluate.table import Comparison, compare_models
from fastpo.evaluate.table_files import write_table
from fastpo.system.files import make_folder, user_path, write_json
from fastpo.system.json_text import read_json
from fastpo.system.locks import FolderLocks
from fastpo.system.ownership import Kind, claim
from fastpo.system.process import Rank
from fastpo.system.storage import storage_errors
from fastpo.system.work import share_work

BASE = "base"
CHUNK = 64
"""Images that a process makes before it looks for what is left."""
MOST_BYTES = 1 << 28
"""Of a file of scores."""


@dataclass(frozen=True)
class Candidate:
    """A model of the table.

    Attributes:
        name: Its name in the table and in paths.
        weights: Folder with its LoRA or denoiser; None: the base.
    """

    name: str
    weights: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One model on one prompt set.

    Attributes:
        candidate: The model.
        prompts: The set.
        samples: All images of it.
        folder: Where they lie.
        fingerprint: Of what decides how they look.
    """

    candidate: Candidate
    prompts: PromptSet
    samples: tuple[Sample, ...]
    folder: Path
    fingerprint: str

    @property
    def label(self) -> str:
        """Its name on a progress bar."""
        return f"{self.candidate.name} {self.prompts.name}"


@storage_errors()
def evaluate_many(
    config: Config,
    candidates: Sequence[Candidate],
    out: Path,
    *,
    process: Rank | None = None,
    progress: bool = True,
) -> Comparison | None:
    """Makes what images and scores are missing, and writes the table.

    Args:
        config: The experiment: base model, prompts and sets, seeds, sampling, scorers.
        candidates: The models to compare with the base.
        out: The folder to work in; one that this function made is gone on with.
        process: This process of the launch; default: as its launcher says. All of them share the
            work, and may come late or be killed.
        progress: Whether to show progress bars.

    Returns:
        The table; None in all processes but the first, which writes it.

    Raises:
        ConfigError: No prompts or scorers, two models of one name, or an unknown scorer.
        CheckpointError: A folder holds no weights.
        ModelError: The base pipeline or a scorer's model is not available.
        ForeignPathError: `out` is none that this function made.
    """
    process = process or Rank.of_launch()
    if not config.evaluate.scorers:
        raise ConfigError("nothing to compare by: give evaluate.scorers")
    sampler = ImageSampler(config, progress=progress and process.rank == 0)
    candidates = [Candidate(BASE), *candidates]
    with filled_cells(sampler, candidates, out, TABLE, process) as (cells, scored):
        if process.rank != 0:
            return None
        scores = {(cell.candidate.name, cell.prompts.name): scored.all_of(cell) for cell in cells}
        sets = {cell.prompts.name: (cell.prompts, cell.samples) for cell in cells}
        comparison = compare_models(sets, scores, confidence=config.evaluate.confidence)
        about = {
            "family": sampler.family.name,
            "settings": sampler.settings,
            "scorers": list(config.evaluate.scorers),
            "models": {c.name: None if c.weights is None else str(c.weights) for c in candidates},
            "fingerprints": {cell.label: cell.fingerprint for cell in cells},
        }
        write_table(out, comparison, about)
    return comparison


_TOGETHER, _SCORES = 1 << 24, 1 << 25
"""Numbers of the locks: chunks of images from 0, whole folders and scores from these."""


@contextmanager
def filled_cells(
    sampler: ImageSampler, candidates: Sequence[Candidate], out: Path, kind: Kind, process: Rank
) -> Iterator[tuple[list[Cell], CellScores]]:
    """Makes what images and scores of a folder are missing; its locks are held in the block.

    Args:
        sampler: Makes the images, of the configuration's prompts and sets.
        candidates: The models.
        out: The folder.
        kind: What the folder is, for its marker.
        process: This process of the launch; all share the work.

    Raises:
        FastPOError: As `evaluate_many`.
    """
    check_candidates(candidates, sampler)
    cells = list(plan_cells(sampler.config, candidates, out, sampler))
    claim(out, kind)
    with FolderLocks(out) as locks:
        locks.sweep()
        make_images(cells, sampler, locks, process)
        sampler.drop_pipeline()
        scored = CellScores(sampler.config, out, progress=sampler.progress)
        scored.fill(cells, locks, process)
        yield cells, scored


def check_candidates(candidates: Sequence[Candidate], sampler: ImageSampler) -> None:
    """Refuses models without weights or with names that are taken or no names.

    Raises:
        ConfigError: A name is none, or two models have one.
        CheckpointError: A folder holds no weights.
    """
    names = [candidate.name for candidate in candidates]
    for candidate in candidates:
        if not re.fullmatch(r"\w[\w.+-]*", candidate.name):
            raise ConfigError(
                f"--weights: {candidate.name!r} cannot name a model in the table (letters, digits, "
                "'.', '+', '-'): name it, NAME=FOLDER"
            )
        if names.count(candidate.name) > 1:
            raise ConfigError(
                f"--weights: two models are named {candidate.name!r}: name them, NAME=FOLDER"
            )
        if candidate.weights is not None:
            check_aligned(candidate.weights, sampler.family)


def plan_cells(
    config: Config, candidates: Sequence[Candidate], out: Path, sampler: ImageSampler
) -> Iterator[Cell]:
    """Yields what is sampled: each model on each configured set; errors as `evaluate_many`."""
    sets = configured_sets(config)
    for candidate in candidates:
        for one in sets:
            samples = tuple(list_samples(config, one.rows))
            folder = out / "images" / candidate.name / one.name
            fingerprint = sampler.fingerprint(samples, candidate.weights)
            yield Cell(candidate, one, samples, folder, fingerprint)


def make_images(
    cells: Sequence[Cell], sampler: ImageSampler, locks: FolderLocks, process: Rank
) -> None:
    """Makes what images are missing, in chunks that the processes share."""
    chunks, folders, number = {}, {}, 0
    for place, cell in enumerate(cells):
        missing = not _is_there(cell)
        for start in range(0, len(cell.samples), CHUNK):
            if missing:
                chunks[number] = (cell, cell.samples[start : start + CHUNK])
            number += 1
        if missing:
            folders[_TOGETHER + place] = cell

    def make(item: tuple[Cell, Sequence[Sample]]) -> None:
        cell, some = item
        make_folder(cell.folder.parent)
        weights = cell.candidate.weights
        sampler.make(cell.folder, cell.samples, some, label=cell.label, aligned=weights)

    def put_together(cell: Cell) -> None:
        if not _is_there(cell):
            sampler.put_together(cell.folder, cell.samples, cell.candidate.weights)

    share_work(chunks, locks, make, process=process)
    share_work(folders, locks, put_together, process=process)


def _is_there(cell: Cell) -> bool:
    return holds_samples(cell.folder, cell.samples, cell.fingerprint)


class CellScores:
    """Scores of cells, kept in files; holds one scorer at a time."""

    def __init__(self, config: Config, out: Path, *, progress: bool) -> None:
        self.config, self.out, self.progress = config, out, progress
        self._text, self._scorer = "", None

    def fill(self, cells: Sequence[Cell], locks: FolderLocks, process: Rank) -> None:
        """Scores all cells by all scorers, as work that the processes share."""
        texts = self.config.evaluate.scorers
        pairs = [(cell, text) for text in texts for cell in cells]  # one scorer after the other
        items = {_SCORES + number: pair for number, pair in enumerate(pairs)}
        share_work(items, locks, lambda item: self.score(*item), process=process)

    def score(self, cell: Cell, text: str) -> None:
        """Scores a cell's images unless their scores are there."""
        if self.read(cell, text) is not None:
            return
        scorer = self._built(text)
        found = score_folder([scorer], cell.folder, cell.samples, progress=self.progress)
        file = self._file(cell, text)
        make_folder(file.parent)
        values = {metric: scores.tolist() for metric, scores in found.items()}
        write_json(file, {**self._key(cell, text), "metrics": values})

    def read(self, cell: Cell, text: str) -> Scores | None:
        """Returns the scores that are there, of these images by this scorer; None if none are."""
        try:
            content = read_json(self._file(cell, text), most_bytes=MOST_BYTES)
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
            return None
        if any(content.get(name) != value for name, value in self._key(cell, text).items()):
            return None
        return {metric: np.array(values) for metric, values in content["metrics"].items()}

    def all_of(self, cell: Cell) -> Scores:
        """Returns a cell's scores by all scorers.

        Raises:
            ConfigError: Two scorers share a metric's name.
        """
        scores: Scores = {}
        for text in self.config.evaluate.scorers:
            found = self.read(cell, text) or {}
            for metric in scores.keys() & found.keys():
                raise ConfigError(f"evaluate.scorers: two scorers give a metric {metric!r}")
            scores |= found
        return scores

    def _built(self, text: str) -> Scorer:
        if self._scorer is None or self._text != text:
            self._scorer = None  # frees the memory of the one before
            options = self.config.evaluate
            self._scorer = build_scorer(
                text, batch_size=options.score_batch_size, precision=options.score_precision
            )
            self._text = text
        return self._scorer

    def _key(self, cell: Cell, text: str) -> dict[str, Any]:
        return {
            "images": cell.fingerprint,
            "scorer": text,
            "precision": self.config.evaluate.score_precision,
            "weights": _stamps(text),
        }

    def _file(self, cell: Cell, text: str) -> Path:
        name = text.partition(":")[0]
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = self.out / "scores" / cell.candidate.name / cell.prompts.name
        return folder / f"{name}-{mark}.json"


def _stamps(text: str) -> list[list[Any]]:
    """Sizes and times of a scorer's local files, which tell when its weights were replaced."""
    place = user_path(text.partition(":")[2] or ".")
    if ":" not in text or not place.exists():
        return []
    files = sorted(f for f in place.iterdir() if f.is_file()) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
