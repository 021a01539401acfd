"""From a run or a checkpoint to a folder that stock diffusers loads, without training's processes.

A checkpoint holds whole weights under every ZeRO stage (`fastpo.train.checkpoint`), so this needs
neither DeepSpeed nor a GPU, and host memory for one copy of the trained weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpo.config import Config, parse_config
from fastpo.errors import CheckpointError
from fastpo.models.denoisers import Denoisers, add_lora
from fastpo.models.export import LORA_FILE, export_policy
from fastpo.models.folder import ModelFolder
from fastpo.models.lora_formats import LoraFormat, write_lora
from fastpo.system.files import check_folder, make_folder, whole_file
from fastpo.system.storage import storage_errors
from fastpo.train.checkpoint_folders import (
    FOLDER,
    STATE,
    WEIGHTS,
    check_whole,
    newest_whole,
    read_about,
)

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser

OTHER_FILES = (".bin", ".ckpt", ".pt", ".pth", ".gguf", ".json", ".sft")
"""Endings of files that a LoRA is not written as; nobody who gives one means a folder."""


@storage_errors()
def consolidate(source: Path, target: Path, *, average: bool = False) -> Path:
    """Exports a checkpoint as training exports its end.

    Args:
        source: A run's folder, whose newest whole checkpoint is taken, or a checkpoint's folder.
        target: The folder to make; its layout is `fastpo.models.export.export_policy`'s. It may be
            there if it is empty: nothing is replaced, not even an earlier export.
        average: Export the moving average of `train.ema_decay` instead of the last weights.

    Returns:
        `target`.

    Raises:
        CheckpointError: There is no whole checkpoint, or no moving average in it, or the target
            holds something.
        ModelError: The base model's folder is not to be found.
    """
    _check_free(target)
    config, weights = _trained(source, average=average)
    model = ModelFolder.resolve(config.model)
    policy = _architecture(config, model)
    return export_policy(model.family, policy, target, config.train.method, weights)


@storage_errors()
def export_lora(source: Path, target: Path, form: LoraFormat, *, average: bool = False) -> Path:
    """Writes a checkpoint's LoRA as one file in a format that other programs read.

    Args:
        source: As of `consolidate`.
        target: The file to write, which ends in `.safetensors`, or a folder in which it is named
            `pytorch_lora_weights.safetensors`. Nothing is replaced.
        form: See `fastpo.models.lora_formats`.
        average: As of `consolidate`.

    Returns:
        The file.

    Raises:
        CheckpointError: As `consolidate`; or the run trained the whole model, or the file is there.
        ModelError: The base model's folder is not to be found, or has no names in the format.
    """
    file = target if target.suffix == ".safetensors" else target / LORA_FILE
    if os.path.lexists(file):
        raise CheckpointError(f"{file} is there: give a new name, nothing is replaced")
    taken = os.path.lexists(target) and not target.is_dir()
    if file != target and (taken or target.suffix.lower() in OTHER_FILES):
        raise CheckpointError(f"{target} is no folder: give a name that ends in .safetensors")
    check_folder(file.parent)
    config, weights = _trained(source, average=average)
    if config.train.method != "lora":
        raise CheckpointError(
            f"{source} trained the whole model (train.method: full), and holds no LoRA to export; "
            f"fastpo consolidate {source} OUT writes its weights as a folder for diffusers"
        )
    model = ModelFolder.resolve(config.model)
    policy = _architecture(config, model)
    make_folder(file.parent)
    with whole_file(file) as temporary:
        write_lora(model.family, policy, weights, temporary, form)
    return file


def export_best(denoisers: Denoisers, checkpoint: Path, target: Path, method: str) -> None:
    """Exports the checkpoint that `train.keep_best` has kept; one that is damaged is told of.

    Args:
        denoisers: The run's; the policy tells the architecture.
        checkpoint: The checkpoint's folder.
        target: The run's folder `best`, which an earlier one may have left.
        method: As of `export_policy`.
    """
    try:
        _, weights = _trained(checkpoint, average=False)
    except CheckpointError as error:
        print(f"{target} is not written: {error}", file=sys.stderr)
        return
    export_policy(denoisers.family, denoisers.policy, target, method, weights)


@contextmanager
def exported(
    run: Path, weights: Path | None, *, average: bool = False
) -> Iterator[tuple[Path | None, int | None]]:
    """Gives an export of the weights that an evaluation is asked for, and their step.

    Args:
        run: The folder of the run that is evaluated.
        weights: A checkpoint, a run, whose newest whole checkpoint is taken, or an export; None for
            what `run` has exported.
        average: Their moving average.

    Raises:
        CheckpointError: As `consolidate`; or an export has no moving average of its own.
    """
    if weights is None and not average:
        yield None, None
        return
    source = run if weights is None else weights
    if weights is None and (run / "ema").is_dir():
        yield run / "ema", None
    elif (source / STATE).is_file() or (source / FOLDER).is_dir():
        checkpoint = _find(source)
        with TemporaryDirectory() as folder:
            made = consolidate(checkpoint, Path(folder, "export"), average=average)
            yield made, read_about(checkpoint).step
    elif average:
        raise CheckpointError(
            f"--average is for a run or a checkpoint, and {source} is neither; an exported average "
            "is evaluated by its folder, RUN/ema"
        )
    else:
        yield source, None


def _trained(source: Path, *, average: bool) -> tuple[Config, dict[str, Tensor]]:
    """Returns the configuration and the trained weights by name, or their moving average."""
    checkpoint = _find(source)
    where = str(checkpoint / STATE)
    config = parse_config(read_about(checkpoint).config, where=where)
    file = checkpoint / ("average-export.safetensors" if average else WEIGHTS)
    if not file.is_file():
        hint = "; only a run with train.ema_decay keeps one" if average else ""
        raise CheckpointError(f"{checkpoint} holds no {file.name}{hint}")
    weights = load_file(file)
    if average:
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    return config, weights


def _check_free(target: Path) -> None:
    empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not empty:
        raise CheckpointError(
            f"{target} is there and is not an empty folder: give a new one, nothing is replaced"
        )
    check_folder(target.parent)


def _find(source: Path) -> Path:
    """The checkpoint to take; its files are compared with their checksums."""
    if (source / STATE).is_file():
        check_whole(source)
        return source
    checkpoint = newest_whole(source)
    if checkpoint is None:
        raise CheckpointError(f"{source} is neither a checkpoint nor a run that has one")
    return checkpoint


def _architecture(config: Config, model: ModelFolder) -> Denoiser:
    """The policy without weights."""
    denoiser = model.family.load_denoiser(model, weights=False)
    if config.train.method == "lora":
        with torch.device("meta"):
            add_lora(model.family, denoiser, config.train.lora)
    return denoiser
