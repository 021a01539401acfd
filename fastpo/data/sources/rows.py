"""One row of a listing, whatever its columns are called: prompt, winner, loser."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastpo.data.sources.base import content_hash, plain_text, shown
from fastpo.data.sources.columns import BAD, TIE, UNLABELED, WEIGHT, number
from fastpo.errors import DataError

COLUMNS = {
    "prompt": ("prompt", "caption", "text"),
    "winner": ("winner", "chosen", "preferred"),
    "loser": ("loser", "rejected"),
    "first": ("image_0", "jpg_0"),
    "second": ("image_1", "jpg_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "id": ("id",),
    "weight": (WEIGHT,),
    "source": ("source",),
}
"""Names that a column may have, the first one the preferred."""
MOST_WEIGHT = 1_000_000
"""Of `pair_weight`; a larger one is a mistake."""
FILE_NAME = "_file_name"
"""What `imagefolder` wants the names of columns with image paths to end with."""
EXPECTED = (
    "expected prompt (or caption, text) and winner and loser (or chosen and rejected), or image_0, "
    "image_1, label_0 and label_1; names may end with _file_name"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison.

    Attributes:
        name: Name of the pair.
        prompt: The prompt.
        winner: Names the preferred image.
        loser: Names the other.
        weight: The pair's weight, if one is given.
        sources: Of an edit, names the images that the prompt says how to change.
        misnamed: Why there are none though something stands there.
    """

    name: str
    prompt: str
    winner: str
    loser: str
    weight: float | None = None
    sources: tuple[str, ...] = ()
    misnamed: str = ""


@dataclass(frozen=True, slots=True)
class NoPair:
    """A row that is no pair.

    Attributes:
        kind: `TIE`, `UNLABELED` or `BAD`.
        reason: Of a bad one, what is wrong.
    """

    kind: int
    reason: str = ""


def find_columns(where: str, found: Collection[str]) -> dict[str, str]:
    """Returns which column holds what.

    Args:
        where: The listing, as errors name it.
        found: The names of its columns.

    Raises:
        DataError: One is missing; the text names what was found.
    """
    names = {
        what: next(
            (c for name in known for c in (name, name + FILE_NAME) if c in found),
            None,
        )
        for what, known in COLUMNS.items()
    }
    columns = {what: name for what, name in names.items() if name is not None}
    labeled = ("first", "second", "label_0", "label_1")
    wanted = labeled if any(name in columns for name in labeled[:2]) else ("winner", "loser")
    if any(name in columns for name in ("winner", "loser")):
        wanted = ("winner", "loser")
    missing = [COLUMNS[what][0] for what in ("prompt", *wanted) if what not in columns]
    if missing:
        raise DataError(
            f"{where}: missing column {', '.join(missing)}; {EXPECTED}; found {shown([*found])}"
        )
    if "winner" in columns:
        columns = {what: name for what, name in columns.items() if what not in labeled}
    return columns


def read_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row | NoPair:
    """Reads a row by its columns; see `find_columns`."""
    values = {what: row.get(name) for what, name in columns.items()}
    if not plain_text(values["prompt"]):
        return NoPair(BAD, f"{columns['prompt']} is {shown(values['prompt'])}; expected text")
    sides = ("winner", "loser")
    if "first" in columns:
        winner = _winner(values)
        if winner in (TIE, UNLABELED):
            return NoPair(winner)
        if winner == BAD:
            labels = ", ".join(f"label_{k}={shown(values[f'label_{k}'])}" for k in (0, 1))
            return NoPair(BAD, f"{labels}: labels must be 0, 0.5 or 1 and sum to 1")
        sides = ("first", "second") if winner == 0 else ("second", "first")
    for side in sides:
        if not plain_text(values[side]) or not values[side]:
            told = shown(values[side])
            return NoPair(BAD, f"{columns[side]} is {told}; expected the image's path")
    winner_path, loser_path = (str(values[side]) for side in sides)
    name = values.get("id")
    if name is None or name == "":
        name = name_of(winner_path, loser_path, str(values["prompt"]))
    elif not isinstance(name, int) and not plain_text(name):
        return NoPair(BAD, f"id is {shown(name)}; expected text or a whole number")
    weight = pair_weight(row.get(WEIGHT))  # of JSON lines the first may lack it
    if isinstance(weight, str):
        return NoPair(BAD, weight)
    source = values.get("source")
    about = (weight, named(source), misnamed(source))
    return Row(str(name), str(values["prompt"]), winner_path, loser_path, *about)


def named(value: Any) -> tuple[str, ...]:
    """Returns the source images that a value names: text, or a list of it; else there are none."""
    names = value if isinstance(value, list) else [value]
    return tuple(names) if all(name and plain_text(name) for name in names) else ()


def misnamed(value: Any) -> str:
    """Says why a value that is there names no source image; empty where it does, or is not there.

    It matters where images are edited: of other data such a column may hold anything.
    """
    if value is None or value in ("", []) or named(value):
        return ""
    return f"source is {shown(value)}; expected the image's path, or a list of paths"


def pair_weight(value: Any) -> float | str | None:
    """Returns a pair's weight, None where there is none (null, or an empty cell).

    Returns:
        Or why it is none: it must be a number, or text of one, from 0 to `MOST_WEIGHT`.
    """
    if value is None or value == "":
        return None
    found = math.nan if isinstance(value, bool) else number(value)
    if 0.0 <= found <= MOST_WEIGHT:
        return found
    return f"pair_weight is {shown(value)}; expected a number from 0 to {MOST_WEIGHT:,}"


def name_of(winner: str, loser: str, prompt: str) -> str:
    """Returns the name of a pair without an id; turning its label round keeps it."""
    return ":".join([*sorted((winner, loser)), content_hash(prompt)[:8]])


def _winner(values: Mapping[str, Any]) -> int:
    """As `columns.winners`, of one row."""
    first, second, told = (number(values.get(key)) for key in ("label_0", "label_1", "has_label"))
    if told == 0 or (math.isnan(first) and math.isnan(second)):
        return UNLABELED
    if first + second != 1 or first not in (0.0, 0.5, 1.0):
        return BAD
    return TIE if first == 0.5 else int(second)
