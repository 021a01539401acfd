"""What becomes of each label: by a threshold, by a person's verdicts, or by scorers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from fastpo.data.images import UnusableImageError, decode
from fastpo.errors import DataError
from fastpo.evaluate.scorers import Scorer
from fastpo.system.json_text import parse_json
from fastpo.types import PreferencePair

Action = Literal["drop", "tie", "turn"]
Change = Literal["kept", "dropped", "tied", "turned"]
CHANGES: dict[Action, Change] = {"drop": "dropped", "tie": "tied", "turn": "turned"}
SIGNS: dict[Change, float] = {"kept": 1.0, "turned": -1.0}
"""Which way round a pair's label is now, of those that have one."""
UNREADABLE = "unreadable: "
VERDICTS = ("right", "wrong", "tie")
MOST_LINE = 1 << 16
"""Characters of a line of a reviewer's file."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a label, and why.

    Attributes:
        change: What.
        why: In words; empty where nothing spoke against the label.
        weight: The pair's weight from now on; None: the one that it has.
    """

    change: Change = "kept"
    why: str = ""
    weight: float | None = None


def read_marks(path: Path) -> dict[str, str]:
    """Reads a reviewer's file, as the gallery saves it; of a pair's verdicts the last one counts.

    Raises:
        DataError: A line is none of a reviewer's.
    """
    marks: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--marks {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MOST_LINE:
                raise ValueError(f"more than {MOST_LINE:,} characters")
            row = parse_json(line)
            name, verdict = row["pair_id"], row["verdict"]
            if not isinstance(name, str) or verdict not in VERDICTS:
                raise ValueError("no name and verdict")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'--marks {path}, line {number}: expected {{"pair_id": ..., "verdict": '
                f'"right", "wrong" or "tie"}} ({type(error).__name__}: {str(error)[:100]})'
            ) from None
        marks[name] = verdict
    return marks


def by_marks(verdict: str, action: Action) -> Decision:
    """What a person's verdict makes of a label."""
    if verdict == "right":
        return Decision("kept", "reviewer: right")
    if verdict == "tie":
        return Decision("tied", "reviewer: tie")
    return Decision(CHANGES[action], "reviewer: wrong")


def by_probability(probability: float, threshold: float, action: Action) -> Decision:
    """What the probability of a wrong label makes of it."""
    if probability < threshold:
        return Decision()
    return Decision(CHANGES[action], f"probability {probability:.4f}, from {threshold:g} on")


@dataclass
class Jury:
    """Scorers that vote on each label; each prefers the image that it rates higher.

    Attributes:
        scorers: Who votes.
        action: What becomes of a label that most of them speak against.
        votes: For each pair so far, the label's vote (+1) and each scorer's: +1 for the label's
            winner, -1 for its loser, 0 for neither.
        gaps: For each pair so far, by how much each scorer rates the label's winner above its
            loser; unreadable pairs are left out of both.
    """

    scorers: Sequence[Scorer]
    action: Action
    votes: list[list[int]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)

    def decide(self, pairs: Sequence[PreferencePair]) -> list[Decision]:
        """Decides on some pairs, whose winners are the label's; equal votes make a tie."""
        images, whole, faults = [], [], {}
        for k, pair in enumerate(pairs):
            try:
                images.append((_image(pair, "winner"), _image(pair, "loser")))
                whole.append(k)
            except (UnusableImageError, OSError) as error:
                faults[k] = Decision("dropped", f"{UNREADABLE}{' '.join(str(error).split())[:200]}")
        prompts = [pairs[k].prompt for k in whole]
        gaps = np.zeros((len(whole), len(self.scorers)))
        for number, scorer in enumerate(self.scorers if whole else ()):
            first, second = (
                next(iter(scorer.score([pair[side] for pair in images], prompts).values()))
                for side in (0, 1)
            )
            gaps[:, number] = np.nan_to_num(first) - np.nan_to_num(second)
        votes = np.sign(gaps).astype(int)
        found = dict(zip(whole, (self._decision(row) for row in votes), strict=True))
        self.votes += [[1, *row] for row in votes.tolist()]
        self.gaps += gaps.tolist()
        return [(faults | found)[k] for k in range(len(pairs))]

    def _decision(self, votes: NDArray[np.int_]) -> Decision:
        names = [scorer.name for scorer in self.scorers]
        against = [name for name, vote in zip(names, votes, strict=True) if vote < 0]
        total = int(votes.sum())
        if total > 0:
            return Decision()
        if total == 0:
            return Decision(
                "tied", f"as many for as against it ({', '.join(against) or 'neither'})"
            )
        return Decision(CHANGES[self.action], f"{', '.join(against)} prefer the other image")

    def weighed(self, decisions: Sequence[Decision]) -> list[Decision]:
        """Returns the decisions on all pairs so far, those with a label with a weight.

        The weight of a pair is known once all pairs are rated; see `gap_weights`.

        Raises:
            DataError: On average the scorers rate both images of every pair alike.
        """
        found = list(decisions)
        rated = [k for k, one in enumerate(found) if not one.why.startswith(UNREADABLE)]
        labeled = [(k, row) for row, k in enumerate(rated) if found[k].change in SIGNS]
        signs = np.array([SIGNS[found[k].change] for k, _ in labeled])
        gaps = np.array(self.gaps).reshape(len(self.gaps), len(self.scorers))
        weights = gap_weights(gaps, [row for _, row in labeled], signs)
        for (k, _), weight in zip(labeled, weights.tolist(), strict=True):
            found[k] = replace(found[k], weight=weight)
        return found

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """How often two agree, of the pairs on which both have an opinion: people and scorers."""
        votes = np.array(self.votes, dtype=int).reshape(len(self.votes), len(self.scorers) + 1)
        names = ["label", *(scorer.name for scorer in self.scorers)]
        rows: dict[str, dict[str, float | None]] = {}
        for i, name in enumerate(names):
            both = [(votes[:, i] != 0) & (votes[:, j] != 0) for j in range(len(names))]
            rows[name] = {
                other: float((votes[one, i] == votes[one, j]).mean()) if one.any() else None
                for j, (other, one) in enumerate(zip(names, both, strict=True))
            }
        return rows


