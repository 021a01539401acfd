"""Reading a prepared cache: checked against the configuration, then random access by pair."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.data.cache.arrow import Texts, column, open_arrow, rows_of
from fastpo.data.cache.checks import RowChecks
from fastpo.data.cache.fingerprint import cache_fingerprint
from fastpo.data.cache.flips import is_flipped, write_flip_mask
from fastpo.data.cache.held_out import held_out_mask
from fastpo.data.cache.index import INDEX_FILE, PROMPTS_FILE, QUARANTINE
from fastpo.data.cache.manifest import (
    REMAKE,
    Manifest,
    Quarantined,
    check_files,
    check_identity,
    load_manifest,
)
from fastpo.data.cache.parts import (
    LATENTS,
    MORE_SOURCES,
    SOURCE_IMAGE,
    TEXT,
    WEIGHT,
    finished_parts,
    first_part,
    part_name,
    parts_of,
)
from fastpo.data.cache.source_images import IMAGES_FILE, SourceLatents
from fastpo.data.cache.summary import told_counts
from fastpo.data.cache.tensors import TensorFiles, bytes_of
from fastpo.data.cache.texts import TextRows
from fastpo.errors import CacheError, ConfigError, one_line
from fastpo.models.edits import source_condition
from fastpo.models.folder import ModelFolder
from fastpo.system.words import counted
from fastpo.types import PairBatch


class PairCache:
    """Latents and text embeddings of all pairs, on disk; the index is mapped, not loaded.

    Attributes:
        folder: The cache's folder.
        family: Name of the model's family.
        fingerprint: SHA-256 of the content: identity and files.
        report: Counts of the source's scan.
        quarantined: How many pairs and bad rows were left out as unusable.
        pair_ids: Names, in the order of the source.
        pair_keys: `(N,)` int64, `fastpo.types.pair_key` of each name.
        flipped: `(N,)` bool, pairs whose winner and loser `read` exchanges.
        turned: `(N,)` bool, pairs that a run reads the other way round than it was given them; see
            `train.rounds_turn`. False until the run writes there.
        held_out: `(N,)` bool, pairs that training leaves out, see `data.held_out`.
        pair_weight: `(N,)` float32, what multiplies each pair's loss; None where the data set gives
            no pair a weight.
        bucket: `(N,)` int64, number of the pair's latent shape.
        latent_shapes: `(h, w)` by bucket number.
        prompts: The distinct prompts; number 0 is the empty one.
        prompt_index: `(N,)` int64, number of each pair's prompt.
        source_images: Of edits, `(N,)` int32, the number of the image that each begins from.
        more_sources: Where pairs have several, `(N, K)` int32, the next ones' numbers, -1 for none.
        source_names: Of several data sets the names, in their order; empty for a single one.
        source_index: `(N,)` int64, the number of each pair's data set; all 0 for a single one.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: Config,
        pair_conditions: Sequence[str] = (),
    ) -> None:
        """Maps the index; use `PairCache.open`.

        Args:
            folder: The cache's folder.
            manifest: Its table of contents.
            config: The configuration.
            pair_conditions: Columns of the index that the denoiser is told.
        """
        self._opened_as = (folder, manifest, config, pair_conditions)
        self.folder = folder
        self.family = manifest.identity["model family"]
        self.fingerprint = manifest.fingerprint
        self.report = dict(manifest.report)
        self.quarantined = manifest.quarantined
        self.latent_shapes = list(manifest.shapes)
        checks = RowChecks(folder, manifest.files | manifest.beside, config.data.verify)
        self._files = TensorFiles(folder, checks=checks)
        self._texts = TextRows(self._files)
        self.prompts: Sequence[str] = Texts(open_arrow(folder / PROMPTS_FILE).column("prompt"))
        self._text_starts = np.array([span.start for span in manifest.texts])
        index = open_arrow(folder / INDEX_FILE)
        if index.num_rows != manifest.pairs or len(self.prompts) != manifest.texts[-1].stop:
            raise CacheError(f"{folder}: the index does not match the manifest; prepare again")
        self._all_pair_ids: Sequence[str] = Texts(index.column("pair_id"))
        if config.data.limit is not None:
            position = index.column("position").to_numpy()
            index = index.slice(0, int(np.searchsorted(position, config.data.limit)))
        if not index.num_rows:
            raise CacheError(f"{self.folder}: no pair is left within data.limit")
        self.pair_ids: Sequence[str] = Texts(index.column("pair_id"))
        self.pair_keys = column(index, "pair_key")
        self.prompt_index = column(index, "prompt")
        self.bucket = column(index, "bucket")
        weighted = WEIGHT in index.schema.names
        self.pair_weight = column(index, WEIGHT) if weighted else None
        self._positions = column(index, "position")
        self._sources = manifest.sources
        self.source_names = [one.name for one in manifest.sources]
        self.source_index = torch.from_numpy(manifest.source_of(self._positions.numpy()))
        self._shard, self._slot = column(index, "shard"), column(index, "slot")
        known = (len(self.latent_shapes), len(manifest.shards), len(self.prompts))
        for numbers, count in zip(
            (self.bucket, self._shard, self.prompt_index), known, strict=True
        ):
            if int(numbers.min()) < 0 or int(numbers.max()) >= count:
                raise CacheError(f"{folder}: the index does not match the manifest; prepare again")
        self.source_images: Tensor | None = None
        self.more_sources: Tensor | None = None
        if manifest.images:
            self.source_images = column(index, SOURCE_IMAGE)
            self._source_latents = SourceLatents(folder, manifest, self._files)
        if MORE_SOURCES in index.schema.names:
            self.more_sources = rows_of(index, MORE_SOURCES)
        self._pair_conditions = {name: rows_of(index, name) for name in pair_conditions}
        rate, seed = self._flips = (config.data.flip_rate, config.data.flip_seed)
        flips = (is_flipped(name, rate=rate, seed=seed) for name in self.pair_ids if rate > 0)
        self.flipped = torch.zeros(len(self), dtype=torch.bool)
        if rate > 0:
            self.flipped = torch.from_numpy(np.fromiter(flips, dtype=bool, count=len(self)))
        self.turned = torch.zeros(len(self), dtype=torch.bool)
        self.held_out = self._held_out(config.data.held_out, config.data.held_out_by)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the mapped index out: a copy maps it again."""
        return {"opened_as": self._opened_as}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the same cache."""
        self.__init__(*state["opened_as"])

    @classmethod
    def open(
        cls, config: Config, *, verify: bool = False, model: ModelFolder | None = None
    ) -> PairCache:
        """Opens the cache that `prepare` made for this configuration.

        Args:
            config: The configuration; `prepare.cache_dir` names the folder. `data.limit` may be
                smaller than the prepared one, the flip settings may be any.
            verify: Also hash every file and compare, as with `data.verify: always`.
            model: The folder of the configuration's model; by default it is looked for.

        Raises:
            CacheError: Missing, unfinished, damaged, or made from something else; the text names
                each differing field.
            ModelError: The model folder is missing.
        """
        folder = config.prepare.cache_dir
        manifest = load_manifest(folder)
        if manifest is None:
            raise CacheError(f"no prepared cache in {folder}: run `fastpo prepare` first")
        model = model or ModelFolder.resolve(config.model)
        known = None if config.data.verify == "always" else manifest.weights
        identity = cache_fingerprint(config, model, known)
        if manifest.complete or first_part(folder) is not None:  # an empty plan is replaced
            check_identity(folder, identity.fields, manifest.identity)
        if not manifest.complete:
            raise CacheError(
                f"the cache {folder} is unfinished ({finished_parts(folder, manifest)} of "
                f"{len(parts_of(manifest))} parts done): run `fastpo prepare` again, it continues "
                f"where it stopped"
            )
        if not manifest.covers(config.data.limit):
            raise CacheError(
                f"the cache {folder} does not fit the configuration: data.limit: the configuration "
                f"gives {config.data.limit}, the cache was made with {manifest.limit}. Run "
                f"`fastpo prepare` again, it adds the missing pairs"
            )
        files, when = manifest.files | manifest.beside, config.data.verify
        check_files(folder, files, verify=verify or when == "always")
        if when == "first" and not verify:
            merged = (INDEX_FILE, PROMPTS_FILE, IMAGES_FILE, QUARANTINE)
            whole = {name: files[name] for name in merged if name in files}
            check_files(folder, whole, verify=True)
        return cls(folder, manifest, config, model.family.pair_conditions)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.pair_ids)

    def read(self, indices: Sequence[int], visit: int | Sequence[int]) -> PairBatch:
        """Reads pairs of one latent shape.

        Flipped pairs come with winner and loser exchanged. Latents and embeddings keep the dtype
        they are stored in.

        Args:
            indices: B positions in the cache, all of one bucket.
            visit: How often these pairs were drawn before; one number for all, or one each.

        Raises:
            ValueError: No index, or indices of different buckets.
            CacheError: A file is damaged.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        buckets = set(self.bucket[index].tolist())
        if len(buckets) != 1:
            raise ValueError(f"indices must be of one bucket, got buckets {sorted(buckets)}")
        flipped = self.flipped[index] ^ self.turned[index]
        mean, logvar = self._latents(index, self.latent_shapes[buckets.pop()], flipped)
        of_prompts = self._text(self.prompt_index[index].tolist())
        of_pairs = {name: rows[index] for name, rows in self._pair_conditions.items()}
        for place, numbers in enumerate(self._sources_of(index)):
            of_pairs[source_condition(place)] = self._source_latents.read(numbers)
        return PairBatch(
            index=index,
            pair_key=self.pair_keys[index],
            visit=torch.as_tensor(visit, dtype=torch.int64).expand(len(index)).clone(),
            flipped=flipped,
            latent_mean=mean,
            latent_logvar=logvar,
            conditions=of_prompts | of_pairs,
            pair_weight=None if self.pair_weight is None else self.pair_weight[index],
        )

    def sources_of(self, row: int) -> tuple[int, ...]:
        """Returns the numbers of the images that a pair begins from, in its order."""
        return tuple(numbers[0] for numbers in self._sources_of(torch.tensor([row])))

    def _sources_of(self, index: Tensor) -> list[list[int]]:
        """Returns by place in a pair the numbers of the source images of pairs of one bucket."""
        if self.source_images is None:
            return []
        columns = [self.source_images[index].tolist()]
        if self.more_sources is not None:
            columns += self.more_sources[index].T.tolist()
        return [numbers for numbers in columns if numbers[0] >= 0]

    def source_latents(self, number: int) -> Tensor | None:
        """Returns a source image's latents as stored, `(C, h, w)`; None where it has none.

        Raises:
            CacheError: A file is damaged.
        """
        if not self._source_latents.stored(number):
            return None
        return self._source_latents.read([number])[0]

    def _held_out(self, share: float, by: str) -> Tensor:
        """Which pairs are held out; errors where that leaves nothing to train or to measure on."""
        if by == "pair":
            mask = held_out_mask(self.pair_ids, share, len(self))
        else:
            mask = held_out_mask(self.prompts, share, len(self.prompts))[self.prompt_index]
        if share and (not mask.any() or mask.all()):
            kept = "no pair" if not mask.any() else f"all {counted(len(self), 'pair')}"
            raise ConfigError(
                f"data.held_out: {share:g} by {by} holds out {kept} of {self.folder}, expected "
                f"some of its {counted(len(self), 'pair')}; give another share"
            )
        return mask

    @property
    def trained(self) -> Tensor | None:
        """Positions of the pairs that training draws, `(M,)` int64; None: all of them."""
        return (~self.held_out).nonzero().flatten() if bool(self.held_out.any()) else None

    @property
    def positions(self) -> Tensor:
        """`(N,)` int64, each pair's position in the data set, pairs left out included."""
        return self._positions

    def encoded(self, row: int, *, turned: bool = False) -> Tensor:
        """Returns a pair's latents as stored, `(2, 2, C, h, w)`: mean and log-variance.

        Args:
            row: Position in the cache.
            turned: The other image first.

        Raises:
            CacheError: A file is damaged.
        """
        shape = self.latent_shapes[int(self.bucket[row])]
        mean, logvar = self._latents(torch.tensor([row]), shape, torch.tensor([turned]))
        return torch.stack([mean, logvar])

    def pair_condition(self, name: str, row: int) -> tuple[float, ...]:
        """Returns a pair's row of a column that the denoiser is told."""
        return tuple(self._pair_conditions[name][row].tolist())

    def prompt_conditions(self, number: int) -> dict[str, Tensor]:
        """Returns the conditions that a prompt gives, each `(1, ...)`, by the prompt's number."""
        return self._text([number])

    def empty_prompt(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns the conditions that the empty prompt gives, each `(1, ...)`."""
        return {name: tensor.to(device) for name, tensor in self._text([0]).items()}

    def summary(self) -> str | None:
        """Says what was left out of all pairs that were prepared, and what looks like a mistake.

        Returns:
            Such as `65 of 75 pairs; left out: 4 ties, 2 bad rows or images, ...`; of several data
            sets followed by a line for each. None where there is nothing to say.
        """
        total = len(self._all_pair_ids)
        told = partial(told_counts, family=self.family)
        said = told(self.report, pairs=total, quarantined=self.quarantined)
        if said is None:
            return None
        first = f"; listed in {self._first_left_out()}" if self.quarantined else ""
        each = [
            f"{one.name}: "
            + (
                told(one.report, pairs=one.pairs, quarantined=one.quarantined)
                or counted(one.pairs, "pair")
            )
            for one in self._sources
        ]
        return "\n".join([said + first, *each])

    def left_out(self) -> str | None:
        """Says how many pairs of the data set are in quarantine, and why the first one is."""
        if not self.quarantined:
            return None
        total = len(self._all_pair_ids) + self.quarantined
        return f"{counted(self.quarantined, 'pair', of=total)} left out: {self._first_left_out()}"

    def _first_left_out(self) -> str:
        """Names the list of what is in quarantine, and its first entry."""
        path = self.folder / QUARANTINE
        try:
            with path.open(encoding="utf-8") as file:
                first = Quarantined.model_validate_json(file.readline())
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged ({one_line(error)}); {REMAKE}") from None
        return f"{path}, first reason ({first.pair_id}): {first.reason}"

    def write_flip_mask(self, otherwise: Path | None = None) -> Path:
        """Writes which pairs are flipped beside the cache, those beyond `data.limit` included.

        Args:
            otherwise: The folder to write to where the cache's is read-only.
        """
        rate, seed = self._flips
        try:
            return write_flip_mask(self.folder, self._all_pair_ids, rate=rate, seed=seed)
        except OSError as error:
            read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            if otherwise is None or not read_only:
                raise
        return write_flip_mask(otherwise, self._all_pair_ids, rate=rate, seed=seed)

    def _latents(
        self, index: Tensor, shape: tuple[int, int], flipped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance, each `(2B, C, h, w)`, winners first."""
        key = f"{shape[0]}x{shape[1]}"
        names = [f"{part_name('shard', k)}/{LATENTS}" for k in self._shard[index].tolist()]
        rows, pairs = self._files.rows(names[0], key), len(names)
        mean, logvar = (torch.empty((2 * pairs, *rows.shape[2:]), dtype=rows.dtype) for _ in "ml")
        into = bytes_of(mean), bytes_of(logvar)
        places = zip(names, self._slot[index].tolist(), flipped.tolist(), strict=True)
        for i, (name, slot, turned) in enumerate(places):
            sides = (pairs + i, i) if turned else (i, pairs + i)
            parts = [statistic[side] for statistic in into for side in sides]
            self._files.read(name, key, slot, parts)
        return mean, logvar

    def _text(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Returns the conditions that prompts give, by the prompts' numbers."""
        parts = np.searchsorted(self._text_starts, numbers, side="right") - 1
        places = [
            (f"{part_name('text', part)}/{TEXT}", number - int(self._text_starts[part]))
            for part, number in zip(parts.tolist(), numbers, strict=True)
        ]
        return self._texts.read(places)
