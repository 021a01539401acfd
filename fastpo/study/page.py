"""The page of a study: Markdown whose tables and figures come from the table of all runs.

A section between the marks `<!-- study-NAME:begin -->` and `<!-- study-NAME:end -->` is written
anew each time; text outside of them is the author's and stays. NAME is `state` (how much is done),
`methods`, `calibration`, or a part. A page that is not there yet is made with all sections.
"""

from __future__ import annotations

from pathlib import Path

from fastpo.bench.table import marks, with_section
from fastpo.errors import ForeignPathError
from fastpo.study.config import Part, StudyConfig
from fastpo.study.figures import bins_figure, calibration_figure, gain_figure
from fastpo.study.rows import read_rows
from fastpo.study.tables import calibration_table, methods_table, part_table, state_line
from fastpo.study.trials import plan
from fastpo.system.files import check_folder, make_folder, write_bytes, write_text

FIGURES = {
    "gain": (gain_figure, "Gain over the share of flipped labels"),
    "bins": (bins_figure, "Share of wrong labels by minority metric"),
}


def check_page(page: Path) -> None:
    """Refuses a file that is there and has no section of a study.

    Raises:
        ForeignPathError: It is one.
        StorageError: Its folder cannot be made or written in.
    """
    check_folder(page.parent)
    if not page.exists():
        return
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if "<!-- study-" not in text:
        raise ForeignPathError(
            f"{page} is there and has no section of a study, <!-- study-state:begin -->: give "
            "another file"
        )


def write_page(page: Path, study: StudyConfig, table: Path, *, short: bool = False) -> None:
    """Writes the page's sections anew from the CSV of all runs, and the figures beside it.

    Args:
        page: The Markdown file; figures are `PAGE-PART-gain.png` and `PAGE-PART-bins.png`.
        study: Which parts and methods there are, and in which order.
        table: The CSV; rows that are none of the study's runs are left out.
        short: Whether the study was only tried.

    Raises:
        ForeignPathError: The page or the table is something else.
    """
    check_page(page)
    make_folder(page.parent)
    trials = plan(study, short=short)
    known = {tuple(trial.labels.values()) for trial in trials}
    rows = [row for row in read_rows(table) if tuple(row[k] for k in trials[0].labels) in known]
    sections = {"state": state_line(rows, len(trials)), "methods": methods_table(study)}
    for part in study.parts:
        figures = [_figure(page, part, kind, rows) for kind in FIGURES]
        texts = [part_table(part, rows), *(text for text in figures if text)]
        sections[part.name] = "\n\n".join(texts)
    if study.calibration:
        image = calibration_figure(study, rows)
        drawn = _shown(page, "calibration", "Reliability curves", image)
        sections["calibration"] = "\n\n".join(filter(None, [calibration_table(study, rows), drawn]))
    text = page.read_text(encoding="utf-8") if page.exists() else skeleton(study)
    for name, body in sections.items():
        if marks(f"study-{name}")[0] in text:
            text = with_section(text, f"study-{name}", body)
    write_text(page, text)


def _figure(page: Path, part: Part, kind: str, rows: list[dict[str, str]]) -> str:
    """Draws one figure beside the page; returns the line that shows it, empty without one."""
    draw, title = FIGURES[kind]
    return _shown(page, f"{part.name}-{kind}", title, draw(part, rows))


def _shown(page: Path, name: str, title: str, image: bytes | None) -> str:
    """Writes a figure beside the page; returns the line that shows it, empty without one."""
    if image is None:
        return ""
    path = page.with_name(f"{page.stem}-{name}.png")
    write_bytes(path, image)
    return f"![{title}]({path.name})"


def skeleton(study: StudyConfig) -> str:
    """A page with every section of a study, each empty."""
    parts = [(part.title or part.name, part.name) for part in study.parts]
    if study.calibration:
        parts.append(("Are the probabilities true?", "calibration"))
    lines = ["# A study", ""]
    for title, name in [("What is done", "state"), ("Methods", "methods"), *parts]:
        lines += [f"## {title}", "", "".join(marks(f"study-{name}")), ""]
    return "\n".join(lines)