def gap_weights(
    gaps: NDArray[np.float64], rows: Sequence[int], signs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights of pairs, from how far apart scorers rate their two images.

    With `gap_s` the score of the label's winner less that of its loser, and `rms_s` the root mean
    square of scorer s's gaps over all pairs, which puts scorers on one scale:

        g = mean over s of gap_s / rms_s,    w = tanh(max(g, 0) / 2),

    divided by the mean of w over the pairs that keep a label, so that the weights' mean is 1 and
    the loss keeps its size. `tanh(g / 2) = 2 sigmoid(g) - 1` is, in the Bradley-Terry model with
    rewards g apart, the chance that people prefer the winner less the chance that they prefer the
    loser: near 0 where the two are alike, 1 where the winner is clearly better.

    The literature speaks of weighting by the reward gap or preference gap: RankDPO (arXiv
    2410.18013) multiplies each pair's loss by a gain that grows with the scores' gap;
    GDPO (arXiv 2409.06691) takes `2p - 1` from soft labels p as here, but as a factor of the logit.

    Args:
        gaps: `(N, S)`, of all pairs that were rated.
        rows: The M pairs that keep a label.
        signs: `(M,)` 1, or -1 where the label was turned round.

    Returns:
        `(M,)` float64, with mean 1.

    Raises:
        DataError: All of them would be 0.
    """
    scale = np.sqrt(np.square(gaps).mean(axis=0)) if len(gaps) else np.ones(gaps.shape[1])
    mean = (gaps[rows] / np.where(scale > 0, scale, 1.0)).mean(axis=1) * signs
    weights = np.tanh(np.maximum(mean, 0.0) / 2.0)
    if not weights.any():
        raise DataError(
            "--weigh: the scorers rate both images of every pair alike, so that no weight follows"
        )
    return weights / weights.mean()


def _image(pair: PreferencePair, side: Literal["winner", "loser"]) -> Image.Image:
    return decode(pair.winner() if side == "winner" else pair.loser())


def agreement_table(rows: dict[str, dict[str, float | None]]) -> Table:
    """The shares as a table for the console."""
    table = Table("agreement", *rows, title="label: what the data's people say")
    for name, shares in rows.items():
        table.add_row(name, *("-" if v is None else f"{v:.1%}" for v in shares.values()))
    return table


def check_names(marks: Iterable[str], known: Iterable[str], path: Path) -> None:
    """Refuses a reviewer's file of another data set.

    Raises:
        DataError: It names a pair that is not there.
    """
    strange = sorted(set(marks) - set(known))
    if strange:
        raise DataError(
            f"--marks {path}: {len(strange)} of its pairs are not the run's, such as {strange[0]!r}"
        )
