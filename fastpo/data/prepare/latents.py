"""Encodes every image and prompt once: data set -> cache, by any number of processes.

    fastpo prepare CONFIG
    torchrun --nproc_per_node 8 -m fastpo prepare CONFIG
    accelerate launch -m fastpo prepare CONFIG
    srun fastpo prepare CONFIG

Processes meet in the cache's folder only, so they may run on several machines, come late, and be
killed at any time. Each reads the source's columns, makes parts that no other process works on,
beginning where its rank lies, and puts each finished part in place by one rename. The first process
that finds all parts done merges them. A part that a killed process had begun is free again at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.cache.fingerprint import CacheFingerprint, cache_fingerprint
from fastpo.data.cache.index import QUARANTINE, merge
from fastpo.data.cache.manifest import (
    CACHE,
    TRY_AGAIN,
    Manifest,
    Quarantined,
    check_files,
    check_identity,
    load_manifest,
)
from fastpo.data.cache.parts import CachePart, first_part, parts_of
from fastpo.data.images import PairImages, UnusableImageError, load_pair
from fastpo.data.prepare.edits import (
    numbers_of,
    source_image,
    tables_of,
    write_edit_texts,
    write_source_images,
)
from fastpo.data.prepare.encode import ShardBuilder, Shared, write_prompts
from fastpo.data.prepare.partition import Tables, partition
from fastpo.data.prepare.remake import find_lost, take_back, try_again
from fastpo.data.prepare.reuse import EarlierCache, EncodedPair
from fastpo.data.prepare.verify_source import (
    PairDigests,
    check_contents,
    naming,
    pair_digests,
    read_images,
)
from fastpo.data.sources import PairSource, open_source, source_stamps
from fastpo.data.sources.bad_rows import MOST_TOLD, BadRows
from fastpo.errors import CacheError, DataError, TooManyBadRowsError
from fastpo.models.edits import EditEncoders
from fastpo.models.encoders import Encoders
from fastpo.models.folder import ModelFolder
from fastpo.models.geometry import Geometry
from fastpo.system.files import sweep, write_text
from fastpo.system.locks import FolderLocks
from fastpo.system.ownership import claim
from fastpo.system.process import Rank
from fastpo.system.progress import Advance, progress_bar
from fastpo.system.read_ahead import read_ahead
from fastpo.system.retry import retrying
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted
from fastpo.system.work import share_work
from fastpo.types import PreferencePair


@storage_errors()
def prepare(
    config: Config,
    *,
    progress: bool = True,
    model: ModelFolder | None = None,
    retry_quarantined: bool = False,
) -> PairCache:
    """Makes the cache of a configuration, continues an unfinished one, or finds it done.

    Returns when the whole cache is there, also the parts that other processes make. A pair with a
    corrupt or missing image, or with images of different aspect ratio, is left out and listed in
    `quarantine.jsonl` with the reason, as are rows without a caption or label; more of them than
    `data.max_bad` stop the work. Parts of a finished cache that are missing or damaged are
    made again; wrong bytes inside of a file are looked for with `data.verify: always`.

    Args:
        config: Everything but `train` and `evaluate` is used.
        progress: Show a progress bar with images/s and time left, in the process of rank 0.
        model: The folder of the configuration's model; by default it is looked for.
        retry_quarantined: Make those parts again of which pairs were left out; of an unfinished
            cache unless another process is at work on it. Without it this is done where a cache is
            unfinished and what was left out has changed.

    Returns:
        The opened cache.

    Raises:
        CacheError: The folder holds a cache made from something else (also from other images under
            the same names), a damaged one, or another process is preparing it with another
            `data.limit`.
        ConfigError: `prepare.reuse` names the cache that is to be made.
        ForeignPathError: The folder holds other things, and no cache.
        DataError: The data set is missing, wrong, or has no usable pair.
        TooManyBadRowsError: More of its rows are bad than `data.max_bad` allows; what is finished
            is kept.
        ModelError: The model is missing, unsupported, or answers with NaN.
    """
    folder, process = config.prepare.cache_dir, Rank.of_launch()
    manifest = load_manifest(folder)
    try:
        claim(folder, CACHE)
    except OSError as error:
        raise CacheError(f"prepare.cache_dir: cannot create the folder {folder}: {error}") from None
    model = model or ModelFolder.resolve(config.model)
    memo = manifest.weights if manifest and config.data.verify != "always" else None
    identity = cache_fingerprint(config, model, memo)
    if manifest is not None and (manifest.complete or first_part(folder) is not None):
        check_identity(folder, identity.fields, manifest.identity)
    show = progress and process.rank == 0
    with FolderLocks(folder) as locks:
        locks.sweep()
        stamp = _compare(config, locks, show=show, retry=retry_quarantined)
        lost = find_lost(folder, manifest, config.data.verify, retry_quarantined=retry_quarantined)
        done = manifest is not None and manifest.complete and manifest.covers(config.data.limit)
        if lost.reasons or not done:
            earlier = EarlierCache.open(config, identity.fields)
            with _bad_rows_listed(folder):
                source = open_source(config.data)
                tables = tables_of(model.family, source)
                if lost.reasons:
                    take_back(folder, lost, locks, source_pairs=len(source), tell=process.rank == 0)
                manifest = partition(config, identity, source, tables, locks, stamp=stamp)
                work = _Work(config, model, identity, manifest, source, tables, process, earlier)
                with progress_bar(
                    "encoding images", 2 * len(source), unit="images", show=show
                ) as advance:
                    work.make_parts(locks, advance)
                with locks.manifest():
                    _finish(config, manifest, source, locks)
        elif manifest is not None and manifest.weights != identity.weights:
            _remember(folder, identity, locks)
    cache = PairCache.open(config, model=model)
    if config.data.flip_rate > 0 and process.rank == 0:
        cache.write_flip_mask()
    return cache


@dataclass(frozen=True)
class _Work:
    """What one process needs to make parts of the cache."""

    config: Config
    model: ModelFolder
    identity: CacheFingerprint
    manifest: Manifest
    source: PairSource
    tables: Tables
    process: Rank
    earlier: EarlierCache | None

    @cached_property
    def bad(self) -> dict[str | None, BadRows]:
        """Each data set's bad rows, and the pairs that this process found to be bad."""
        return _bad_rows(self.source)

    @cached_property
    def encoders(self) -> Encoders:
        """VAE and text encoders, loaded with the first part."""
        return Encoders.load(self.config, device=self.process.device(), model=self.model)

    def make_parts(self, locks: FolderLocks, advance: Advance) -> None:
        """Makes the parts that no other process makes, and waits until all of them exist."""
        parts = {part.lock_number: part for part in parts_of(self.manifest)}
        share_work(parts, locks, partial(self._make, advance=advance), process=self.process)

    def _make(self, part: CachePart, advance: Advance) -> None:
        """Makes one part, unless it exists."""
        folder = self.config.prepare.cache_dir
        if part.done(folder):
            advance(self._images(part))
        elif part.kind == "text":
            self.encoders.place_texts(self.encoders.device)
            self._make_text(part)
        elif part.kind == "image":
            self.encoders.place_texts("cpu")
            assert self.tables.images is not None, "the plan has source images"
            write_source_images(
                self.config, self._edit_encoders, part, self.tables.images, self.earlier
            )
        else:
            self._make_shard(part, advance)

    def _make_text(self, part: CachePart) -> None:
        if self.tables.seen is not None:
            write_edit_texts(self.config, self._edit_encoders, part, self.tables, self.earlier)
            return
        prompts = self.tables.texts.prompts[part.span.start : part.span.stop]
        write_prompts(self.config, self.encoders, part, prompts, self.earlier)

    @property
    def _edit_encoders(self) -> EditEncoders:
        encoders = self.encoders
        assert isinstance(encoders, EditEncoders), "the family edits"
        return encoders

    def _make_shard(self, part: CachePart, advance: Advance) -> None:
        start, stop = part.span.start, part.span.stop
        self.encoders.place_texts("cpu")
        edits = None if self.tables.images is None else self._edit_encoders
        builder = ShardBuilder(self.config, self.encoders, start, edits=edits is not None)
        loaded = read_ahead(
            partial(_load, geometry=self.identity.geometry, earlier=self.earlier, edits=edits),
            self.source.pairs(start, stop),
            threads=self.config.prepare.workers,
        )
        numbers = [Shared(*both) for both in numbers_of(self.tables, start, stop)]
        parts = list(self.source.parts)
        owners = self.manifest.source_of(np.arange(start, start + len(numbers))).tolist()
        with closing(loaded):
            each = zip(numbers, owners, loaded, strict=True)
            for number, owner, (pair, digests, images) in each:
                builder.add(pair, number, digests, images)
                if isinstance(images, UnusableImageError) and images.kind == "bad":
                    name = parts[owner]
                    self.bad[name].add(pair.pair_id, str(images))
                    self.bad[name].check(self.source.parts[name].report.rows)
                advance(2)
        builder.write(self.config.prepare.cache_dir, part)

    def _images(self, part: CachePart) -> int:
        """Images of a part within `data.limit`."""
        if part.kind != "shard":
            return 0
        return 2 * (min(part.span.stop, len(self.source)) - part.span.start)


