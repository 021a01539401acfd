"""How well a metric finds labels that are known to be wrong, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastpo.evaluate.win_rate import wilson_interval
from fastpo.report.figures import FLIPPED_COLOR, KEPT_COLOR, style_axes, to_png
from fastpo.review.calibration import Array, ReliabilityBin

RESAMPLES = 200
THRESHOLDS = (0.5, 0.7, 0.9, 0.98)
GRID = np.linspace(0.0, 1.0, 201)
Interval = tuple[float, float]
Drawn = tuple[Array, NDArray[np.bool_]]


@dataclass(frozen=True)
class Found:
    """Pairs from a threshold on, held against the wrong labels.

    Attributes:
        threshold: The probability.
        pairs: How many have it or more.
        precision: The share of them that is wrong, with its interval; None of no pair.
        recall: The share of the wrong labels that is among them, with its interval.
    """

    threshold: float
    pairs: int
    precision: tuple[float, Interval] | None
    recall: tuple[float, Interval]


def at_thresholds(probability: Array, wrong: NDArray[np.bool_]) -> list[Found]:
    """Returns precision and recall at `THRESHOLDS`, with Wilson's 95 % intervals."""
    rows = []
    for threshold in THRESHOLDS:
        taken = probability >= threshold
        hits, pairs, all_wrong = int((taken & wrong).sum()), int(taken.sum()), int(wrong.sum())
        precision = (hits / pairs, wilson_interval(hits / pairs, pairs)) if pairs else None
        recall = hits / all_wrong
        rows.append(
            Found(threshold, pairs, precision, (recall, wilson_interval(recall, all_wrong)))
        )
    return rows


@dataclass(frozen=True)
class Curves:
    """ROC and precision over recall, each `(201,)` over an even grid, with 95 % bands.

    Attributes:
        hits: Share of the wrong labels found, by the share of right ones taken for wrong.
        hits_band: `(2, 201)` its bootstrap band over pairs.
        precision: By the share of the wrong labels found.
        precision_band: Its band.
        auroc: Area under the first, with its interval.
        average_precision: Area under the second (the step function), with its interval.
    """

    hits: Array
    hits_band: Array
    precision: Array
    precision_band: Array
    auroc: tuple[float, Interval]
    average_precision: tuple[float, Interval]


def curves(metric: Array, wrong: NDArray[np.bool_], *, seed: int = 0) -> Curves:
    """Draws both curves of a metric, and resamples pairs for their intervals.

    Raises:
        ValueError: All labels are right, or all are wrong.
    """
    if wrong.all() or not wrong.any():
        raise ValueError("curves need right and wrong labels, got one kind")
    rng = np.random.default_rng(seed)
    drawn: list[Drawn] = [(metric, wrong)]
    while len(drawn) <= RESAMPLES:
        rows = rng.integers(0, len(metric), len(metric))
        if wrong[rows].any() and not wrong[rows].all():
            drawn.append((metric[rows], wrong[rows]))
    hits, precision = (
        np.stack([curve(*one) for one in drawn]) for curve in (_roc, _precision_by_recall)
    )
    return Curves(
        hits=hits[0],
        hits_band=np.quantile(hits[1:], (0.025, 0.975), axis=0),
        precision=precision[0],
        precision_band=np.quantile(precision[1:], (0.025, 0.975), axis=0),
        auroc=_with_interval(_area, drawn),
        average_precision=_with_interval(_mean_precision, drawn),
    )


def _area(metric: Array, wrong: NDArray[np.bool_]) -> float:
    """The area under the ROC: the chance that a wrong label's metric is the larger, ties half."""
    hits, misses = (np.concatenate([[0.0], one]) for one in _counts(metric, wrong))
    return float(np.trapezoid(hits / hits[-1], misses / misses[-1]))


def _mean_precision(metric: Array, wrong: NDArray[np.bool_]) -> float:
    """The area under the steps of precision over recall."""
    hits, misses = _counts(metric, wrong)
    return float((np.diff(hits, prepend=0.0) / hits[-1] * hits / (hits + misses)).sum())


def _with_interval(score: Callable[..., float], drawn: list[Drawn]) -> tuple[float, Interval]:
    """The score of all pairs, which are drawn first, and the interval of the resamples'."""
    found = [score(*one) for one in drawn]
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return found[0], (float(low), float(high))


