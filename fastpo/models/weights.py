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
from safetensors import safe_open

from fastpo.errors import ModelError
from fastpo.models.folder import (
    WEIGHTS,
    ModelFolder,
    component_variant,
    loading,
    read_json,
    variant_of,
    weight_files,
)
from fastpo.models.headers import check_weights_file
from fastpo.models.reports import complain
from fastpo.models.single_file import load_from_file
from fastpo.system.files import listing

_REPORTS = ("LOAD REPORT", "Some weights of")


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
    with loading(what), without_reports():
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


def load_part(
    kind: Any, folder: ModelFolder, name: str, *, what: str, dtype: torch.dtype | None = None
) -> Any:
    """Loads a component of a pipeline from its folder, or from the single file that holds it.

    Args:
        kind: Its class.
        folder: The pipeline.
        name: Its name in the pipeline.
        what: Begins a refusal: which part, and that it could not be loaded.
        dtype: Of the weights; default: as the class does.

    Raises:
        ModelError: As `load_component`.
    """
    file = folder.weights_file(name)
    if file is None:
        own = name == "vae" and folder.other_vae is not None
        path, subfolder = (folder.vae, "") if own else (folder.place(name), name)
        return load_component(
            kind, path, what=what, subfolder=subfolder, variant=folder.variant, dtype=dtype
        )
    with loading(f"{what} from {file}"), without_reports():
        return load_from_file(kind, folder, name, file, dtype)


def read_tensors(folder: ModelFolder, name: str, wanted: Collection[str]) -> dict[str, Any]:
    """Reads some of a component's tensors from its folder, in float32, and loads no model.

    Args:
        folder: The pipeline.
        name: The component.
        wanted: The tensors' names; those that no file has are left out.
    """
    found: dict[str, Any] = {}
    if not wanted:
        return found
    part = folder.component(name)
    for file in weight_files(part, component_variant(part, folder.variant)):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys() if key in wanted}
        else:
            held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found |= {key: held[key] for key in held if key in wanted}
    return {key: tensor.float() for key, tensor in found.items()}


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
            models[name] = load_part(found, folder, name, what=what, dtype=dtype)
    return models


def _nothing_in(folder: Path) -> str:
    """Says that a folder has no plain weights, and which variants it has."""
    if not folder.is_dir():
        return "is missing"
    names = {variant_of(f) for kind in WEIGHTS for f in folder.glob(kind)}
    variants = sorted(name for name in names if name)
    if not variants:
        return f"holds no weights (found: {listing(folder)})"
    return f"holds weights of the variant {' and '.join(variants)} alone: set model.variant"


@contextmanager
def without_reports() -> Iterator[None]:
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
