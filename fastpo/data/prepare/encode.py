"""Encodes the pairs of one shard, and the prompts of one text part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.data.cache.checks import ROWS
from fastpo.data.cache.manifest import Quarantined
from fastpo.data.cache.parts import (
    INDEX,
    LATENTS,
    MORE_SOURCES,
    PROMPT_SCHEMA,
    PROMPTS,
    SOURCE_IMAGE,
    TEXT,
    WEIGHT,
    CachePart,
    Digests,
    index_schema,
    rows_writer,
    table_writer,
    tensor_writer,
)
from fastpo.data.cache.texts import without_padding
from fastpo.data.images import PairImages, UnusableImageError, to_model_range
from fastpo.data.prepare.reuse import EarlierCache, EncodedPair, in_order
from fastpo.data.prepare.verify_source import PairDigests
from fastpo.errors import CacheError, ConfigError, ModelError, NonFiniteLatentsError
from fastpo.models.encoders import Encoders
from fastpo.precision import DTYPES
from fastpo.system.retry import is_out_of_memory
from fastpo.types import PreferencePair


@dataclass(frozen=True)
class _Waiting:
    """A pair that waits for its batch: with pixels, or with latents of an earlier cache."""

    name: str
    pixels: Tensor | None = None
    latents: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """What a pair has in common with others, by number.

    Attributes:
        text: Of its text.
        sources: Of the images that it begins from, in its order; none where it is no edit.
    """

    text: int
    sources: tuple[int, ...] = ()


class ShardBuilder:
    """Collects pairs by image size and encodes them in batches of one size.

    Batches never reach into another shard, so it does not matter who encodes which shard, or after
    how many interruptions.
    """

    def __init__(
        self, config: Config, encoders: Encoders, position: int, *, edits: bool = False
    ) -> None:
        """Starts an empty shard.

        Args:
            config: Gives the batch size and the stored dtype.
            encoders: VAE and text encoders.
            position: Position in the source of the first pair.
            edits: Whether pairs begin from a source image.
        """
        self._encoders, self._edits = encoders, edits
        self._position = position
        self._batch_size = config.prepare.batch_size
        self._dtype = DTYPES[config.prepare.store_precision]
        self._waiting: dict[tuple[int, int], list[_Waiting]] = defaultdict(list)
        self._slots: dict[str, int] = defaultdict(int)
        self._latents: dict[str, list[Tensor]] = defaultdict(list)
        self._rows: list[dict[str, Any]] = []
        self._quarantined: dict[int, Quarantined] = {}
        self._digests: list[PairDigests] = []

    def add(
        self,
        pair: PreferencePair,
        shared: Shared,
        digests: PairDigests,
        images: PairImages | EncodedPair | UnusableImageError,
    ) -> None:
        """Takes the next pair of the source; an unusable one goes to the quarantine.

        Args:
            pair: The pair.
            shared: Its text and source images.
            digests: What it is made from.
            images: Both images, or what an earlier cache holds of them, or why there are none.
        """
        position, self._position = self._position, self._position + 1
        self._digests.append(digests)
        if isinstance(images, UnusableImageError):
            left_out = Quarantined(pair_id=pair.pair_id, reason=str(images), kind=images.kind)
            self._quarantined[position] = left_out
            return
        factor = self._encoders.vae_factor
        if isinstance(images, EncodedPair):
            height, width = images.latents.shape[-2:]
            waiting = _Waiting(pair.pair_id, latents=images.latents)
        else:
            height, width = (side // factor for side in images.pixels.shape[-2:])
            waiting = _Waiting(pair.pair_id, pixels=images.pixels)
        size = height * factor, width * factor
        shape = f"{height}x{width}"
        self._rows.append(
            {
                "pair_id": pair.pair_id,
                "position": position,
                "prompt": shared.text,
                SOURCE_IMAGE: shared.sources[0] if shared.sources else None,
                MORE_SOURCES: list(shared.sources[1:]),
                "height": height,
                "width": width,
                "slot": self._slots[shape],
                "add_time_ids": images.add_time_ids,
                WEIGHT: pair.weight,
            }
        )
        self._slots[shape] += 1
        self._waiting[size].append(waiting)
        if 2 * sum(one.pixels is not None for one in self._waiting[size]) >= self._batch_size:
            self._encode(size)

    def write(self, folder: Path, part: CachePart) -> None:
        """Encodes what is left and puts the shard in place."""
        for size in list(self._waiting):
            self._encode(size)
        latents = {name: torch.cat(parts) for name, parts in self._latents.items()}
        writers = {
            LATENTS: tensor_writer(latents),
            ROWS: rows_writer(LATENTS, latents),
            INDEX: table_writer(self._rows, index_schema(self._rows, edits=self._edits)),
        }
        digests = Digests(
            "".join(one.content for one in self._digests),
            "".join(one.winner + one.loser for one in self._digests),
        )
        part.write(folder, writers, self._quarantined, digests)

    def _encode(self, size: tuple[int, int]) -> None:
        """Encodes the waiting pairs of one image size that no earlier cache has."""
        waiting = self._waiting.pop(size)
        encoded = iter(self._latents_of(size, waiting))
        latents = torch.stack([next(encoded) if w.latents is None else w.latents for w in waiting])
        self._latents[f"{latents.shape[-2]}x{latents.shape[-1]}"].append(latents)

    def _latents_of(self, size: tuple[int, int], waiting: Sequence[_Waiting]) -> Sequence[Tensor]:
        """Returns the latents of those pairs that have pixels, each `(2, 2, C, h, w)`."""
        names = [one.name for one in waiting if one.pixels is not None]
        pairs = [one.pixels for one in waiting if one.pixels is not None]
        if not pairs:
            return ()
        pixels = torch.stack(pairs).flatten(0, 1)
        encoded = []
        for number, part in enumerate(pixels.split(self._batch_size)):
            images = to_model_range(part.to(self._encoders.device))
            try:
                with enough_memory(
                    f"{len(images)} images of {size[1]}x{size[0]}", self._batch_size
                ):
                    encoded.append(self._encoders.encode_images(images))
            except NonFiniteLatentsError as error:
                rows = (number * self._batch_size + row for row in error.rows)
                bad = ", ".join(dict.fromkeys(names[row // 2] for row in rows))
                raise ModelError(f"{error}; seen in the pairs {bad}") from None
        statistics = []
        for name, parts in zip(("mean", "logvar"), zip(*encoded, strict=True), strict=True):
            values = store(torch.cat(parts), self._dtype, f"latent {name}")
            statistics.append(values.unflatten(0, (len(pairs), 2)))
        return torch.stack(statistics, dim=1).unbind()


def write_prompts(
    config: Config,
    encoders: Encoders,
    part: CachePart,
    prompts: Sequence[str],
    earlier: EarlierCache | None = None,
) -> None:
    """Encodes a text part's prompts, but for those of an earlier cache, and puts it in place."""
    folder = config.prepare.cache_dir
    size, dtype = config.prepare.batch_size, DTYPES[config.prepare.store_precision]
    known = earlier.prompts(prompts) if earlier else {}
    unknown = [prompt for prompt in prompts if prompt not in known]
    encoded: dict[str, list[Tensor]] = defaultdict(list)
    with enough_memory(f"{min(size, len(unknown))} prompts", size):
        for conditions in encoders.encode_batches(unknown, size):
            for name, values in conditions.items():
                encoded[name].append(store(values, dtype, name))
    new = {name: torch.cat(parts) for name, parts in encoded.items()}
    text = without_padding(in_order(prompts, known, new))
    rows = [{"prompt": prompt} for prompt in prompts]
    writers = {
        TEXT: tensor_writer(text),
        ROWS: rows_writer(TEXT, text),
        PROMPTS: table_writer(rows, PROMPT_SCHEMA),
    }
    part.write(folder, writers, cut=encoders.count_cut(prompts))


@contextmanager
def enough_memory(what: str, batch_size: int) -> Iterator[None]:
    """Says what to lower where there is too little memory; finished parts stay.

    Args:
        what: What is computed.
        batch_size: `prepare.batch_size`.

    Raises:
        ConfigError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"prepare.batch_size: out of memory over {what}; lower it (it is {batch_size}), or set "
            "prepare.vae_precision and prepare.text_precision to bf16. What is finished is kept, "
            "and the same command continues"
        ) from error


def store(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns values in the stored dtype on the CPU; integers and masks keep their own.

    Raises:
        CacheError: They do not fit into it.
    """
    stored = values.to(dtype if values.is_floating_point() else values.dtype).cpu()
    if not bool(torch.isfinite(stored).all()):
        raise CacheError(
            f"a {name} value of {values.abs().max().item():g} does not fit into {dtype}; "
            f"set prepare.store_precision to bf16 or fp32"
        )
    return stored
