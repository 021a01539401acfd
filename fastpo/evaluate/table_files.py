"""The files of an evaluation of many models: JSON, CSV, and a page to look at."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastpo._version import __version__
from fastpo.evaluate.folders import SCORES, TABLE_CSV, TABLE_JSON, TABLE_PAGE
from fastpo.evaluate.published import PublishedScore, beside
from fastpo.evaluate.table import ALL, NOTES, Comparison, Row
from fastpo.system.files import write_json, write_text

TEMPLATE = "table.html"
SHOWN_PROMPTS = 8
"""Of each set, whose images the page shows."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A cell of the page.

    Attributes:
        mean: The mean score.
        interval: Its interval.
        gain: Gain with its interval; empty for the base.
        wins: Win rate with its interval and adjusted p-value; empty for the base.
        best: Whether it is the highest mean of its column.
    """

    mean: str
    interval: str
    gain: str
    wins: str
    best: bool


def write_table(out: Path, comparison: Comparison, about: Mapping[str, Any]) -> None:
    """Writes all files of a table.

    Args:
        out: The folder.
        comparison: The table.
        about: `family`, `settings`, `scorers`, `models` and `fingerprints` of the evaluation.
    """
    near = beside(about["family"], list(comparison.sets), comparison.metrics)
    published = [asdict(score) for score in near]
    write_json(out / TABLE_JSON, {**about, **comparison.as_json(), "published": published})
    write_text(out / TABLE_CSV, rows_csv(comparison.rows))
    write_text(out / SCORES, scores_csv(comparison))
    write_text(out / TABLE_PAGE, page(comparison, about, near))


def rows_csv(rows: Sequence[Row]) -> str:
    """Returns the table's rows; an interval is two columns, what is absent is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Row)]
    intervals = [name.endswith("interval") for name in names]
    writer.writerow(
        column
        for name, double in zip(names, intervals, strict=True)
        for column in ((f"{name}_low", f"{name}_high") if double else (name,))
    )
    for row in rows:
        writer.writerow(
            _plain(part)
            for value, double in zip(astuple(row), intervals, strict=True)
            for part in ((value or (None, None)) if double else (value,))
        )
    return text.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value


def scores_csv(comparison: Comparison) -> str:
    """Returns a row an image, with all its scores."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["set", "group", "model", "prompt_index", "seed", "prompt", *comparison.metrics]
    )
    for (model, name), scores in comparison.scores.items():
        prompts, samples = comparison.sets[name]
        for i, s in enumerate(samples):
            group = prompts.groups[s.prompt_index] if prompts.groups else ""
            values = (repr(float(scores[metric][i])) for metric in comparison.metrics)
            writer.writerow([name, group, model, s.prompt_index, s.seed, s.prompt, *values])
    return text.getvalue()


def page(
    comparison: Comparison, about: Mapping[str, Any], published: Sequence[PublishedScore]
) -> str:
    """Returns the page, which shows the images that lie beside it."""
    from jinja2 import Environment, StrictUndefined

    sections = [
        {
            "name": name,
            "prompts": len(prompts.prompts),
            "images": len(samples),
            "groups": [
                {"name": group, "models": _models(comparison, name, group)}
                for group in dict.fromkeys(row.group for row in comparison.rows if row.set == name)
            ],
            "pictures": _pictures(comparison, name),
        }
        for name, (prompts, samples) in comparison.sets.items()
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = files("fastpo.evaluate").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        sections=sections,
        metrics=comparison.metrics,
        models=comparison.models,
        confidence=f"{comparison.confidence:.0%}",
        published=_by_source(published, comparison.metrics),
        settings=about["settings"],
        scorers=about["scorers"],
        notes=NOTES,
        version=__version__,
    )


def _models(comparison: Comparison, name: str, group: str) -> dict[str, list[Shown]]:
    """The cells of a set's group, by model, in the metrics' order."""
    rows = {
        (row.model, row.metric): row
        for row in comparison.rows
        if (row.set, row.group) == (name, group)
    }
    best = {
        metric: max(rows[model, metric].mean for model in comparison.models)
        for metric in comparison.metrics
    }
    return {
        model: [
            _shown(rows[model, metric], best=rows[model, metric].mean == best[metric])
            for metric in comparison.metrics
        ]
        for model in comparison.models
    }


def _shown(row: Row, *, best: bool) -> Shown:
    gain = wins = ""
    if row.gain is not None and row.win_rate is not None:
        gain = f"{row.gain:+.4g} {_interval(row.gain_interval, '+.3g')}"
        p = row.p if row.p_holm is None else row.p_holm
        sure = "" if p is None else f", p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
        wins = f"{row.win_rate:.1%} {_interval(row.win_interval, '.1%')}{sure}"
    return Shown(f"{row.mean:.4g}", _interval(row.interval, ".4g"), gain, wins, best)


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _pictures(comparison: Comparison, name: str) -> list[dict[str, Any]]:
    """Images of the first prompts of a set, one seed each."""
    first = {}
    for sample in comparison.sets[name][1]:
        first.setdefault(sample.prompt_index, sample)
    return [
        {
            "prompt": sample.prompt,
            "seed": sample.seed,
            "files": [f"images/{model}/{name}/{sample.file}" for model in comparison.models],
        }
        for sample in list(first.values())[:SHOWN_PROMPTS]
    ]


def _by_source(published: Sequence[PublishedScore], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The published numbers as one table a source, with a row a set and model."""
    tables: dict[str, dict[str, Any]] = {}
    for score in published:
        table = tables.setdefault(
            score.source, {"source": score.source, "caveat": score.caveat, "rows": {}}
        )
        table["rows"].setdefault((score.set or "not stated", score.model), {})[score.metric] = (
            f"{score.value:g}"
        )
    return [
        {
            **table,
            "rows": [
                [*place, *(values.get(metric, "") for metric in metrics)]
                for place, values in table["rows"].items()
            ],
        }
        for table in tables.values()
    ]


def show(comparison: Comparison, console: Console) -> None:
    """Prints the sets' tables: mean, and below it win rate and adjusted p-value."""
    for name in comparison.sets:
        table = Table("model", *comparison.metrics, title=name, title_justify="left")
        for model, cells in _models(comparison, name, ALL).items():
            lines = (f"{cell.mean}\n{cell.wins}".strip() for cell in cells)
            table.add_row(model, *(line.replace("[", r"\[") for line in lines))
        console.print(table)
