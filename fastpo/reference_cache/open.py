"""Which errors a run reads, and whether the stored ones last to its end."""

from __future__ import annotations

import numpy as np

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.sampler import PairSampler, round_steps
from fastpo.errors import CacheError, ConfigError
from fastpo.models.folder import ModelFolder
from fastpo.noise import PairNoise
from fastpo.reference_cache.fingerprint import reference_identity
from fastpo.reference_cache.store import ReferenceErrors, open_reference_errors
from fastpo.system.words import counted


def needed_pairs(
    config: Config, cache: PairCache, sampler: PairSampler, micro_batches: int
) -> list[np.ndarray]:
    """Returns, visit by visit, the positions of the pairs that a run draws or measures on.

    Args:
        config: The run's configuration.
        cache: Its prepared latents.
        sampler: Its stream.
        micro_batches: How many the run takes of the stream; the last epoch may be partial.
    """
    needed = sampler.needed(micro_batches)
    held_out = cache.held_out.nonzero().flatten().numpy()
    for draw in range(config.train.held_out_draws if len(held_out) else 0):
        if draw == len(needed):
            needed.append(held_out)
        else:
            needed[draw] = np.sort(np.concatenate([needed[draw], held_out]))
    return needed


def read_visits(text: str | None) -> int | None:
    """Returns the number of visits that `--reference` gives; None for auto, or without it.

    Raises:
        ConfigError: It is neither.
    """
    if text is None or text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--reference must be a number of visits, or auto; got {text!r}")


def run_steps(config: Config, sampler: PairSampler, micro_batches_per_step: int) -> int:
    """Optimizer steps with draws of their own in the configuration's run, at most.

    Rounds may settle earlier; those that draw the same (`train.rounds_draws`) count as the longest.
    """
    train = config.train
    judging, last = round_steps(train, sampler, micro_batches_per_step)
    if train.rounds_draws == "same":
        return max(judging, last)
    return (train.rounds - 1) * judging + last


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
    steps = run_steps(config, sampler, micro_batches)
    needed = needed_pairs(config, cache, sampler, steps * micro_batches)
    whole = f"fastpo prepare CONFIG --reference {len(needed)}"
    errors = open_reference_errors(
        config.prepare.cache_dir,
        reference_identity(config, model, cache, noise),
        command=whole,
        content=config.data.verify != "never",
    )
    for visit, pairs in enumerate(needed):
        missing = errors.missing(visit, pairs)
        if not len(missing):
            continue
        raise CacheError(
            f"the reference errors in {errors.folder} end before the run does: they hold "
            f"{counted(errors.complete_visits(len(cache)), 'whole visit')} of "
            f"{counted(len(cache), 'pair')}, {counted(steps, 'step')} of "
            f"{counted(micro_batches, 'micro-batch')} need {len(needed)}; visit {visit} (from 0) "
            f"lacks {len(missing)} of {counted(len(pairs), 'pair')} drawn. Run `{whole}`, or for "
            f"these pairs alone `fastpo prepare CONFIG --reference auto --processes {processes}`; "
            "only what is missing is computed"
        )
    return errors
