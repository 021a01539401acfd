"""Puts the page together: words, tables, figures, grids, in one HTML file without links."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastpo._version import __version__
from fastpo.config import flatten
from fastpo.evaluate.win_rate import MetricSummary
from fastpo.report.figures import (
    color,
    curve_panels,
    curves_figure,
    minority_figure,
    panel_figure,
    roc_figure,
)
from fastpo.report.grids import build_grids, build_training_grids, data_url, grid_figure
from fastpo.report.runs import MINORITY_NAMES, Run, load_runs
from fastpo.system.files import write_bytes, write_text
from fastpo.system.ownership import Kind, check_claim, claim
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted

PAGE = "report.html"
TEMPLATE = "page.html"


def _holds_a_page(folder: Path) -> bool:
    """Whether FastPO made the page in a folder, as its last line says."""
    try:
        return "Made by FastPO" in (folder / PAGE).read_text(encoding="utf-8")[-500:]
    except (OSError, UnicodeDecodeError):
        return False


REPORT = Kind("a report", r"report\.html|(curves|roc|(grid|minority)-.+)\.png", _holds_a_page)


@dataclass(frozen=True, slots=True)
class Bar:
    """A win rate as the page draws it: percentages of the bar's width, and words."""

    rate: float
    low: float
    high: float
    text: str
    interval: str


