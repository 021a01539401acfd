"""Stable Diffusion 1.5 and SDXL: a UNet that is told the timestep and the states of CLIP.

Conditions: `prompt_embeds` `(B, L, D)` for the cross attention. SDXL adds `pooled` `(B, P)`, the
second text encoder's projection, and `add_time_ids` `(B, 6)` float32: original height and width,
crop top and left, target height and width in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.attention import AttentionName, use_processors
from fastpo.models.clip import ClipEncoders, PenultimateEncoders, latent_normalization
from fastpo.models.encoders import Encoders, limit_tokens, load_clip, load_vae_of
from fastpo.models.export import LORA_FILE
from fastpo.models.family import ModelFamily
from fastpo.models.folder import ModelFolder, read_json, weight_files
from fastpo.models.geometry import halvings
from fastpo.models.headers import header
from fastpo.models.schedule import NoiseSchedule, read_ddpm_schedule
from fastpo.models.single_file import check_component
from fastpo.precision import DTYPES
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser


class UNetFamily(ModelFamily):
    """What SD1.5 and SDXL share."""

    denoiser = "unet"
    title = "UNet"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    denoiser_class = UNet2DConditionModel
    addition_embed_type: ClassVar[str | None]
    encoders_class: ClassVar[type[ClipEncoders]]
    text_models: ClassVar[tuple[Any, ...]]

    def recognizes(self, folder: Path) -> bool:
        """By `unet/config.json`; inpainting, the refiner and the like are refused."""
        path = folder / "unet" / "config.json"
        if not path.is_file():
            return False
        config = read_json(path)
        wrong = _unsupported(folder, config)
        if wrong:
            raise ModelError(
                f"{folder}: FastPO trains SD1.5 and SDXL text-to-image models, but {wrong}"
            )
        return config.get("addition_embed_type") == self.addition_embed_type

    def check(self, folder: ModelFolder) -> None:
        """As `ModelFamily.check`: the schedule must be DDPM's, the VAE an `AutoencoderKL`."""
        schedule = read_ddpm_schedule(folder)
        path = folder.vae / "config.json"
        config = read_json(path)
        kind, channels = config.get("_class_name"), config.get("latent_channels", 4)
        if kind != "AutoencoderKL" or channels != 4:
            raise ModelError(
                f"{path}: FastPO trains {self.name} with an AutoencoderKL of 4 channels, got "
                f"{ascii(kind)[:80]} of {ascii(channels)[:80]}"
            )
        self._check_single_files(folder, schedule.prediction)

    def _check_single_files(self, folder: ModelFolder, prediction: str) -> None:
        """Compares single files with the configurations, before hours of encoding.

        Raises:
            ModelError: A part is in neither, does not fit, or is told to predict something else.
        """
        texts = [name for name in self.encoder_parts if name.startswith("text_encoder")]
        kinds = dict(zip(texts, self.text_models, strict=True))
        for name, kind in {"unet": self.denoiser_class, "vae": AutoencoderKL, **kinds}.items():
            file, part = folder.weights_file(name), folder.component(name)
            if file is not None:
                check_component(kind, folder, name, file)
            elif folder.checkpoint and not weight_files(part, folder.variant):
                raise ModelError(
                    f"model.path: {folder.checkpoint} holds no {name}, and {part} of model.config "
                    "has no weights either" + ("; set model.vae" if name == "vae" else "")
                )
        if folder.checkpoint and V_PREDICTION in header(folder.checkpoint):
            if prediction != "v_prediction":
                raise ModelError(
                    f"{folder.checkpoint} says by its key {V_PREDICTION} that it predicts the "
                    f"velocity, but the scheduler of model.config is for {prediction}: set its "
                    "prediction_type to v_prediction (and rescale_betas_zero_snr, if the key "
                    "ztsnr is there too)"
                )

    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads the VAE and CLIP's text encoders."""
        if config.text_length is not None:
            raise ConfigError(
                f"prepare.text_length: {self.name} has CLIP's text encoders alone; set "
                f"prepare.prompt_chunks instead, got {config.text_length}"
            )
        vae = load_vae_of(folder, DTYPES[config.vae_precision])
        self.check_vae(vae)
        dtype = DTYPES[config.text_precision]
        names = [name for name in self.encoder_parts if name.startswith("text_encoder")]
        models = zip(names, self.text_models, strict=True)
        parts = [load_clip(folder, name, kind, dtype) for name, kind in models]
        tokenizers, texts = zip(*parts, strict=True)
        for module in (vae, *texts):
            module.to(device).eval().requires_grad_(False)
        return self._encoders((vae, tokenizers, texts, device), config)

    def _encoders(
        self, parts: tuple[Any, Any, Any, torch.device], config: PrepareConfig
    ) -> ClipEncoders:
        encoders = self.encoders_class(*parts, config.prompt_chunks, config.clip_skip)
        encoders.check_layers()
        return encoders

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`; chunks and left-out layers are encoded by ours."""
        if config.prompt_chunks == 1 and config.clip_skip == 0:
            return super().prompt_arguments(pipeline, prompts, config)
        texts = [name for name in self.encoder_parts if name.startswith("text_encoder")]
        models = tuple(pipeline.components[name] for name in texts)
        tokenizers = tuple(
            pipeline.components[name.replace("text_encoder", "tokenizer")] for name in texts
        )
        parts = pipeline.vae, tokenizers, models, models[0].device
        encoders = self._encoders(parts, config)
        given = encoders.encode_prompts(prompts)
        empty = encoders.encode_prompts([""] * len(prompts))
        if pipeline.config.get("force_zeros_for_empty_prompt", False):
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        arguments = {}
        for name, argument in _ARGUMENTS.items():
            if name in given:
                arguments |= {argument: given[name], f"negative_{argument}": empty[name]}
        return arguments

    def check_vae(self, vae: Any) -> None:
        """Refuses a VAE that is known to overflow in its precision.

        Raises:
            ConfigError: The text says what to set.
        """

    def denoiser_factor(self, folder: ModelFolder) -> int:
        """Latent pixels per pixel of the UNet's coarsest level."""
        config = read_json(folder.component("unet") / "config.json")
        return halvings(config, "the UNet")

    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """`DDPMScheduler`'s table of the pipeline's settings, at every resolution."""
        return read_ddpm_schedule(folder)

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`; see `predict`."""
        return predict(denoiser, noised, conditions)

    def pipeline(
        self, folder: ModelFolder, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        """As `ModelFamily.pipeline`; its tokenizers are those that prompts are encoded with."""
        pipeline = super().pipeline(folder, dtype, denoiser)
        for name in self.encoder_parts:
            if name.startswith("text_encoder"):
                tokenizer = pipeline.components[name.replace("text_encoder", "tokenizer")]
                limit_tokens(tokenizer, pipeline.components[name].config)
        return pipeline

    def use_attention(self, denoiser: Denoiser, name: AttentionName) -> None:
        """By attention processors: a UNet's layers ignore `set_attention_backend`."""
        use_processors(denoiser, name)

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        """As `pipeline.load_lora_weights`, less its warnings about the text encoders."""
        layers, alphas, metadata = pipeline.lora_state_dict(
            folder,
            weight_name=LORA_FILE,
            unet_config=pipeline.unet.config,
            return_lora_metadata=True,
        )
        pipeline.load_lora_into_unet(
            layers, network_alphas=alphas, unet=pipeline.unet, metadata=metadata
        )


