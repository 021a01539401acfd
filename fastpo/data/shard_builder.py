"""Encodes one shard's pairs and prompts and writes it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.data.images import PairImages, UnusableImageError, to_model_range
from fastpo.data.manifest import Quarantined, ShardRecord
from fastpo.data.shards import write_shard
from fastpo.encoders import DTYPES, Encoders
from fastpo.errors import CacheError
from fastpo.types import PreferencePair, pair_key


class ShardBuilder:
    """Collects pairs by image size and encodes them in batches of one size.

    Batches never reach into another shard, so an interrupted and continued preparation encodes
    the same batches as an uninterrupted one.
    """

    def __init__(
        self, config: Config, encoders: Encoders, numbers: dict[str, int], position: int
    ) -> None:
        """Starts an empty shard.

        Args:
            config: Gives the batch size and the stored dtype.
            encoders: VAE and text encoders.
            numbers: Number of every known prompt; new ones are added to it.
            position: Position in the source of the first pair.
        """
        self._encoders = encoders
        self._numbers = numbers
        self._start = self._position = position
        self._batch_size = config.prepare.batch_size
        self._dtype = DTYPES[config.prepare.store_precision]
        self._waiting: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._slots: dict[str, int] = defaultdict(int)
        self._latents: dict[str, list[Tensor]] = defaultdict(list)
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[str] = []
        self._quarantined: list[Quarantined] = []
        self._number_of("")

    def add(self, pair: PreferencePair, images: PairImages | UnusableImageError) -> None:
        """Takes the next pair of the source; an unusable one goes to the quarantine."""
        position, self._position = self._position, self._position + 1
        if isinstance(images, UnusableImageError):
            self._quarantined.append(Quarantined(pair_id=pair.pair_id, reason=str(images)))
            return
        size = images.pixels.shape[-2], images.pixels.shape[-1]
        height, width = (side // self._encoders.vae_factor for side in size)
        shape = f"{height}x{width}"
        self._rows.append(
            {
                "pair_id": pair.pair_id,
                "pair_key": pair_key(pair.pair_id),
                "position": position,
                "prompt": self._number_of(pair.prompt),
                "height": height,
                "width": width,
                "slot": self._slots[shape],
                "add_time_ids": images.add_time_ids,
            }
        )
        self._slots[shape] += 1
        self._waiting[size].append(images.pixels)
        if 2 * len(self._waiting[size]) >= self._batch_size:
            self._encode(size)

    def write(self, folder: Path, number: int) -> ShardRecord:
        """Encodes what is left and writes the shard's files."""
        for size in list(self._waiting):
            self._encode(size)
        latents = {name: torch.cat(parts) for name, parts in self._latents.items()}
        files = write_shard(
            folder,
            number,
            latents=latents,
            text=self._encode_prompts(),
            prompts=self._prompts,
            rows=self._rows,
        )
        return ShardRecord(
            source_pairs=self._position - self._start,
            pairs=len(self._rows),
            prompts=len(self._prompts),
            files=files,
            quarantined=self._quarantined,
        )

    def _number_of(self, prompt: str) -> int:
        if prompt not in self._numbers:
            self._numbers[prompt] = len(self._numbers)
            self._prompts.append(prompt)
        return self._numbers[prompt]

    def _encode(self, size: tuple[int, int]) -> None:
        """Encodes the waiting pairs of one image size."""
        pairs = self._waiting.pop(size)
        pixels = torch.stack(pairs).flatten(0, 1)
        encoded = [
            self._encoders.encode_images(to_model_range(part.to(self._encoders.device)))
            for part in pixels.split(self._batch_size)
        ]
        for name, parts in zip(("mean", "logvar"), zip(*encoded, strict=True), strict=True):
            values = self._store(torch.cat(parts), f"latent {name}")
            key = f"{values.shape[-2]}x{values.shape[-1]}.{name}"
            self._latents[key].append(values.unflatten(0, (len(pairs), 2)))

    def _encode_prompts(self) -> dict[str, Tensor]:
        """Encodes the prompts that are new in this shard."""
        batches = range(0, len(self._prompts), self._batch_size)
        encoded = [
            self._encoders.encode_prompts(self._prompts[i : i + self._batch_size]) for i in batches
        ]
        if not encoded:
            return {}
        text = {"prompt_embeds": torch.cat([self._store(e, "prompt") for e, _ in encoded])}
        pooled = [self._store(p, "pooled prompt") for _, p in encoded if p is not None]
        return text | ({"pooled": torch.cat(pooled)} if pooled else {})

    def _store(self, values: Tensor, name: str) -> Tensor:
        """Returns values in the stored dtype on the CPU.

        Raises:
            CacheError: They do not fit into it.
        """
        stored = values.to(self._dtype).cpu()
        if not bool(torch.isfinite(stored).all()):
            raise CacheError(
                f"a {name} value of {values.abs().max().item():g} does not fit into {self._dtype}; "
                f"set prepare.store_precision to bf16 or fp32"
            )
        return stored
