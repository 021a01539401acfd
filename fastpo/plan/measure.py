"""FLOPs and memory of the real modules, from passes on the meta device: no weights, no data.

A pass costs some ten thousand Python calls whatever the resolution and the batch, a few seconds
on one core. The peak is that of the allocations in the order of the run, recomputation and
temporaries included; the kernels' own workspaces and the allocator's losses are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastpo.config import Precision, TrainConfig
from fastpo.models.checkpointing import checkpoint_into
from fastpo.models.denoisers import Denoisers, setup_denoisers
from fastpo.models.registry import load_family
from fastpo.plan import transformers
from fastpo.plan.architecture import Architecture
from fastpo.plan.modes import CudaForward, RepeatedOperators, StorageTracker, flop_counter
from fastpo.plan.shapes import Shapes as Shapes
from fastpo.precision import DTYPES, autocast_dtype

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser

META = torch.device("meta")
VAE_BATCH = 8
"""Images a pass, as the released SDXL trainers' `vae_encode_batch_size`."""


@dataclass(frozen=True)
class Pass:
    """What one pass over a batch costs.

    Attributes:
        flops: Floating-point operations, a multiply-add as two.
        peak: Most bytes that the pass holds at once, beside weights and finished gradients.
        kept: Bytes held when the forward pass has ended, its output included.
        host: Bytes that wait in host memory then: checkpoints that are offloaded.
    """

    flops: int
    peak: int
    kept: int = 0
    host: int = 0


@dataclass(frozen=True)
class Parts:
    """A pipeline's modules on the meta device.

    Attributes:
        denoisers: Policy and reference, as training sets them up.
        vae: The VAE.
        texts: The text encoders.
    """

    denoisers: Denoisers
    vae: nn.Module
    texts: tuple[nn.Module, ...]


def build_parts(architecture: Architecture, train: TrainConfig, *, reference: bool) -> Parts:
    """Makes the modules without weights, trainable where and in the dtypes that training chooses.

    Args:
        architecture: The parts' configurations.
        train: The run.
        reference: Whether a frozen reference is held (LoRA's is the policy itself).
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # What a kernel does not change here and what would start a compiler or a GPU is left out.
    plain = {
        "attention": "sdpa",
        "compile": False,
        "channels_last": False,
        "quantize_base": None,  # its bytes are calculated, see `fastpo.plan.memory`
    }
    flow = architecture.flow
    with META, _quiet():
        unet: Any = (
            UNet2DConditionModel.from_config(architecture.unet)
            if flow is None
            else transformers.empty_transformer(flow, architecture.unet)
        )
        denoisers = setup_denoisers(
            load_family(architecture.family),
            unet,
            train.model_copy(update=plain),
            needs_reference=reference,
        )
        if flow is not None:
            vae = transformers.empty_vae(flow, architecture.vae)
            texts = tuple(transformers.empty_text(text) for text in architecture.texts)
            return _frozen(denoisers, vae, texts)
        vae: Any = AutoencoderKL.from_config(architecture.vae)
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        texts = tuple(
            kind(CLIPTextConfig.from_dict(text))
            for kind, text in zip(kinds, architecture.texts, strict=False)
        )
    return _frozen(denoisers, vae, texts)


def _frozen(denoisers: Denoisers, vae: nn.Module, texts: tuple[nn.Module, ...]) -> Parts:
    for module in (vae, *texts):
        module.eval().requires_grad_(False)
    return Parts(denoisers, vae, texts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def unet_inputs(unet: Denoiser, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Both sides of a micro-batch as the UNet takes them; random on a real device."""
    rows, config = 2 * shapes.pairs, unet.config

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    inputs: dict[str, Any] = {
        "sample": draw(rows, config["in_channels"], shapes.height, shapes.width),
        "timestep": torch.full((rows,), 500, device=device),
        "encoder_hidden_states": draw(rows, shapes.tokens, config["cross_attention_dim"]),
    }
    if config["addition_embed_type"] == "text_time":
        sizes = 6
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= sizes * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(rows, pooled),
            "time_ids": draw(rows, sizes),
        }
    return inputs


Call = tuple[list[Tensor], Callable[[nn.Module], Tensor]]
"""The tensors of a micro-batch, and a denoiser's pass on them."""


def unet_call(unet: Denoiser, shapes: Shapes) -> Call:
    """A UNet's micro-batch on the meta device."""
    inputs = unet_inputs(unet, shapes, META)
    return _tensors(inputs), lambda model: model(**inputs, return_dict=False)[0]


