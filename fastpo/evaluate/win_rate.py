"""Base against aligned model, image by image: gain and win rate with their intervals.

Both models sampled the same prompts from the same seeds, so every comparison is of two images that
differ by the alignment alone. With wins `w`, ties `t` and `n` comparisons the win rate is
`(w + t/2) / n`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
NOTES = {
    "win_rate": "(wins + ties / 2) / comparisons; a comparison is one prompt and seed.",
    "win_interval": (
        "Wilson's score interval with a tie counted as half a win and half a loss. Ties vary less "
        "than the binomial it assumes, so with many of them it is too wide rather than too narrow. "
        "It takes the comparisons as independent; images of one prompt are not quite, and "
        "gain_interval is the one that allows for it."
    ),
    "gain_interval": (
        f"Percentile bootstrap of the mean gain, {RESAMPLES} resamples of whole prompts: images of "
        "one prompt resemble one another, so the prompts are what was drawn independently, and "
        "resampling single images would make the interval too narrow. Absent with one prompt."
    ),
}


@dataclass(frozen=True, slots=True)
class MetricSummary:
    """One metric's outcome over all images.

    Attributes:
        base_mean: Mean score of the base model's images.
        aligned_mean: Mean score of the aligned model's images.
        gain: `aligned_mean - base_mean`.
        gain_interval: Bootstrap interval of `gain`, resampled by prompt; None with one prompt.
        win_rate: `(wins + ties / 2) / comparisons`.
        win_interval: Wilson's interval of `win_rate`.
        wins: Images that score higher than the base's for the same prompt and seed.
        ties: Images that score the same.
        losses: Images that score lower.
    """

    base_mean: float
    aligned_mean: float
    gain: float
    gain_interval: tuple[float, float] | None
    win_rate: float
    win_interval: tuple[float, float]
    wins: int
    ties: int
    losses: int

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MetricSummary:
        """Reads what `dataclasses.asdict` and JSON made of one."""
        pairs: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**pairs)


def compare_scores(
    base: ArrayLike, aligned: ArrayLike, prompt: ArrayLike, *, confidence: float = 0.95
) -> MetricSummary:
    """Compares two models' scores.

    Args:
        base: `(N,)` scores of the base's images.
        aligned: `(N,)` scores of the aligned model's, for the same prompts and seeds in order.
        prompt: `(N,)` any labels; equal ones mark images of one prompt.
        confidence: Coverage of both intervals.

    Raises:
        ValueError: The lengths differ, or there is nothing to compare.
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    groups = np.asarray(prompt)
    if not before.shape == after.shape == groups.shape or before.ndim != 1 or not before.size:
        raise ValueError(
            "base, aligned and prompt must be vectors of one length, at least 1, got "
            f"{before.shape}, {after.shape} and {groups.shape}"
        )
    gain = after - before
    wins, ties = int((gain > 0).sum()), int((gain == 0).sum())
    rate = (wins + ties / 2) / len(gain)
    return MetricSummary(
        base_mean=float(before.mean()),
        aligned_mean=float(after.mean()),
        gain=float(gain.mean()),
        gain_interval=bootstrap_mean(gain, groups, confidence=confidence),
        win_rate=rate,
        win_interval=wilson_interval(rate, len(gain), confidence=confidence),
        wins=wins,
        ties=ties,
        losses=len(gain) - wins - ties,
    )


def wilson_interval(rate: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    With z the normal quantile, the center is `(p + z²/2n) / (1 + z²/n)` and the half-width
    `z / (1 + z²/n) · sqrt(p(1-p)/n + z²/4n²)`.

    Args:
        rate: The observed proportion p in [0, 1].
        n: Number of observations, positive.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> [round(x, 4) for x in wilson_interval(0.5, 100)]
        [0.4038, 0.5962]
    """
    if not (0.0 <= rate <= 1.0 and n > 0 and 0.0 < confidence < 1.0):
        raise ValueError(
            f"rate in [0, 1], n > 0 and confidence in (0, 1) are needed, "
            f"got {rate}, {n} and {confidence}"
        )
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    shrink = 1.0 + z * z / n
    center = (rate + z * z / (2.0 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1.0 - rate) / n + z * z / (4.0 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_mean(
    values: NDArray[np.float64], groups: NDArray[Any], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Returns the percentile interval of the mean when whole groups are drawn with replacement.

    Args:
        values: `(N,)` observations.
        groups: `(N,)` labels; equal ones are drawn together.
        confidence: Coverage in (0, 1).
        seed: Seed of the resampling; the same seed gives the same interval.

    Returns:
        The interval, or None with a single group, which says nothing about other ones.
    """
    _, member = np.unique(groups, return_inverse=True)
    sizes = np.bincount(member)
    if len(sizes) < 2:
        return None
    sums = np.bincount(member, weights=values)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, RESAMPLES, 500):  # in slices: thousands of prompts would fill the memory
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1.0 / len(sizes)), size=500)
        means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip_test(
    values: NDArray[np.float64], groups: NDArray[Any], *, seed: int = 0
) -> float | None:
    """Returns the two-sided p-value of a paired permutation test of whole groups.

    If the two models were alike, each prompt's sum of gains could as well have the other sign. The
    p-value is the share of sign patterns whose mean gain is at least as large as the one observed,
    that one included: over all patterns with up to 13 groups, else over random ones.

    Args:
        values: `(N,)` gains.
        groups: `(N,)` labels; equal ones change sign together.
        seed: Seed of the patterns; the same seed gives the same value.

    Returns:
        The p-value, or None with a single group.
    """
    _, member = np.unique(groups, return_inverse=True)
    sums = np.bincount(member, weights=values)
    if len(sums) < 2:
        return None
    seen = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # sums of other orders round otherwise
    if len(sums) <= 13:
        patterns = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((1 - 2 * patterns) @ sums) >= seen).mean())
    rng, reached = np.random.default_rng(seed), 1
    for _ in range(0, RESAMPLES, 500):
        signs = 1 - 2 * rng.integers(0, 2, (500, len(sums)), dtype=np.int8)
        reached += int((np.abs(signs @ sums) >= seen).sum())
    return reached / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number (S. Holm, Scand. J. Statist. 6, 1979).

    Args:
        p_values: In any order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
