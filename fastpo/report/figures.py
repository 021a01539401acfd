"""Figures: training curves, the minority metric's histogram, its ROC.

Drawn with matplotlib's objects, without pyplot's global state; a run has one color everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter
from sklearn.metrics import roc_curve

from fastpo.report.runs import MINORITY_NAMES, Array, Run

# Okabe and Ito's colors, which the color-blind tell apart, without the yellow (too pale on white)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASE_COLOR = "#767676"
KEPT_COLOR, FLIPPED_COLOR = COLORS[0], COLORS[1]
INK = "#33383f"
DPI = 160


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of the training curves.

    Attributes:
        title: What it shows.
        label: Its y axis.
        series: Keys of the metrics; the first is drawn solid, the second dashed.
        level: A value to mark by a thin line, or None.
        smoothed: Whether a moving mean is drawn over the raw values.
        sparse: Few steps have a value; these are marked and joined.
        reference: Draw only runs with (True) or without (False) a reference model; None: all.
        moving: Draw only runs in which the value changes.
    """

    title: str
    label: str
    series: tuple[str, ...]
    level: float | None = None
    smoothed: bool = True
    sparse: bool = False
    reference: bool | None = None
    moving: bool = False

    def column(self, run: Run, key: str) -> Array | None:
        """Returns the run's values of `key` as far as they belong into this panel."""
        values = run.metrics.get(key)
        if values is None or not np.isfinite(values).any():
            return None
        known = values[np.isfinite(values)]
        if self.moving and (known == known[0]).all():
            return None
        return None if self.reference not in (None, run.has_reference) else values


PANELS = (
    Panel("Loss", "loss", ("loss",)),
    Panel("Implicit margin", "margin d", ("rewards/margins",), 0.0, reference=True),
    Panel(
        "Margin where there is no reference",
        "the objective's own margin",
        ("rewards/margins",),
        0.0,
        reference=False,
    ),
    Panel("Implicit accuracy", "share of pairs with d > 0", ("rewards/accuracies",), 0.5),
    Panel(
        "Error against the reference (loser dashed)",
        "policy - reference",
        ("error/winner", "error/loser"),
        0.0,
        reference=True,
    ),
    Panel(
        "Error where there is no reference (loser dashed)",
        "denoising error",
        ("error/winner", "error/loser"),
        reference=False,
    ),
    Panel(
        "Accuracy on held-out pairs",
        "share of pairs with d > 0",
        ("held_out/accuracy",),
        0.5,
        sparse=True,
    ),
    Panel(
        "The same by label (flipped on purpose dashed)",
        "share of pairs with d > 0",
        ("held_out/clean/accuracy", "held_out/flipped/accuracy"),
        0.5,
        sparse=True,
    ),
    Panel("Margin on held-out pairs", "margin d", ("held_out/margin",), 0.0, sparse=True),
    Panel(
        "Held-out error against the reference (loser dashed)",
        "policy - reference",
        ("held_out/against_reference/winner", "held_out/against_reference/loser"),
        0.0,
        sparse=True,
    ),
    Panel(
        "Held-out error (loser dashed)",
        "denoising error",
        ("held_out/error/winner", "held_out/error/loser"),
        sparse=True,
        reference=False,
    ),
    Panel("Gradient norm before clipping", "norm", ("grad_norm",)),
    Panel("Learning rate", "learning rate", ("lr",), smoothed=False),
    Panel(
        "Minority metric, median (90 % dashed)",
        "u",
        ("minority/q50", "minority/q90"),
    ),
    Panel("Mean weight of a pair", "weight", ("weight/mean",)),
    Panel("Saturated pairs (logit beyond 4)", "share", ("rewards/saturated",)),
    Panel("Slope, where it moves", "beta", ("slope",), smoothed=False, moving=True),
    Panel("Pairs with a backward pass", "share", ("backward/share",)),
    Panel(
        "Equally strong pairs in a step's gradient",
        "effective pairs",
        ("backward/effective",),
    ),
    Panel("Passes through the policy (forward 1, backward 2)", "a pair", ("backward/cost",)),
)


def color(index: int) -> str:
    """Returns the color of the page's run number `index`."""
    return COLORS[index % len(COLORS)]


