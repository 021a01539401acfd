"""What every source shares: the report, stable names, and the errors for missing files."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fastpo.config import SourceConfig
from fastpo.data.sources.bad_rows import BadRows, told
from fastpo.errors import DataError
from fastpo.types import MOST_PROMPT, PreferencePair, pair_key

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class SourceReport:
    """What the label scan found; `rows == ties + unlabeled + bad + pairs`.

    Attributes:
        rows: Comparisons read; with a limit, up to the last pair taken.
        ties: Comparisons without a preference, dropped.
        unlabeled: Comparisons marked as not labeled, dropped.
        pairs: Comparisons that are yielded.
        duplicates: Pairs whose name occurred before; they were given a numbered suffix. Known
            only after iterating.
        bad: Rows that are no comparison: no caption, no or a wrong label, a line that is no JSON.
    """

    rows: int = 0
    ties: int = 0
    unlabeled: int = 0
    pairs: int = 0
    duplicates: int = 0
    bad: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the counts by name; `bad` only where there are bad rows."""
        return {name: count for name, count in asdict(self).items() if count or name != "bad"}

    def __str__(self) -> str:
        """Returns the counts as one line."""
        return ", ".join(f"{count} {name}" for name, count in self.as_dict().items())


@dataclass(frozen=True)
class PromptTable:
    """The distinct prompts of a source and which pair has which.

    Attributes:
        prompts: In the order of their first appearance; number 0 is the empty prompt.
        numbers: `(N,)` int32, the number of each pair's prompt.
    """

    prompts: list[str]
    numbers: np.ndarray


@dataclass(frozen=True)
class SourceImages:
    """The distinct images that a data set of edits begins from, and which pair has which.

    Attributes:
        names: In the order of their first appearance.
        sets: The distinct lists of images that pairs begin from, in the order of their first
            appearance: of each the numbers of its images, in the pair's order.
        numbers: `(N,)` int32, the number of each pair's list.
        read: Returns the bytes of the image of a number; errors as `DataFolder.read`.
    """

    names: list[str]
    sets: list[tuple[int, ...]]
    numbers: np.ndarray
    read: Callable[[int], bytes]

    @property
    def most(self) -> int:
        """The most images that a pair begins from."""
        return max(map(len, self.sets))


