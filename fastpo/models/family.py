"""What FastPO must know of a kind of model: the one interface that `fastpo/models/` offers.

A family is one file with one subclass of `ModelFamily`, and one line in `fastpo.models.registry`.
Everything behind the interface works on named tensors and on latents `(2B, C, h, w)`, winners
first; packing into tokens, position ids, guidance, the sign of the prediction and the scale of the
time are the family's own, inside `predict` and `schedule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, DataError
from fastpo.models.attention import AttentionName
from fastpo.models.encoders import Encoders, load_vae_of, vae_factor
from fastpo.models.export import (
    empty_denoiser,
    lora_layers,
    lora_metadata,
    peft_layers,
    saved_tables,
    with_weights,
)
from fastpo.models.folder import ModelFolder, loading, read_json
from fastpo.models.geometry import Geometry, make_geometry
from fastpo.models.schedule import NoiseSchedule
from fastpo.models.weights import load_models, load_part, read_tensors
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin

    class Denoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
        """A diffusers model that takes adapters."""


class ModelFamily(ABC):
    """One kind of diffusion model.

    Attributes:
        name: Its name, as in `fastpo.models.registry`; part of a cache's identity.
        denoiser: The denoiser's folder in a pipeline and in an export: `unet` or `transformer`.
        title: The denoiser in messages.
        lora_targets: How the names of the layers end that adapters usually go to.
        encoder_parts: The pipeline's components that prompts are encoded with, by folder.
        pair_conditions: Columns of the cache's index that the denoiser is told of each pair.
        denoiser_class: The diffusers class of the denoiser: a `ModelMixin` that takes adapters.
        pipeline_class: The diffusers class of the pipeline.
        pipeline_options: Arguments with which the pipeline is loaded to make images.
        guidance: The guidance scale that the denoiser is told unless `train.guidance` says another;
            None: it is told none.
        peft_names: Whether exports name adapters as peft does (`lora_A`), like diffusers' trainers
            of transformers, which other programs read; else as its trainers of UNets.
        edits: Whether pairs begin from a source image, which the prompt says how to change.
        most_sources: How many source images the pipeline takes at most, of families that edit.
        text_sees_source: Whether prompts are encoded together with their source images.
        text_room: The key that says how much of a prompt is encoded.
        sdpa_alone: Whether the denoiser's layers ignore `set_attention_backend`.
    """

    name: ClassVar[str]
    denoiser: ClassVar[str]
    title: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    encoder_parts: ClassVar[tuple[str, ...]]
    pair_conditions: ClassVar[tuple[str, ...]] = ()
    denoiser_class: ClassVar[Any]
    pipeline_class: ClassVar[Any]
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    guidance: ClassVar[float | None] = None
    peft_names: ClassVar[bool] = False
    edits: ClassVar[Literal["never", "may", "must"]] = "never"
    most_sources: ClassVar[int] = 1
    text_sees_source: ClassVar[bool] = False
    text_room: ClassVar[str] = "prepare.prompt_chunks"
    sdpa_alone: ClassVar[bool] = False

    @abstractmethod
    def recognizes(self, folder: Path) -> bool:
        """Tells whether a pipeline's folder holds a model of this family.

        Raises:
            ModelError: It holds one of this kind that FastPO cannot train; the text says why.
        """

    def check(self, folder: ModelFolder) -> None:
        """Refuses a model of this family that could not be trained right, before hours of encoding.

        Raises:
            ModelError: A component is of another kind than the family's; the text names its file.
        """
        self.vae_factor(folder)

    @property
    def takes_sources(self) -> bool:
        """Whether pairs may begin from a source image."""
        return self.edits != "never"

    def check_edits(self, given: int, where: str) -> None:
        """Refuses source images that the model could not be told, or that it lacks.

        Args:
            given: How many source images a pair has, at most.
            where: The data, as errors name it.

        Raises:
            DataError: There are some, and the family edits no images, or fewer; or it does nothing
                else, and there are none.
        """
        if given and self.edits == "never":
            raise DataError(
                f"{where}: source images are given, and {self.name} edits no images; take a model "
                'that does, or remove the column "source"'
            )
        if not given and self.edits == "must":
            raise DataError(
                f"{where}: {self.name} edits source images, and none are given; name them in a "
                'column "source"'
            )
        if given > self.most_sources:
            raise DataError(
                f"{where}: {given} source images are given to a pair, and {self.name} takes "
                f"{self.most_sources} at most; name fewer of them, or take another model (FLUX.2 "
                "and Qwen-Image-Edit-2509 and later take several)"
            )

    def latent_notes(self, folder: ModelFolder) -> dict[str, str]:
        """Returns what else decides the cached latents, by name, beside weights and settings."""
        return {}

    def zeros_for_empty_prompt(self, folder: ModelFolder) -> bool:
        """Tells whether the pipeline's unconditional branch is conditioned on zeros.

        Else it is conditioned on what the empty prompt gives.
        """
        return False

    @abstractmethod
    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads what turns images and prompts into latents and conditions.

        Raises:
            ModelError: A part is missing.
            ConfigError: A part is known to overflow in the precision asked for.
        """

    @abstractmethod
    def denoiser_factor(self, folder: ModelFolder) -> int:
        """Returns what the latents' sides must be multiples of.

        Raises:
            ModelError: The denoiser's configuration is missing.
        """

    @abstractmethod
    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """Reads the noise schedule that the model is trained with.

        Args:
            folder: The model.
            resolution: Side of the square images in pixels; some families shift the noise by it.

        Raises:
            ModelError: A configuration is missing, or the schedule is not supported.
        """

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Runs a denoiser on both sides of every pair.

        Args:
            denoiser: The denoiser, as `load_denoiser` gives it or wrapped by a launcher.
            noised: B noisy pairs.
            conditions: What prompts and pairs give, each `(B, ...)`, text as it is stored.

        Returns:
            `(2B, C, h, w)`, winners first, in the layout and with the sign of `noised.target`.
        """

    def load_denoiser(
        self,
        folder: ModelFolder,
        *,
        weights: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Denoiser:
        """Loads the denoiser, or, without weights, its architecture on the meta device.

        Args:
            folder: The model.
            weights: Whether weights are loaded.
            dtype: Of the weights.

        Tables that are not trained are there in both cases.

        Raises:
            ModelError: The folder has none, or one that diffusers cannot load.
        """
        part = folder.component(self.denoiser)
        what = f"{part} holds no {self.title} that diffusers loads"
        if not weights:
            config = read_json(part / "config.json")
            with loading(what):
                empty = empty_denoiser(self.denoiser_class, config)
                tables = read_tensors(folder, self.denoiser, saved_tables(empty))
                empty.load_state_dict(tables, strict=False, assign=True)
                return empty
        loaded = load_part(self.denoiser_class, folder, self.denoiser, what=what, dtype=dtype)
        # diffusers' own `to` warns about modules that ask to stay in float32.
        nn.Module.to(loaded, dtype)
        return loaded

    def vae_factor(self, folder: ModelFolder) -> int:
        """Returns how many image pixels one latent pixel spans on each side.

        Raises:
            ModelError: The VAE or its configuration is missing.
        """
        return vae_factor(read_json(folder.vae / "config.json"))

    def geometry(self, folder: ModelFolder, resolution: int, *, buckets: bool) -> Geometry:
        """Returns the image sizes that training sees.

        Args:
            folder: The model.
            resolution: Side of the square in pixels.
            buckets: Whether there are other aspect ratios than the square.

        Raises:
            ModelError: A configuration is missing.
            ConfigError: The resolution does not fit the model.
        """
        return make_geometry(
            resolution,
            use_buckets=buckets,
            vae_factor=self.vae_factor(folder),
            denoiser_factor=self.denoiser_factor(folder),
            denoiser=self.title,
        )

    def check_attention(self, name: AttentionName) -> None:
        """Refuses an attention that the family's layers do not run.

        Raises:
            ConfigError: They would ignore what is asked for; see `sdpa_alone`.
        """
        if self.sdpa_alone and name != "sdpa":
            raise ConfigError(
                f"train.attention: {self.name} runs with sdpa alone (torch takes its flash kernel "
                f"by itself where that fits), got {name}"
            )

    def use_attention(self, denoiser: Denoiser, name: AttentionName) -> None:
        """Sets the attention of every layer; `sdpa` is diffusers' own choice.

        Raises:
            ConfigError: As `check_attention`.
        """
        self.check_attention(name)
        if name != "sdpa":
            backend = {"flash": "_native_flash", "xformers": "xformers"}[name]
            denoiser.set_attention_backend(backend)

    def pipeline(
        self, folder: ModelFolder, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        """Loads the pipeline that makes images, in a precision.

        Args:
            folder: The pipeline's.
            dtype: Of what is loaded.
            denoiser: One to sample with as it is, instead of the folder's.

        Raises:
            ModelError: A part of it could not be loaded.
        """
        options: dict[str, Any] = {
            **self.pipeline_options,
            **self.pipeline_parts(folder),
            "dtype": dtype,
        }
        if folder.other_vae is not None:
            options["vae"] = load_vae_of(folder, dtype)
        if denoiser is not None:
            options[self.denoiser] = denoiser
        options |= load_models(folder, dtype, without=options)
        with loading(f"{folder.path} could not be loaded"):
            return self.pipeline_class.from_pretrained(folder.path, **options)

    def pipeline_parts(self, folder: ModelFolder) -> dict[str, Any]:
        """Returns components of the pipeline that diffusers cannot load everywhere, by name."""
        return {}

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """Returns the arguments with which the pipeline samples prompts as they were encoded."""
        return {"prompt": list(prompts)}

    def edit_arguments(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        """Returns the arguments with which the pipeline edits source images.

        Args:
            images: The sources, PIL images.
            height: Of the result in pixels.
            width: Of the result.
        """
        return {"image": images[0] if len(images) == 1 else list(images)}

    def guidance_arguments(self, scale: float, images: int) -> dict[str, Any]:
        """Returns the arguments with which the pipeline samples at `evaluate.guidance_scale`.

        Args:
            scale: The scale.
            images: How many are sampled at once.
        """
        return {"guidance_scale": scale}

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        """Puts adapters that `save` wrote into a pipeline."""
        pipeline.load_lora_weights(folder)

    def save(
        self,
        denoiser: Denoiser,
        folder: Path,
        method: str,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the trained weights as stock diffusers loads them.

        Args:
            denoiser: The policy, not wrapped by any launcher.
            folder: Where to: `pytorch_lora_weights.safetensors` for LoRA, which the pipeline's
                `load_lora_weights` reads; the denoiser's folder for full fine-tuning, which
                `from_pretrained` reads.
            method: `lora` or `full`.
            weights: The trained weights by name, where the denoiser has only the architecture;
                default: its own.
        """
        if method == "full":
            with_weights(denoiser, weights).save_pretrained(folder / self.denoiser)
            return
        # Without the adapter's metadata a loader takes alpha for the rank.
        layers = peft_layers if self.peft_names else lora_layers
        named = {
            f"{self.denoiser}_lora_layers": layers(denoiser, weights),
            f"{self.denoiser}_lora_adapter_metadata": lora_metadata(denoiser),
        }
        self.pipeline_class.save_lora_weights(folder, **named)
