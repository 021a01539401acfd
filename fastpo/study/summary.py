"""From rows to means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from fastpo.evaluate.win_rate import wilson_interval
from fastpo.review.calibration import EDGES, ReliabilityBin

Row = Mapping[str, str]
CONFIDENCE = 0.95
ENOUGH = 3  # seeds for an interval


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: The mean.
        half_width: Of its 95 % interval, by Student's t over the seeds; None with fewer than three,
            of which the interval would be wider than anything that can be read from them.
        seeds: How many there are.
        lowest: Of the seeds.
        highest: Of the seeds.
    """

    value: float
    half_width: float | None
    seeds: int
    lowest: float
    highest: float

    def text(self, style: str) -> str:
        """The mean in a style such as `.3f` or `.0%`, with its interval or both seeds' values."""
        if self.half_width is not None:
            return f"{self.value:{style}} ± {self.half_width:{style}}"
        if self.seeds == 2:
            return f"{self.value:{style}} ({self.lowest:{style}} to {self.highest:{style}})"
        return f"{self.value:{style}}"


def mean_of(values: Iterable[float]) -> Mean | None:
    """Returns the mean of a number for each seed; None without any."""
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        return None
    half = None
    if len(found) >= ENOUGH:
        quantile = float(student.ppf((1.0 + CONFIDENCE) / 2.0, len(found) - 1))
        half = quantile * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Mean(float(found.mean()), half, len(found), float(found.min()), float(found.max()))


def column(rows: Iterable[Row], name: str) -> Mean | None:
    """The mean of a column over rows, those left out that have nothing there."""
    return mean_of(float(row[name]) for row in rows if row.get(name))


def chosen(rows: Iterable[Row], **labels: str) -> list[Row]:
    """Rows with these labels."""
    return [row for row in rows if all(row[k] == v for k, v in labels.items())]


def kept(rows: Sequence[Row], part: Sequence[Row]) -> Mean | None:
    """The share of plain DPO's gain on clean labels that is kept, seed by seed.

    Args:
        rows: Of one method.
        part: All rows of its part; without plain DPO on labels of which none is wrong, or a
            minority's, there is nothing to compare with.
    """
    clean = {
        row["seed"]: float(row["gain"])
        for row in chosen(part, method="dpo", case="")
        if float(row["flip_rate"]) == 0.0 and float(row["wrong"]) == 0.0
    }
    shares = [
        float(row["gain"]) / clean[row["seed"]] for row in rows if clean.get(row["seed"], 0.0) > 0.0
    ]
    return mean_of(shares)


def cost(rows: Sequence[Row], part: Sequence[Row]) -> float | None:
    """Passes through the denoiser, as a multiple of plain DPO's in the same part and case."""
    case = rows[0]["case"]
    plain = column(chosen(part, method="dpo", case=case), "passes")
    own = column(rows, "passes")
    return None if plain is None or own is None or not plain.value else own.value / plain.value


def bins(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray] | None:
    """Sums over seeds: pairs, and wrong ones among them, in each tenth of the minority metric."""
    with_bins = [row for row in rows if row["bin_pairs"]]
    if not with_bins:
        return None
    pairs, wrong = (
        np.sum([[int(n) for n in row[name].split()] for row in with_bins], axis=0)
        for name in ("bin_pairs", "bin_wrong")
    )
    return pairs, wrong


def reliability_bins(rows: Iterable[Row], name: str) -> list[ReliabilityBin]:
    """The bins of a reliability curve over the pairs of several runs together.

    Args:
        rows: The runs; those without the column are left out.
        name: `reliability` of the calibrated probability, `reliability_u` of the ledger's metric.
    """
    counts = np.zeros((len(EDGES) - 1, 3))  # pairs, wrong ones, sum of their expectations
    for row in rows:
        for word in row.get(name, "").split():
            pairs, wrong, expected = map(float, word.split(":"))
            number = int(np.digitize(expected, EDGES[1:-1]))
            counts[number] += pairs, wrong, pairs * expected
    bins_ = []
    for pairs, wrong, sums in counts[counts[:, 0] > 0]:
        found = float(wrong / pairs)
        interval = wilson_interval(found, int(pairs))
        bins_.append(ReliabilityBin(float(sums / pairs), found, interval, int(pairs)))
    return bins_