_ARGUMENTS = {"prompt_embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
V_PREDICTION = "v_pred"
"""An empty tensor of this name marks single files of models that predict the velocity."""
_OTHER_CONDITIONING = (
    "class_embed_type",
    "num_class_embeds",
    "time_cond_proj_dim",  # the guidance scale, in consistency-distilled models
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)
_PIPELINES = re.compile(r"StableDiffusion|DiffusionPipeline$|LatentConsistencyModel")
"""How the names of the pipelines begin whose UNets are those of SD1.5 and SDXL."""


def _unsupported(folder: Path, config: dict[str, Any]) -> str | None:
    """Says why a UNet is of no kind that FastPO trains."""
    index = folder / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    if isinstance(pipeline, str) and not _PIPELINES.match(pipeline):
        return f"its model_index.json names {ascii(pipeline)[:80]}"
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        return f"its unet is a {ascii(kind)[:80]}"
    addition = config.get("addition_embed_type")
    channels = config.get("in_channels"), config.get("out_channels")
    if channels != (4, 4):
        return f"its UNet maps {channels[0]} to {channels[1]} channels"
    if not (folder / "text_encoder").is_dir():
        return "it has no text_encoder (the SDXL refiner is one such model)"
    if addition not in (None, "text_time"):
        return f"its UNet's addition_embed_type is {addition!r}"
    for key in _OTHER_CONDITIONING:
        if config.get(key) is not None:
            return f"its UNet takes conditioning beside the text: its {key} is {config[key]!r:.80}"
    if config.get("attention_type", "default") != "default":
        return f"its UNet's attention_type is {config['attention_type']!r:.80}"
    if addition and not (folder / "text_encoder_2").is_dir():
        return "its UNet is SDXL's but text_encoder_2 is missing"
    return None


def load_unet(folder: Path, variant: str | None = None) -> UNet2DConditionModel:
    """Loads the UNet of a diffusers pipeline folder, in float32.

    Raises:
        ModelError: The folder has no UNet, or one that diffusers cannot load.
    """
    return SDXL().load_denoiser(ModelFolder(folder, variant))  # pyright: ignore[reportReturnType]


def predict(unet: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]) -> Tensor:
    """Runs a UNet on both sides of every pair; `(2B, C, h, w)`, winners first.

    SDXL's `add_time_ids` stay float32: its sinusoidal embedding of sizes in the hundreds is not
    representable in half precision.

    Args:
        unet: The denoiser.
        noised: B noisy pairs.
        conditions: `prompt_embeds` `(B, L, D)` and, for SDXL, `pooled` `(B, P)` and `add_time_ids`
            `(B, 6)`; text in any dtype.
    """
    dtype = noised.noisy_latents.dtype  # embeddings come as they are stored
    added = None
    if "add_time_ids" in conditions:
        added = {
            "text_embeds": conditions["pooled"].to(dtype).repeat(2, 1),
            "time_ids": conditions["add_time_ids"].repeat(2, 1),
        }
    return unet(
        noised.noisy_latents,
        noised.timesteps.repeat(2),
        conditions["prompt_embeds"].to(dtype).repeat(2, 1, 1),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


class SD15(UNetFamily):
    """Stable Diffusion 1.x: one text encoder."""

    name = "sd15"
    encoder_parts = ("text_encoder", "tokenizer")
    pipeline_class = StableDiffusionPipeline
    # Neither safety checker nor watermark: both would alter images.
    pipeline_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}
    addition_embed_type = None
    encoders_class = ClipEncoders
    text_models = (CLIPTextModel,)


