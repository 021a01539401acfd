"""Images of any origin with their prompts, as people keep them: for `fastpo score`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastpo.errors import DataError, one_line
from fastpo.evaluate.folders import SET
from fastpo.system.json_text import parse_json, read_bounded, read_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
LISTINGS = ("metadata.jsonl", "metadata.csv")
FILE_NAMES = ("file_name", "file", "image")
PROMPT_NAMES = ("prompt", "caption", "text")
MOST_BYTES = 1 << 28
"""Of a listing."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of a folder.

    Attributes:
        file: Its path in the folder.
        path: Where it is read.
        prompt: What it should show; None if nothing says so.
    """

    file: str
    path: Path
    prompt: str | None


def list_pictures(folder: Path) -> list[Picture]:
    """Lists the images of a folder and its folders, sorted by path, each with its prompt.

    A prompt comes from the first of these that has one:

    * `metadata.jsonl` or `metadata.csv` in the folder or the image's own, as `imagefolder` of
      `datasets` reads them: `file_name` and `prompt`, `caption` or `text`;
    * `set.json` of images that FastPO sampled;
    * a text file of the image's name beside it (`cat.png`, `cat.txt`);
    * a `metadata.jsonl` of one line with a prompt above the image, as GenEval keeps them.

    Raises:
        DataError: There is no image, or a listing is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(folder))
    )
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    listed: dict[Path, Mapping[Path, str]] = {}
    for place in dict.fromkeys([folder, *(path.parent for path in paths)]):
        listed[place] = dict(_listed(place))
    return [
        Picture(
            path.relative_to(folder).as_posix(),
            path,
            listed[folder].get(path) or listed[path.parent].get(path) or _beside(path, folder),
        )
        for path in paths
    ]


def read_picture(picture: Picture) -> Image.Image:
    """Returns an image as RGB.

    Raises:
        DataError: It cannot be decoded.
    """
    try:
        with Image.open(picture.path, formats=FORMATS) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # PIL's plug-ins raise anything on broken data
        raise DataError(f"{picture.path} cannot be read: {one_line(error)}") from None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listed(place: Path) -> Iterator[tuple[Path, str]]:
    """The images that a folder's listing names, with their prompts."""
    file = next((place / name for name in LISTINGS if (place / name).is_file()), None)
    if file is None:
        yield from _sampled(place)
        return
    try:
        for row in _rows(file):
            name = next((row[key] for key in FILE_NAMES if row.get(key)), None)
            prompt = _prompt_of(row)
            if name is not None and prompt:
                yield place / str(name), prompt
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def _sampled(place: Path) -> Iterator[tuple[Path, str]]:
    """The images of a folder that FastPO sampled, with their prompts; none of older versions."""
    try:
        marker = read_json(place / SET, most_bytes=MOST_BYTES)
    except (OSError, ValueError):
        return
    prompts = marker.get("prompts") if isinstance(marker, dict) else None
    for name, prompt in prompts.items() if isinstance(prompts, dict) else ():
        yield place / name, str(prompt)


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    lines = read_bounded(file, MOST_BYTES).decode("utf-8-sig").splitlines()
    if file.suffix == ".csv":
        yield from csv.DictReader(lines)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield row


def _beside(path: Path, folder: Path) -> str | None:
    """The prompt in the image's text file, or in GenEval's file above it."""
    try:
        text = path.with_suffix(".txt")
        if text.is_file():
            return read_bounded(text, MOST_BYTES).decode("utf-8-sig").strip() or None
        above = path.parent.parent / "metadata.jsonl"
        if path.parent != folder and above.is_file():
            rows = list(_rows(above))
            return _prompt_of(rows[0]) if len(rows) == 1 else None
    except (OSError, ValueError) as error:
        raise DataError(f"the prompt of {path} cannot be read: {one_line(error)}") from None
    return None


def _prompt_of(row: Mapping[str, Any]) -> str | None:
    return next((str(row[key]).strip() for key in PROMPT_NAMES if row.get(key)), None)
