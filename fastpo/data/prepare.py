"""Encodes every image and prompt once: data set -> cache, by any number of processes.

    fastpo prepare CONFIG
    torchrun --nproc_per_node 8 -m fastpo prepare CONFIG
    accelerate launch -m fastpo prepare CONFIG
    srun fastpo prepare CONFIG

Processes meet in the cache's folder only, so they may run on several machines, come late, and be
killed at any time. Each reads the source's columns, takes parts that nobody works on, beginning
where its rank lies, and puts each finished part in place by one rename. Whoever finds all parts
there merges them. What a killed process had claimed is free again at once.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.claims import Claims
from fastpo.data.identity import CacheIdentity, cache_identity
from fastpo.data.images import Geometry, PairImages, UnusableImageError, load_pair
from fastpo.data.index import QUARANTINE, merge
from fastpo.data.launcher import Worker
from fastpo.data.manifest import Manifest, check_files, check_identity, load_manifest
from fastpo.data.plan import plan
from fastpo.data.progress import Advance, image_progress
from fastpo.data.shard_builder import ShardBuilder, write_text
from fastpo.data.sources import PairSource, open_source
from fastpo.data.sources.base import PromptTable
from fastpo.data.units import Unit, units_of
from fastpo.encoders import Encoders
from fastpo.errors import CacheError, DataError
from fastpo.types import PreferencePair

POLL_SECONDS = 0.5
"""How long to wait between two looks at parts that other processes are working on."""


def prepare(config: Config, *, progress: bool = True) -> PairCache:
    """Makes the cache of a configuration, continues an unfinished one, or finds it done.

    Returns when the whole cache is there, also the parts that other processes make. A pair with a
    corrupt or missing image, or with images of different aspect ratio, is left out and listed in
    `quarantine.jsonl` with the reason.

    Args:
        config: Everything but `train` and `evaluate` is used.
        progress: Show a progress bar with images/s and time left, in the process of rank 0.

    Returns:
        The opened cache.

    Raises:
        CacheError: The folder holds a cache made from something else, a damaged one, or another
            process is preparing it with another `data.limit`.
        DataError: The data set is missing, wrong, or has no usable pair.
        ModelError: The model is missing, unsupported, or answers with NaN.
    """
    folder, worker = config.prepare.cache_dir, Worker.of_launch()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"prepare.cache_dir: cannot create the folder {folder}: {error}") from None
    manifest = load_manifest(folder)
    identity = cache_identity(config, manifest.weights if manifest else None)
    if manifest is not None:
        check_identity(folder, identity.fields, manifest.identity)
    with Claims(folder) as claims:
        if manifest is None or not (manifest.complete and manifest.covers(config.data.limit)):
            source = open_source(config.data)
            prompts = source.prompt_table()
            manifest = plan(config, identity, source, prompts, claims)
            work = _Work(config, identity, manifest, source, prompts, worker)
            show = progress and worker.rank == 0
            with image_progress(2 * len(source), show=show) as advance:
                work.make_parts(claims, advance)
            with claims.manifest():
                _finish(config, manifest, claims)
        elif manifest.weights != identity.weights:
            _remember(folder, identity, claims)
    cache = PairCache.open(config)
    if config.data.flip_rate > 0 and worker.rank == 0:
        cache.write_flip_mask()
    return cache


@dataclass(frozen=True)
class _Work:
    """What one process needs to make parts of the cache."""

    config: Config
    identity: CacheIdentity
    manifest: Manifest
    source: PairSource
    prompts: PromptTable
    worker: Worker

    @cached_property
    def encoders(self) -> Encoders:
        """VAE and text encoders, loaded with the first part."""
        return Encoders.load(self.config, device=self.worker.device())

    def make_parts(self, claims: Claims, advance: Advance) -> None:
        """Makes what nobody else makes, and waits until all of it is there."""
        folder = self.config.prepare.cache_dir
        units = units_of(self.manifest)
        first = self.worker.rank * len(units) // self.worker.world_size
        left = units[first:] + units[:first]
        while True:
            left = [unit for unit in left if not unit.done(folder)]
            advance.to(self._images(units) - self._images(left))
            if not left:
                return
            made = [self._make(unit, claims, advance) for unit in left]
            if not any(made):
                time.sleep(POLL_SECONDS)

    def _make(self, unit: Unit, claims: Claims, advance: Advance) -> bool:
        """Makes one part, unless it is there or another process is at work on it."""
        folder = self.config.prepare.cache_dir
        if not claims.take(unit.claim):
            return False
        try:
            if unit.done(folder):
                return True
            if unit.kind == "text":
                prompts = self.prompts.prompts[unit.span.start : unit.span.stop]
                write_text(self.config, self.encoders, folder, unit, prompts)
            else:
                self._make_shard(unit, advance)
            return True
        finally:
            claims.give_back(unit.claim)

    def _make_shard(self, unit: Unit, advance: Advance) -> None:
        start, stop = unit.span.start, unit.span.stop
        builder = ShardBuilder(self.config, self.encoders, start)
        loaded = load_ahead(
            self.source.pairs(start, stop),
            self.identity.geometry,
            workers=self.config.prepare.workers,
        )
        numbers = self.prompts.numbers[start:stop].tolist()
        with closing(loaded):
            for number, (pair, images) in zip(numbers, loaded, strict=True):
                builder.add(pair, number, images)
                advance(2)
        builder.write(self.config.prepare.cache_dir, unit)

    def _images(self, units: Iterable[Unit]) -> int:
        pairs = len(self.source)
        shards = (unit.span for unit in units if unit.kind == "shard")
        return 2 * sum(min(span.stop, pairs) - span.start for span in shards)


def _finish(config: Config, manifest: Manifest, claims: Claims) -> None:
    """Merges the parts unless another process has; call it with the manifest claimed."""
    folder = config.prepare.cache_dir
    current = load_manifest(folder)
    if current is None or current.shards != manifest.shards or current.texts != manifest.texts:
        raise CacheError(f"another process changed the plan of {folder}; prepare again")
    if current.complete:
        return
    quarantined = merge(folder, current)
    if not current.pairs:
        raise DataError(
            f"data.path {config.data.path}: none of the {len(quarantined)} pairs is usable; the "
            f"first, {quarantined[0].pair_id}: {quarantined[0].reason} (all: {folder / QUARANTINE})"
        )
    check_files(folder, current.files, verify=False)
    current.complete = True
    current.save(folder)
    if not claims.locks:
        return  # another process may still be making what this one has made
    for name in ("shard-*", "text-*", "*.arrow", "*.json*"):  # what killed processes left
        for leftover in folder.glob(f".{name}.partial-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _remember(folder: Path, identity: CacheIdentity, claims: Claims) -> None:
    """Notes that the model's files were hashed, so that nobody hashes them again."""
    with claims.manifest():
        manifest = load_manifest(folder)
        if manifest is not None:
            manifest.weights = identity.weights
            manifest.save(folder)


def load_ahead(
    pairs: Iterable[PreferencePair], geometry: Geometry, *, workers: int
) -> Generator[tuple[PreferencePair, PairImages | UnusableImageError]]:
    """Yields each pair with its images, or with why it is unusable, in the order given.

    Args:
        pairs: The pairs; taken as they are needed.
        geometry: The image sizes.
        workers: Decoding threads, each with up to four pairs ahead; 0 decodes in the caller's.
    """
    if workers == 0:
        for pair in pairs:
            yield pair, _load(pair, geometry)
        return
    waiting: deque[tuple[PreferencePair, Future[PairImages | UnusableImageError]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for pair in pairs:
            waiting.append((pair, pool.submit(_load, pair, geometry)))
            if len(waiting) > 4 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _load(pair: PreferencePair, geometry: Geometry) -> PairImages | UnusableImageError:
    try:
        return load_pair(pair.winner, pair.loser, geometry)
    except UnusableImageError as error:
        return error
