"""Published sets of prompts, from local files as their authors publish them.

| name       | files                                                             | groups      |
|------------|-------------------------------------------------------------------|-------------|
| `pickapic` | Parquet files of Pick-a-Pic v2, split `validation_unique`         | none        |
| `parti`    | `PartiPrompts.tsv`                                                | categories  |
| `hpdv2`    | `anime.json`, `concept-art.json`, `paintings.json`, `photo.json`  | styles      |
| `geneval`  | `evaluation_metadata.jsonl`                                       | tags        |
| `lines`    | any text file, a prompt a line                                    | none        |
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpo.config import Config
from fastpo.errors import ConfigError, one_line
from fastpo.system.files import user_path
from fastpo.system.json_text import parse_json, read_bounded, read_json
from fastpo.types import MOST_PROMPT

MOST_BYTES = 1 << 26
"""Of a file of prompts."""
STYLES = ("anime", "concept-art", "paintings", "photo")
OWN = "prompts"
"""Name of the set that `evaluate.prompts` and `evaluate.prompts_file` make."""

Row = tuple[str, str]
Edit = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are evaluated together.

    Attributes:
        name: The set's name in tables and paths.
        prompts: Distinct prompts, in the files' order.
        groups: Category, style or tag of each; empty where the set has none.
        sources: Paths of the source images that each prompt edits; empty where it edits none. A
            prompt may then come several times, with others.
    """

    name: str
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...] = ()

    @property
    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each prompt with its source images."""
        return list(zip(self.prompts, self.sources or [()] * len(self.prompts), strict=True))


@dataclass(frozen=True)
class Source:
    """How a named set is read.

    Attributes:
        files: The names to look for in a folder, as patterns; the first that is there counts.
        read: Yields prompt and group of each row of a file.
        together: Whether all patterns must be there, and are read in order.
        published: Prompts in the published set, repeated ones included; 0 of any number.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Row]]
    together: bool = False
    published: int = 0


def read_prompt_set(text: str, *, most: int | None = None) -> PromptSet:
    """Reads a set from its name and, after a colon, its file or folder (`parti:~/prompts`).

    Args:
        text: Name and place.
        most: How many of its first prompts to take; of a set in several files of each.

    Raises:
        ConfigError: The name is unknown, the place is missing, or a file is not as published.
    """
    name, colon, place = text.partition(":")
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"evaluate.prompt_sets: unknown set {name!r}{hint} (valid: {', '.join(SETS)})"
        )
    if not colon or not place:
        raise ConfigError(f"evaluate.prompt_sets: {name} needs its file or folder: {name}:PATH")
    source = SETS[name]
    files = _files(name, source, user_path(place))
    rows: dict[str, str] = {}
    for file in files if source.together else [files[0]]:
        fresh = dict(row for row in _rows(name, source, file) if row[0] not in rows)
        rows |= dict(list(fresh.items())[:most])
    if not rows:
        raise ConfigError(f"evaluate.prompt_sets: {name}: {files[0]} holds no prompt")
    groups = tuple(rows.values())
    return PromptSet(name, tuple(rows), groups if any(groups) else ())