def curve_panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels for which any run has numbers."""
    return [
        p for p in PANELS if any(p.column(run, key) is not None for run in runs for key in p.series)
    ]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Draws one panel: every run's raw values faintly, their moving mean boldly."""
    if panel.level is not None:
        axes.axhline(panel.level, color="#b6bbc2", linewidth=0.8)
    for i, run in enumerate(runs):
        for key, dash in zip(panel.series, ("-", (0, (4, 2))), strict=False):
            values = panel.column(run, key)
            if values is None:
                continue
            steps = run.metrics.get("step", np.arange(1.0, len(values) + 1))
            if panel.sparse:
                known = np.isfinite(values)
                steps, values = steps[known], values[known]
            mean = smooth(values) if panel.smoothed and not panel.sparse else values
            if len(panel.series) == 1 and mean is not values:
                axes.plot(steps, values, color=color(i), alpha=0.2, linewidth=0.7)
            label = run.name if key == panel.series[0] else None
            line = {"color": color(i), "linestyle": dash, "linewidth": 1.6, "label": label}
            axes.plot(steps, mean, marker="o" if panel.sparse else None, markersize=3, **line)
    axes.set_title(panel.title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.label)
    style_axes(axes)


def panel_figure(panel: Panel, runs: Sequence[Run]) -> bytes:
    """Returns one panel as a PNG."""
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    draw_panel(figure.subplots(), panel, runs)
    return to_png(figure)


def curves_figure(runs: Sequence[Run]) -> bytes:
    """Returns all panels with a legend as one PNG."""
    panels = curve_panels(runs)
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(9.6, 2.7 * rows + 0.4), layout="constrained")
    every = figure.subplots(rows, 2, squeeze=False).ravel().tolist()
    for panel, axes in zip(panels, every, strict=False):
        draw_panel(axes, panel, runs)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    handles = {
        label: handle
        for axes in every
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper left", ncols=4, frameon=False
        )
    return to_png(figure)


def smooth(values: Array, parts: int = 25) -> Array:
    """Returns the centered mean over a `parts`-th of the steps; short or broken rows unchanged."""
    width = len(values) // parts
    if width < 2:
        return values
    width += 1 - width % 2
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def minority_figure(run: Run, annotators: Sequence[str]) -> bytes:
    """Returns histograms of the run's minority metric side by side, one per annotator."""
    figure = Figure(figsize=(4.6 * len(annotators), 2.9), layout="constrained")
    every = figure.subplots(1, len(annotators), squeeze=False).ravel().tolist()
    for axes, annotator in zip(every, annotators, strict=True):
        _draw_minority(axes, run, annotator)
    return to_png(figure)


def _draw_minority(axes: Axes, run: Run, annotator: str) -> None:
    """Draws one histogram, kept and flipped labels apart."""
    assert run.minority is not None
    flipped, metric = run.minority.judged(annotator)
    bins = np.linspace(0.0, 1.0, 41).tolist()
    parts = (
        (metric[~flipped], KEPT_COLOR, "label kept"),
        (metric[flipped], FLIPPED_COLOR, "label flipped"),
    )
    for values, shade, name in parts:
        if len(values):
            label = f"{name} ({len(values):,})"
            axes.hist(values, bins=bins, color=shade, alpha=0.35, label=label)
            axes.hist(values, bins=bins, color=shade, histtype="step", linewidth=1.3)
    axes.set_yscale("log")  # flipped labels are few: on a linear scale they would hardly show
    axes.set(xlim=(0.0, 1.0))
    axes.set_ylim(bottom=0.7)
    # Plain numbers: the default's powers of ten are formulas, which names may not become.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    title = fill(f"{run.name}: {MINORITY_NAMES[annotator]}", 50)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("minority metric u")
    axes.set_ylabel("pairs (log scale)")
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)


def roc_figure(runs: Sequence[Run]) -> bytes | None:
    """Returns the ROC of every run's minority metrics; None where no run has flipped labels."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#b6bbc2", linewidth=0.8)
    found = False
    for i, run in enumerate(runs):
        for annotator, area in (run.minority.auroc() if run.minority else {}).items():
            assert run.minority is not None
            wrong, right, _ = roc_curve(*run.minority.judged(annotator))
            label = f"{run.name}, {MINORITY_NAMES[annotator]}: {area:.3f}"
            dash = "-" if annotator == "ledger" else (0, (4, 2))
            axes.plot(wrong, right, color=color(i), linestyle=dash, linewidth=1.7, label=label)
            found = True
    if not found:
        return None
    axes.set_xlabel("kept labels taken for flipped")
    axes.set_ylabel("flipped labels found")
    axes.set_aspect("equal")
    axes.legend(title="AUROC", frameon=False, fontsize=8, loc="lower right", alignment="left")
    style_axes(axes)
    return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG that is the same each time; a `$` in a text is no formula."""
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def style_axes(axes: Axes) -> None:
    """Gives a diagram the look of all others."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1aa")
    axes.tick_params(colors="#5b626b", labelsize=8)
    axes.xaxis.label.set(color="#5b626b", fontsize=8.5)
    axes.yaxis.label.set(color="#5b626b", fontsize=8.5)
    axes.grid(True, color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
