"""Encodes every image and prompt once: data set -> cache.

Decoding runs in threads ahead of the encoder. Every shard is complete on disk before the manifest
names it, so a run killed at any moment continues with the next shard.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from fastpo.config import Config
from fastpo.data.cache import PairCache, covers
from fastpo.data.identity import CacheIdentity, cache_identity
from fastpo.data.images import Geometry, PairImages, UnusableImageError, load_pair
from fastpo.data.manifest import Manifest, check_files, check_identity, load_manifest
from fastpo.data.progress import image_progress
from fastpo.data.shard_builder import ShardBuilder
from fastpo.data.shards import prompts_name, read_table
from fastpo.data.sources import open_source
from fastpo.encoders import Encoders
from fastpo.errors import CacheError, DataError
from fastpo.files import lock_folder
from fastpo.types import PreferencePair


def prepare(config: Config, *, progress: bool = True) -> PairCache:
    """Makes the cache of a configuration, continues an unfinished one, or finds it done.

    A pair with a corrupt or missing image, or with images of different aspect ratio, is left out
    and listed in `quarantine.jsonl` with the reason.

    Args:
        config: Everything but `train` and `evaluate` is used.
        progress: Show a progress bar with images/s and time left.

    Returns:
        The opened cache.

    Raises:
        CacheError: The folder holds a cache made from something else, a damaged one, or another
            process is preparing it.
        DataError: The data set is missing, wrong, or has no usable pair.
        ModelError: The model is missing, unsupported, or answers with NaN.
    """
    folder = config.prepare.cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"prepare.cache_dir: cannot create the folder {folder}: {error}") from None
    with lock_folder(folder):
        manifest = load_manifest(folder)
        identity = cache_identity(config, manifest.weights if manifest else None)
        if manifest is None:
            manifest = Manifest(identity=identity.fields)
        check_identity(folder, identity.fields, manifest.identity)
        check_files(folder, manifest, verify=False)
        if not (manifest.complete and covers(manifest, config.data.limit)):
            _build(config, identity, manifest, progress=progress)
        elif manifest.weights != identity.weights:
            manifest.weights = identity.weights
            manifest.save(folder)
    cache = PairCache.open(config)
    if config.data.flip_rate > 0:
        cache.write_flip_mask()
    return cache


def _build(config: Config, identity: CacheIdentity, manifest: Manifest, *, progress: bool) -> None:
    """Adds the missing shards, saving the manifest after each."""
    folder, size = config.prepare.cache_dir, config.prepare.shard_size
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    source = open_source(config.data)
    manifest.weights, manifest.limit = identity.weights, config.data.limit
    manifest.complete = False
    start = manifest.source_pairs
    if start < len(source):
        encoders = Encoders.load(config)
        numbers = _known_prompts(folder, manifest)
        pairs = load_ahead(
            islice(source, start, None), identity.geometry, workers=config.prepare.workers
        )
        with (
            contextlib.closing(pairs),
            image_progress(2 * len(source), done=2 * start, show=progress) as advance,
        ):
            while manifest.source_pairs < len(source):
                builder = ShardBuilder(config, encoders, numbers, manifest.source_pairs)
                for pair, images in islice(pairs, size):
                    builder.add(pair, images)
                    advance(2)
                manifest.shards.append(builder.write(folder, len(manifest.shards)))
                manifest.report = source.report.as_dict()
                manifest.save(folder)
    manifest.report = source.report.as_dict()
    if not any(shard.pairs for shard in manifest.shards):
        first = manifest.quarantined[0]
        raise DataError(
            f"data.path {config.data.path}: none of the {manifest.source_pairs} pairs is usable; "
            f"the first, {first.pair_id}: {first.reason} (all: {folder / 'quarantine.jsonl'})"
        )
    manifest.complete = True
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


def _known_prompts(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Returns the number of every prompt that is encoded already."""
    if not manifest.shards:
        return {}
    table = read_table(folder, [prompts_name(k) for k in range(len(manifest.shards))])
    return {prompt: number for number, prompt in enumerate(table["prompt"].to_pylist())}
