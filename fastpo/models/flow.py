"""What families of flow matching share: a transformer that predicts `noise - x` or its negative.

Which family a folder is of, `model_index.json` says, by the name of its pipeline. A family's file
gives the names of diffusers' classes, its encoders, and `predict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.family import ModelFamily
from fastpo.models.folder import ModelFolder, loading, read_json
from fastpo.models.schedule import NoiseSchedule, flow_schedule, vae_number
from fastpo.models.weights import load_part
from fastpo.precision import DTYPES

JOINT_ATTENTION = (
    *("to_k", "to_q", "to_v", "to_out.0"),
    *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
)
"""Layers of attention that images and texts share, of the images' tokens, then of the texts'."""
_FEW_STEPS = re.compile(
    r"(?i)(?<![a-z])(turbo|lightning|schnell|distilled|lcm|hyper|sprint)(?![a-z])"
)
"""Words in the names of models that were distilled to a few sampling steps."""
_SAYS_NOTHING = re.compile(
    r"(?i)(diffusers|models?|pipeline|transformer|final|weights|checkpoint|main|bf16|fp16|/)"
)
"""Names of folders below the one that is named after the model."""
_OTHER_SIGMAS = (
    *("invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
"""Options of schedulers with which none of these models was trained."""


class FlowFamily(ModelFamily):
    """A transformer trained with flow matching.

    Attributes:
        pipeline_prefix: How the names of diffusers' pipelines of this kind of model begin; those
            that are not `pipeline_class` are refused by name.
        vae_class: The diffusers class of the VAE.
        latent_channels: Of the VAE.
        scheduler_class: The scheduler that the family was trained for.
        shifts_by_tokens: Whether its noise is shifted by the number of an image's tokens
            (`use_dynamic_shifting`).
    """

    denoiser = "transformer"
    title = "transformer"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    peft_names = True
    text_room = "prepare.text_length"
    pipeline_prefix: ClassVar[str]
    vae_class: ClassVar[Any] = AutoencoderKL
    latent_channels: ClassVar[int] = 16
    scheduler_class: ClassVar[Any] = FlowMatchEulerDiscreteScheduler
    shifts_by_tokens: ClassVar[bool] = False

    def recognizes(self, folder: Path) -> bool:
        """By the pipeline's name in `model_index.json`; its relatives are refused."""
        path = folder / "model_index.json"
        if not path.is_file():
            return False
        kind = read_json(path).get("_class_name")
        if kind != self.pipeline_class.__name__:
            if isinstance(kind, str) and re.match(self.pipeline_prefix, kind):
                raise ModelError(
                    f"{path}: FastPO trains {self.pipeline_class.__name__}, not its relative "
                    f"{ascii(kind)[:80]}"
                )
            return False
        own = read_json(folder / "transformer" / "config.json").get("_class_name")
        if own != self.denoiser_class.__name__:
            raise ModelError(
                f"{folder / 'transformer'}: the transformer of {kind} is a "
                f"{self.denoiser_class.__name__}, got {ascii(own)[:80]}"
            )
        return True

    def check(self, folder: ModelFolder) -> None:
        """As `ModelFamily.check`: scheduler, VAE and transformer must be of the family's kind."""
        self.refuse_few_steps(folder)
        self.scheduler_config(folder)
        path = folder.vae / "config.json"
        config = read_json(path)
        kind, channels = config.get("_class_name"), self.vae_channels(config)
        if (kind, channels) != (self.vae_class.__name__, self.latent_channels):
            raise ModelError(
                f"{path}: FastPO trains {self.name} with an {self.vae_class.__name__} of "
                f"{self.latent_channels} channels, got {ascii(kind)[:80]} of "
                f"{ascii(channels)[:80]}"
            )
        self.check_parts(folder)

    def refuse_few_steps(self, folder: ModelFolder) -> None:
        """Refuses models whose name says that they were distilled to a few sampling steps.

        Their configurations are those of the models that they were made from, so names are all
        that tells them apart: the repository's, or of a folder its own, the nearest above it where
        its own says nothing, and what diffusers wrote down when it saved the model
        (`_name_or_path`).

        Raises:
            ModelError: A name has such a word.
        """
        for place, name in _names(folder):
            word = _FEW_STEPS.search(name)
            if word is not None:
                raise ModelError(
                    f"{place}: {ascii(name)[:80]} is by its name ({word[0]}) a model distilled "
                    "to a few steps, which flow matching's training would undo; train the model "
                    "that it was made from, or rename it if it is none"
                )

    def check_parts(self, folder: ModelFolder) -> None:
        """Refuses a folder in which a text encoder or tokenizer is missing.

        Raises:
            ModelError: The text names the part.
        """
        for name in self.encoder_parts:
            if not folder.component(name).is_dir():
                raise ModelError(
                    f"{folder.path}: {name}/ is missing, with which {self.name} encodes prompts"
                )

    def check_width(
        self, folder: ModelFolder, texts: Sequence[tuple[str, str]], reads: str
    ) -> None:
        """Compares what text encoders give with what the transformer reads.

        Args:
            folder: The model.
            texts: Text encoders and the keys of their widths, which the transformer reads together.
            reads: The key of the transformer's configuration.

        Raises:
            ModelError: They are of different models.
        """
        given: list[Any] = [
            read_json(folder.component(name) / "config.json").get(key) for name, key in texts
        ]
        expected = self.denoiser_config(folder).get(reads)
        if not all(isinstance(width, int) for width in given) or sum(given) != expected:
            names, keys = (" and ".join(dict.fromkeys(words)) for words in zip(*texts, strict=True))
            raise ModelError(
                f"{folder.path}: {names} give {' + '.join(ascii(w)[:20] for w in given)} numbers "
                f"({keys}), the transformer reads {ascii(expected)[:20]} ({reads}): they are of "
                "different models"
            )

    def vae_channels(self, config: dict[str, Any]) -> Any:
        """Returns the VAE's channels by its configuration."""
        return config.get("latent_channels", 4)

    def scheduler_config(self, folder: ModelFolder) -> dict[str, Any]:
        """Reads the scheduler's configuration.

        Raises:
            ModelError: It is of another class than the family's, or of another schedule.
        """
        path = folder.component("scheduler") / "scheduler_config.json"
        config = read_json(path)
        kind, expected = config.get("_class_name"), self.scheduler_class.__name__
        if kind != expected:
            raise ModelError(
                f"{path}: {self.name} is trained with flow matching, for which its pipeline has a "
                f"{expected}; got {ascii(kind)[:80]}"
            )
        self.check_sigmas(path, config)
        if self.shifts_by_tokens and not config.get("use_dynamic_shifting"):
            raise ModelError(
                f"{path}: the noise of {self.name} is shifted by the resolution "
                "(use_dynamic_shifting); this scheduler's is not"
            )
        return config

    def check_sigmas(self, path: Path, config: Mapping[str, Any]) -> None:
        """Refuses options of a scheduler with which the family was not trained.

        Raises:
            ModelError: There is one; the text names it.
        """
        for key in (*_OTHER_SIGMAS, *(() if self.shifts_by_tokens else ("use_dynamic_shifting",))):
            if config.get(key):
                raise ModelError(
                    f"{path}: {self.name} is not trained with {key}; take the scheduler of the "
                    "model's own repository"
                )
        if (count := config.get("num_train_timesteps", 1000)) != 1000:
            raise ModelError(
                f"{path}: {self.name} was trained with num_train_timesteps 1000, got "
                f"{ascii(count)[:80]}"
            )

    def denoiser_config(self, folder: ModelFolder) -> dict[str, Any]:
        """Reads the transformer's configuration."""
        return read_json(folder.component("transformer") / "config.json")

    def denoiser_factor(self, folder: ModelFolder) -> int:
        """The side of a patch in latent pixels."""
        size = self.denoiser_config(folder).get("patch_size", 2)
        if not isinstance(size, int) or not 0 < size <= 64:
            raise ModelError(f"transformer/config.json: patch_size is {ascii(size)[:80]}")
        return size

    def tokens(self, folder: ModelFolder, resolution: int) -> int:
        """Returns how many tokens the transformer sees of a square image."""
        side = resolution // (self.vae_factor(folder) * self.denoiser_factor(folder))
        return side * side

    def mu(self, tokens: int) -> float | None:
        """Returns by what a scheduler with dynamic shifting shifts; None: by `dynamic_shift`."""
        return None

    def told(self, sigma: Tensor) -> Tensor:
        """Returns what the transformer is told where the noise's factor is `sigma`, float32."""
        return 1000.0 * sigma

    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """The scheduler's sigmas with its shift, static or by the number of tokens."""
        config = self.scheduler_config(folder)
        with loading("scheduler/scheduler_config.json: no schedule could be made of it"):
            scheduler = self.scheduler_class.from_config(config)
            tokens = self.tokens(folder, resolution)
            schedule = flow_schedule(scheduler, tokens=tokens, mu=self.mu(tokens))
        vae = read_json(folder.vae / "config.json")
        return NoiseSchedule(
            signal=schedule.signal,
            sigma=schedule.sigma,
            timesteps=self.told(schedule.sigma),
            prediction=schedule.prediction,
            latent_scale=vae_number(vae, "scaling_factor", 1.0),
            latent_shift=vae_number(vae, "shift_factor", 0.0),
        )

    def load_vae(self, folder: ModelFolder, config: PrepareConfig, device: torch.device) -> Any:
        """Loads the VAE in evaluation mode."""
        what = f"{folder.vae}: the VAE could not be loaded"
        dtype = DTYPES[config.vae_precision]
        vae = load_part(self.vae_class, folder, "vae", what=what, dtype=dtype)
        return vae.to(device).eval().requires_grad_(False)

    def refuse_clip_options(self, config: PrepareConfig) -> None:
        """Refuses ways of encoding that only models with CLIP alone have.

        Raises:
            ConfigError: `prepare.prompt_chunks` or `prepare.clip_skip` is set.
        """
        for key, value, plain in (
            ("prompt_chunks", config.prompt_chunks, 1),
            ("clip_skip", config.clip_skip, 0),
        ):
            if value != plain:
                raise ConfigError(
                    f"prepare.{key}: {self.name} has no such way of encoding; leave it at {plain}, "
                    f"got {value}"
                )


def _names(folder: ModelFolder) -> Iterator[tuple[Path, str]]:
    """Yields by what names a model goes, each with the file or folder that says so."""
    yield folder.path, _model_of(folder.path.absolute())
    for path in (
        folder.path / "model_index.json",
        folder.component("transformer") / "config.json",
    ):
        name = read_json(path).get("_name_or_path") if path.is_file() else None
        if isinstance(name, str):
            yield path, _model_of(PurePath(name))


def _model_of(path: PurePath) -> str:
    """Returns what a path, or a hub id, calls the model: the last part that says something."""
    parts = [part for part in path.parts if part.startswith("models--")] or path.parts
    return next((part for part in reversed(parts) if not _SAYS_NOTHING.fullmatch(part)), "")
