"""Image grids: the base above each aligned model, for the same prompts and seeds."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fastpo.errors import DataError, one_line
from fastpo.evaluate.folders import BASE, SAMPLES_FOLDER, SET
from fastpo.report.figures import BASE_COLOR, INK, color, to_png
from fastpo.report.runs import EvaluationData, Run
from fastpo.system.json_text import read_json

COLUMNS = 8
ROWS = 6
MOST_LIST = 1 << 24
"""Bytes of the list of a step's images."""
IMAGE = re.compile(r"\d{5,}-\d+\.png")
SMALL = 128  # images up to this side are enlarged without smoothing
MOST_PIXELS = 80_000_000  # of an image, told by its header before it is decoded
LARGE = 288  # larger ones are reduced to this side on the page; the full ones stay in the run


@dataclass(frozen=True, slots=True)
class Cell:
    """One image on the page: its data URL, and its score in words or nothing."""

    url: str
    score: str


@dataclass(frozen=True, slots=True)
class Row:
    """One model's images."""

    name: str
    color: str
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Grid:
    """Runs that share the base's images.

    Attributes:
        prompts: The caption of each column.
        seeds: Its seed.
        rows: The base's row, then one per run.
        metric: What the scores are, or None.
        small: Whether the images are shown enlarged, pixel by pixel.
        total: How many images each model has in all.
        run: The run, where the rows are steps of its training.
    """

    prompts: list[str]
    seeds: list[int]
    rows: list[Row]
    metric: str | None
    small: bool
    total: int
    run: str | None = None


def build_training_grids(runs: Sequence[Run]) -> list[Grid]:
    """Returns a grid of every run that has sampled while it trained: the base, then its steps.

    Raises:
        DataError: One of the images, or their list, is damaged.
    """
    grids = []
    for i, run in enumerate(runs):
        folder = run.path / SAMPLES_FOLDER
        steps = sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
        if steps:
            grids.append(_training_grid(run.name, color(i), folder, steps))
    return grids


