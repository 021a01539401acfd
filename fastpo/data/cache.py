"""Reading a prepared cache: checked against the configuration, then random access by pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.data.identity import cache_identity
from fastpo.data.labels import is_flipped, write_flip_mask
from fastpo.data.manifest import Manifest, check_files, check_identity, load_manifest
from fastpo.data.shards import (
    TensorFiles,
    index_name,
    latents_name,
    prompts_name,
    read_table,
    text_name,
)
from fastpo.errors import CacheError
from fastpo.types import PairBatch


class PairCache:
    """Latents and text embeddings of all pairs, on disk.

    Attributes:
        folder: The cache's folder.
        family: `sd15` or `sdxl`.
        fingerprint: SHA-256 of the content: identity and files.
        report: Counts of the source's scan.
        quarantined: How many pairs were left out as unusable.
        pair_ids: Names, in the order of the source.
        pair_keys: `(N,)` int64, `fastpo.types.pair_key` of each name.
        flipped: `(N,)` bool, pairs whose winner and loser `read` exchanges.
        bucket: `(N,)` int64, number of the pair's latent shape.
        latent_shapes: `(h, w)` by bucket number.
        prompts: The distinct prompts; number 0 is the empty one.
        prompt_index: `(N,)` int64, number of each pair's prompt.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: Config) -> None:
        """Reads the index; use `PairCache.open`."""
        self.folder = folder
        self.family = manifest.identity["model family"]
        self.fingerprint = manifest.fingerprint
        self.report = dict(manifest.report)
        self._flips = (config.data.flip_rate, config.data.flip_seed)
        self._files = TensorFiles(folder)
        shards = range(len(manifest.shards))
        prompts = read_table(folder, [prompts_name(k) for k in shards])
        self.prompts: list[str] = prompts["prompt"].to_pylist()
        self._prompt_starts = np.cumsum([0, *(s.prompts for s in manifest.shards)])
        index = read_table(folder, [index_name(k) for k in shards])
        shard = np.repeat(np.arange(len(shards)), [s.pairs for s in manifest.shards])
        if len(shard) != len(index) or self._prompt_starts[-1] != len(prompts):
            raise CacheError(f"{folder}: the index does not match the manifest; prepare again")
        limit = config.data.limit
        if limit is not None:
            kept = index["position"].to_numpy() < limit
            index, shard = index.filter(pa.array(kept)).combine_chunks(), shard[kept]
        self.quarantined = sum(len(s.quarantined) for s in manifest.shards)
        self._shard = shard
        self._read_index(index)

    def _read_index(self, index: pa.Table) -> None:
        if not len(index):
            raise CacheError(f"{self.folder}: no pair is left within data.limit")
        self.pair_ids: list[str] = index["pair_id"].to_pylist()
        self.pair_keys = _tensor(index["pair_key"])
        if len(torch.unique(self.pair_keys)) != len(self.pair_keys):
            raise CacheError(f"{self.folder}: two pairs have the same key; name them differently")
        self.prompt_index = _tensor(index["prompt"])
        self._slot = index["slot"].to_numpy()
        shapes = np.stack([index[side].to_numpy() for side in ("height", "width")], axis=1)
        distinct, bucket = np.unique(shapes, axis=0, return_inverse=True)
        self.latent_shapes = [(int(h), int(w)) for h, w in distinct]
        self.bucket = torch.from_numpy(bucket.reshape(-1).astype(np.int64))
        times = index["add_time_ids"].combine_chunks().flatten().to_numpy()
        self._add_time_ids = torch.from_numpy(times.reshape(-1, 6).copy())
        rate, seed = self._flips
        flips = [rate > 0 and is_flipped(name, rate=rate, seed=seed) for name in self.pair_ids]
        self.flipped = torch.tensor(flips, dtype=torch.bool)

    @classmethod
    def open(cls, config: Config, *, verify: bool = False) -> PairCache:
        """Opens the cache that `prepare` made for this configuration.

        Args:
            config: The configuration; `prepare.cache_dir` names the folder. `data.limit` may be
                smaller than the prepared one, the flip settings may be any.
            verify: Also hash every file and compare.

        Raises:
            CacheError: Missing, unfinished, damaged, or made from something else; the text names
                each differing field.
            ModelError: The model folder is missing.
        """
        folder = config.prepare.cache_dir
        manifest = load_manifest(folder)
        if manifest is None:
            raise CacheError(f"no prepared cache in {folder}: run `fastpo prepare` first")
        identity = cache_identity(config, manifest.weights)
        check_identity(folder, identity.fields, manifest.identity)
        if not manifest.complete:
            raise CacheError(
                f"the cache {folder} is unfinished ({manifest.source_pairs} pairs done): run "
                f"`fastpo prepare` again, it continues where it stopped"
            )
        if not covers(manifest, config.data.limit):
            raise CacheError(
                f"the cache {folder} does not fit the configuration: data.limit: the configuration "
                f"gives {config.data.limit}, the cache was made with {manifest.limit}. Run "
                f"`fastpo prepare` again, it adds the missing pairs"
            )
        check_files(folder, manifest, verify=verify)
        return cls(folder, manifest, config)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.pair_ids)

    def read(self, indices: Sequence[int], visit: int) -> PairBatch:
        """Reads pairs of one latent shape.

        Flipped pairs come with winner and loser exchanged. Latents and embeddings keep the dtype
        they are stored in.

        Args:
            indices: B positions in the cache, all of one bucket.
            visit: How often these pairs were drawn before.

        Raises:
            ValueError: No index, or indices of different buckets.
            CacheError: A file is damaged.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        buckets = set(self.bucket[index].tolist())
        if len(buckets) != 1:
            raise ValueError(f"indices must be of one bucket, got buckets {sorted(buckets)}")
        shape = "x".join(map(str, self.latent_shapes[buckets.pop()]))
        flipped = self.flipped[index]
        embeds, pooled = self._text(self.prompt_index[index].tolist())
        return PairBatch(
            index=index,
            pair_key=self.pair_keys[index],
            visit=torch.full_like(index, visit),
            flipped=flipped,
            latent_mean=self._latents(index, f"{shape}.mean", flipped),
            latent_logvar=self._latents(index, f"{shape}.logvar", flipped),
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=self._add_time_ids[index] if self.family == "sdxl" else None,
        )

    def empty_prompt(self) -> tuple[Tensor, Tensor | None]:
        """Returns the empty prompt's `(1, L, D)` states and `(1, P)` pooled states (or None)."""
        return self._text([0])

    def write_flip_mask(self) -> Path:
        """Writes which pairs are flipped beside the cache; see `fastpo.data.labels`."""
        rate, seed = self._flips
        return write_flip_mask(self.folder, self.pair_ids, rate=rate, seed=seed)

    def _latents(self, index: Tensor, key: str, flipped: Tensor) -> Tensor:
        """Returns `(2B, C, h, w)`, winners first."""
        pairs = torch.stack(
            [
                self._files.row(latents_name(int(self._shard[i])), key, int(self._slot[i]))
                for i in index.tolist()
            ]
        )
        pairs[flipped] = pairs[flipped].flip(1)
        return pairs.transpose(0, 1).flatten(0, 1)

    def _text(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Returns states and pooled states of prompts by number."""
        shards = np.searchsorted(self._prompt_starts, numbers, side="right") - 1
        places = [
            (text_name(shard), number - int(self._prompt_starts[shard]))
            for shard, number in zip(shards.tolist(), numbers, strict=True)
        ]
        embeds = torch.stack([self._files.row(n, "prompt_embeds", row) for n, row in places])
        if self.family == "sd15":
            return embeds, None
        return embeds, torch.stack([self._files.row(n, "pooled", row) for n, row in places])


def covers(manifest: Manifest, limit: int | None) -> bool:
    """Tells whether a cache holds every pair that a limit allows."""
    return manifest.limit is None or (limit is not None and limit <= manifest.limit)


def _tensor(column: Any) -> Tensor:
    return torch.from_numpy(column.to_numpy().copy())
