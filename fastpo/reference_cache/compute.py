"""The reference's errors on the visits to come: computed once, for every run that shares them.

    fastpo prepare CONFIG --reference 4
    torchrun --nproc_per_node 8 -m fastpo prepare CONFIG --reference auto

Training with `train.reference: cached` then holds and runs no reference model. Each pair and visit
costs one forward pass, as in a live run, but at inference batch sizes, without the policy in
memory, on any number of processes, and once for all runs that differ in objective, slope, optimizer
or adapters. The live pass sees other pairs in its batch, which changes the last digits: in float32
an error of order 1 by 1e-7.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.mixing import make_sampler
from fastpo.data.prepare.encode import enough_memory
from fastpo.errors import ConfigError, ModelError
from fastpo.loss import pair_errors
from fastpo.models.denoisers import loading_dtype, setup_denoisers
from fastpo.models.folder import ModelFolder
from fastpo.noise import PairNoise, dropped_conditions, setup_noise
from fastpo.precision import autocast
from fastpo.reference_cache.fingerprint import reference_identity
from fastpo.reference_cache.open import needed_pairs, run_steps
from fastpo.reference_cache.store import (
    REFERENCE,
    ReferenceErrors,
    has_part,
    merge_parts,
    open_reference_errors,
    reference_folder,
    reference_root,
    write_part,
)
from fastpo.system.files import sweep
from fastpo.system.locks import FolderLocks
from fastpo.system.ownership import claim
from fastpo.system.process import Rank
from fastpo.system.progress import Advance, progress_bar
from fastpo.system.read_ahead import read_ahead
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted
from fastpo.system.work import share_work
from fastpo.types import PairBatch

Block = tuple[int, int]  # visit, number
BLOCK_PAIRS = 512  # what a kill can lose, per process


@storage_errors()
def prepare_reference(
    config: Config,
    visits: int | None = None,
    *,
    processes: int | None = None,
    progress: bool = True,
    model: ModelFolder | None = None,
) -> ReferenceErrors:
    """Computes the missing errors; processes of any number of launches share the work.

    Each block of 512 pairs is whole on disk before it counts, so a killed run goes on where it was.
    Processes find one another through the folder of the cache, which all of them must see.

    Args:
        config: The experiment; its latents are prepared.
        visits: How many visits of every pair, from the first; None computes those pairs and visits
            that the configuration's run draws, up to its last step.
        processes: How many processes will train (for None); default: as many as run now.
        progress: Show a bar with pairs/s and time left.
        model: The folder of the configuration's model; by default it is looked for.

    Returns:
        The errors, all that were asked for; what other processes are at work on is waited for.

    Raises:
        CacheError: The latents are not prepared, or a file of earlier work is damaged.
        ConfigError: fp16 was asked for without a GPU.
        ModelError: The denoiser is missing, or answers with NaN or infinity.
        ForeignPathError: The folder `reference` of the cache is none that this made.
    """
    process = Rank.of_launch()
    device = process.device()
    if device.type == "cpu" and config.train.precision == "fp16":
        raise ConfigError("train.precision: fp16 needs a CUDA device; use bf16 or fp32 here")
    model = model or ModelFolder.resolve(config.model)
    cache = PairCache.open(config, model=model)
    noise = setup_noise(config, model, device)
    needed = [np.arange(len(cache))] * (visits or 0)
    if visits is None:
        sampler = make_sampler(cache, config)
        micro_batches = (processes or process.world_size) * config.train.accumulation_steps
        steps = run_steps(config, sampler, micro_batches)
        needed = needed_pairs(config, cache, sampler, steps * micro_batches)
    root = reference_root(config.prepare.cache_dir)
    claim(root, REFERENCE)  # the denoiser's digest is noted there
    identity = reference_identity(config, model, cache, noise)
    target = reference_folder(config.prepare.cache_dir, identity)
    claim(target, REFERENCE)
    sweep(root)
    with FolderLocks(target) as locks:
        locks.sweep()
        with locks.manifest():
            errors = merge_parts(target, identity, len(cache))
        task = _Task(config, model, cache, noise, identity, locks)
        while missing := _blocks(errors, needed):
            task.make(missing, process, show=progress and process.rank == 0)
            with locks.manifest():
                errors = merge_parts(target, identity, len(cache))
    return errors


def _blocks(errors: ReferenceErrors, needed: Sequence[np.ndarray]) -> dict[Block, np.ndarray]:
    """Cuts what is missing into blocks: `(visit, number)` to positions."""
    blocks: dict[Block, np.ndarray] = {}
    for visit, pairs in enumerate(needed):
        for positions in _runs(missing := errors.missing(visit, pairs), missing // BLOCK_PAIRS):
            blocks[visit, int(positions[0]) // BLOCK_PAIRS] = positions
    return blocks


def _runs(values: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Splits values where their labels, equal ones side by side, change."""
    return np.split(values, np.flatnonzero(np.diff(labels)) + 1) if len(values) else []