def _training_grid(name: str, shade: str, folder: Path, steps: list[Path]) -> Grid:
    """A grid of the base and of up to `ROWS` steps, evenly spread, the last among them."""
    try:
        listed = read_json(steps[-1] / SET, most_bytes=MOST_LIST)["samples"]
        samples = [(str(s["prompt"]), int(s["seed"]), str(s["file"])) for s in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{steps[-1] / SET} is damaged: {one_line(error)}") from None
    samples = [one for one in samples if IMAGE.fullmatch(one[2])][:COLUMNS]
    places = np.linspace(0, len(steps) - 1, min(ROWS, len(steps))).round().astype(int)
    shown = [("base", BASE_COLOR, folder / BASE)]
    shown += [(f"step {int(p.name[5:]):,}", shade, p) for p in (steps[k] for k in places)]
    rows = []
    for title, tint, path in shown:
        if all((path / file).is_file() for _, _, file in samples):
            images = [_open(path / file) for _, _, file in samples]
            rows.append(Row(title, tint, [Cell(_image_url(image), "") for image in images]))
    return Grid(
        prompts=[prompt for prompt, _, _ in samples],
        seeds=[seed for _, seed, _ in samples],
        rows=rows,
        metric=None,
        small=all(_is_small(_open(steps[-1] / file)) for _, _, file in samples),
        total=len(listed),
        run=name,
    )


def build_grids(runs: Sequence[Run]) -> list[Grid]:
    """Returns one grid for each set of base images that runs on the page share."""
    groups: dict[str, list[tuple[int, Run, EvaluationData]]] = {}
    for i, run in enumerate(runs):
        if run.evaluation is not None:
            groups.setdefault(run.evaluation.base, []).append((i, run, run.evaluation))
    return [_grid(members) for members in groups.values()]


def choose_samples(samples: list[dict[str, Any]], count: int = COLUMNS) -> list[dict[str, Any]]:
    """Returns up to `count` samples, evenly spread over the prompts and then over the seeds.

    The choice knows nothing of scores: a page that showed the best images would mislead.
    """
    prompts: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        prompts.setdefault(sample["prompt_index"], []).append(sample)
    layers = max((len(each) for each in prompts.values()), default=0)
    pool = [each[k] for k in range(layers) for each in prompts.values() if k < len(each)]
    if len(prompts) >= count:
        pool = [each[0] for each in prompts.values()]
        return [pool[i] for i in np.linspace(0, len(pool) - 1, count).round().astype(int)]
    return sorted(pool[:count], key=lambda s: (s["prompt_index"], s["seed"]))


def grid_figure(evaluation: EvaluationData, name: str, shade: str) -> bytes:
    """Returns the base's images above the aligned model's as one PNG."""
    chosen = choose_samples(evaluation.samples)
    first = _open(evaluation.folder / chosen[0]["base"])
    gap, height = 0.06, first.height / first.width
    rows = (("base", "base", BASE_COLOR, height + gap), ("aligned", name, shade, 0.0))
    figure = Figure(figsize=(1.4 * len(chosen) + 0.9, 2.8 * height + 0.5), layout="constrained")
    axes = figure.subplots()
    for i, sample in enumerate(chosen):
        for model, _, _, bottom in rows:
            image = _open(evaluation.folder / sample[model])
            axes.imshow(
                np.asarray(image),
                extent=(i * (1 + gap), i * (1 + gap) + 1, bottom, bottom + height),
                interpolation="nearest" if _is_small(image) else "antialiased",
            )
        caption = textwrap.fill(textwrap.shorten(sample["prompt"], 60, placeholder="…"), 20)
        top = (i * (1 + gap) + 0.5, 2 * height + 2 * gap)
        axes.text(*top, caption, fontsize=7.5, color=INK, ha="center", va="bottom")
    for _, label, tint, bottom in rows:
        text = textwrap.fill(label.replace("_", "_ "), 16).replace("_ ", "_")
        axes.text(-0.08, bottom + height / 2, text, fontsize=9, color=tint, ha="right", va="center")
    axes.set(xlim=(-0.8, len(chosen) * (1 + gap)), ylim=(0, 2 * height + 0.4), aspect="equal")
    axes.set_axis_off()
    return to_png(figure)


def data_url(png: bytes) -> str:
    """Returns a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _grid(members: list[tuple[int, Run, EvaluationData]]) -> Grid:
    first = members[0][2]
    chosen = choose_samples(first.samples)
    metric = first.primary
    rows = [Row("base", BASE_COLOR, [_cell(first, "base", s, metric) for s in chosen])]
    rows += [
        Row(run.name, color(i), [_cell(data, "aligned", s, metric) for s in chosen])
        for i, run, data in members
    ]
    return Grid(
        prompts=[sample["prompt"] for sample in chosen],
        seeds=[sample["seed"] for sample in chosen],
        rows=rows,
        metric=metric,
        small=all(_is_small(_open(first.folder / sample["base"])) for sample in chosen),
        total=len(first.samples),
    )


def _cell(
    evaluation: EvaluationData, model: str, sample: dict[str, Any], metric: str | None
) -> Cell:
    image = _open(evaluation.folder / sample[model])
    scores = evaluation.scores.get((model, sample["prompt_index"], sample["seed"]), {})
    score = f"{scores[metric]:.3g}" if metric in scores else ""
    return Cell(_image_url(image), score)


def _image_url(image: Image.Image) -> str:
    """An image as the page holds it, reduced where it is large."""
    if not _is_small(image):
        image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return data_url(buffer.getvalue())


def _open(path: Path) -> Image.Image:
    """Reads an image that `fastpo evaluate` wrote.

    Raises:
        DataError: It is no PNG, too large, or cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{path} has {image.width}x{image.height} pixels")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # PIL's plug-ins raise anything on broken data
        text = one_line(error)
        raise DataError(f"an evaluated image cannot be read: {text}; evaluate again") from None


def _is_small(image: Image.Image) -> bool:
    return max(image.size) <= SMALL