def _bad_rows(source: PairSource) -> dict[str | None, BadRows]:
    """Returns by data set the rows that are no pair."""
    return {name: part.bad.without_pairs() for name, part in source.parts.items()}


@contextmanager
def _bad_rows_listed(folder: Path) -> Iterator[None]:
    """Lists bad rows beside an unfinished cache where they are too many to be told in an error."""
    try:
        yield
    except TooManyBadRowsError as error:
        manifest = load_manifest(folder)
        if len(error.rows) <= MOST_TOLD or (manifest is not None and manifest.complete):
            raise
        rows = (Quarantined(pair_id=place, reason=reason) for place, reason in error.rows)
        write_text(folder / QUARANTINE, "".join(row.model_dump_json() + "\n" for row in rows))
        raise TooManyBadRowsError(f"{error} (all: {folder / QUARANTINE})", error.rows) from None


def _finish(config: Config, manifest: Manifest, source: PairSource, locks: FolderLocks) -> None:
    """Merges the parts unless another process has; call it with the manifest claimed."""
    folder = config.prepare.cache_dir
    current = load_manifest(folder)
    if current is None or current.shards != manifest.shards or current.texts != manifest.texts:
        raise CacheError(f"another process changed the plan of {folder}; prepare again")
    if current.complete:
        return
    bad = _bad_rows(source)
    rows = [
        Quarantined(pair_id=row.place, reason=row.reason, source=name)
        for name, of_part in bad.items()
        for row in of_part.kept
    ]
    quarantined = merge(folder, current, rows)
    # Data sets on this disk show that they were changed; others do not.
    again = "" if current.stamp else f"; once they are repaired, {TRY_AGAIN} takes them"
    if not current.pairs:
        raise DataError(
            f"data.path {config.data.title}: none of {counted(len(quarantined), 'pair')} is "
            f"usable; the first, {quarantined[0].pair_id}: {quarantined[0].reason} (all: "
            f"{folder / QUARANTINE}){again}"
        )
    for pair in quarantined[: len(quarantined) - len(rows)]:
        if pair.kind == "bad":
            bad[pair.source].add(pair.pair_id, pair.reason)
    for name, of_part in bad.items():
        of_part.check(source.parts[name].report.rows, again)
    check_files(folder, current.files, verify=False)
    current.complete = True
    current.save(folder)
    # Without locks another process may still be making what this one has made.
    sweep(folder, sole_writer=locks.supported)