class _Task:
    """What one process needs to compute blocks; the model is loaded for the first one."""

    def __init__(
        self,
        config: Config,
        source: ModelFolder,
        cache: PairCache,
        noise: PairNoise,
        identity: dict[str, str],
        locks: FolderLocks,
    ) -> None:
        self.config, self.source, self.cache, self.noise = config, source, cache, noise
        self.device, self.identity, self.locks = noise.schedule.signal.device, identity, locks
        self.folder = reference_folder(config.prepare.cache_dir, identity)
        self.model: nn.Module | None = None
        self.empty = dropped_conditions(config, source, cache.empty_prompt(self.device))

    def make(self, blocks: dict[Block, np.ndarray], process: Rank, *, show: bool) -> None:
        """Computes the blocks that no other process does, and waits until all of them exist."""
        order = {self._lock_number(block): block for block in sorted(blocks)}
        total = sum(map(len, blocks.values()))
        with progress_bar("reference errors", total, unit="pairs", show=show) as advance:

            def make_block(block: Block) -> None:
                missing = self._still_missing(block, blocks[block])
                advance(len(blocks[block]) - len(missing))
                if len(missing):
                    self._compute(block, missing, advance)

            share_work(order, self.locks, make_block, process=process)

    def _lock_number(self, block: Block) -> int:
        """Numbers the blocks of all visits through; the same in every process."""
        visit, number = block
        blocks_per_visit = math.ceil(len(self.cache) / BLOCK_PAIRS)
        return visit * blocks_per_visit + number

    def _still_missing(self, block: Block, positions: np.ndarray) -> np.ndarray:
        """What no process has computed since the blocks were cut."""
        if has_part(self.folder, *block):
            return positions[:0]
        with self.locks.manifest():
            errors = open_reference_errors(
                self.config.prepare.cache_dir,
                self.identity,
                command="fastpo prepare",
                content=False,
            )
        return errors.missing(block[0], positions)

    def _compute(self, block: Block, positions: np.ndarray, advance: Advance) -> None:
        """Runs the reference over a block and writes its part."""
        visit, number = block
        bucket = self.cache.bucket.numpy()
        positions = positions[np.argsort(bucket[positions], kind="stable")]
        size = max(1, self.config.prepare.batch_size // 2)  # it counts images
        batches = [
            run[i : i + size]
            for run in _runs(positions, bucket[positions])
            for i in range(0, len(run), size)
        ]
        errors = []
        read = read_ahead(lambda pairs: self.cache.read(pairs.tolist(), visit), batches, threads=1)
        with contextlib.closing(read):
            for batch in read:
                with enough_memory(f"{len(batch)} pairs", self.config.prepare.batch_size):
                    errors.append(self._errors(batch))
                advance(len(batch))
        table = np.concatenate(errors)
        bad = positions[~np.isfinite(table).all(axis=1)]
        if len(bad):
            names = ", ".join(self.cache.pair_ids[int(i)] for i in bad[:8])
            raise ModelError(
                f"the reference's errors are not finite on visit {visit} of "
                f"{counted(len(bad), 'pair')} ({names}); with train.precision: fp16 use bf16, else "
                "look at these pairs' latents"
            )
        write_part(self.folder, visit, number, positions, table)

    @torch.no_grad()
    def _errors(self, batch: PairBatch) -> np.ndarray:
        """The reference's errors on a batch, `(B, 2)` float32, in the data set's order of sides."""
        train = self.config.train
        if self.model is None:
            self.model = load_reference(self.config, self.source, self.device)
        batch = batch.to(self.device)
        noised = self.noise.noised_pair(batch)
        batch = self.noise.drop_captions(batch, train.empty_prompt_rate, self.empty)
        with autocast(self.device, train.precision):
            prediction = self.source.family.predict(self.model, noised, batch.conditions)
        errors = pair_errors(prediction, noised.target, impl=train.loss_impl)
        sides = errors.float().view(2, -1).T
        return torch.where(batch.flipped[:, None], sides.flip(1), sides).cpu().numpy()


def load_reference(config: Config, model: ModelFolder, device: torch.device) -> nn.Module:
    """Loads the reference alone, as a live run sets it up, but never compiled.

    Raises:
        ModelError: There is no denoiser that diffusers loads.
        ConfigError: The attention asked for is not available here.
    """
    train = config.train.model_copy(update={"gradient_checkpointing": False, "compile": False})
    denoiser = model.family.load_denoiser(model, dtype=loading_dtype(train))
    denoisers = setup_denoisers(model.family, denoiser, train, needs_reference=True)
    if denoisers.frozen is not None:
        return nn.Module.to(denoisers.frozen, device)
    denoisers.policy.disable_adapters()
    return nn.Module.to(denoisers.policy.eval().requires_grad_(False), device)
