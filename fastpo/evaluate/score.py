"""`fastpo score`: images that are there already, rated by any scorers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastpo.errors import ConfigError, DataError
from fastpo.evaluate.compare import SCORE_TOGETHER, score_images
from fastpo.evaluate.image_folder import Picture, list_pictures, read_picture
from fastpo.evaluate.prompt_sets import read_prompt_set
from fastpo.evaluate.scorers import Scorer, Scores, needs_groups, reads_prompts
from fastpo.evaluate.win_rate import bootstrap_mean
from fastpo.system.files import make_folder, write_text
from fastpo.system.json_text import finite
from fastpo.system.ownership import check_new
from fastpo.system.progress import progress_bar
from fastpo.system.storage import storage_errors

WRITERS = (".json", ".csv")


@dataclass(frozen=True)
class MetricMean:
    """One metric over a folder.

    Attributes:
        mean: Over the images.
        interval: Bootstrap interval of the mean, resampled by prompt (by image where no prompt is
            known); None with a single one.
        deviation: Standard deviation of the images' scores.
    """

    mean: float
    interval: tuple[float, float] | None
    deviation: float


@dataclass(frozen=True)
class FolderScores:
    """One folder's outcome.

    Attributes:
        folder: The folder.
        pictures: Its images.
        scores: `(N,)` per metric.
        metrics: Each metric's mean.
    """

    folder: Path
    pictures: tuple[Picture, ...]
    scores: Scores
    metrics: dict[str, MetricMean]


@storage_errors()
def score_pictures(
    folders: Sequence[Path],
    scorers: Sequence[Scorer],
    *,
    prompts: str | None = None,
    out: Sequence[Path] = (),
    progress: bool = True,
) -> list[FolderScores]:
    """Scores the images of folders and writes what was found.

    Args:
        folders: Folders of images; see `list_pictures` for where prompts come from.
        scorers: What rates them.
        prompts: A prompt set by name and place instead (`hpdv2:...`, `lines:prompts.txt`): the
            images of a folder, sorted by path, are of its prompts in order, equally many of each.
        out: `.json` and `.csv` files to write; they must not exist, missing folders are made.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: No scorer is given, or a file to write exists or has another ending.
        DataError: A folder holds no images, an image is broken, or a prompt is missing.
        StorageError: A file cannot be written where it shall be; told before anything is rated.
    """
    if not scorers:
        raise ConfigError("nothing to score by: name a scorer (--scorer pickscore)")
    for file in out:
        check_new_file(file, WRITERS)
    listed = [_with_prompts(folder, prompts) for folder in folders]
    if any(map(reads_prompts, scorers)):
        for folder, pictures in zip(folders, listed, strict=True):
            _require_prompts(folder, pictures, scorers)
    results = [
        _score_folder(folder, pictures, scorers, progress=progress)
        for folder, pictures in zip(folders, listed, strict=True)
    ]
    for file in out:
        make_folder(file.parent)
        write_text(file, as_json(results) if file.suffix == ".json" else as_csv(results))
    return results


def check_new_file(file: Path, suffixes: Sequence[str]) -> None:
    """Refuses to write a file that exists, that has none of the endings, or where none can be.

    Raises:
        ConfigError: It is so.
        StorageError: Its folder cannot be made or written in.
    """
    if file.suffix not in suffixes:
        raise ConfigError(f"{file}: the file's name must end with {' or '.join(suffixes)}")
    check_new(file, ConfigError)


def _with_prompts(folder: Path, prompts: str | None) -> list[Picture]:
    pictures = list_pictures(folder)
    if prompts is None:
        return pictures
    known = read_prompt_set(prompts).prompts
    each, rest = divmod(len(pictures), len(known))
    if rest or not each:
        raise DataError(
            f"{folder} holds {len(pictures)} images, {prompts} has {len(known)} prompts: expected "
            "equally many images of each"
        )
    return [
        Picture(picture.file, picture.path, known[i // each]) for i, picture in enumerate(pictures)
    ]


def _require_prompts(folder: Path, pictures: Sequence[Picture], scorers: Sequence[Scorer]) -> None:
    without = [picture.file for picture in pictures if not picture.prompt]
    if without:
        names = ", ".join(scorer.name for scorer in scorers if reads_prompts(scorer))
        raise DataError(
            f"{folder}: {len(without)} of {len(pictures)} images have no prompt, which {names} "
            f"needs, the first is {without[0]}: give metadata.jsonl with file_name and prompt, "
            "text files beside the images, or --prompts"
        )


def _score_folder(
    folder: Path, pictures: Sequence[Picture], scorers: Sequence[Scorer], *, progress: bool
) -> FolderScores:
    order, whole = list(range(len(pictures))), any(map(needs_groups, scorers))
    if whole:  # a prompt's images need not lie side by side
        order.sort(key=lambda i: pictures[i].prompt or "")
    scores: dict[str, np.ndarray] = {}
    with progress_bar(
        f"score {folder.name}", len(pictures), unit="images", show=progress
    ) as advance:
        for some in _slices(order, pictures, whole_prompts=whole):
            images = [read_picture(pictures[i]) for i in some]
            found = score_images(scorers, images, [pictures[i].prompt or "" for i in some])
            for metric, values in found.items():
                scores.setdefault(metric, np.zeros(len(pictures)))[some] = values
            advance(len(some))
    groups = np.array([picture.prompt or f"\0{picture.file}" for picture in pictures])
    metrics = {
        metric: MetricMean(
            float(values.mean()), bootstrap_mean(values, groups), float(values.std())
        )
        for metric, values in scores.items()
    }
    return FolderScores(folder, tuple(pictures), scores, metrics)


def _slices(
    order: Sequence[int], pictures: Sequence[Picture], *, whole_prompts: bool
) -> list[list[int]]:
    """Cuts the images into slices of about `SCORE_TOGETHER`."""
    slices: list[list[int]] = [[]]
    for i in order:
        last = slices[-1]
        same = bool(last) and pictures[last[-1]].prompt == pictures[i].prompt
        if len(last) >= SCORE_TOGETHER and not (whole_prompts and same):
            slices.append([])
        slices[-1].append(i)
    return slices


def as_json(results: Sequence[FolderScores]) -> str:
    """Returns means and every image's scores as JSON."""
    content: list[dict[str, Any]] = [
        {
            "folder": str(result.folder),
            "images": len(result.pictures),
            "metrics": {name: asdict(metric) for name, metric in result.metrics.items()},
            "scores": [
                {
                    "file": picture.file,
                    "prompt": picture.prompt,
                    **{name: float(values[i]) for name, values in result.scores.items()},
                }
                for i, picture in enumerate(result.pictures)
            ],
        }
        for result in results
    ]
    text = json.dumps(finite({"folders": content}), indent=2, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def as_csv(results: Sequence[FolderScores]) -> str:
    """Returns a row an image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "file", "prompt", *results[0].metrics])
    for result in results:
        for i, picture in enumerate(result.pictures):
            values = (repr(float(scores[i])) for scores in result.scores.values())
            writer.writerow([str(result.folder), picture.file, picture.prompt or "", *values])
    return text.getvalue()


def show(results: Sequence[FolderScores], console: Console) -> None:
    """Prints a row a folder."""
    table = Table("folder", "images", *results[0].metrics)
    for result in results:
        cells = []
        for metric in result.metrics.values():
            low, high = metric.interval or (None, None)
            around = "" if low is None else rf" \[{low:.4g}, {high:.4g}]"
            cells.append(f"{metric.mean:.4g}{around}")
        table.add_row(str(result.folder), f"{len(result.pictures):,}", *cells)
    console.print(table)