def configured_sets(config: Config) -> list[PromptSet]:
    """Returns the sets of a configuration: its own prompts, if any, and `evaluate.prompt_sets`.

    Raises:
        ConfigError: As `read_prompt_set`; two sets share a name; or there is no prompt at all.
    """
    options = config.evaluate
    own: list[Edit] = [(prompt, ()) for prompt in options.prompts]
    if options.prompts_file is not None:
        file = options.prompts_file
        try:
            if file.suffix == ".jsonl":
                own += _edits(file)
            else:
                own += ((prompt, ()) for prompt, _ in _lines(file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluate.prompts_file: cannot read it: {error}") from None
    sets = [_own_set(own)] if own else []
    for text in options.prompt_sets:
        sets.append(read_prompt_set(text, most=options.prompts_per_set))
        if any(one.name == sets[-1].name for one in sets[:-1]):
            raise ConfigError(f"evaluate.prompt_sets: {sets[-1].name} is named twice")
    if not sets:
        raise ConfigError(
            "nothing to sample: give evaluate.prompts (a list), evaluate.prompts_file (a text "
            "file, one prompt per line; of models that edit, JSON lines with prompt and source) or "
            "evaluate.prompt_sets"
        )
    for one in sets:
        _check_lengths(one)
    return sets


def _own_set(rows: Sequence[Edit]) -> PromptSet:
    """The set of prompts that are given one by one, with their source images."""
    distinct = list(dict.fromkeys(rows))
    sources = tuple(source for _, source in distinct)
    if any(sources) and not all(sources):
        without = next(prompt for prompt, source in distinct if not source)
        raise ConfigError(
            f"evaluate.prompts: {without[:80]!r} has no source image, others have; give all "
            "prompts by evaluate.prompts_file, as JSON lines with prompt and source"
        )
    prompts = tuple(prompt for prompt, _ in distinct)
    return PromptSet(OWN, prompts, (), sources if any(sources) else ())


def _check_lengths(one: PromptSet) -> None:
    for number, prompt in enumerate(one.prompts):
        if len(prompt) > MOST_PROMPT:
            what = "evaluate.prompts" if one.name == OWN else f"evaluate.prompt_sets: {one.name}"
            raise ConfigError(
                f"{what}: prompt {number} (from 0) has {len(prompt):,} characters, at most "
                f"{MOST_PROMPT:,} are taken"
            )


def _files(name: str, source: Source, place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = []
    for pattern in source.files:
        matches = sorted(place.glob(pattern))
        found += matches
        if matches and not source.together:
            return matches
        if not matches and source.together:
            inner = next((f for f in place.glob("*/") if (f / pattern).is_file()), None)
            if inner is None:
                found = []
                break
            found.append(inner / pattern)
    if not found:
        what = f"holds no {' or '.join(source.files)}" if place.is_dir() else "does not exist"
        raise ConfigError(f"evaluate.prompt_sets: {name}: {place} {what}")
    return found


def _rows(name: str, source: Source, file: Path) -> Iterator[Row]:
    try:
        for prompt, group in source.read(file):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"a prompt is {prompt!r:.40}")
            yield prompt.strip(), str(group)
    except MemoryError:
        raise
    except Exception as error:  # Parquet's reader raises its own errors
        raise ConfigError(
            f"evaluate.prompt_sets: {name}: {file} is not as published: {one_line(error)}"
        ) from None


def _pickapic(file: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(columns=["caption"]):
            for caption in batch.column("caption").to_pylist():
                yield caption, ""


def _parti(file: Path) -> Iterator[Row]:
    lines = read_bounded(file, MOST_BYTES).decode("utf-8-sig").splitlines()
    # The file quotes nothing: a quotation mark belongs to the prompt.
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        yield row["Prompt"], row.get("Category") or ""


def _hpdv2(file: Path) -> Iterator[Row]:
    prompts = read_json(file, most_bytes=MOST_BYTES)
    if not isinstance(prompts, list):
        raise ValueError("a list of prompts was expected")
    for prompt in prompts:
        yield prompt, file.stem


def _geneval(file: Path) -> Iterator[Row]:
    for line in read_bounded(file, MOST_BYTES).decode("utf-8-sig").splitlines():
        if line.strip():
            row = parse_json(line)
            yield row["prompt"], row["tag"]


def _lines(file: Path) -> Iterator[Row]:
    for line in read_bounded(file, MOST_BYTES).decode("utf-8-sig").splitlines():
        if line.strip():
            yield line.strip(), ""


def _edits(file: Path) -> Iterator[Edit]:
    """Yields prompt and source images of JSON lines; a data set's `pairs.jsonl` is one such file.

    Raises:
        ValueError: A line has no prompt, or names a source that is not there.
    """
    lines = read_bounded(file, MOST_BYTES).decode("utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line)
        prompt = row.get("prompt") if isinstance(row, dict) else None
        source = row.get("source", "") if isinstance(row, dict) else ""
        names = source if isinstance(source, list) else [source] if source != "" else []
        named = all(name and isinstance(name, str) for name in names)
        if not isinstance(prompt, str) or not prompt.strip() or not named:
            raise ValueError(
                f"line {number} is no object with prompt and source: text, and text or a list of it"
            )
        places = [file.parent / name for name in names]
        for place in places:
            if not place.is_file():
                raise ValueError(f"line {number}: source image not found: {place}")
        yield prompt.strip(), tuple(str(place.absolute()) for place in places)


SETS = {
    "pickapic": Source(
        ("data/validation_unique-*.parquet", "validation_unique-*.parquet"), _pickapic, False, 500
    ),
    "parti": Source(("PartiPrompts.tsv",), _parti, False, 1632),
    "hpdv2": Source(tuple(f"{style}.json" for style in STYLES), _hpdv2, True, 3200),
    "geneval": Source(
        ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"), _geneval, False, 553
    ),
    "lines": Source(("prompts.txt",), _lines),
}
