"""What a finished run of a study says: the numbers of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from fastpo.config import Config, EmaAnnotators
from fastpo.evaluate import Evaluation
from fastpo.review.calibration import FEWEST, ReliabilityBin, reliability
from fastpo.review.evidence import MINORITY, load_verdicts, read_minority

BINS = 10  # of the minority metric, equally wide
ANNOTATORS = ("ledger", "ema")


def minority_columns(
    run: Path,
) -> tuple[list[str], NDArray[np.bool_], dict[str, NDArray[np.float64]]]:
    """Reads `minority.csv`.

    Returns:
        Pair ids, `(N,)` whether the label is flipped, and by annotator `(N,)` the minority metric,
        NaN where there is none.
    """
    table = read_minority(run / MINORITY)
    ledger = np.where(table["visits"] > 0, table["ledger_minority"], np.nan)
    metrics = {"ledger": ledger, "ema": table["metric_minority"]}
    return table["pair_id"], table["flipped"] > 0, metrics


def area(wrong: NDArray[np.bool_], metric: NDArray[np.float64]) -> float:
    """AUROC over all pairs; one without a metric counts as unsuspicious."""
    return float(roc_auc_score(wrong, np.nan_to_num(metric, nan=0.0)))


def verdict_row(run: Path, config: Config, looked_for: frozenset[str]) -> dict[str, Any]:
    """How well a run's metric tells the pairs that are wrong, or of a minority.

    Args:
        run: The run that judged.
        config: Its configuration: moving averages judge where it has some, else the ledger, which
            in a run without annotators only looks on.
        looked_for: Ids of pairs to be found beside those that the run flipped.

    Returns:
        `pairs`; `wrong`, their share; `auroc`; `right`, the share of pairs on the right side of
        u = 1/2; and `bin_pairs`, `bin_wrong`: how many pairs, and how many of those looked for,
        have a metric in each tenth of [0, 1]. Without a metric the last four are empty. Of a run
        whose ledger has votes enough also what `calibration_row` says.
    """
    names, flipped, metrics = minority_columns(run)
    wrong = flipped | np.isin(names, list(looked_for))
    judged = isinstance(config.train.annotators, EmaAnnotators)
    metric = metrics["ema" if judged else "ledger"]
    row: dict[str, Any] = {"pairs": len(names), "wrong": float(wrong.mean())}
    if not np.isfinite(metric).any():
        return {**row, "auroc": "", "right": "", "bin_pairs": "", "bin_wrong": ""}
    place = np.clip((np.nan_to_num(metric) * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS), np.bincount(place[wrong], minlength=BINS)
    return {
        **row,
        "auroc": area(wrong, metric) if 0 < wrong.sum() < len(wrong) else "",
        "right": float(((metric >= 0.5) == wrong).mean()),
        "bin_pairs": " ".join(map(str, counts[0])),
        "bin_wrong": " ".join(map(str, counts[1])),
        **calibration_row(run, looked_for),
    }


def calibration_row(run: Path, looked_for: frozenset[str]) -> dict[str, Any]:
    """Whether a run's probabilities of a wrong label are true ones (`fastpo.review.calibration`).

    Args:
        run: The run that judged.
        looked_for: As in `verdict_row`.

    Returns:
        `learned_wrong`, the share of wrong labels that the calibration learned, empty where it
        could not; and `reliability`, `reliability_u`: of the probability and of the ledger's own
        metric u, as `reliability_text` writes it. Nothing where the ledger judged too few pairs.
    """
    verdicts = load_verdicts(run)
    wrong = verdicts.flipped | np.isin(verdicts.pair_ids, list(looked_for))
    seen, found = verdicts.judged, verdicts.calibration
    if seen.sum() < FEWEST:
        return {}
    return {
        "learned_wrong": "" if found is None else found.share,
        "reliability": reliability_text(reliability(verdicts.probability[seen], wrong[seen])),
        "reliability_u": reliability_text(reliability(verdicts.minority[seen], wrong[seen])),
    }


def reliability_text(bins: Sequence[ReliabilityBin]) -> str:
    """A word for each bin with a pair: pairs, wrong ones among them, and their mean expectation."""
    return " ".join(f"{b.pairs}:{round(b.found * b.pairs)}:{b.expected!r}" for b in bins)


def score_row(evaluation: Evaluation, columns: Mapping[str, str]) -> dict[str, Any]:
    """Each column's mean and the base's, and of the reward gain and win rate against the base."""
    row: dict[str, Any] = {}
    for column, metric in columns.items():
        found = evaluation.metrics[metric]
        row |= {column: found.aligned_mean, f"base_{column}": found.base_mean}
    reward = evaluation.metrics[columns["reward"]]
    return {**row, "gain": reward.gain, "win_base": reward.win_rate}


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """The share of images that score higher than the other run's of the same prompt and seed.

    A tie counts one half.
    """
    gains = np.subtract(ours, theirs)
    return float((gains > 0).mean() + (gains == 0).mean() / 2.0)