class PairSource(ABC):
    """Preference pairs by their position in the data.

    Attributes:
        where: What the rows stand in, for messages.
        report: Counts of the label scan, complete once the source is open.
        bad: Rows known to be unusable before any image is read: those that `report` counts as bad,
            and pairs whose image is missing or, once the prompts are read, whose prompt is too
            long.
    """

    where: str
    report: SourceReport
    bad: BadRows

    @property
    def parts(self) -> Mapping[str | None, PairSource]:
        """The data sets that it is made of, by name, in order; a single one has none."""
        return {None: self}

    def __len__(self) -> int:
        """Returns the number of pairs that iterating yields."""
        return self.report.pairs

    def __iter__(self) -> Iterator[PreferencePair]:
        """Yields the pairs in the order of the files; names are unique."""
        seen: dict[int, int] = {}
        self.report.duplicates = 0
        for pair in self.pairs():
            key = pair_key(pair.pair_id)
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1:
                self.report.duplicates += 1
            yield replace(pair, pair_id=numbered(pair.pair_id, seen[key]))

    def pairs(self, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        """Yields the pairs at positions `start` to `stop` - 1 without reading those before.

        A name that the data set uses twice comes twice: only who sees all names can number them.
        """
        end = len(self) if stop is None else min(stop, len(self))
        return map(_with_fault, self._pairs(start, end)) if start < end else iter(())

    @abstractmethod
    def prompt_table(self) -> PromptTable:
        """Returns every distinct prompt and each pair's, from the text alone.

        A prompt that is too long counts as a bad row, and as the empty prompt.

        Raises:
            TooManyBadRowsError: There are more of them than `data.max_bad` allows.
        """

    @abstractmethod
    def source_images(self) -> SourceImages | None:
        """Returns the images that edits begin from; None where no pair names one.

        A pair whose image is missing counts as a bad row.

        Raises:
            DataError: Some pairs name one and others none, or a name leads out of the folder.
            TooManyBadRowsError: There are more bad rows than `data.max_bad` allows.
        """

    @abstractmethod
    def edits(self) -> bool:
        """Tells whether the first pair's `source` names images that are there.

        A column of that name may hold anything where the model begins from no image.
        """

    @abstractmethod
    def _pairs(self, start: int, stop: int) -> Iterator[PreferencePair]:
        """Yields the pairs at positions `start` to `stop` - 1, of those that the scan counted."""


class ScannedSource(PairSource):
    """One data set, whose labels are scanned when it is opened.

    Attributes:
        config: What was asked for.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Scans the labels.

        Raises:
            DataError: As `open_source`.
        """
        self.config = config
        self.report = SourceReport()
        self.where = self._where()
        self.bad = BadRows(self.where, config.max_bad)
        self._long_prompts_told = self._source_faults_told = False
        self._scan()
        if self.report.pairs == 0:
            reasons = f"; {told(self.bad.kept, self.bad.count)}" if self.bad.count else ""
            raise DataError(
                f"{self.where} (source {config.source}, split {config.split}) holds no labeled "
                f"pair: {self.report}{reasons}"
            )
        self.bad.check(self.report.rows)

    def _where(self) -> str:
        """What the rows stand in, for messages."""
        return f"data.path {self.config.path}"

    def prompt_table(self) -> PromptTable:
        """See the base class."""
        known = {"": 0}
        numbers = np.fromiter(
            (
                known.setdefault(self._checked_prompt(number, prompt), len(known))
                for number, prompt in enumerate(self._captions())
            ),
            dtype=np.int32,
            count=len(self),
        )
        self._long_prompts_told = True
        self.bad.check(self.report.rows)
        return PromptTable(list(known), numbers)

    def _checked_prompt(self, number: int, prompt: str) -> str:
        """Returns a prompt; no longer one reaches a tokenizer, whose time grows with it."""
        fault = prompt_fault(prompt)
        if fault is None:
            return prompt
        if not self._long_prompts_told:
            self.bad.add(f"pair {number} (from 0)", fault, is_pair=True)
        return ""

    def source_images(self) -> SourceImages | None:
        """See the base class."""
        known: dict[str, int] = {}
        sets: dict[tuple[int, ...], int] = {}
        numbers, without = np.zeros(len(self), dtype=np.int32), []
        for number, names in enumerate(self._source_names()):
            if isinstance(names, str):
                raise DataError(f"{self.where}: pair {number} (from 0): {names}")
            if not names:
                without.append(number)
                continue
            fault = next(filter(None, map(self._source_fault, names)), None)
            if fault is not None and not self._source_faults_told:
                self.bad.add(f"pair {number} (from 0)", fault, is_pair=True)
            images = tuple(known.setdefault(name, len(known)) for name in names)
            numbers[number] = sets.setdefault(images, len(sets))
        self._source_faults_told = True
        if not known:
            return None
        if without:
            raise DataError(
                f"{self.where}: {len(without)} of {len(self)} pairs have no source image, the "
                f"first is pair {without[0]} (from 0); give all of them one, or none"
            )
        self.bad.check(self.report.rows)
        listed = list(known)
        return SourceImages(
            listed, list(sets), numbers, lambda number: self._read_source(listed[number])
        )

    def edits(self) -> bool:
        """See the base class."""
        names = next(iter(self._source_names()), ())
        named = bool(names) and not isinstance(names, str)
        return named and not any(map(self._source_fault, names))

    def _source_names(self) -> Iterable[tuple[str, ...] | str]:
        """Yields the names of the source images of every pair, or what stands there instead.

        By default there are none.
        """
        return ()

    def _source_fault(self, name: str) -> str | None:
        """Says why there is no source image of a name, or returns None."""
        return None

    def _read_source(self, name: str) -> bytes:
        """Returns a source image's bytes."""
        raise NotImplementedError

    def _bad_row(self, place: str, reason: str) -> None:
        """Counts a row that is no comparison."""
        self.report.rows += 1
        self.report.bad += 1
        self.bad.add(place, reason)

    def _no_pair(self, place: str, reason: str, *, tie: bool) -> None:
        """Counts a row that is no pair: a bad one where there is a reason, a tie, or unlabeled."""
        if reason:
            self._bad_row(place, reason)
            return
        self.report.rows += 1
        self.report.ties += tie
        self.report.unlabeled += not tie

    def _full(self) -> bool:
        """Tells whether the limit is reached."""
        return self.config.limit is not None and self.report.pairs >= self.config.limit

    @abstractmethod
    def _scan(self) -> None:
        """Reads the labels of all rows up to the limit and fills `report`."""

    @abstractmethod
    def _captions(self) -> Iterable[str]:
        """Yields the prompt of every pair that the scan counted; no image is read."""

    @classmethod
    @abstractmethod
    def digest(cls, config: SourceConfig) -> str | None:
        """See `source_digest`."""

    @classmethod
    @abstractmethod
    def files(cls, config: SourceConfig) -> Iterable[str] | None:
        """Yields the paths of all files, some perhaps missing; None: not on this disk."""


def prompt_fault(prompt: str) -> str | None:
    """Says why a prompt cannot be used, or returns None."""
    if len(prompt) <= MOST_PROMPT:
        return None
    return f"its prompt has {len(prompt):,} characters, at most {MOST_PROMPT:,} are taken"


def _with_fault(pair: PreferencePair) -> PreferencePair:
    """Marks a pair whose prompt cannot be used."""
    fault = prompt_fault(pair.prompt)
    return pair if fault is None else replace(pair, prompt="", fault=fault)


def numbered(name: str, occurrence: int) -> str:
    """Returns the name of a pair whose name occurs for the n-th time, n from 1 on."""
    return name if occurrence == 1 else f"{name}#{occurrence}"


def printable(text: str) -> str:
    """Returns a text as errors show it: as it is, quoted where it would not stay in one line."""
    return text if text.isprintable() else ascii(text)


def shown(value: object) -> str:
    """Returns a wrong value as errors show it: in one line, of bounded length."""
    text = ascii(value) if not isinstance(value, int) or value.bit_length() < 200 else "a number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_text(value: object) -> bool:
    """Tells whether a value is text that UTF-8 can write; JSON can name halves of characters."""
    return isinstance(value, str) and (value.isascii() or _SURROGATE.search(value) is None)


def content_hash(*parts: bytes | str) -> str:
    """Returns 32 hexadecimal digits of BLAKE2b over the parts and their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def digest_file(path: Path) -> str | None:
    """Returns a file's SHA-256, None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def found_in(folder: Path) -> str:
    """Names what stands in a folder, for error messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "empty folder"
