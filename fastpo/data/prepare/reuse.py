"""Rows of an earlier cache, copied instead of encoded again: for data that grew or changed.

A pair is known by the bytes of its two images, in either order, a prompt by its text, and of edits
a source image by its bytes and a prompt that is read with source images by its text and theirs;
names, lines and labels may have changed. The earlier cache is read only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import Manifest, differing_fields, is_of_data, load_manifest
from fastpo.data.cache.parts import DIGITS, parts_of
from fastpo.data.prepare.verify_source import PairDigests
from fastpo.errors import CacheError, ConfigError


@dataclass(frozen=True)
class EncodedPair:
    """What an earlier cache holds of a pair.

    Attributes:
        latents: `(2, 2, C, h, w)`: mean and log-variance, each of winner and loser, as stored.
        add_time_ids: See `fastpo.data.images.PairImages`.
    """

    latents: Tensor
    add_time_ids: tuple[float, ...]


class EarlierCache:
    """Finds pairs and prompts in a finished cache; any number of threads may ask."""

    def __init__(
        self,
        cache: PairCache,
        pairs: dict[str, int],
        sources: Sequence[str] = (),
        *,
        by_image: bool,
    ) -> None:
        """Use `EarlierCache.open`.

        Args:
            cache: The cache.
            pairs: Position in it by digests: of winner and loser, or of the whole content.
            sources: Digests of the images that edits begin from, by their numbers.
            by_image: Which digests pairs are known by.
        """
        self._cache, self._pairs, self._by_image = cache, pairs, by_image
        self._prompts = {prompt: number for number, prompt in enumerate(cache.prompts)}
        self._digests = sources
        self._sources = {digest: number for number, digest in enumerate(sources)}

    @classmethod
    def open(cls, config: Config, identity: dict[str, str]) -> EarlierCache | None:
        """Opens the cache that `prepare.reuse` names, if it names one.

        Args:
            config: The configuration.
            identity: Of the cache to be made; all of it but the data must be the earlier one's.

        Raises:
            ConfigError: It is the folder of the cache that is to be made.
            CacheError: It is missing, unfinished, damaged, or was encoded otherwise.
        """
        folder = config.prepare.reuse
        if folder is None:
            return None
        if folder.resolve() == config.prepare.cache_dir.resolve():
            raise ConfigError(
                f"prepare.reuse: {folder} is prepare.cache_dir itself; point prepare.cache_dir at "
                "a new folder"
            )
        manifest = load_manifest(folder)
        if manifest is None or not manifest.complete:
            what = "no prepared cache" if manifest is None else "an unfinished cache"
            raise CacheError(f"prepare.reuse: {what} in {folder}")
        lines = [
            line for line in differing_fields(identity, manifest.identity) if not is_of_data(line)
        ]
        if lines:
            raise CacheError(f"prepare.reuse: {folder} was encoded otherwise: {'; '.join(lines)}")
        data = config.data.model_copy(update={"limit": None, "flip_rate": 0.0})
        whole = config.model_copy(update={"data": data})
        cache = PairCache(folder, manifest, whole, ("add_time_ids",))
        digests, by_image = _digests(cache, manifest)
        positions = cache.positions.tolist()
        pairs = {digests[position]: row for row, position in enumerate(positions)}
        sources = "".join(
            part.record(folder).contents for part in parts_of(manifest) if part.kind == "image"
        )
        return cls(cache, pairs, _cut(sources, DIGITS), by_image=by_image)

    def pair(self, digests: PairDigests) -> EncodedPair | None:
        """Returns what is known of a pair, or None.

        Raises:
            CacheError: Its row is damaged.
        """
        turned = False
        if self._by_image:
            row = self._pairs.get(digests.winner + digests.loser)
            if row is None:
                row, turned = self._pairs.get(digests.loser + digests.winner), True
        else:
            row = self._pairs.get(digests.content)
        if row is None:
            return None
        latents = self._cache.encoded(row, turned=turned)
        return EncodedPair(latents, self._cache.pair_condition("add_time_ids", row))

    def prompts(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Returns the conditions of those prompts that are known, each `(1, ...)` as stored.

        Raises:
            CacheError: A row is damaged.
        """
        known = {prompt: self._prompts[prompt] for prompt in prompts if prompt in self._prompts}
        return {prompt: self._cache.prompt_conditions(number) for prompt, number in known.items()}

    @cached_property
    def _edits(self) -> dict[tuple[str, ...], int]:
        """Numbers of texts by prompt and digests of the images that they are read with."""
        found = {}
        for row, text in enumerate(self._cache.prompt_index.tolist()):
            digests = (self._digests[number] for number in self._cache.sources_of(row))
            found[self._cache.prompts[text], *digests] = text
        return found

    def source(self, digest: str) -> Tensor | None:
        """Returns the latents of a source image as stored, `(C, h, w)`, or None.

        Args:
            digest: Of its bytes.

        Raises:
            CacheError: Its row is damaged.
        """
        number = self._sources.get(digest)
        return None if number is None else self._cache.source_latents(number)

    def edit(self, prompt: str, digests: Iterable[str]) -> dict[str, Tensor] | None:
        """Returns the conditions of a prompt that is read with source images, or None.

        Args:
            prompt: The prompt.
            digests: Of the images' bytes, in their order.

        Raises:
            CacheError: A row is damaged.
        """
        number = self._edits.get((prompt, *digests))
        return None if number is None else self._cache.prompt_conditions(number)


def _digests(cache: PairCache, manifest: Manifest) -> tuple[list[str], bool]:
    """Returns by position in the source the digests, and whether they are of the images."""
    records = [part.record(cache.folder) for part in parts_of(manifest) if part.kind == "shard"]
    sizes = [record.span.stop - record.span.start for record in records]
    if all(len(r.images) == 2 * DIGITS * n for r, n in zip(records, sizes, strict=True)):
        return _cut("".join(record.images for record in records), 2 * DIGITS), True
    if all(len(r.contents) == DIGITS * n for r, n in zip(records, sizes, strict=True)):
        return _cut("".join(record.contents for record in records), DIGITS), False
    raise CacheError(
        f"prepare.reuse: {cache.folder} was made by a version that kept no digests of its pairs; "
        f"prepare again without it"
    )


def _cut(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def in_order(
    prompts: Sequence[str],
    known: dict[str, dict[str, Tensor]],
    encoded: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Returns the conditions of prompts, each `(prompts, ...)`.

    Args:
        prompts: The prompts.
        known: Conditions of some of them, by prompt.
        encoded: Those of the others, in their order.
    """
    if not known:
        return encoded
    names = list(next(iter(known.values())))
    rows = {name: iter(encoded[name].split(1)) for name in names if name in encoded}
    return {
        name: torch.cat([known[p][name] if p in known else next(rows[name]) for p in prompts])
        for name in names
    }
