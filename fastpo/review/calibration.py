"""From the sum of a pair's votes to the probability that its label is wrong.

The ledger's own metric u takes right and wrong labels to be as likely before, and knows votes only
weakened by the wrong labels among them; so it errs on the cautious side. Here the sums T of all
pairs, over their visits n, are told apart into two normal distributions of one spread:

    right:  T ~ N(+a n, s^2 n),  share 1 - f           wrong:  T ~ N(-b n, s^2 n),  share f

by the EM algorithm, which finds f, a, b and s without knowing any label. The probability of a pair
is its share of the second, `1 / (1 + exp(...))` of an expression linear in T. With b at least a / 2
(a model that learns some wrong labels by heart pulls their sums towards zero, never that far) clean
labels give f = 0 instead of a cut through the middle of the right ones.

Where votes are weak, or the model learns wrong labels by heart, as plain DPO does when many are
wrong, the heaps run into each other, and nearly any share fits the sums as well as any other. Then
nothing is learned, and u, which assumes no share, is all there is. Learned is what has

* heaps at least twice the spread apart (of equal sizes, nearer ones have one peak together), and
* either right labels' votes so strong that wrong ones would stand apart (1.5 a at least twice the
  spread: also where none are wrong), or sums to which two heaps fit better than one by what the
  Bayesian information criterion asks of two further parameters, a log-likelihood ratio of log N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastpo.evaluate.win_rate import wilson_interval

Array = NDArray[np.float64]
STARTS = (0.02, 0.1, 0.3, 0.45)  # shares from which EM begins; the likeliest end is taken
ROUNDS = 500
FEWEST = 20
"""Pairs below which there is nothing to fit, and u itself is the probability."""
LEAST_WRONG = 0.5  # b over a
APART = 2.0
"""Least distance of the two distributions of a pair's sum, in units of its spread."""
EDGES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0)
"""Of the reliability curve's bins: finer where a decision is made."""


@dataclass(frozen=True)
class Calibration:
    """The two distributions of the sums of votes, in units of the votes.

    Attributes:
        share: f, the share of wrong labels.
        right: a, the mean vote of a right label.
        wrong: b, the negative mean vote of a wrong one.
        variance: s^2, of one vote.
        pairs: How many pairs it was learned from.
    """

    share: float
    right: float
    wrong: float
    variance: float
    pairs: int

    def probability(self, total: Array, visits: Array) -> Array:
        """Returns the probability of a wrong label, `(N,)`; `share` for a pair without a vote."""
        if not 0.0 < self.share < 1.0:
            return np.full(len(total), self.share)
        prior = math.log(self.share / (1.0 - self.share))
        linear = -(self.right + self.wrong) * total / self.variance
        return _sigmoid(
            prior + linear + visits * (self.right**2 - self.wrong**2) / (2 * self.variance)
        )


def calibrate(total: Array, visits: Array) -> Calibration | None:
    """Fits the two distributions.

    Args:
        total: `(N,)` sum of each pair's votes.
        visits: `(N,)` how many votes that are; pairs without one are left out.

    Returns:
        None where fewer than `FEWEST` pairs have votes, all sums are alike, or the distributions
        cannot be told apart (module docstring).
    """
    seen = visits > 0
    total, visits = total[seen], visits[seen]
    if len(total) < FEWEST or not np.ptp(total / visits) > 1e-6 * np.abs(total / visits).max():
        return None
    scale, weight = float(np.std(total)) or 1.0, visits / visits.mean()
    found = [_fit(total / scale, weight, start) for start in STARTS]
    likelihood, share, right, wrong, variance = max(found)
    apart = APART * math.sqrt(variance)
    gained = len(total) * (likelihood - _one_heap(total / scale, weight))
    strong = (1.0 + LEAST_WRONG) * right >= apart
    if right + wrong < apart or not (strong or gained >= math.log(len(total))):
        return None
    unit = scale / visits.mean()  # from the scaled sums of a mean number of votes to one vote
    return Calibration(
        share, right * unit, wrong * unit, variance * scale**2 / visits.mean(), len(total)
    )


def _fit(x: Array, weight: Array, share: float) -> tuple[float, float, float, float, float]:
    """One EM fit; returns log-likelihood, share, right, wrong and variance."""
    lowest = x / weight <= np.quantile(x / weight, share)
    chance = np.where(lowest, 0.95, 0.05)
    likelihood, before = -math.inf, -math.inf
    right = wrong = variance = 1.0
    for _ in range(ROUNDS):
        share = float(chance.mean())
        right = max(float(((1 - chance) * x).sum() / ((1 - chance) * weight).sum()), 1e-6)
        wrong = max(-float((chance * x).sum() / (chance * weight).sum()), LEAST_WRONG * right)
        off = (1 - chance) * (x - right * weight) ** 2 + chance * (x + wrong * weight) ** 2
        variance = max(float((off / weight).mean()), 1e-9)
        kept = math.log1p(-share) + _log_normal(x - right * weight, variance * weight)
        turned = math.log(share) + _log_normal(x + wrong * weight, variance * weight)
        likelihood = float(np.logaddexp(kept, turned).mean())
        chance = _sigmoid(turned - kept).clip(1e-12, 1 - 1e-12)
        if likelihood - before < 1e-9:
            break
        before = likelihood
    return likelihood, share, right, wrong, variance


def _one_heap(x: Array, weight: Array) -> float:
    """Mean log-likelihood of one normal distribution, `x ~ N(a weight, s^2 weight)`."""
    off = x - weight * x.sum() / weight.sum()
    return float(_log_normal(off, weight * max(float((off**2 / weight).mean()), 1e-9)).mean())


def _log_normal(off: Array, variance: Array) -> Array:
    return -0.5 * (np.log(2 * np.pi * variance) + off**2 / variance)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -700, 700)))


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of about one probability.

    Attributes:
        expected: Their mean probability.
        found: The share of them whose label is wrong.
        interval: 95 % interval of that share.
        pairs: How many they are.
    """

    expected: float
    found: float
    interval: tuple[float, float]
    pairs: int


def reliability(probability: Array, wrong: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """Compares the probabilities with what is known: of those near 0.9 nine in ten are wrong.

    Args:
        probability: `(N,)` in [0, 1].
        wrong: `(N,)` which labels are wrong.

    Returns:
        A bin for each part of `EDGES` that holds a pair.
    """
    number = np.digitize(probability, EDGES[1:-1])
    bins = []
    for k in range(len(EDGES) - 1):
        inside = number == k
        if inside.any():
            found, pairs = float(wrong[inside].mean()), int(inside.sum())
            expected = float(probability[inside].mean())
            bins.append(ReliabilityBin(expected, found, wilson_interval(found, pairs), pairs))
    return bins


def calibration_error(bins: list[ReliabilityBin]) -> float:
    """Mean absolute difference of expected and found shares, weighed by pairs."""
    pairs = sum(one.pairs for one in bins)
    return sum(abs(one.expected - one.found) * one.pairs for one in bins) / max(pairs, 1)
