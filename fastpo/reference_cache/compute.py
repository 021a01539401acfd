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
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from fastpo.config import Config, as_text, decided_values
from fastpo.data.cache import PairCache
from fastpo.data.cache.fingerprint import MODEL_KEYS
from fastpo.data.prepare.work import share_work
from fastpo.data.sampler import PairSampler, count_steps
from fastpo.errors import CacheError, ConfigError, ModelError
from fastpo.loss import pair_errors
from fastpo.models.denoisers import setup_denoisers
from fastpo.models.folder import DigestMemo, ModelFolder
from fastpo.noise import PairNoise, setup_noise
from fastpo.precision import autocast
from fastpo.reference_cache.store import (
    ReferenceErrors,
    merge_parts,
    open_reference_errors,
    part_path,
    reference_folder,
    reference_root,
    write_part,
)
from fastpo.system.files import make_folder, sweep, write_text
from fastpo.system.locks import FolderLocks
from fastpo.system.process import Rank
from fastpo.system.progress import Advance, progress_bar
from fastpo.system.read_ahead import read_ahead
from fastpo.types import PairBatch

Block = tuple[int, int]  # visit, number
BLOCK_PAIRS = 512  # what a kill can lose, per process


def reference_identity(
    config: Config, model: ModelFolder, cache: PairCache, noise: PairNoise
) -> dict[str, str]:
    """Names everything on which a visit's reference errors depend, without loading the model.

    Of the configuration these are the keys with `decides("reference")`: the model and the draws by
    their content, all others by their value. What plays no part has an empty value.

    Raises:
        ModelError: The denoiser is missing.
    """
    content = {
        model.family.title: _denoiser_digest(config, model),
        "prepared latents": cache.fingerprint,
        **noise.identity(),
    }
    values = decided_values(config, "reference", named=(*MODEL_KEYS, *content))
    plain = {key: as_text(value) for key, value in values.items()}
    return content | plain | dict.fromkeys(_idle_keys(config), "")


def _idle_keys(config: Config) -> Iterator[str]:
    """Keys that decide the reference's errors in other configurations, but not in this one."""
    # In half precision LoRA and full fine-tuning round the reference's norms differently.
    if config.train.precision == "fp32":
        yield "train.method"
    # The two sides of a flipped pair exchange their draws; without draws no flip matters.
    if not config.train.sample_latents:
        yield from ("data.flip_rate", "data.flip_seed")
    elif config.data.flip_rate == 0.0:
        yield "data.flip_seed"


def _denoiser_digest(config: Config, model: ModelFolder) -> str:
    """Hashes the denoiser, or recalls it from beside the errors while its files are untouched."""
    name = model.family.denoiser
    path, known = reference_root(config.prepare.cache_dir) / f"{name}.json", None
    with contextlib.suppress(OSError, ValueError):
        known = DigestMemo.model_validate_json(path.read_text())
    memo = model.digest(name, known)
    if memo != known:
        with contextlib.suppress(OSError):  # where it cannot be kept, it is hashed again
            write_text(path, memo.model_dump_json())
    return memo.sha256


def needed_pairs(sampler: PairSampler, num_pairs: int, micro_batches: int) -> list[np.ndarray]:
    """Returns, visit by visit, the positions of the pairs that a run draws.

    Args:
        sampler: The run's stream.
        num_pairs: Pairs of the cache of latents.
        micro_batches: How many the run takes of the stream; the last epoch may be partial.
    """
    per_epoch = sampler.micro_batches_per_epoch
    visits, rest = divmod(micro_batches, per_epoch)
    needed = [np.arange(num_pairs)] * visits
    if rest:
        drawn = (sampler.micro_batch(visits * per_epoch + k)[1] for k in range(rest))
        needed.append(np.sort(np.concatenate([np.asarray(pairs) for pairs in drawn])))
    return needed


def _steps(config: Config, sampler: PairSampler, micro_batches_per_step: int) -> int:
    """Optimizer steps of the configuration's run."""
    return count_steps(
        config.train.max_steps,
        config.train.epochs,
        micro_batches_per_epoch=sampler.micro_batches_per_epoch,
        micro_batches_per_step=micro_batches_per_step,
    )


def open_for_run(
    config: Config,
    model: ModelFolder,
    cache: PairCache,
    noise: PairNoise,
    sampler: PairSampler,
    processes: int,
) -> ReferenceErrors | None:
    """Opens the errors that a training run reads, and checks that they last to its end.

    A run that has no reference, or runs it live, gets None.

    Args:
        config: The run's configuration.
        model: The folder of its model.
        cache: Its prepared latents.
        noise: Its noise source.
        sampler: Its stream.
        processes: How many train.

    Raises:
        CacheError: There are none, they were computed from something else (each differing field is
            named), or they end before the run does; the text says which command mends it.
    """
    if not config.train.reads_reference_errors:
        return None
    micro_batches = processes * config.train.accumulation_steps
    steps = _steps(config, sampler, micro_batches)
    needed = needed_pairs(sampler, len(cache), steps * micro_batches)
    whole = f"fastpo prepare CONFIG --reference {len(needed)}"
    errors = open_reference_errors(
        config.prepare.cache_dir, reference_identity(config, model, cache, noise), command=whole
    )
    for visit, pairs in enumerate(needed):
        missing = errors.missing(visit, pairs)
        if not len(missing):
            continue
        raise CacheError(
            f"the reference errors in {errors.folder} end before the run does: they hold "
            f"{errors.complete_visits(len(cache))} whole visits of the {len(cache)} pairs, "
            f"{steps} steps of {micro_batches} micro-batches need {len(needed)}; visit {visit} "
            f"(from 0) lacks {len(missing)} of the {len(pairs)} pairs drawn. Run `{whole}`, or for "
            f"these pairs alone `fastpo prepare CONFIG --reference auto --processes {processes}`; "
            "only what is missing is computed"
        )
    return errors


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
        sampler = PairSampler(cache.bucket, config.train.micro_batch_size, config.seed)
        micro_batches = (processes or process.world_size) * config.train.accumulation_steps
        steps = _steps(config, sampler, micro_batches)
        needed = needed_pairs(sampler, len(cache), steps * micro_batches)
    root = reference_root(config.prepare.cache_dir)
    make_folder(root)  # the denoiser's digest is noted there
    identity = reference_identity(config, model, cache, noise)
    target = reference_folder(config.prepare.cache_dir, identity)
    make_folder(target)
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
        self.empty = cache.empty_prompt(self.device)

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
        if part_path(self.folder, *block).exists():
            return positions[:0]
        with self.locks.manifest():
            errors = open_reference_errors(
                self.config.prepare.cache_dir, self.identity, command="fastpo prepare"
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
                errors.append(self._errors(batch))
                advance(len(batch))
        table = np.concatenate(errors)
        bad = positions[~np.isfinite(table).all(axis=1)]
        if len(bad):
            names = ", ".join(self.cache.pair_ids[int(i)] for i in bad[:8])
            raise ModelError(
                f"the reference's errors are not finite on visit {visit} of {len(bad)} pairs "
                f"({names}); with train.precision: fp16 use bf16, else look at these pairs' latents"
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
    denoiser = model.family.load_denoiser(model)
    denoisers = setup_denoisers(model.family, denoiser, train, needs_reference=True)
    if denoisers.frozen is not None:
        return nn.Module.to(denoisers.frozen, device)
    denoisers.policy.disable_adapters()
    return nn.Module.to(denoisers.policy.eval().requires_grad_(False), device)