def _remember(folder: Path, identity: CacheFingerprint, locks: FolderLocks) -> None:
    """Notes that the model's files were hashed, so that nobody hashes them again."""
    with locks.manifest():
        manifest = load_manifest(folder)
        if manifest is not None:
            manifest.weights = identity.weights
            manifest.save(folder)


def _compare(config: Config, locks: FolderLocks, *, show: bool, retry: bool) -> str | None:
    """Compares pairs where the data set's files are not as they were; see `check_contents`.

    Of an unfinished cache what was left out and has changed, or with `retry` all of it, is to be
    made again.

    Returns:
        The data set's stamp.

    Raises:
        CacheError: As `check_contents`.
    """
    folder, workers = config.prepare.cache_dir, config.prepare.workers
    tell = Rank.of_launch().rank == 0
    stamps = source_stamps(config.data)
    stamp = None if stamps is None else stamps[0]
    with locks.manifest():
        manifest = load_manifest(folder)
        if manifest is None:
            return stamp
        open_to_change = not manifest.complete and locks.idle()
        if retry and open_to_change:
            try_again(folder, manifest, None, tell=tell)
        if stamps is None or manifest.stamp in stamps:
            return stamp
        source = open_source(config.data)
        repaired = check_contents(folder, manifest, source, workers=workers, show=show)
        if open_to_change:
            try_again(folder, manifest, repaired, tell=tell)
        elif not manifest.complete:
            return stamp  # the next command, with no other at work, compares again
        if len(source) >= manifest.source_pairs:  # all of them were compared
            manifest.stamp = stamp
            manifest.save(folder)
    return stamp


def _load(
    pair: PreferencePair,
    geometry: Geometry,
    earlier: EarlierCache | None,
    *,
    edits: EditEncoders | None,
) -> tuple[PreferencePair, PairDigests, PairImages | EncodedPair | UnusableImageError]:
    """Reads and decodes a pair's images, or says why they are unusable; with its digests.

    Images that an earlier cache holds encoded are not decoded.

    Raises:
        DataError: A fault of the machine did not pass.
    """
    winner, loser, *source = read_images(pair, edits=edits is not None)
    digests = pair_digests(pair, winner, loser, *source)
    give = partial(_give, winner), partial(_give, loser)
    try:
        if pair.fault is not None:
            raise UnusableImageError(pair.fault)
        for image in source:  # its latents stand in a part of their own, which reads it again
            assert edits is not None, "there are source images"
            source_image(image, edits)
        known = earlier.pair(digests) if earlier and winner != loser else None
        if known is not None:
            return pair, digests, known
        with naming(pair, "decoding its images"):
            images = retrying(partial(load_pair, *give, geometry))
        if winner == loser:
            raise UnusableImageError("winner and loser are the same image", "same")
    except UnusableImageError as error:
        return pair, digests, error
    return pair, digests, images


def _give(image: bytes | OSError) -> bytes:
    if isinstance(image, OSError):
        raise image
    return image
