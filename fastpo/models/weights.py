"""Components' weights: loaded so that each of the model's tensors comes from a file, or refused.

The libraries only warn of keys that are missing, unexpected or of another shape, and go on with
random tensors (transformers) or with none (diffusers).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastpo.errors import ModelError, one_line
from fastpo.models.folder import (
    WEIGHTS,
    ModelFolder,
    component_variant,
    loading,
    read_json,
    variant_of,
    weight_files,
)
from fastpo.system.files import listing

_POINTER = b"version https://git-lfs"
_SHOWN = 3
_REPORTS = ("LOAD REPORT", "Some weights of")
_WRAPPERS = {
    "_orig_mod.": "they are of a compiled model, save the one that it was compiled from",
    "base_model.model.": "they are of a PEFT model, merge its adapters before saving it",
    "base_layer.": "they are of a PEFT model, merge its adapters before saving it",
    "module.": "they are of a model wrapped by DDP or DeepSpeed, save the one inside",
}


def load_component(
    kind: Any,
    path: Path,
    *,
    what: str,
    subfolder: str = "",
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Loads a model of diffusers or transformers with all of its weights, and nothing else.

    Args:
        kind: Its class.
        path: Its folder, or that of the pipeline.
        what: Begins a refusal: which part, and that it could not be loaded.
        subfolder: Its folder inside of `path`.
        variant: Weight variant, taken where the folder has it.
        dtype: Of the weights; default: as the class does.

    Raises:
        ModelError: A file is missing, cut off or a Git LFS pointer, or keys are missing,
            unexpected or of another shape; the text names the file and the keys.
    """
    folder = path / subfolder
    chosen = component_variant(folder, variant)
    files = weight_files(folder, chosen)
    if not files:
        raise ModelError(f"{what}: {folder} {_nothing_in(folder)}")
    for file in files:
        check_weights_file(file, what)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if dtype is not None:
        options["dtype"] = dtype
    with loading(what), _without_reports():
        model, found = kind.from_pretrained(
            path,
            variant=chosen,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report too, all of them
            **options,
        )
    complaint = complain(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    if complaint:
        where = str(files[0] if len(files) == 1 else folder)
        raise ModelError(f"{what}: {where} {complaint}")
    return model


def load_models(
    folder: ModelFolder, dtype: torch.dtype, *, without: Collection[str]
) -> dict[str, Any]:
    """Loads the models of a pipeline by the classes that `model_index.json` names.

    Args:
        folder: The pipeline.
        dtype: Of the weights.
        without: Components that are not wanted.

    Returns:
        Each by its component's name; tokenizers, schedulers and the like are no models.

    Raises:
        ModelError: As `load_component`.
    """
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    models: dict[str, Any] = {}
    for name, value in read_json(folder.path / "model_index.json").items():
        if not isinstance(value, list) or name in without:
            continue
        library, kind = value
        if library not in ("diffusers", "transformers") or kind is None:
            continue
        found = getattr(import_module(library), kind, None)
        if isinstance(found, type) and issubclass(found, ModelMixin | PreTrainedModel):
            what = f"{folder.component(name)} could not be loaded"
            models[name] = load_component(
                found, folder.path, what=what, subfolder=name, variant=folder.variant, dtype=dtype
            )
    return models


def check_weights_file(file: Path, what: str) -> None:
    """Refuses a file that holds no weights, by its first bytes and its header.

    Raises:
        ModelError: It is a Git LFS pointer, or a safetensors file that is cut off or damaged.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ModelError(
                    f"{what}: {file} is a Git LFS pointer, not the weights; fetch them with "
                    "`git lfs pull`"
                )
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                weights.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{what}: {file} is cut off or no safetensors file ({one_line(error)}); "
            "fetch or save it again"
        ) from None


def complain(
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Any, Any]],
) -> str | None:
    """Says what is wrong with a file's keys, and why if their names tell; None if nothing is.

    Args:
        missing: Keys of the model that no file has.
        unexpected: Keys of the files that the model does not have.
        mismatched: Keys with the shape in the file and that of the model.
    """
    shapes = [f"{k} {list(there)} instead of {list(own)}" for k, there, own in mismatched]
    counts = (
        (missing, "lacks"),
        (unexpected, "has unexpected"),
        (shapes, "has in another shape"),
    )
    parts = [f"{verb} {_some(keys)}" for keys, verb in counts if keys]
    if not parts:
        return None
    return ", ".join(parts) + _cause(set(missing), unexpected)


def _nothing_in(folder: Path) -> str:
    """Says that a folder has no plain weights, and which variants it has."""
    names = {variant_of(f) for kind in WEIGHTS for f in folder.glob(kind)}
    variants = sorted(name for name in names if name)
    if not variants:
        return f"holds no weights (found: {listing(folder)})"
    return f"holds weights of the variant {' and '.join(variants)} alone: set model.variant"


def _some(keys: Collection[str]) -> str:
    """`2 keys (a, b)`."""
    first = sorted(keys)[:_SHOWN]
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"{len(keys)} key{'s' * (len(keys) != 1)} ({', '.join(first)}{more})"


def _cause(missing: set[str], unexpected: Collection[str]) -> str:
    """What was put around the model's names, if a missing key is an unexpected one without it."""
    for text, why in _WRAPPERS.items():
        if any(text in key and key.replace(text, "") in missing for key in unexpected):
            return f": the names carry {text!r}, {why}"
    for key in sorted(unexpected):
        name = next((m for m in sorted(missing) if key.endswith(f".{m}")), None)
        if name is not None:
            return f": the names carry {key[: -len(name)]!r} in front"
    return ""


@contextmanager
def _without_reports() -> Iterator[None]:
    """Leaves out the libraries' own reports on keys, of which we make an error of one line."""
    names = "transformers.modeling_utils", "diffusers.models.modeling_utils"
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _REPORTS)
