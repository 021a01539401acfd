"""A study's figures, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpo.report.figures import COLORS, style_axes, to_png
from fastpo.review.known import draw_reliability
from fastpo.study.config import Part, StudyConfig
from fastpo.study.measure import BINS
from fastpo.study.summary import Row, bins, chosen, column, reliability_bins
from fastpo.study.tables import judged

MARKS = ("o", "s", "^")  # with the colors' number, more methods than any study has
LEAST = 5  # pairs of a bin, to draw a share of them


def gain_figure(part: Part, rows: Sequence[Row]) -> bytes | None:
    """Gain in reward over the base, over the share of flipped labels; a line for each method.

    Bars are the 95 % intervals over seeds. None where fewer than two shares are known.
    """
    own = chosen(rows, part=part.name, case="")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    shares_drawn: set[float] = set()
    for number, method in enumerate(part.methods):
        points = []
        for flip_rate in sorted(part.flips):
            gain = column(chosen(own, method=method, flip_rate=str(flip_rate)), "gain")
            if gain is not None:
                points.append((flip_rate, gain.value, gain.half_width or 0.0))
        if points:
            x, y, error = np.array(points).T
            shares_drawn |= set(x)
            axes.errorbar(x, y, error, label=method, capsize=2, linewidth=1.4, **_look(number))
    if len(shares_drawn) < 2:
        return None
    axes.axhline(0.0, color="#9aa1aa", linewidth=0.8)
    axes.set_xlabel("share of labels that are flipped")
    axes.set_ylabel("gain in reward over the base")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)
    style_axes(axes)
    return to_png(figure)


def bins_figure(part: Part, rows: Sequence[Row]) -> bytes | None:
    """Share of wrong labels among the pairs in each tenth of the minority metric.

    A diagram for each share of flipped labels at which some are wrong, a line for each method whose
    runs judge labels. None where there is nothing to draw.
    """
    own = chosen(rows, part=part.name, case="")
    drawn = {
        flip_rate: lines
        for flip_rate in sorted(part.flips)
        if (lines := _bin_lines(part, chosen(own, flip_rate=str(flip_rate))))
    }
    if not drawn:
        return None
    figure = Figure(figsize=(3.4 * len(drawn) + 1.6, 3.2), layout="constrained")
    grid = figure.subplots(1, len(drawn), squeeze=False, sharey=True)
    middles = (np.arange(BINS) + 0.5) / BINS
    for axes, (flip_rate, lines) in zip(grid[0], drawn.items(), strict=True):
        for number, (pairs, wrong) in lines.items():
            share = np.where(pairs >= LEAST, wrong / np.maximum(pairs, 1), np.nan)  # no line there
            label = part.methods[number]
            axes.plot(middles, share, label=label, linewidth=1.4, markersize=4, **_look(number))
        axes.plot([0, 1], [0, 1], color="#9aa1aa", linewidth=0.8, linestyle=":")
        axes.set_title(f"{flip_rate:.0%} flipped", fontsize=9)
        axes.set_xlabel("minority metric")
        style_axes(axes)
    grid[0][0].set_ylabel("share of wrong labels")
    handles = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    handles = {label: line for label, line in handles.items() if label in part.methods}
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=7.5)
    return to_png(figure)


def calibration_figure(study: StudyConfig, rows: Sequence[Row]) -> bytes | None:
    """The reliability curve of each method of `StudyConfig.calibration`: probability, and u alone.

    All seeds and shares of flipped labels together. None where there is nothing to draw.
    """
    found = judged(study, rows)
    if not found:
        return None
    figure = Figure(figsize=(3.6 * len(found), 3.4), layout="constrained")
    for axes, (part, method) in zip(
        figure.subplots(1, len(found), squeeze=False, sharey=True)[0], found, strict=True
    ):
        own = chosen(rows, part=part.name, method=method, case="")
        named = (("calibrated probability", "reliability"), ("u", "reliability_u"))
        draw_reliability(axes, [(name, reliability_bins(own, key)) for name, key in named])
        axes.set_title(method, loc="left", fontsize=9.5)
    return to_png(figure)


def _bin_lines(part: Part, rows: Sequence[Row]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The counts of each method that judged and had something to find, by its number."""
    lines = {}
    for number, method in enumerate(part.methods):
        counts = bins(chosen(rows, method=method))
        if counts is not None and counts[1].sum():
            lines[number] = counts
    return lines


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKS[number // len(COLORS) % len(MARKS)],
    }
