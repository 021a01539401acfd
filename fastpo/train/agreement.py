"""All processes of a run must be started alike; what differs is named before anything trains.

Another learning rate or seed on one process would train on without a word, another number of steps
would leave the others waiting. Each process may have its own copy of the model and the data, at its
own path, if the content is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from fastpo._version import __version__
from fastpo.config import Config, as_text, flatten
from fastpo.errors import DifferingRanksError
from fastpo.models.folder import ModelFolder
from fastpo.system.process import named_ranks
from fastpo.train.data import TrainingData

if TYPE_CHECKING:
    from fastpo.train.distributed import Processes

# Paths whose content is compared instead, folders that the main process alone writes, how many
# threads read, and what training does not use.
MAY_DIFFER = (
    "model.path",
    "model.config",
    "model.vae",
    "data.path",
    "prepare.cache_dir",
    "prepare.batch_size",
    "prepare.workers",
    "train.output_dir",
    "train.loader_workers",
    "evaluate",
)
_SAMPLES, _BLOCK = 16, 1 << 16


def settings_of(config: Config, model: ModelFolder, data: TrainingData) -> dict[str, str]:
    """Names everything on which the processes of a run must agree, with this one's values."""
    keys = flatten(config.model_dump(mode="json")).items()
    compared = {key: as_text(value) for key, value in keys if not _may_differ(key)}
    return {
        "the version of fastpo": __version__,
        "the version of torch": torch.__version__,
        "the prepared cache's fingerprint": data.cache.fingerprint[:12],
        "the model's fingerprint": model_sample(model)[:12],
        "the number of steps": str(data.total_steps),
        **compared,
    }


def require_same(processes: Processes, mine: Mapping[str, str]) -> None:
    """Compares named values of all processes (collective).

    Args:
        processes: The processes of the run.
        mine: This process's values.

    Raises:
        DifferingRanksError: On every process alike: which value differs, and on which rank.
    """
    if processes.count == 1:
        return
    differing = differences(processes.gather_objects(dict(mine)))
    if differing:
        raise DifferingRanksError(
            "the processes of this run were not started alike: " + "; ".join(differing)
        )


def differences(values: list[dict[str, str]]) -> list[str]:
    """Describes every name whose values differ: `seed is 7 on rank 0, 8 on ranks 1-3`.

    Args:
        values: Named values, by rank; a name may be missing.
    """
    texts = []
    for name in dict.fromkeys(name for mine in values for name in mine):
        ranks: dict[str, list[int]] = {}
        for rank, mine in enumerate(values):
            ranks.setdefault(mine.get(name, "not set"), []).append(rank)
        if len(ranks) > 1:
            shown = ", ".join(f"{value} on {named_ranks(where)}" for value, where in ranks.items())
            texts.append(f"{name} is {shown}")
    return texts


def model_sample(model: ModelFolder) -> str:
    """Returns a checksum of the denoiser's and the schedule's files, read at 16 places each.

    Enough to tell two models apart, in milliseconds where all of SDXL's weights would take seconds.

    Raises:
        ModelError: The denoiser is missing.
    """
    digest = xxhash.xxh3_128()
    schedule = model.path / "scheduler" / "scheduler_config.json"
    files = model.files(model.family.denoiser)
    for file in (*files, *([schedule] if schedule.is_file() else [])):
        digest.update(f"{file.name} {file.stat().st_size}\0".encode())
        _update(digest, file)
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        for number in range(_SAMPLES if size > _SAMPLES * _BLOCK else 1):
            opened.seek((size - _BLOCK) * number // (_SAMPLES - 1) if number else 0)
            digest.update(opened.read(_BLOCK if size > _SAMPLES * _BLOCK else size))


def _may_differ(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER)
