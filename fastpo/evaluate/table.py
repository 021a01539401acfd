"""Numbers of an evaluation of many models: each against the base, on each set, by each metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpo.evaluate.prompt_sets import PromptSet
from fastpo.evaluate.sampling import Sample
from fastpo.evaluate.scorers import Scores
from fastpo.evaluate.win_rate import bootstrap_mean, holm, sign_flip_test

ALL = ""
"""The group of all of a set's prompts."""
NOTES = {
    "gain": "Mean over prompts and seeds of the model's score less the base's.",
    "intervals": (
        "Percentile bootstrap, 10,000 resamples of whole prompts, because images of one prompt "
        "resemble one another. Absent with one prompt."
    ),
    "win_rate": "(wins + ties / 2) / comparisons; a comparison is one prompt and seed.",
    "p": (
        "Two-sided paired permutation test: the signs of whole prompts' gains are exchanged, over "
        "all patterns with up to 13 prompts, else over 10,000 random ones."
    ),
    "p_holm": (
        "The same, adjusted by Holm for the number of models, sets and metrics in this table; "
        "rows of a set's groups are not counted in."
    ),
}

Scored = Mapping[tuple[str, str], Scores]


@dataclass(frozen=True, slots=True)
class Row:
    """One model on one set, or on one group of it, by one metric.

    Attributes:
        set: The prompt set's name.
        group: A style, category or tag of the set; empty for all of it.
        model: The model's name; `base` for the base.
        metric: The metric's name.
        images: Images scored.
        prompts: Prompts they are of.
        mean: Mean score.
        interval: Bootstrap interval of the mean, by prompt.
        gain: Mean gain over the base; None for the base itself, as all that follow.
        gain_interval: Its bootstrap interval, by prompt.
        win_rate: Share of images better than the base's, ties half.
        win_interval: Its bootstrap interval, by prompt.
        p: The permutation test's p-value.
        p_holm: The same, adjusted for the table's number of tests.
    """

    set: str
    group: str
    model: str
    metric: str
    images: int
    prompts: int
    mean: float
    interval: tuple[float, float] | None
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    win_rate: float | None = None
    win_interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The table and what it was made from.

    Attributes:
        rows: All rows: sets, in them groups, models, metrics.
        sets: Prompts and samples of each set.
        scores: `(N,)` per metric of each model and set.
        confidence: Coverage of the intervals.
    """

    rows: tuple[Row, ...]
    sets: Mapping[str, tuple[PromptSet, Sequence[Sample]]]
    scores: Scored
    confidence: float

    @property
    def models(self) -> list[str]:
        """The models' names, the base first."""
        return list(dict.fromkeys(model for model, _ in self.scores))

    @property
    def metrics(self) -> list[str]:
        """The metrics' names, in the scorers' order."""
        return list(next(iter(self.scores.values())))

    def row(self, name: str, model: str, metric: str, group: str = ALL) -> Row:
        """Returns the row of a set, a model and a metric."""
        return next(
            row
            for row in self.rows
            if (row.set, row.group, row.model, row.metric) == (name, group, model, metric)
        )

    def as_json(self) -> dict[str, Any]:
        """Returns rows and notes as plain values."""
        return {
            "models": self.models,
            "confidence": self.confidence,
            "rows": [asdict(row) for row in self.rows],
            "notes": NOTES,
        }


def compare_models(
    sets: Mapping[str, tuple[PromptSet, Sequence[Sample]]],
    scores: Scored,
    *,
    confidence: float = 0.95,
) -> Comparison:
    """Compares every model with the first one.

    Args:
        sets: Prompts and samples of each set, by its name.
        scores: `(N,)` per metric in the samples' order, by model and set; the base first.
        confidence: Coverage of the intervals.
    """
    base = next(model for model, _ in scores)
    rows = []
    for name, (prompts, samples) in sets.items():
        index = np.array([sample.prompt_index for sample in samples])
        for group, chosen in _groups(prompts, index):
            for (model, _), found in ((k, v) for k, v in scores.items() if k[1] == name):
                against = None if model == base else scores[base, name]
                for metric, values in found.items():
                    before = None if against is None else against[metric][chosen]
                    row = _row(values[chosen], before, index[chosen], confidence)
                    rows.append(replace(row, set=name, group=group, model=model, metric=metric))
    return Comparison(tuple(_adjusted(rows)), sets, scores, confidence)


def _groups(prompts: PromptSet, index: NDArray[np.int_]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """All of a set, then each of its groups if there are several."""
    yield ALL, np.ones(len(index), dtype=bool)
    groups = np.array(prompts.groups)[index] if prompts.groups else index[:0]
    names = list(dict.fromkeys(prompts.groups))
    if len(names) > 1:
        for name in names:
            yield name, groups == name


def _row(
    values: NDArray[np.float64],
    before: NDArray[np.float64] | None,
    index: NDArray[np.int_],
    confidence: float,
) -> Row:
    """The numbers of a row, without its names."""
    row = Row(
        *("", "", "", ""),
        images=len(values),
        prompts=len(np.unique(index)),
        mean=float(values.mean()),
        interval=bootstrap_mean(values, index, confidence=confidence),
    )
    if before is None:
        return row
    gain = values - before
    wins = (gain > 0) + 0.5 * (gain == 0)
    return replace(
        row,
        gain=float(gain.mean()),
        gain_interval=bootstrap_mean(gain, index, confidence=confidence),
        win_rate=float(wins.mean()),
        win_interval=bootstrap_mean(wins, index, confidence=confidence),
        p=sign_flip_test(gain, index),
    )


def _adjusted(rows: Sequence[Row]) -> Iterator[Row]:
    """Adds `p_holm` to the rows of whole sets."""
    tested = [row.p for row in rows if row.group == ALL and row.p is not None]
    adjusted = iter(holm(tested))
    for row in rows:
        counts = row.group == ALL and row.p is not None
        yield replace(row, p_holm=next(adjusted)) if counts else row
