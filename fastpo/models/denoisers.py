"""The denoisers: the policy and its frozen reference.

With LoRA the reference is the policy with its adapters off, so one copy of the base serves both.
With full fine-tuning it is a frozen copy. Trainable weights are float32 whatever the precision (the
gradient scaler refuses anything else, and small updates would round away), unless `train.weights:
bf16` asks for bfloat16 with stochastic rounding; frozen ones are kept in the precision of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from fastpo.config import LoraConfig, TrainConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.attention import check_attention, use_attention
from fastpo.types import NoisedPair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_unet(folder: Path, variant: str | None = None) -> UNet2DConditionModel:
    """Loads the UNet of a diffusers pipeline folder, in float32.

    Raises:
        ModelError: The folder has no UNet, or one that diffusers cannot load.
    """
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant=variant)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'unet'} holds no UNet that diffusers loads: {error}") from None
    return _cast(unet, torch.float32)


def _cast(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Casts all weights; diffusers' own `to` warns about modules it has no opinion on."""
    nn.Module.to(unet, dtype)
    return unet


def predict(unet: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]) -> Tensor:
    """Runs a denoiser on both sides of every pair; `(2B, C, h, w)`, winners first.

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


@dataclass(frozen=True)
class Denoisers:
    """The policy and where its reference comes from.

    Attributes:
        policy: The UNet in training.
        frozen: The frozen copy (full fine-tuning), or None where the reference is the policy
            without its adapters, or where no reference is needed.
        compiled: Whether the models run compiled.
    """

    policy: UNet2DConditionModel
    frozen: UNet2DConditionModel | None
    compiled: bool = False

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The policy's trainable parameters by name."""
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Runs the block without compiled code where judges share the policy's modules.

        An adapter switched off, or an average in the weights' place, then needs no trust in the
        compiler's guards and no second compilation. A frozen copy is a model of its own.
        """
        if self.compiled and self.frozen is None:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield

    @contextmanager
    def reference(self) -> Iterator[UNet2DConditionModel]:
        """Gives the reference model; the policy's adapters are off inside the block."""
        if self.frozen is not None:
            yield self.frozen
            return
        self.policy.disable_adapters()
        try:
            yield self.policy
        finally:
            self.policy.enable_adapters()


@contextmanager
def without_dropout(model: UNet2DConditionModel) -> Iterator[UNet2DConditionModel]:
    """Runs the block in evaluation mode: a judge's opinion must not depend on a dropout mask."""
    model.eval()
    try:
        yield model
    finally:
        model.train()


def setup_denoisers(
    unet: UNet2DConditionModel, config: TrainConfig, *, needs_reference: bool
) -> Denoisers:
    """Makes a loaded UNet ready for LoRA or full fine-tuning, with its reference.

    Raises:
        ConfigError: The attention asked for is not to be had, or nothing matches the LoRA targets.
    """
    frozen = None
    dtype = DTYPES[config.precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_attention(unet, config.attention, device=device, dtype=dtype)
    if config.method == "lora":
        unet.requires_grad_(False)
        _cast(unet, dtype)
        add_lora(unet, config.lora)
        cast_training_params(unet, dtype=torch.float32)
    else:
        unet.requires_grad_(True)
        if needs_reference:
            frozen = copy.deepcopy(unet).requires_grad_(False).eval()
            _cast(frozen, dtype)
            _restore_norms(frozen, unet)
        if config.weights == "bf16":
            _round_matrices(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for model in (unet,) if frozen is None else (unet, frozen):
        _make_fast(model, config)
    unet.train()
    return Denoisers(policy=unet, frozen=frozen, compiled=config.compile)


def _make_fast(unet: UNet2DConditionModel, config: TrainConfig) -> None:
    """Attention, memory format and compilation; weights, names and results stay what they are."""
    use_attention(unet, config.attention)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        # All blocks of a type share one code object. Their sizes, the micro-batch's shapes and
        # no_grad each need a variant of it; beyond the limit a block would silently run eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        unet.compile_repeated_blocks()


def _restore_norms(frozen: nn.Module, unet: nn.Module) -> None:
    """Gives the copy's normalisation layers back their float32 weights.

    Autocast rounds the policy's convolutions and linear layers as the cast rounded the copy's, but
    runs the norms on float32 weights. A rounded norm alone puts an error of order 1 on the logit at
    slope 2500, before any training.
    """
    kept = dict(unet.named_modules())
    for name, module in frozen.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float().load_state_dict(kept[name].state_dict())


def _round_matrices(unet: nn.Module) -> None:
    """Casts weights of two and more dimensions to bfloat16.

    Biases and norms stay float32: they are few, and autocast runs norms on float32 weights.
    """
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def add_lora(unet: UNet2DConditionModel, config: LoraConfig) -> None:
    """Adds trainable adapters.

    Raises:
        ConfigError: Nothing in the UNet matches the targets.
    """
    try:
        unet.add_adapter(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                init_lora_weights="gaussian",
                target_modules=list(config.target_modules),
            )
        )
    except ValueError as error:
        raise ConfigError(f"train.lora.target_modules: {error}") from None
