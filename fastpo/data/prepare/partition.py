"""Who may make which part: the stretches of pairs and prompts, agreed on in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastpo.config import Config
from fastpo.data.cache.fingerprint import CacheFingerprint
from fastpo.data.cache.manifest import (
    Manifest,
    Range,
    SourceCount,
    check_identity,
    load_manifest,
)
from fastpo.data.cache.parts import PART, first_part, parts_of
from fastpo.data.sources import PairSource
from fastpo.data.sources.base import PromptTable, SourceImages
from fastpo.errors import CacheError
from fastpo.system.locks import FolderLocks
from fastpo.system.ownership import remove_owned


@dataclass(frozen=True)
class Tables:
    """What pairs share: their texts and the images that edits begin from.

    Attributes:
        texts: What is encoded as text, and which pair has which.
        images: The source images, or None.
        seen: Of texts that are read together with images, of each text their numbers; else None.
    """

    texts: PromptTable
    images: SourceImages | None = None
    seen: Sequence[tuple[int, ...]] | None = None


def partition(
    config: Config,
    identity: CacheFingerprint,
    source: PairSource,
    tables: Tables,
    locks: FolderLocks,
    *,
    stamp: str | None = None,
) -> Manifest:
    """Returns the folder's plan: the one that stands there, extended if need be, or a new one.

    Every process that comes with the same configuration gets the same plan; `stamp` is the data
    set's `source_stamp`, for a new one. A plan of which nothing was encoded gives way to a new one
    unless another process works by it.

    Raises:
        CacheError: The folder's plan is of something else, or other processes are working on one
            with another `data.limit`.
    """
    folder = config.prepare.cache_dir
    with locks.manifest():
        manifest = load_manifest(folder)
        alone, encoded = locks.join(), first_part(folder)
        if manifest is None and encoded is not None:
            raise CacheError(
                f"{folder} holds {encoded.name} but no manifest.json; delete the folder or "
                f"point prepare.cache_dir elsewhere"
            )
        if manifest is None or (alone and encoded is None and not manifest.complete):
            manifest = Manifest(identity=identity.fields, stamp=stamp)
        check_identity(folder, identity.fields, manifest.identity)
        if manifest.complete and manifest.covers(config.data.limit):
            return manifest
        before = manifest.model_copy(deep=True)
        if manifest.source_pairs != len(source):
            _extend(config, manifest, source, tables, locks)
            manifest.sources = _counts(source)
        if not manifest.covers(config.data.limit):
            manifest.limit = config.data.limit
        manifest.report = manifest.report | source.report.as_dict()
        for count, found in zip(manifest.sources, _counts(source), strict=True):
            count.report = count.report | found.report
        manifest.weights = manifest.weights or identity.weights
        if manifest != before:
            manifest.save(folder)
        return manifest


def _counts(source: PairSource) -> list[SourceCount]:
    """Returns the data sets where there are several."""
    counts, stop = [], 0
    for name, part in source.parts.items():
        stop += len(part)
        if name is not None:
            counts.append(SourceCount(name=name, stop=stop, report=part.report.as_dict()))
    return counts


def _extend(
    config: Config,
    manifest: Manifest,
    source: PairSource,
    tables: Tables,
    locks: FolderLocks,
) -> None:
    """Makes the plan span the source, keeping the parts that are done."""
    folder, size = config.prepare.cache_dir, config.prepare.shard_size
    with locks.exclusive() as exclusive:
        if manifest.shards and not exclusive:
            raise CacheError(
                f"another process is preparing {folder} with data.limit {manifest.limit}, here it "
                f"is {config.data.limit}: wait for it, or use the same"
            )
        before = parts_of(manifest)
        done = {part.name for part in before if part.done(folder)}
        images = 0 if tables.images is None else len(tables.images.names)
        totals = {"shard": len(source), "text": len(tables.texts.prompts), "image": images}
        for kind, total in totals.items():
            old = [part for part in before if part.kind == kind]
            spans = partition_ranges(
                total, size, [u.span for u in old], [u.name in done for u in old]
            )
            if kind == "shard":
                manifest.shards = spans
            elif kind == "text":
                manifest.texts = spans
            else:
                manifest.images = spans
        kept = {part.name for part in parts_of(manifest)}
        for name in done - kept:
            remove_owned(folder / name, PART)
    manifest.source_pairs = len(source)
    manifest.limit = config.data.limit
    manifest.complete, manifest.files, manifest.beside = False, {}, {}


def partition_ranges(
    total: int, size: int, planned: Sequence[Range], finished: Sequence[bool]
) -> list[Range]:
    """Returns the stretches that cover `0..total-1`, keeping those that are planned already.

    Args:
        total: What is to be covered.
        size: Length of a new stretch.
        planned: Earlier stretches, in order.
        finished: Which of them are done; those stay even where they reach beyond `total`.
    """
    spans: list[Range] = []
    for span, done in zip(planned, finished, strict=True):
        if span.start >= total:
            break
        spans.append(span if done else Range(start=span.start, stop=min(span.stop, total)))
    start = spans[-1].stop if spans else 0
    spans += [Range(start=s, stop=min(s + size, total)) for s in range(start, total, size)]
    return spans
