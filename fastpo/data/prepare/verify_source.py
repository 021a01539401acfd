"""Whether the data set still holds what a cache was made from.

A cache's identity holds the listing, not the images: training reads none, and may run where there
are none. Preparing again looks at the names, sizes and times of change of the data set's files,
which takes as long as scanning its labels: 5 s for 100,000 pairs of loose files. While they are as
they were, so is the content. Where they are not (a copied data set, an edited image) every pair is
read once and held against the digest that was written down when it was encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fastpo.data.cache.manifest import Manifest
from fastpo.data.cache.parts import parts_of
from fastpo.data.sources import PairSource
from fastpo.errors import CacheError
from fastpo.system.progress import progress_bar
from fastpo.system.read_ahead import read_ahead
from fastpo.types import PreferencePair

DIGITS = 16


def pair_content(pair: PreferencePair, winner: bytes | OSError, loser: bytes | OSError) -> str:
    """Returns `DIGITS` hexadecimal digits of a pair's name, prompt and images."""
    digest = hashlib.blake2b(digest_size=DIGITS // 2)
    for part in (pair.pair_id.encode(), pair.prompt.encode(), winner, loser):
        data = b"unreadable" if isinstance(part, OSError) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read_image(read: Callable[[], bytes]) -> bytes | OSError:
    """Returns an image's bytes, or why it cannot be read."""
    try:
        return read()
    except OSError as error:
        return error


def check_contents(
    folder: Path, manifest: Manifest, source: PairSource, *, workers: int, show: bool
) -> None:
    """Reads the pairs of the finished shards and holds them against what was encoded.

    Pairs beyond the source's limit, and shards of versions that kept no digests, are passed over.

    Args:
        folder: The cache's folder.
        manifest: Its plan.
        source: The data set, scanned.
        workers: Reading threads.
        show: Show a progress bar.

    Raises:
        CacheError: Pairs differ; the text names the first of them.
    """
    changed: list[str] = []
    done = [u for u in parts_of(manifest) if u.kind == "shard" and u.done(folder)]
    with progress_bar("comparing images", len(source), unit="pairs", show=show) as advance:
        for part in done:
            known, start = part.record(folder).contents, part.span.start
            stop = min(part.span.stop, len(source))
            if not known or start >= stop:
                continue
            pairs = read_ahead(_content_of, source.pairs(start, stop), threads=workers)
            for place, (name, content) in enumerate(pairs):
                if content != known[DIGITS * place :][:DIGITS]:
                    changed.append(name)
                advance(1)
    if changed:
        names = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
        raise CacheError(
            f"{len(changed)} pair(s) of {source.config.path} have other images or prompts than "
            f"those the cache {folder} was made from: {names}. Restore them, or point "
            "prepare.cache_dir at a new folder and prepare again"
        )


def _content_of(pair: PreferencePair) -> tuple[str, str]:
    return pair.pair_id, pair_content(pair, read_image(pair.winner), read_image(pair.loser))
