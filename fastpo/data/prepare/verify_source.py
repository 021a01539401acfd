"""Whether the data set still holds what a cache was made from.

A cache's identity holds the listing, not the images: training reads none, and may run where there
are none. Preparing again looks at the names, sizes and times of change of the data set's files,
which takes as long as scanning its labels: 5 s for 100,000 pairs of loose files. While they are as
they were, so is the content. Where they are not (a copied data set, an edited image) every pair is
read once and held against the digest that was written down when it was encoded.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastpo.data.cache.manifest import Manifest
from fastpo.data.cache.parts import DIGITS, CachePart, parts_of
from fastpo.data.sources import PairSource
from fastpo.errors import CacheError, DataError, one_line
from fastpo.system.progress import progress_bar
from fastpo.system.read_ahead import read_ahead
from fastpo.system.retry import is_out_of_memory, retrying
from fastpo.types import PreferencePair


@dataclass(frozen=True)
class PairDigests:
    """What a pair is made from, each as `DIGITS` hexadecimal digits of BLAKE2b.

    Attributes:
        content: Of its name, prompt and images, with their lengths, and of its weight if it has
            one.
        winner: Of the winner's bytes.
        loser: Of the loser's.
    """

    content: str
    winner: str
    loser: str


def pair_digests(pair: PreferencePair, *images: bytes | OSError) -> PairDigests:
    """Returns the digests of a pair; an image that cannot be read counts as such.

    Args:
        pair: The pair.
        images: Winner, loser and, of an edit, the images that it begins from.
    """
    sides = [readable(image) for image in images]
    content = _digest()
    for data in (pair.pair_id.encode(), pair.prompt.encode(), *sides):
        content.update(len(data).to_bytes(8, "little") + data)
    if pair.weight is not None:
        content.update(f"pair_weight {pair.weight!r}".encode())
    return PairDigests(content.hexdigest(), *map(image_digest, sides[:2]))


def readable(image: bytes | OSError) -> bytes:
    """Returns what an image counts as in digests."""
    return b"unreadable" if isinstance(image, OSError) else image


def image_digest(image: bytes | OSError) -> str:
    """Returns `DIGITS` hexadecimal digits of an image's bytes."""
    return _digest(readable(image)).hexdigest()


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=DIGITS // 2)


BAD = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EFBIG,
        errno.EINVAL,
    )
)
"""What is wrong with a data set, and stays so; everything else is of the machine."""


def read_image(read: Callable[[], bytes]) -> bytes | OSError:
    """Returns an image's bytes, or why there is no such file; faults that may pass are retried.

    Raises:
        OSError: A fault of the machine that did not pass, or a file that may not be read.
        MemoryError: There is none left for it.
    """
    try:
        return retrying(read)
    except OSError as error:
        if error.errno not in BAD:
            raise
        return error


@contextmanager
def naming(pair: PreferencePair, what: str) -> Iterator[None]:
    """Turns a fault of the machine into an error that names the pair it was met at.

    Raises:
        DataError: Nothing was left out for it; the same command goes on.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        text = one_line(error) or "out of memory"
        advice = "; lower prepare.workers" if is_out_of_memory(error) else ""
        raise DataError(
            f"pair {pair.pair_id}: {what} failed and went on failing: {text}{advice}. The pair was "
            f"not left out; run the same command again, it continues"
        ) from error


def check_contents(
    folder: Path, manifest: Manifest, source: PairSource, *, workers: int, show: bool
) -> list[CachePart]:
    """Reads the pairs of the finished shards and holds them against what was encoded.

    Passed over are pairs beyond the source's limit, pairs in quarantine, of which the cache holds
    nothing, and shards of versions that kept no digests.

    Args:
        folder: The cache's folder.
        manifest: Its plan.
        source: The data set, scanned.
        workers: Reading threads.
        show: Show a progress bar.

    Returns:
        The shards of which a pair in quarantine has changed.

    Raises:
        CacheError: Pairs differ; the text names the first of them.
    """
    changed: list[str] = []
    repaired: dict[CachePart, None] = {}
    done = [u for u in parts_of(manifest) if u.kind == "shard" and u.done(folder)]
    with progress_bar("comparing images", len(source), unit="pairs", show=show) as advance:
        for part in done:
            record, start = part.record(folder), part.span.start
            known = record.contents
            stop = min(part.span.stop, len(source))
            if not known or start >= stop:
                continue
            read = partial(_content_of, edits=bool(manifest.images))
            pairs = read_ahead(read, source.pairs(start, stop), threads=workers)
            for place, (name, content) in enumerate(pairs):
                same = content == known[DIGITS * place :][:DIGITS]
                if not same and start + place in record.quarantined:
                    repaired[part] = None
                elif not same:
                    changed.append(name)
                advance(1)
    what = "pair(s) of {} have other images or prompts than those"
    if not changed:
        what = "source image(s) of {} are others than those"
        changed = _changed_sources(folder, manifest, source, workers=workers)
    if changed:
        names = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
        raise CacheError(
            f"{len(changed)} {what.format(source.where)} the cache {folder} was made from: "
            f"{names}. Restore them, or point prepare.cache_dir at a new folder and prepare again"
        )
    return list(repaired)


def _changed_sources(
    folder: Path, manifest: Manifest, source: PairSource, *, workers: int
) -> list[str]:
    """Returns the names of images that pairs begin from and that are not those encoded.

    Looked at are those of parts without a shard yet: a finished cache's pairs tell of them.
    """
    done = [part for part in parts_of(manifest) if part.done(folder)]
    encoded = [part for part in done if part.kind == "image"]
    shards = sum(part.kind == "shard" for part in done)
    if not encoded or shards == len(manifest.shards):
        return []
    images = source.source_images()
    if images is None:
        return [part.name for part in encoded]
    changed = []
    for part in encoded:
        record, start = part.record(folder), part.span.start
        numbers = range(start, min(part.span.stop, len(images.names)))
        read = [partial(images.read, number) for number in numbers]
        found = read_ahead(_image_content, read, threads=workers)
        for number, digest in zip(numbers, found, strict=True):
            same = digest == record.contents[DIGITS * (number - start) :][:DIGITS]
            if record.contents and not same and number not in record.quarantined:
                changed.append(images.names[number])
    return changed


def _image_content(read: Callable[[], bytes]) -> str:
    return image_digest(read_image(read))


def _content_of(pair: PreferencePair, *, edits: bool) -> tuple[str, str]:
    return pair.pair_id, pair_digests(pair, *read_images(pair, edits=edits)).content


def read_images(pair: PreferencePair, *, edits: bool) -> list[bytes | OSError]:
    """Reads winner, loser and, of an edit, the images that it begins from; see `read_image`.

    Raises:
        DataError: A fault of the machine did not pass.
    """
    readers = [pair.winner, pair.loser, *(pair.source_images if edits else ())]
    with naming(pair, "reading its images"):
        return [read_image(reader) for reader in readers]