def measure_training(
    unet: Denoiser,
    shapes: Shapes,
    precision: Precision,
    *,
    checkpointing: bool | Literal["offload"],
    call: Call | None = None,
) -> tuple[Pass, Pass, int]:
    """Forward and backward of a policy on a micro-batch; `call`: default, a UNet's.

    Returns:
        The forward pass alone (`kept` are the activations), forward and backward together, and the
        FLOPs of the latter that gradient checkpointing repeats. It repeats less than the forward
        pass: nothing outside the checkpointed blocks, and of each block nothing behind the last
        tensor that its backward needs.
    """
    dtype = autocast_dtype(precision)
    inputs, run = call or unet_call(unet, shapes)
    counter, tracker = flop_counter(), StorageTracker(unet.parameters(), inputs)
    repeats, away = _Repeats(counter), _Away()
    if checkpointing:
        again = partial(checkpoint, use_reentrant=False)
        if checkpointing == "offload":
            again = partial(checkpoint_into, away)
        counted = partial(
            again, context_fn=lambda: (contextlib.nullcontext(), repeats.counting(dtype))
        )
        unet.enable_gradient_checkpointing(counted)
    try:
        with counter, tracker, RepeatedOperators(counter, tracker):
            with CudaForward(dtype):
                prediction = run(unet)
            forward = Pass(counter.get_total_flops(), tracker.peak, tracker.live)
            prediction.backward(torch.empty_like(prediction))
            whole = Pass(counter.get_total_flops(), tracker.peak, host=away.bytes)
    finally:
        tracker.close()
        unet.zero_grad(set_to_none=True)
    return forward, whole, repeats.flops


class _Away:
    """A place off the device for tensors without content, which counts their bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor.shape, tensor.dtype

    def unpack(self, packed: tuple[torch.Size, torch.dtype]) -> Tensor:
        size, dtype = packed
        return torch.empty(size, dtype=dtype, device=META)


class _Repeats:
    """Adds up the FLOPs of the blocks that gradient checkpointing computes again."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.flops = 0
        self._counter = counter

    @contextlib.contextmanager
    def counting(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Runs one block's recomputation under the forward pass's precision."""
        before = self._counter.get_total_flops()
        try:
            with CudaForward(dtype):
                yield
        finally:  # an exception ends a recomputation as soon as nothing more is needed
            self.flops += self._counter.get_total_flops() - before


@torch.no_grad()
def measure_forward(
    unet: Denoiser, shapes: Shapes, precision: Precision, call: Call | None = None
) -> Pass:
    """A forward pass of an annotator; `call`: default, a UNet's."""
    inputs, run = call or unet_call(unet, shapes)
    with _watched(unet, inputs, autocast_dtype(precision)) as (counter, tracker):
        run(unet)
        return Pass(counter.get_total_flops(), tracker.peak)


@torch.no_grad()
def measure_vae(vae: Any, shapes: Shapes, precision: Precision) -> Pass:
    """Encoding both images of every pair, at most `VAE_BATCH` images at a time."""
    nn.Module.to(vae, DTYPES[precision])
    images = 2 * shapes.pairs
    height, width = (side * shapes.vae_factor for side in (shapes.height, shapes.width))
    batch = min(images, VAE_BATCH)
    pixels = torch.empty(batch, 3, height, width, device=META, dtype=DTYPES[precision])
    with _watched(vae, pixels, None) as (counter, tracker):
        # Qwen-Image's takes videos.
        vae.encode(pixels.unsqueeze(2) if "temperal_downsample" in vae.config else pixels)
        # Every image costs the same, so that a part of the batch tells the whole.
        return Pass(counter.get_total_flops() * images // batch, tracker.peak)


@torch.no_grad()
def measure_texts(
    texts: tuple[Any, ...], shapes: Shapes, tokens: Sequence[int] | None = None
) -> Pass:
    """Encoding every pair's prompt with all text encoders.

    Args:
        texts: The text encoders.
        shapes: The micro-batch.
        tokens: Tokens that each of them reads of a prompt; default: `shapes.tokens`, in chunks.
    """
    flops, peak = 0, 0
    for number, text in enumerate(texts):
        size = shapes.pairs * shapes.chunks, shapes.tokens // shapes.chunks
        if tokens is not None:
            size = shapes.pairs, tokens[number]
        ids = torch.zeros(size, device=META, dtype=torch.int64)
        with _watched(text, ids, None) as (counter, tracker):
            text(ids)
            flops, peak = flops + counter.get_total_flops(), max(peak, tracker.peak)
    return Pass(flops, peak)


@contextlib.contextmanager
def _watched(
    module: nn.Module, inputs: Any, dtype: torch.dtype | None
) -> Iterator[tuple[FlopCounterMode, StorageTracker]]:
    tracker = StorageTracker(module.parameters(), _tensors(inputs))
    try:
        counter = flop_counter()
        with counter, tracker, RepeatedOperators(counter, tracker), CudaForward(dtype):
            yield counter, tracker
    finally:
        tracker.close()


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def module_bytes(module: nn.Module, precision: Precision | None = None) -> int:
    """Bytes of a module's weights, as they are or in a precision."""
    if precision is None:
        return sum(p.numel() * p.element_size() for p in module.parameters())
    return sum(p.numel() for p in module.parameters()) * DTYPES[precision].itemsize
