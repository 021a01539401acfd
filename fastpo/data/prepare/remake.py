"""Parts that must be made again: of a finished cache damaged ones, and those with pairs left out.

Of an unfinished cache parts with pairs left out are made again by themselves where the data were
changed since, so that a command that was refused goes on once they are repaired.

Everything else of the cache stays. On the machine that made it a part gets the bytes that it had;
where another machine rounds differently, the cache's fingerprint changes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpo.config.data import Verify
from fastpo.data.cache.index import INDEX_FILE, PROMPTS_FILE, QUARANTINE
from fastpo.data.cache.manifest import Manifest, damages, load_manifest
from fastpo.data.cache.parts import PART, CachePart, parts_of
from fastpo.data.cache.source_images import IMAGES_FILE
from fastpo.errors import CacheError
from fastpo.system.locks import FolderLocks
from fastpo.system.ownership import remove_owned


@dataclass(frozen=True)
class Lost:
    """What a finished cache lacks.

    Attributes:
        reasons: Why, one line each; empty if nothing is lacking.
        parts: The parts to make again; none where only merging is to be done again.
    """

    reasons: tuple[str, ...] = ()
    parts: tuple[CachePart, ...] = ()


def find_lost(
    folder: Path, manifest: Manifest | None, verify: Verify, *, retry_quarantined: bool
) -> Lost:
    """Looks for damage, and for parts with pairs in quarantine if they are to be tried again.

    Sizes tell a missing or shortened file; with `data.verify: always` all contents are read too.

    Raises:
        CacheError: A part's record, which lists its quarantine, is damaged.
    """
    if manifest is None or not manifest.complete:
        return Lost()
    files = manifest.files | manifest.beside
    found = damages(folder, files, content=verify == "always")
    if verify == "first":
        names = (INDEX_FILE, PROMPTS_FILE, IMAGES_FILE, QUARANTINE)
        merged = [name for name in names if name in files]
        found |= damages(folder, {name: files[name] for name in merged}, content=True)
    broken = {name.partition("/")[0] for name in found}
    parts = [part for part in parts_of(manifest) if part.name in broken]
    reasons = [*found.values()]
    if retry_quarantined:
        left_out = with_quarantine(folder, [p for p in parts_of(manifest) if p.name not in broken])
        parts += left_out
        reasons += left_out.values()
    return Lost(tuple(reasons), tuple(parts))


def with_quarantine(folder: Path, parts: Sequence[CachePart]) -> dict[CachePart, str]:
    """Returns those of finished parts of which something was left out, with a line that says so.

    Raises:
        CacheError: A part's record is damaged.
    """
    what = {"shard": "pair(s)", "text": "prompt(s)", "image": "source image(s)"}
    counts = {part: len(part.record(folder).quarantined) for part in parts}
    return {
        part: f"{folder / part.name}: {n} {what[part.kind]} in quarantine, tried again"
        for part, n in counts.items()
        if n
    }


def try_again(
    folder: Path,
    manifest: Manifest,
    repaired: Sequence[CachePart] | None,
    *,
    tell: bool,
) -> None:
    """Removes parts of an unfinished cache of which something was left out.

    Call it with the manifest claimed, while no other process works by it.

    Args:
        folder: The cache's folder.
        manifest: Its plan.
        repaired: Of shards these alone, of which a pair that was left out has changed; None: all.
        tell: Whether to say on standard error what is made again.

    Raises:
        ForeignPathError: A part holds a file that is not ours.
        CacheError: A part's record is damaged.
    """
    done = [part for part in parts_of(manifest) if part.done(folder)]
    for part, reason in with_quarantine(folder, done).items():
        if part.kind != "shard" or repaired is None or part in repaired:
            if tell:
                print(f"made again: {reason}", file=sys.stderr)
            remove_owned(folder / part.name, PART)


def take_back(
    folder: Path, lost: Lost, locks: FolderLocks, *, source_pairs: int, tell: bool
) -> None:
    """Removes lost parts and marks the cache as unfinished; once, however many processes ask.

    Args:
        folder: The cache's folder.
        lost: What it lacks.
        locks: Its locks.
        source_pairs: Pairs of the data set within the configuration's limit.
        tell: Whether to say on standard error what is made again.

    Raises:
        ForeignPathError: A lost part holds a file that is not ours.
        CacheError: The configuration's limit leaves out pairs that the cache holds.
    """
    with locks.manifest():
        manifest = load_manifest(folder)
        if manifest is None or not manifest.complete:  # another process was here before
            return
        if source_pairs < manifest.source_pairs:
            raise CacheError(
                f"{lost.reasons[0]}; it is made again with the data.limit that the cache was made "
                f"with ({manifest.limit}), here it is smaller"
            )
        if tell:
            for reason in lost.reasons:
                print(f"made again: {reason}", file=sys.stderr)
        for part in lost.parts:
            if locks.acquire(part.lock_number):
                try:
                    remove_owned(folder / part.name, PART)
                finally:
                    locks.release(part.lock_number)
        manifest.complete, manifest.files, manifest.beside = False, {}, {}
        manifest.save(folder)
