"""Pairs from tables that people have: ranked or scored lists of images, likes and dislikes."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.data.sources.folder import json_lines
from fastpo.errors import DataError, one_line
from fastpo.pairs.choose import Pick, choose_pairs
from fastpo.system.files import make_folder, write_text
from fastpo.system.json_text import parse_json, read_json
from fastpo.system.ownership import check_new
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted

PROMPT = ("prompt", "caption", "text")
IMAGES = ("images", "image_path", "file_path", "file_names")
IMAGE = ("image", "file_name", "file_path", "image_path", "file")
RANKING = ("ranking", "rank", "ranks")
SCORES = ("scores", "score")
RANKED = ("ranked",)
LIKED = ("liked", "like", "label", "split")
YES = ("1", "1.0", "true", "yes", "like", "liked", "exclusive_win", "win")
NO = ("0", "0.0", "false", "no", "dislike", "disliked", "exclusive_lose", "lose")
NEITHER = ("", "intersections", "none", "null")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MOST_BYTES = 1 << 30
"""Of a table in one piece of JSON."""
EXPECTED = (
    "prompt with images and ranking (1 is best) or scores (higher is better), or ranked (image "
    "paths, best first), or a row an image with image and liked"
)


@dataclass(frozen=True)
class Compared:
    """Images of one prompt with what orders them.

    Attributes:
        prompt: The prompt.
        images: Their paths, as the table has them.
        values: One value each, higher is better.
    """

    prompt: str
    images: tuple[str, ...]
    values: tuple[float, ...]


@storage_errors()
def pairs_from_table(table: Path, out: Path, *, pick: Pick = "all", gap: float = 0.0) -> str:
    """Writes a listing of pairs that `source: folder` reads.

    Args:
        table: `.jsonl`, `.json` (a list), `.csv` or `.parquet`: see `EXPECTED` and the docs.
        out: The `.jsonl` file to write, which must not exist, missing folders are made; image paths
            are made relative to its folder.
        pick: See `choose_pairs`.
        gap: See `choose_pairs`; in ranks, scores, or 1 between a like and a dislike.

    Returns:
        What was written, in a line.

    Raises:
        DataError: The table cannot be read, has none of these columns, a row is wrong, or no pair
            comes of it; or `out` exists.
        StorageError: `out` cannot be written where it shall be; told before the table is read.
    """
    if out.suffix != ".jsonl":
        raise DataError(f"{out}: the pairs' file must end with .jsonl")
    check_new(out, DataError)
    compared = list(read_compared(table))
    lines, outside = [], 0
    for number, one in enumerate(compared):
        places = [_relative(table.parent / image, out.parent) for image in one.images]
        for choice in choose_pairs(one.values, pick, gap=gap):
            winner, loser = places[choice.winner], places[choice.loser]
            outside += winner.startswith("..") or loser.startswith("..")
            row = {
                "id": f"{number}-{choice.winner}-{choice.loser}",
                "prompt": one.prompt,
                "winner": winner,
                "loser": loser,
                "gap": choice.gap,
            }
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
    if not lines:
        raise DataError(f"{table}: {counted(len(compared), 'prompt')}, but no pair with this gap")
    make_folder(out.parent)
    write_text(out, "\n".join(lines) + "\n")
    note = f"; {counted(outside, 'pair')} outside of its folder: data.allow_outside" * bool(outside)
    return f"{counted(len(lines), 'pair')} of {counted(len(compared), 'prompt')} in {out}{note}"


def read_compared(table: Path) -> Iterator[Compared]:
    """Yields a table's lists, or its likes gathered by prompt; errors as `pairs_from_table`."""
    likes: dict[str, tuple[list[str], list[float]]] = {}
    for place, row in _rows(table):
        try:
            if "supervision" in row:
                yield _supervised(row)
                continue
            prompt = _first(row, PROMPT)
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"no prompt; expected {EXPECTED}")
            listed = _listed(row)
            if listed is not None:
                yield Compared(prompt.strip(), *listed)
                continue
            image, value = _liked(row)
            if value is not None:
                images, values = likes.setdefault(prompt.strip(), ([], []))
                images.append(image)
                values.append(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{table}: {place}: {one_line(error)}") from None
    for prompt, (images, values) in likes.items():
        yield Compared(prompt, tuple(images), tuple(values))


def _supervised(row: Mapping[str, Any]) -> Compared:
    """A preference record of Flow-Factory's schema 2: one image is chosen, one rejected."""
    given, told = row.get("input") or {}, row["supervision"]
    prompt = given.get("prompt")
    if told.get("type") != "preference" or not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no preference record: no prompt, or another type of supervision")
    if given.get("media"):
        raise ValueError("it has input media; pairs here have a prompt alone")
    images = []
    for side in ("chosen", "rejected"):
        media = (told.get(side) or {}).get("media")
        if not isinstance(media, list) or len(media) != 1 or media[0].get("type") != "image":
            raise ValueError(f"supervision.{side}.media must be one image")
        images.append(str(media[0]["path"]))
    return Compared(prompt.strip(), tuple(images), (1.0, 0.0))


def _listed(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """Images and values of a ranked or scored list; None if the row is none."""
    ranked = _sequence(_first(row, RANKED))
    if ranked is not None:
        return tuple(map(str, ranked)), tuple(float(-i) for i in range(len(ranked)))
    images = _sequence(_first(row, IMAGES))
    if images is None:
        return None
    ranking, scores = _sequence(_first(row, RANKING)), _sequence(_first(row, SCORES))
    values = [-_number(rank) for rank in ranking] if ranking is not None else scores
    if values is None:
        raise ValueError(f"images without ranking or scores; expected {EXPECTED}")
    if len(values) != len(images):
        raise ValueError(f"{len(images)} images and {len(values)} ranks or scores")
    numbers = tuple(map(_number, values))
    if numbers and not math.isfinite(max(numbers) - min(numbers)):
        raise ValueError("scores differ by more than a number can hold")
    return tuple(map(str, images)), numbers


def _number(value: Any) -> float:
    """A rank or score, of which JSON's `1e999` and Python's `NaN` are none."""
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"a rank or score is {value!r:.40}, expected a finite number")
    return number


def _liked(row: Mapping[str, Any]) -> tuple[str, float | None]:
    """Image and verdict of a row of likes; None for an image that is neither."""
    image, verdict = _first(row, IMAGE), _first(row, LIKED)
    if not isinstance(image, str) or not image:
        raise ValueError(f"no image; expected {EXPECTED}")
    word = str(verdict if verdict is not None else "").strip().lower()
    if word in NEITHER:
        return image, None
    if word not in (*YES, *NO):
        raise ValueError(f"liked is {verdict!r:.40}; expected one of {', '.join((*YES, *NO))}")
    return image, float(word in YES)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _sequence(value: Any) -> list[Any] | None:
    """A list, or one written as JSON in a table's cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value)
    return value if isinstance(value, list) else None


def _relative(image: Path, folder: Path) -> str:
    return Path(os.path.relpath(image.absolute(), folder.absolute())).as_posix()


def _rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields where a row stands, and the row."""
    if table.suffix not in SUFFIXES:
        raise DataError(f"{table}: a table must end with {', '.join(SUFFIXES)}")
    if not table.is_file():
        raise DataError(f"no such file: {table}")
    if table.suffix == ".jsonl":
        for number, _, row in json_lines(table):
            if not isinstance(row, dict):
                raise DataError(f"{table}: line {number}: {row}")
            yield f"line {number}", row
        return
    try:
        rows = _whole(table)
    except MemoryError:
        raise
    except Exception as error:  # Parquet's reader raises its own errors
        raise DataError(f"{table} cannot be read: {one_line(error)}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{table}: row {number} is no mapping; expected {EXPECTED}")
        yield f"row {number}", row


def _whole(table: Path) -> list[Any]:
    if table.suffix == ".csv":
        with table.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if table.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(table).to_pylist()
    rows = read_json(table, most_bytes=MOST_BYTES)
    if not isinstance(rows, list):
        raise ValueError("a list of rows was expected")
    return rows