def _counts(metric: Array, wrong: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Wrong and right labels from each distinct value of the metric on, largest value first."""
    order = np.argsort(-metric, kind="stable")
    last = np.append(np.flatnonzero(np.diff(metric[order])), len(metric) - 1)
    hits = np.cumsum(wrong[order])[last].astype(float)
    return hits, last + 1.0 - hits


def _roc(metric: Array, wrong: NDArray[np.bool_]) -> Array:
    hits, misses = _counts(metric, wrong)
    x = np.concatenate([[0.0], misses / misses[-1]])
    return np.interp(GRID, x, np.concatenate([[0.0], hits / hits[-1]]))


def _precision_by_recall(metric: Array, wrong: NDArray[np.bool_]) -> Array:
    """The best precision at a recall of at least each grid point."""
    hits, misses = _counts(metric, wrong)
    best = np.maximum.accumulate((hits / (hits + misses))[::-1])[::-1]
    return best[np.searchsorted(hits / hits[-1], GRID - 1e-12).clip(max=len(best) - 1)]


def roc_figure(found: Curves) -> bytes:
    """Returns the ROC with its band, as a PNG."""
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#b6bbc2", linewidth=0.8)
    _draw_band(axes, found.hits, found.hits_band)
    _name(axes, "ROC: area", found.auroc)
    axes.set(xlabel="right labels taken for wrong", ylabel="wrong labels found")
    return to_png(figure)


def precision_figure(found: Curves) -> bytes:
    """Returns precision over recall with its band, as a PNG."""
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.subplots()
    _draw_band(axes, found.precision, found.precision_band)
    _name(axes, "Precision: mean", found.average_precision)
    axes.set(xlabel="wrong labels found", ylabel="share of those taken that is wrong")
    return to_png(figure)


def _name(axes: Axes, name: str, score: tuple[float, Interval]) -> None:
    value, (low, high) = score
    axes.set_title(f"{name} {value:.4f} ({low:.4f} to {high:.4f})", loc="left", fontsize=9.5)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    style_axes(axes)


def _draw_band(axes: Axes, line: Array, band: Array) -> None:
    axes.fill_between(GRID, band[0], band[1], color=KEPT_COLOR, alpha=0.2, linewidth=0)
    axes.plot(GRID, line, color=KEPT_COLOR, linewidth=1.7)


def reliability_figure(parts: list[tuple[str, list[ReliabilityBin]]]) -> bytes:
    """Returns what is found over what is expected, a line for each named metric, as a PNG."""
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_reliability(axes, parts)
    axes.set_title("Reliability: of pairs near 0.9 nine in ten", loc="left", fontsize=9.5)
    return to_png(figure)


def draw_reliability(axes: Axes, parts: list[tuple[str, list[ReliabilityBin]]]) -> None:
    """Draws a line for each named metric, with 95 % intervals, and the diagonal."""
    axes.plot([0, 1], [0, 1], color="#b6bbc2", linewidth=0.8)
    for (name, bins), shade in zip(parts, (KEPT_COLOR, FLIPPED_COLOR), strict=False):
        x, y = [b.expected for b in bins], [b.found for b in bins]
        off = [[b.found - b.interval[0] for b in bins], [b.interval[1] - b.found for b in bins]]
        axes.errorbar(x, y, yerr=np.abs(off), color=shade, marker="o", markersize=4, label=name)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set(xlabel="probability", ylabel="share that is wrong", xlim=(-0.02, 1.02))
    style_axes(axes)


def probability_figure(probability: Array, wrong: NDArray[np.bool_] | None) -> bytes:
    """Returns the histogram of the probabilities, wrong labels apart where they are known."""
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.subplots()
    groups = [("all pairs", probability, KEPT_COLOR)]
    if wrong is not None:
        groups = [
            ("label kept", probability[~wrong], KEPT_COLOR),
            ("label flipped", probability[wrong], FLIPPED_COLOR),
        ]
    bins = np.linspace(0.0, 1.0, 41).tolist()
    for name, values, shade in groups:
        axes.hist(values, bins=bins, color=shade, alpha=0.5, label=f"{name} ({len(values):,})")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set(xlabel="probability that the label is wrong", ylabel="pairs (log scale)")
    axes.set_yticks([0, 1, 10, 100, 1000, 10000][: 2 + len(str(len(probability)))])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Probabilities", loc="left", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    return to_png(figure)
