"""HPDv2: JSON listings beside folders of images."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.config import SourceConfig
from fastpo.data.sources.bad_rows import passed_over
from fastpo.data.sources.base import (
    ScannedSource,
    content_hash,
    digest_file,
    found_in,
    plain_text,
    printable,
    shown,
)
from fastpo.data.sources.files import DataFolder, is_file
from fastpo.errors import DataError
from fastpo.system.files import user_path
from fastpo.system.json_text import read_json
from fastpo.types import PreferencePair

MOST_BYTES = 1 << 32
"""Of a listing; HPDv2's have some hundred megabytes."""
MOST_IMAGES = 1000
"""Of one entry, which gives every pair of them."""
_KEYS = {"train": ("file_path", "human_preference"), "test": ("image_path", "rank")}


class HPDv2Source(ScannedSource):
    """`train.json` (two images, 1 marks the preferred) and `test.json` (k images, rank 1 is best).

    k images give every one of the k(k-1)/2 comparisons, better image first; equal ranks are ties.
    Image paths are relative to `data.path` or to its folder of the split's name. A pair is named
    after its two image paths and a hash of the prompt.
    """

    def _scan(self) -> None:
        self._listing = _listing(self.config)
        self._entries = _read(self._listing)
        self._root = self._listing.parent
        kept = array("i")  # entry, winner and loser of each pair, as numbers
        for entry, first, second, preference in self._comparisons(self._bad_entry):
            self.report.rows += 1
            self.report.ties += preference == 0
            if preference != 0:
                self.report.pairs += 1
                kept.extend((entry, first, second) if preference > 0 else (entry, second, first))
            if self._full():
                break
        self._kept = np.array(kept, dtype=np.int32).reshape(-1, 3)
        if self.report.rows:
            self._root = self._image_root()
        self._images = DataFolder(self._root, allow_outside=self.config.allow_outside)

    def _bad_entry(self, number: int, reason: str) -> None:
        self._bad_row(f"entry {number}", reason)

    def _comparisons(
        self, bad: Callable[[int, str], None]
    ) -> Iterator[tuple[int, int, int, float]]:
        """Yields entry, two images of it and a number that is > 0 if the first is preferred.

        `bad` is called with the number of an entry that is not what the schema says, and why.
        """
        paths_key, scores_key = _KEYS[self.config.split]
        sign = -1 if scores_key == "rank" else 1
        folder = DataFolder(self._root, allow_outside=self.config.allow_outside)
        for number, entry in enumerate(self._entries):
            checked = _checked(entry, paths_key, scores_key)
            if isinstance(checked, str):
                bad(number, checked)
                continue
            paths, scores = checked
            for complaint in filter(None, map(folder.name_complaint, paths)):
                raise DataError(f"{self._listing}: entry {number}: image {complaint}")
            for i in range(len(scores)):
                for j in range(i + 1, len(scores)):
                    yield number, i, j, sign * (scores[i] - scores[j])

    def _captions(self) -> Iterator[str]:
        return (self._entries[number]["prompt"] for number in self._kept[:, 0].tolist())

    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        paths_key, _ = _KEYS[self.config.split]
        for number, winner, loser in self._kept[start:stop].tolist():
            prompt, paths = self._entries[number]["prompt"], self._entries[number][paths_key]
            first, second = (paths[image] for image in sorted((winner, loser)))
            name = f"{first}:{second}:{content_hash(prompt)[:8]}"
            read_winner, read_loser = (
                partial(self._images.read, paths[image]) for image in (winner, loser)
            )
            yield PreferencePair(name, prompt, read_winner, read_loser)

    def _image_root(self) -> Path:
        """Returns the folder that has an image: of the first comparisons, some may be missing."""
        paths_key, _ = _KEYS[self.config.split]
        roots = (self._root, self._root / self.config.split)
        first: tuple[int, str] | None = None
        for number, image, _, _ in islice(self._comparisons(passed_over), MOST_IMAGES):
            name = self._entries[number][paths_key][image]
            first = first or (number, name)
            for root in roots:
                if is_file(root, name):
                    return root
        if first is None:  # no comparison is left, as the base class says
            return self._root
        raise DataError(
            f"{self._listing}: entry {first[0]}: image {printable(first[1])} is neither in "
            f"{roots[0]} nor in {roots[1]}; unpack HPDv2's image archives there "
            f"(found: {found_in(self._root)})"
        )

    @classmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""
        return digest_file(user_path(config.path) / f"{config.split}.json")

    @classmethod
    def files(cls, config: SourceConfig) -> Iterator[str] | None:
        """See the base class; an image may lie in either of two folders."""
        listing = user_path(config.path) / f"{config.split}.json"
        known = config.split in _KEYS and listing.is_file()
        return cls._named_in(listing, config.split) if known else None

    @classmethod
    def _named_in(cls, listing: Path, split: str) -> Iterator[str]:
        roots = (listing.parent, listing.parent / split)
        with contextlib.suppress(DataError):  # the scan tells what cannot be read
            for entry in _read(listing):
                checked = _checked(entry, *_KEYS[split])
                for path in () if isinstance(checked, str) else checked[0]:
                    yield from (os.path.join(root, path) for root in roots)


def _listing(config: SourceConfig) -> Path:
    if config.split not in _KEYS:
        raise DataError(f"data.split: HPDv2 has the splits train and test, got {config.split!r}")
    folder = user_path(config.path)
    path = folder / f"{config.split}.json"
    if not path.is_file():
        raise DataError(
            f"missing file: {path}; HPDv2 is read from a local folder with {config.split}.json and "
            f"its unpacked images (found: {found_in(folder)})"
        )
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # Entries are flat lists; the parser's own bound on depth is enough for a listing this long.
        entries = read_json(path, most_bytes=MOST_BYTES, depth=None)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of entries, got {type(entries).__name__}")
    return entries


def _checked(entry: Any, paths_key: str, scores_key: str) -> tuple[list[str], list[float]] | str:
    """Returns an entry's image paths and scores, or why it is not what HPDv2's schema says."""
    expected = f"expected prompt (text), {paths_key} (list of text), {scores_key} (list of numbers)"
    if not isinstance(entry, dict):
        return f"{expected}, got {type(entry).__name__}"
    missing = [key for key in ("prompt", paths_key, scores_key) if key not in entry]
    if missing:
        return f"missing key {', '.join(missing)}; {expected}; found {shown([*entry])}"
    paths, scores = entry[paths_key], entry[scores_key]
    if not plain_text(entry["prompt"]):
        return f"prompt is {shown(entry['prompt'])}; {expected}"
    if not isinstance(paths, list) or not all(map(plain_text, paths)):
        return f"{paths_key} is {shown(paths)}; {expected}"
    if not isinstance(scores, list) or not all(map(_is_score, scores)):
        return f"{scores_key} is {shown(scores)}; {expected}"
    if len(scores) != len(paths) or not 2 <= len(paths) <= MOST_IMAGES:
        return (
            f"{scores_key} is {shown(scores)} for {len(paths)} images; {expected} of "
            f"equal length, two to {MOST_IMAGES}"
        )
    if scores_key == "human_preference" and (len(scores) != 2 or not set(scores) <= {0, 1}):
        return f"human_preference is {shown(scores)}; expected two values of 0 and 1"
    return paths, scores


def _is_score(value: Any) -> bool:
    """Whether a value is a finite number of ordinary size, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e9
