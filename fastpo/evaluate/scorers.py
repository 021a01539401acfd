"""What the samples are scored by: named scorers behind one protocol.

| name in `evaluate.scorers` | metrics                        | what it needs                    |
|----------------------------|--------------------------------|----------------------------------|
| `pickscore[:folder or id]` | `pickscore`                    | PickScore v1 (CLIP-H)            |
| `clip[:folder or id]`      | `clip`, cosine x 100           | any CLIP model, default ViT-L/14 |
| `aesthetic:head.pth`       | `aesthetic`, about 1 to 10     | LAION's head on CLIP ViT-L/14    |
| `digits`                   | `ink_reward`, `ink`, `legible` | the demonstration's own scorer   |

Any object with `name` and `score` serves as well: `evaluate(config, scorers=[mine])`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastpo.errors import ConfigError, ModelError, one_line
from fastpo.models.folder import is_hub_id
from fastpo.models.reports import complain
from fastpo.models.weights import without_reports
from fastpo.system.process import default_device

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSOR_FILES = (
    "preprocessor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "vocab.json merges.txt"
)
PUBLIC_CLIPS = ("openai/clip-", "laion/CLIP-")
CLIP = "openai/clip-vit-large-patch14"
BATCH_SIZE = 16

Scores = dict[str, NDArray[np.float64]]


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts.

    Attributes:
        name: Its name in messages.
    """

    name: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns one `(N,)` float64 array per metric, higher is better, the main metric first."""
        ...


class ClipScorer:
    """Agreement of image and prompt by CLIP: 100 times the cosine of the two embeddings.

    Args:
        path: A folder or hub id of a CLIP model with its processor.
        device: Where it runs; default CUDA if there is any.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "clip"
    default_path = CLIP

    def __init__(
        self, path: str | None = None, *, device: torch.device | str | None = None
    ) -> None:
        path = path or self.default_path
        self.device = _device(device)
        self.check_path(path)
        self.model = _load_clip(self.name, path, self.device)
        self.processor = _load_processor(self.name, self.processor_path(path), self.model, path)

    def check_path(self, path: str) -> None:
        """Refuses what is known to be another model; any CLIP serves here."""

    def processor_path(self, path: str) -> str:
        """Where the processor of the model at `path` is: a folder or hub id."""
        return path

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{name: (N,)}`."""
        return {self.name: self.scale() * _batched(self._cosine, images, prompts)}

    def scale(self) -> float:
        """What the cosine is multiplied by."""
        return 100.0

    def _cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(prompts),
            images=[image.convert("RGB") for image in images],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(**inputs)  # both embeddings have unit length
        return (output.image_embeds.double() * output.text_embeds.double()).sum(-1)


class PickScorer(ClipScorer):
    """PickScore (arXiv 2305.01569): a CLIP-H tuned on human choices; temperature times cosine.

    The published scale, about 20 to 24. A folder without a processor uses that of the CLIP it was
    tuned from. Other CLIPs are refused as far as they can be told.

    Args:
        path: A folder or hub id.
        device: Where it runs; default CUDA if there is any.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "pickscore"
    default_path = PICKSCORE

    def check_path(self, path: str) -> None:
        """Refuses public CLIPs, whose scores would be called PickScore's.

        Raises:
            ModelError: It is the CLIP that PickScore was tuned from, or another one, by its hub id,
                its folder in the hub's cache or OpenCLIP's configuration beside the weights.
        """
        folder = Path(path).expanduser()
        names = [path, *(p.removeprefix("models--").replace("--", "/") for p in folder.parts)]
        known = any(name.startswith(PUBLIC_CLIPS) for name in names)
        if known or (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"scorer pickscore: {path} holds CLIP, not PickScore, whose weights are "
                f"{PICKSCORE}; to score by CLIP itself: evaluate.scorers: [clip:{path}]"
            )

    def processor_path(self, path: str) -> str:
        """The folder itself if it has a processor, else that of the CLIP it was tuned from."""
        files = ("processor_config.json", "preprocessor_config.json")
        own = any((Path(path).expanduser() / name).is_file() for name in files)
        return path if own else PICKSCORE_PROCESSOR

    def scale(self) -> float:
        """The temperature learned with the model."""
        return self.model.logit_scale.exp().item()


class AestheticScorer:
    """LAION's aesthetic predictor: linear layers on CLIP ViT-L/14's image embedding; no prompt.

    Args:
        head: The head's weights, `sac+logos+ava1-l14-linearMSE.pth`.
        clip: A folder or hub id of the CLIP the head was trained on.
        device: Where it runs; default CUDA if there is any.

    Raises:
        ConfigError: No head was given.
        ModelError: The head or CLIP is not available, or they do not fit together.
    """

    name = "aesthetic"

    def __init__(
        self, head: str = "", clip: str = CLIP, *, device: torch.device | str | None = None
    ) -> None:
        if not head:
            raise ConfigError(
                "evaluate.scorers: aesthetic needs the head's weights: "
                "aesthetic:/path/to/sac+logos+ava1-l14-linearMSE.pth"
            )
        self.device = _device(device)
        self.model = _load_clip(self.name, clip, self.device)
        self.processor = _load_processor(self.name, clip, self.model, clip)
        self.layers = _load_head(Path(head).expanduser(), self.model.config.projection_dim)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"aesthetic": (N,)}`."""
        return {self.name: _batched(self._rating, images, prompts)}

    def _rating(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        rgb = [image.convert("RGB") for image in images]
        inputs = self.processor(images=rgb, return_tensors="pt").to(self.device)
        pooled = self.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        x = torch.nn.functional.normalize(self.model.visual_projection(pooled).double(), dim=-1)
        for weight, bias in self.layers:  # dropout between them, no activation: as released
            x = torch.nn.functional.linear(x, weight.to(x), bias.to(x))
        return x[:, 0]


def build_scorer(text: str, *, device: torch.device | str | None = None) -> Scorer:
    """Builds a scorer from its name and, after a colon, its argument (`clip:/models/clip-l`).

    Raises:
        ConfigError: The name is unknown; the text gives the nearest valid one.
        ModelError: Its model is not available.
    """
    name, colon, argument = text.partition(":")
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"evaluate.scorers: unknown scorer {name!r}{hint} (valid: {', '.join(SCORERS)})"
        )
    if colon and not argument:
        raise ConfigError(f"evaluate.scorers: {text!r} has a colon but nothing after it")
    entry = SCORERS[name]
    if argument and not entry.takes_argument:
        raise ConfigError(f"evaluate.scorers: {name} takes no argument, got {argument!r}")
    module, _, attribute = entry.target.partition(":")
    scorer = getattr(import_module(module), attribute)
    return scorer(*filter(None, [argument]), device=device) if entry.takes_argument else scorer()


def build_scorers(
    names: Sequence[str], *, device: torch.device | str | None = None
) -> list[Scorer]:
    """Builds every scorer of `evaluate.scorers`, in order; errors as in `build_scorer`."""
    return [build_scorer(name, device=device) for name in names]


@dataclass(frozen=True)
class ScorerEntry:
    """Where a named scorer is defined; it is imported when a configuration names it.

    Attributes:
        target: `module:class`.
        takes_argument: Whether it is built with the text after the colon and a device, or with
            nothing.
    """

    target: str
    takes_argument: bool = True


SCORERS = {
    "pickscore": ScorerEntry("fastpo.evaluate.scorers:PickScorer"),
    "clip": ScorerEntry("fastpo.evaluate.scorers:ClipScorer"),
    "aesthetic": ScorerEntry("fastpo.evaluate.scorers:AestheticScorer"),
    "digits": ScorerEntry("fastpo.demo.scorer:DigitScorer", takes_argument=False),
}


@torch.inference_mode()
def _batched(
    score: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
) -> NDArray[np.float64]:
    """Runs `score` over slices of the images; `(N,)`."""
    if len(images) != len(prompts):
        raise ValueError(f"one prompt per image: got {len(images)} and {len(prompts)}")
    starts = range(0, len(images), BATCH_SIZE)
    parts = [score(images[i : i + BATCH_SIZE], prompts[i : i + BATCH_SIZE]) for i in starts]
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or default_device())


def _load_clip(scorer: str, path: str, device: torch.device) -> Any:
    """Loads a CLIP of which each tensor comes from a file.

    Raises:
        ModelError: It is not available, no CLIP, or lacks weights.
    """
    from transformers import AutoModel

    advice = (
        f"Fetch it where there is a network (`hf download {_published(scorer, path)} --local-dir "
        f"DIR`) and give the folder: evaluate.scorers: [{scorer}:DIR]"
    )
    load = partial(AutoModel.from_pretrained, output_loading_info=True)
    with without_reports():
        model, found = _load(scorer, path, load, advice)
    if not hasattr(model, "logit_scale") or not hasattr(model, "visual_projection"):
        raise ModelError(f"scorer {scorer}: {path} is a {type(model).__name__}, expected CLIP")
    missing, wrong = found["missing_keys"], found["mismatched_keys"]
    if missing or wrong:  # the library would go on with random numbers in their place
        complaint = complain(missing, found["unexpected_keys"], wrong)
        raise ModelError(f"scorer {scorer}: {path} {complaint}")
    return model.float().eval().to(device)


def _load_processor(scorer: str, path: str, model: Any, weights: str) -> Any:
    """Loads the processor at `path` for the model at `weights`.

    Raises:
        ModelError: It is not available, or is of another model.
    """
    from transformers import AutoProcessor

    folder = Path(weights).expanduser()
    beside = str(folder) if folder.is_dir() else "DIR"
    source = path if is_hub_id(path) and not Path(path).expanduser().is_dir() else None
    advice = (
        f"It is the processor that is missing, not the weights. Fetch its files where there is a "
        f"network (`hf download {source or _published(scorer, path)} {PROCESSOR_FILES} --local-dir "
        f"{beside}`), beside the weights of {weights}"
    )
    processor = _load(scorer, path, AutoProcessor.from_pretrained, advice)
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
    if is_hub_id(path) and not Path(path).expanduser().exists():
        return path
    return PICKSCORE if scorer == PickScorer.name else CLIP


def _load(scorer: str, path: str, loader: Callable[..., Any], advice: str) -> Any:
    folder = Path(path).expanduser()
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


def _load_head(path: Path, width: int) -> list[tuple[Tensor, Tensor]]:
    """Reads `layers.<i>.weight|bias` in order and checks that they form one chain to a number."""
    if not path.is_file():
        raise ModelError(
            f"scorer aesthetic: no such file: {path}. The head is published as "
            "sac+logos+ava1-l14-linearMSE.pth with the improved-aesthetic-predictor repository"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = [re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state]
        order = sorted(int(match[1]) for match in found if match)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in order]
    except Exception as error:
        text = one_line(error)[:300]
        raise ModelError(f"scorer aesthetic: {path} is no such head: {text}") from error
    widths = [width, *(len(weight) for weight, _ in layers)]
    if (
        not layers
        or widths[-1] != 1
        or any(
            weight.shape[1] != before for (weight, _), before in zip(layers, widths, strict=False)
        )
    ):
        shapes = [tuple(weight.shape) for weight, _ in layers]
        raise ModelError(
            f"scorer aesthetic: {path} must lead from CLIP's {width} features to one number, its "
            f"layers are {shapes}"
        )
    return layers
