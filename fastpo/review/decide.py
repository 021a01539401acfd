"""What becomes of each label: by a threshold, by a person's verdicts, or by scorers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
VERDICTS = ("right", "wrong", "tie")
MOST_LINE = 1 << 16
"""Characters of a line of a reviewer's file."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a label, and why.

    Attributes:
        change: What.
        why: In words; empty where nothing spoke against the label.
    """

    change: Change = "kept"
    why: str = ""


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
    """

    scorers: Sequence[Scorer]
    action: Action
    votes: list[list[int]] = field(default_factory=list)

    def decide(self, pairs: Sequence[PreferencePair]) -> list[Decision]:
        """Decides on some pairs, whose winners are the label's; equal votes make a tie."""
        images, whole, faults = [], [], {}
        for k, pair in enumerate(pairs):
            try:
                images.append((_image(pair, "winner"), _image(pair, "loser")))
                whole.append(k)
            except (UnusableImageError, OSError) as error:
                faults[k] = Decision("dropped", f"unreadable: {' '.join(str(error).split())[:200]}")
        prompts = [pairs[k].prompt for k in whole]
        votes = np.zeros((len(whole), len(self.scorers)), dtype=int)
        for number, scorer in enumerate(self.scorers if whole else ()):
            first, second = (
                next(iter(scorer.score([pair[side] for pair in images], prompts).values()))
                for side in (0, 1)
            )
            votes[:, number] = np.sign(np.nan_to_num(first) - np.nan_to_num(second)).astype(int)
        found = dict(zip(whole, (self._decision(row) for row in votes), strict=True))
        self.votes += [[1, *row] for row in votes.tolist()]
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