@storage_errors()
def write_report(
    runs: Sequence[Path], out: Path, *, title: str, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes `report.html`, complete in itself, and its figures as PNGs beside it.

    Args:
        runs: Folders that `fastpo train` wrote, evaluated or not; in the page's order.
        out: Folder for the page, `curves.png`, `grid-<run>.png`, `minority-<run>.png`, `roc.png`.
        title: The page's heading.
        extra: Further sections by heading: a text (blank lines part paragraphs), a sequence of
            mappings (a table), or the `Path` of a PNG.

    Returns:
        The page.

    Raises:
        DataError: A folder is no run, or one of its files is damaged.
        ForeignPathError: `out` holds other things, and no report.
    """
    check_claim(out, REPORT)
    loaded = load_runs(runs)
    pictures = _pictures(loaded)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "signed": format_signed}
    template = files("fastpo.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        title=title,
        version=__version__,
        runs=[_about(run, i) for i, run in enumerate(loaded)],
        headline=headline(loaded),
        warnings=warnings(loaded),
        primaries=_metric_names(loaded)[0],
        others=_metric_names(loaded)[1],
        table=[_row(run, i) for i, run in enumerate(loaded)],
        areas=any(run.minority and run.minority.auroc() for run in loaded),
        notes=_notes(loaded),
        grids=build_grids(loaded),
        training_grids=build_training_grids(loaded),
        panels=[
            (panel.title, data_url(panel_figure(panel, loaded))) for panel in curve_panels(loaded)
        ],
        histograms=[
            (run.name, data_url(minority_figure(run, [annotator])))
            for run in loaded
            for annotator in (run.minority.metrics if run.minority else ())
        ],
        roc=data_url(pictures["roc.png"]) if "roc.png" in pictures else None,
        minority_words=minority_words(loaded),
        differences=config_differences(loaded),
        extra=[_section(heading, content) for heading, content in (extra or {}).items()],
    )
    claim(out, REPORT)
    for name, png in pictures.items():
        write_bytes(out / name, png)
    write_text(out / PAGE, html)
    return out / PAGE


def headline(runs: Sequence[Run]) -> str:
    """Says in one sentence what the evaluation found."""
    scored = [(run, run.evaluation) for run in runs if run.evaluation and run.evaluation.primary]
    if not scored and any(run.evaluation for run in runs):
        return (
            "Sampled, not scored: base and aligned model made images of the same prompts and "
            "seeds, and nothing rated them. Name scorers in evaluate.scorers, run `fastpo evaluate "
            "CONFIG` (the images are kept), then make the page again."
        )
    if not scored:
        return (
            "Not evaluated yet: this page shows the training only. Run `fastpo evaluate CONFIG` "
            "with prompts and scorers, then make the page again."
        )
    primary, base = scored[0][1].primary, scored[0][1].base
    # One base fingerprint: the same model, prompts, seeds, guidance and other settings.
    alike = [pair for pair in scored if (pair[1].primary, pair[1].base) == (primary, base)]
    best, data = max(alike, key=lambda pair: pair[1].metrics[primary or ""].gain)
    metric = data.metrics[primary or ""]
    low, high = metric.win_interval
    lead = f"Best of {len(alike)}: {best.name}. " if len(alike) > 1 else ""
    if len(alike) == 1 and len(scored) > 1:
        lead = f"{best.name}: "
    of = f" (of {best.stale})" if best.stale else ""
    change = (
        f"{primary} goes from {format_number(metric.base_mean)} to "
        f"{format_number(metric.aligned_mean)} ({format_signed(metric.gain)}){of}"
    )
    apart = len(scored) - len(alike)
    rest = (
        f" {counted(apart, 'other run')} had another first scorer, other prompts or settings: not "
        "compared with it."
        if apart
        else ""
    )
    compared = f"{data.summary['comparisons']:,} same-prompt, same-seed comparisons"
    interval = f"{data.summary['confidence']:.0%} interval {low:.0%} to {high:.0%}"
    if low <= 0.5 <= high:
        return (
            f"{lead}{change}, but it wins {metric.win_rate:.0%} of {compared} ({interval}): "
            f"no clear difference from the base.{rest}"
        )
    verb = "wins" if low > 0.5 else "wins only"
    return f"{lead}{change} and {verb} {metric.win_rate:.0%} of {compared} ({interval}).{rest}"


def warnings(runs: Sequence[Run]) -> list[str]:
    """Names evaluations of earlier weights, and every metric that fell beyond doubt.

    Beyond doubt is an interval of the gain wholly below zero.
    """
    stale = [
        f"{run.name}: scores and images are of {run.stale}, its weights and curves of "
        f"{'later ones' if run.steps is None else f'step {run.steps:,}'}. Evaluate again."
        for run in runs
        if run.stale
    ]
    return stale + [
        f"{run.name}: {name} falls from {format_number(metric.base_mean)} to "
        f"{format_number(metric.aligned_mean)} (interval of the change "
        f"{format_signed(metric.gain_interval[0])} to {format_signed(metric.gain_interval[1])})."
        for run in runs
        if run.evaluation
        for name, metric in run.evaluation.metrics.items()
        if metric.gain_interval and metric.gain_interval[1] < 0
    ]


def minority_words(runs: Sequence[Run]) -> list[str]:
    """Says for each run what its minority table shows or why it shows nothing."""
    words = []
    for run in runs:
        table = run.minority
        if table is None:
            words.append(f"{run.name}: no minority.csv; training has not come to its end.")
        elif not table.metrics:
            words.append(f"{run.name}: no pair was judged.")
        elif not table.flipped.any():
            words.append(
                f"{run.name}: no label was flipped on purpose (data.flip_rate is 0), so there is "
                "nothing to hold the metric against."
            )
        else:
            told = counted(int(table.flipped.sum()), "label", of=len(table.flipped))
            share = f"{told} flipped"
            areas = "; ".join(
                f"{MINORITY_NAMES[annotator]}: AUROC {area:.3f}"
                for annotator, area in table.auroc().items()
            )
            words.append(f"{run.name}: {share}. {areas or 'No annotator saw both kinds of label'}.")
    return words


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the configuration keys in which the runs differ, with each run's value."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    return [
        (key, [_text(each.get(key, "")) for each in flat])
        for key in keys
        if key != "train.output_dir" and len({_text(each.get(key, "")) for each in flat}) > 1
    ]


def format_number(value: float) -> str:
    """Returns four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def format_signed(value: float) -> str:
    """Returns three significant digits with the sign, a true minus included."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def slug(name: str) -> str:
    """Returns a run's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _pictures(runs: Sequence[Run]) -> dict[str, bytes]:
    """All PNGs that lie beside the page, by name."""
    pictures = {"curves.png": curves_figure(runs)} if curve_panels(runs) else {}
    for i, run in enumerate(runs):
        if run.evaluation is not None:
            figure = grid_figure(run.evaluation, run.name, color(i))
            pictures[f"grid-{slug(run.name)}.png"] = figure
        if run.minority and run.minority.metrics:
            figure = minority_figure(run, list(run.minority.metrics))
            pictures[f"minority-{slug(run.name)}.png"] = figure
    roc = roc_figure(runs)
    return pictures | ({} if roc is None else {"roc.png": roc})


def _about(run: Run, index: int) -> dict[str, Any]:
    """What the page's legend and its configuration blocks say about a run."""
    return {"name": run.name, "color": color(index), "config": run.config_text}


def _metric_names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The metrics that are some evaluation's primary one, and all others."""
    evaluations = [run.evaluation for run in runs if run.evaluation]
    primaries = list(dict.fromkeys(data.primary for data in evaluations if data.primary))
    every = dict.fromkeys(metric for data in evaluations for metric in data.metrics)
    return primaries, [metric for metric in every if metric not in primaries]


def _row(run: Run, index: int) -> dict[str, Any]:
    """One line of the headline table."""
    metrics = run.evaluation.metrics if run.evaluation else {}
    rate = run.metrics.get("pairs_per_second")
    areas = run.minority.auroc() if run.minority else {}
    return {
        "name": run.name,
        "color": color(index),
        "objective": run.objective,
        "evaluated": run.evaluation is not None,
        "stale": run.stale,
        "metrics": metrics,
        "bars": {name: _bar(metric) for name, metric in metrics.items()},
        "areas": [(MINORITY_NAMES[annotator], area) for annotator, area in areas.items()],
        "steps": run.steps,
        "rate": None if rate is None or not len(rate) else float(sorted(rate)[len(rate) // 2]),
    }


def _bar(metric: MetricSummary) -> Bar:
    low, high = metric.win_interval
    return Bar(
        rate=100 * metric.win_rate,
        low=100 * low,
        high=100 * high,
        text=f"{metric.win_rate:.1%}",
        interval=f"{100 * low:.0f}\N{EN DASH}{100 * high:.0f} %",
    )


def _notes(runs: Sequence[Run]) -> dict[str, str]:
    """How win rate and intervals are to be read; the same for all evaluations."""
    return next((dict(r.evaluation.summary.get("notes", {})) for r in runs if r.evaluation), {})


def _section(heading: str, content: Any) -> dict[str, Any]:
    """One of the caller's own sections."""
    section: dict[str, Any] = {"heading": heading, "paragraphs": [], "table": None, "image": None}
    if isinstance(content, Path):
        section["image"] = data_url(content.read_bytes())
    elif isinstance(content, str):
        section["paragraphs"] = [part for part in content.split("\n\n") if part.strip()]
    else:
        rows = [dict(row) for row in content]
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_text(row.get(name, "")) for name in names] for row in rows]
        section["table"] = {"names": names, "rows": cells}
    return section


def _text(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
