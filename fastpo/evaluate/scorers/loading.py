"""CLIP models, their processors and files of weights, loaded whole or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpo.errors import ModelError, one_line
from fastpo.models.folder import is_hub_id
from fastpo.models.headers import check_weights_file
from fastpo.models.reports import complain
from fastpo.models.weights import without_reports
from fastpo.system.files import user_path

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP = "openai/clip-vit-large-patch14"
PROCESSOR_FILES = (
    "preprocessor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "vocab.json merges.txt"
)


def load_clip(
    scorer: str, path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """Loads a CLIP of which each tensor comes from a file.

    Raises:
        ModelError: It is not available, no CLIP, or lacks weights.
    """
    from transformers import AutoModel

    advice = (
        f"Fetch it where there is a network (`hf download {_published(scorer, path)} --local-dir "
        f"DIR`) and give the folder: evaluate.scorers: [{scorer}:DIR]"
    )
    loader = partial(AutoModel.from_pretrained, output_loading_info=True)
    with without_reports():
        model, found = load(scorer, path, loader, advice)
    if not hasattr(model, "logit_scale") or not hasattr(model, "visual_projection"):
        raise ModelError(f"scorer {scorer}: {path} is a {type(model).__name__}, expected CLIP")
    missing, wrong = found["missing_keys"], found["mismatched_keys"]
    if missing or wrong:  # the library would go on with random numbers in their place
        complaint = complain(missing, found["unexpected_keys"], wrong)
        raise ModelError(f"scorer {scorer}: {path} {complaint}")
    return model.to(dtype).eval().to(device)


def load_processor(scorer: str, path: str, model: Any, weights: str) -> Any:
    """Loads the processor at `path` for the model at `weights`.

    Raises:
        ModelError: It is not available, or is of another model.
    """
    from transformers import AutoProcessor

    folder = user_path(weights)
    beside = str(folder) if folder.is_dir() else "DIR"
    source = path if is_hub_id(path) and not user_path(path).is_dir() else None
    advice = (
        f"It is the processor that is missing, not the weights. Fetch its files where there is a "
        f"network (`hf download {source or _published(scorer, path)} {PROCESSOR_FILES} --local-dir "
        f"{beside}`), beside the weights of {weights}"
    )
    processor = load(scorer, path, AutoProcessor.from_pretrained, advice)
    complaint = _misfit(processor, model.config)
    if complaint is not None:
        raise ModelError(
            f"scorer {scorer}: the processor of {path} is of another model than {weights}: "
            f"{complaint}"
        )
    return processor


def _misfit(processor: Any, config: Any) -> str | None:
    """Says in which numbers a processor differs from a CLIP's configuration; None: in none."""
    from transformers import CLIPProcessor

    if not isinstance(processor, CLIPProcessor):
        return f"it is a {type(processor).__name__}, not one of images and text"
    images, tokenizer = processor.image_processor, processor.tokenizer
    if len(tokenizer) > config.text_config.vocab_size:
        known = config.text_config.vocab_size
        return f"its tokenizer has {len(tokenizer)} tokens, the model knows {known}"
    crop, size = (getattr(images, name, None) or {} for name in ("crop_size", "size"))
    side = crop.get("height") or size.get("height") or size.get("shortest_edge")
    wanted = config.vision_config.image_size
    if side is not None and side != wanted:
        return f"it makes images of {side} pixels, the model takes {wanted}"
    return None


def _published(scorer: str, path: str) -> str:
    """The hub id to name where `path` cannot be loaded."""
    if is_hub_id(path) and not user_path(path).exists():
        return path
    return PICKSCORE if scorer == "pickscore" else CLIP


def load(scorer: str, path: str, loader: Callable[..., Any], advice: str) -> Any:
    folder = user_path(path)
    try:
        # Without the choice transformers asks on the terminal about code that comes with a model.
        return loader(str(folder) if folder.is_dir() else path, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # loaders raise anything on a broken folder
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"scorer {scorer}: {path!r} could not be loaded ({reason}). {advice}"
        ) from error


def find_file(scorer: str, path: str, name: str) -> Path:
    """Returns the published file `name`: at `path`, in the folder `path`, or of a hub repository.

    Raises:
        ModelError: It is not there, or cannot be fetched.
    """
    place = user_path(path)
    if place.is_file():
        return place
    if place.is_dir():
        if (place / name).is_file():
            return place / name
        raise ModelError(f"scorer {scorer}: {place} holds no {name}")
    advice = (
        f"Fetch it where there is a network (`hf download {path} {name} --local-dir DIR`) and name "
        f"the folder: evaluate.scorers: [{scorer}:DIR]"
    )
    if not is_hub_id(path):
        raise ModelError(f"scorer {scorer}: no such file or folder: {path}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name))
    except MemoryError:
        raise
    except Exception as error:  # the client also raises its transport's errors
        raise ModelError(
            f"scorer {scorer}: {name} of {path!r} could not be fetched ({one_line(error)}). "
            f"{advice}"
        ) from error


def read_weights(scorer: str, file: Path) -> dict[str, Any]:
    """Reads a file of tensors by safetensors or torch's reader of weights alone.

    Returns:
        Its mapping; of a checkpoint with `state_dict` that part.

    Raises:
        ModelError: It is damaged, or holds anything but tensors and plain values.
    """
    check_weights_file(file, f"scorer {scorer}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpicklers raise anything on a broken file
        reason = one_line(error)[:200]
        raise ModelError(
            f"scorer {scorer}: {file} cannot be read as weights alone ({reason}); fetch it again"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(t, torch.Tensor) for t in content.values()
    ):
        raise ModelError(f"scorer {scorer}: {file} holds no mapping of names to tensors")
    return content


def fill(model: Any, state: dict[str, torch.Tensor], file: Path, what: str, expected: str) -> Any:
    """Puts a file's tensors into a model, all or none, and returns it.

    Args:
        model: The model.
        state: The tensors, by the model's names.
        file: Where they were read, for messages.
        what: Who asks, for messages, such as `scorer imagereward`.
        expected: What the file should be, for messages.

    Raises:
        ModelError: A tensor is missing, unknown or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        (name, tuple(tensor.shape), own[name])
        for name, tensor in state.items()
        if name in own and tuple(tensor.shape) != own[name]
    ]
    if text := complain(set(own) - set(state), set(state) - set(own), wrong):
        raise ModelError(f"{what}: {file} {text}; {expected}")
    model.load_state_dict(state, assign=True)
    return model


def load_tokenizer(scorer: str, folder: Path, hub: str, *, most: int) -> Any:
    """Loads the tokenizer of a folder, or of a hub repository if the folder has none.

    Args:
        scorer: The scorer's name, for messages.
        folder: Where the weights lie.
        hub: The repository that publishes the tokenizer.
        most: Tokens that the model knows.

    Raises:
        ModelError: It is not available, or has more tokens than the model.
    """
    from transformers import AutoTokenizer

    own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    advice = (
        f"It is the tokenizer that is missing, not the weights. Fetch its files where there is a "
        f"network (`hf download {hub} --include 'tokenizer*' 'vocab*' 'merges*' 'config.json' "
        f"--local-dir {folder}`), beside the weights"
    )
    tokenizer = load(scorer, str(folder) if own else hub, AutoTokenizer.from_pretrained, advice)
    if len(tokenizer) > most:
        raise ModelError(
            f"scorer {scorer}: the tokenizer of {folder if own else hub} has {len(tokenizer)} "
            f"tokens, the model knows {most}"
        )
    return tokenizer
