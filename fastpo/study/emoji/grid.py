"""A picture of a study's samples: a row for the base and each run, the same prompts and seeds.

    python -m fastpo.study.emoji.grid emoji --work FOLDER --out docs/study-emoji.png [--part ...]

FOLDER is that of `fastpo study`; runs that it lacks are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fastpo.errors import DataError
from fastpo.evaluate.folders import SAMPLE_LIST
from fastpo.report.figures import to_png
from fastpo.study.config import load_study
from fastpo.study.trials import Trial, plan
from fastpo.system.files import write_bytes
from fastpo.system.json_text import read_json

COLUMNS = 12
MOST_LIST = 1 << 24  # bytes of the list of a run's samples
INCH = 0.55  # of a picture on the page


def grid(trials: Sequence[Trial], work: Path) -> bytes:
    """Draws the first sample of some prompts of each run, as a PNG; the base's above each part.

    Of runs that differ by their seed alone, the first is drawn.

    Raises:
        DataError: None of the runs is there.
    """
    rows: list[tuple[str, list[Path]]] = []
    parts: set[str] = set()
    drawn: set[tuple[object, ...]] = set()
    for trial in trials:
        run = (trial.part.name, trial.case, trial.method_name, trial.flip_rate)
        if run in drawn:
            continue
        folder = trial.folder(work) / "run" / "evaluation"
        if not (folder / SAMPLE_LIST).is_file():
            continue
        drawn.add(run)
        samples = read_json(folder / SAMPLE_LIST, most_bytes=MOST_LIST)["samples"]
        first = {s["prompt"]: s for s in reversed(samples)}
        shown = list(first.values())[::-1][:: max(1, len(first) // COLUMNS)][:COLUMNS]
        title = trial.part.title or trial.part.name
        if title not in parts:
            parts.add(title)
            rows.append((f"{title}: base", [folder / s["base"] for s in shown]))
        flips = f", {trial.flip_rate:.0%} wrong" if trial.flip_rate else ""
        case = f", {trial.case}" if trial.case else ""
        name = f"{trial.method_name}{case}{flips}"
        rows.append((name, [folder / s["aligned"] for s in shown]))
    if not rows:
        raise DataError(f"{work}: none of the study's runs is there")
    return _drawn(rows)


def _drawn(rows: Sequence[tuple[str, list[Path]]]) -> bytes:
    """One line of pictures a row, its name above it."""
    width = max(len(paths) for _, paths in rows)
    figure = Figure(figsize=(INCH * width, 1.35 * INCH * len(rows)), dpi=110)
    for number, (name, paths) in enumerate(rows):
        line = np.concatenate([np.asarray(Image.open(p).convert("RGB")) for p in paths], axis=1)
        height = 1.0 / len(rows)
        axes = figure.add_axes((0.0, 1.0 - (number + 1) * height, 1.0, height / 1.35))
        axes.imshow(line, interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=7, loc="left", pad=2)
        axes.set_axis_off()
    return to_png(figure)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="the study's YAML file or name")
    parser.add_argument("--work", type=Path, required=True, help="the study's folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--part", nargs="+", help="only these parts")
    options = parser.parse_args()
    trials = plan(load_study(options.config), short=False)
    wanted = [t for t in trials if options.part is None or t.part.name in options.part]
    write_bytes(options.out, grid(wanted, options.work))


if __name__ == "__main__":
    main()
