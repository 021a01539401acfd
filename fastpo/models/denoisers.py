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
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from fastpo.config import LoraConfig, TrainConfig
from fastpo.errors import ConfigError
from fastpo.models.attention import check_attention
from fastpo.models.checkpointing import enable_checkpointing
from fastpo.models.family import ModelFamily
from fastpo.models.quantized import quantize_base
from fastpo.precision import DTYPES
from fastpo.system.process import default_device
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser


def _cast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Casts all weights; diffusers' own `to` warns about modules that ask to stay in float32."""
    nn.Module.to(denoiser, dtype)


@dataclass(frozen=True)
class Denoisers:
    """The policy and where its reference comes from.

    Attributes:
        family: The family of both.
        policy: The denoiser in training.
        frozen: The frozen copy (full fine-tuning), or None where the reference is the policy
            without its adapters, or where no reference is needed.
        compiled: Whether the models run compiled.
    """

    family: ModelFamily
    policy: Denoiser
    frozen: Denoiser | None
    compiled: bool = False

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The policy's trainable parameters by name."""
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

    def predict(
        self, model: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Runs one of the models on both sides of every pair; see `ModelFamily.predict`."""
        return self.family.predict(model, noised, conditions)

    @contextmanager
    def shared_modules(self) -> Iterator[None]:
        """Runs the block without compiled code where other predictions use the policy's modules.

        An adapter switched off, or an average in the weights' place, then needs no trust in the
        compiler's guards and no second compilation. A frozen copy is a model of its own.
        """
        if self.compiled and self.frozen is None:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield

    @contextmanager
    def reference(self) -> Iterator[Denoiser]:
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
def without_dropout(model: Denoiser) -> Iterator[Denoiser]:
    """Runs the block in evaluation mode, so that no prediction depends on a dropout mask."""
    model.eval()
    try:
        yield model
    finally:
        model.train()


def loading_dtype(config: TrainConfig) -> torch.dtype:
    """The precision in which a denoiser is loaded: that in which its frozen weights are kept."""
    return DTYPES[config.precision] if config.method == "lora" else torch.float32


def setup_denoisers(
    family: ModelFamily, denoiser: Denoiser, config: TrainConfig, *, needs_reference: bool
) -> Denoisers:
    """Makes a loaded denoiser ready for LoRA or full fine-tuning, with its reference.

    Raises:
        ConfigError: The attention asked for or bitsandbytes is not available, or nothing matches
            the LoRA targets.
        ModelError: The denoiser has no layers that could be quantized.
    """
    frozen = None
    dtype = DTYPES[config.precision]
    check_attention(denoiser, config.attention, device=default_device().type, dtype=dtype)
    if config.method == "lora":
        denoiser.requires_grad_(False)
        _cast(denoiser, dtype)
        if config.quantize_base is not None:
            quantize_base(denoiser, config.quantize_base, default_device())
        add_lora(family, denoiser, config.lora)
        cast_training_params(denoiser, dtype=torch.float32)
    else:
        denoiser.requires_grad_(True)
        if needs_reference:
            frozen = copy.deepcopy(denoiser).requires_grad_(False).eval()
            _cast(frozen, dtype)
            _restore_norms(frozen, denoiser)
        if config.weights == "bf16":
            _round_matrices(denoiser)
    if config.gradient_checkpointing:
        enable_checkpointing(denoiser, offload=config.gradient_checkpointing == "offload")
    for model in (denoiser,) if frozen is None else (denoiser, frozen):
        _make_fast(family, model, config)
    denoiser.train()
    return Denoisers(family, policy=denoiser, frozen=frozen, compiled=config.compile)


def _make_fast(family: ModelFamily, denoiser: Denoiser, config: TrainConfig) -> None:
    """Attention, memory format and compilation; weights, names and results stay what they are."""
    family.use_attention(denoiser, config.attention)
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        # All blocks of a type share one code object. Their sizes, the micro-batch's shapes and
        # no_grad each need a variant of it; beyond the limit a block would silently run eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        denoiser.compile_repeated_blocks()


def _restore_norms(frozen: nn.Module, denoiser: nn.Module) -> None:
    """Gives the copy's normalization layers, and all else that autocast leaves, float32 back.

    Autocast rounds the policy's convolutions and linear layers as the cast rounded the copy's, but
    runs the norms on float32 weights, and tables (of shifts, of positions) as they are. A rounded
    norm alone puts an error of order 1 on the logit at slope 2500, before any training.
    """
    kept = dict(denoiser.named_modules())
    for name, module in frozen.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        own = kept[name]
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data = own.get_parameter(key).detach().clone()
        for key, _ in module.named_buffers(recurse=False):
            setattr(module, key, own.get_buffer(key).clone())


def _round_matrices(denoiser: nn.Module) -> None:
    """Casts weights of two and more dimensions to bfloat16.

    Biases and norms stay float32: they are few, and autocast runs norms on float32 weights.
    """
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def add_lora(family: ModelFamily, denoiser: Denoiser, config: LoraConfig) -> None:
    """Adds trainable adapters.

    Raises:
        ConfigError: Nothing in the denoiser matches the targets.
    """
    try:
        denoiser.add_adapter(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                init_lora_weights="gaussian",
                target_modules=list(config.target_modules),
                rank_pattern=dict(config.rank_pattern),
                alpha_pattern=dict(config.alpha_pattern),
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
            )
        )
    except ValueError as error:
        usual = ", ".join(family.lora_targets)
        raise ConfigError(
            f"train.lora.target_modules: {error} (usual for {family.name}: {usual})"
        ) from None