class SDXL(UNetFamily):
    """SDXL: two text encoders, pooled text and size conditioning."""

    name = "sdxl"
    encoder_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pair_conditions = ("add_time_ids",)
    pipeline_class = StableDiffusionXLPipeline
    pipeline_options: ClassVar = {"add_watermarker": False}
    addition_embed_type = "text_time"
    encoders_class = PenultimateEncoders
    text_models = (CLIPTextModel, CLIPTextModelWithProjection)

    def check(self, folder: ModelFolder) -> None:
        """As `UNetFamily.check`; a VAE's normalization must be usable."""
        super().check(folder)
        latent_normalization(read_json(folder.vae / "config.json"))

    def latent_notes(self, folder: ModelFolder) -> dict[str, str]:
        """The VAE's normalization by channel, if it has one."""
        normalization = latent_normalization(read_json(folder.vae / "config.json"))
        return {} if normalization is None else {"latent normalization": repr(normalization)}

    def zeros_for_empty_prompt(self, folder: ModelFolder) -> bool:
        """By `force_zeros_for_empty_prompt` of `model_index.json`; diffusers' default is true."""
        index = read_json(folder.path / "model_index.json")
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def check_vae(self, vae: Any) -> None:
        """Refuses float16 for SDXL's original VAE, which answers with infinities."""
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            raise ConfigError(
                "prepare.vae_precision: fp16 overflows in this VAE (its config.json asks for "
                "force_upcast, as SDXL's original one does); set prepare.vae_precision=fp32 or "
                "bf16, or model.vae to an fp16-fix VAE"
            )
