"""A frozen base in 4 or 8 bits, on which adapters train in float32 (QLoRA, arXiv 2305.14314).

The linear layers inside the denoiser's repeated blocks are stored by bitsandbytes' codes: `4bit` as
NormalFloat in blocks of 64 weights with 8-bit scales, 4.13 bits a weight; `8bit` as whole numbers
with one scale a row. Embeddings, norms and the last layers keep the run's precision. A layer
multiplies by its weights as they come out of the codes, in passes with and without gradients alike,
so that policy and reference agree to the bit before the first step; bitsandbytes' own layers take
another kernel where no gradient is asked for, and diffusers' loader refuses machines without a GPU.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.errors import ConfigError, ModelError

BaseBits = Literal["4bit", "8bit"]
_BLOCK = 64
"""Weights that share a scale in 4 bits."""
_SCALES = 256
"""Scales of 4-bit blocks that share a scale of their own."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds codes in the place of its weights.

    Args:
        layer: The layer; its weight is freed.
        bits: How it is stored.
        device: Where to.
    """

    def __init__(self, layer: nn.Linear, bits: BaseBits, device: torch.device) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.data.to(device)
        self.bits: BaseBits = bits
        self.state: Any = None
        if bits == "4bit":
            from bitsandbytes.functional import quantize_4bit

            # As one row: where blocks cross the ends of rows, bitsandbytes 0.50.2 decodes them with
            # the scales of others on processors with AVX-512.
            codes, self.state = quantize_4bit(
                weight.flatten(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
            )
            scales = None
        else:
            from bitsandbytes.functional import int8_vectorwise_quant

            # Its kernel on a GPU takes half precision alone.
            codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns the weights that the codes stand for, `(out, in)`."""
        if self.state is not None:
            from bitsandbytes.functional import dequantize_4bit

            shape = self.out_features, self.in_features
            return dequantize_4bit(self.weight, self.state).view(shape).to(dtype)
        assert isinstance(self.scales, Tensor)
        return (self.weight.float() * (self.scales / 127.0)[:, None]).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in autocast's precision where that is on."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), self, bias)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Moves the 4-bit scales along, which belong to no module."""
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Returns the sizes and how the weights are stored."""
        return f"{super().extra_repr()}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """`x W^T + b` with a frozen W, which is made from its codes again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dense(gradient.dtype), None, None


def quantize_base(denoiser: nn.Module, bits: BaseBits, device: torch.device) -> None:
    """Replaces the linear layers of a frozen denoiser's blocks, one after the other.

    Args:
        denoiser: The denoiser, in the precision of the run.
        bits: How weights are stored.
        device: Where the quantized layers are made and stay.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: The denoiser has no such layers.
    """
    require_bitsandbytes()
    layers = quantizable(denoiser)
    if not layers:
        raise ModelError(
            f"train.quantize_base: {type(denoiser).__name__} names no repeated blocks with linear "
            "layers; leave it out"
        )
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        denoiser.get_submodule(parent).register_module(last, QuantizedLinear(layer, bits, device))


def quantizable(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Returns the frozen layers that `quantize_base` stores in few bits, by name."""
    # Of diffusers' models; some name their blocks only as what must not be split.
    blocks: Any = getattr(denoiser, "_repeated_blocks", None)
    blocks = blocks or getattr(denoiser, "_no_split_modules", None) or ()
    found: dict[str, nn.Linear] = {}
    for name, block in denoiser.named_modules():
        if type(block).__name__ in blocks:
            inside = block.named_modules(prefix=name)
            found |= {
                inner: layer
                for inner, layer in inside
                if type(layer) is nn.Linear and not layer.weight.requires_grad
            }
    return found


def quantized_bytes(layer: nn.Linear, bits: BaseBits) -> int:
    """Returns the bytes of a layer's codes and scales, its bias not among them."""
    weights = layer.in_features * layer.out_features
    if bits == "8bit":
        return weights + 4 * layer.out_features
    blocks = -(-weights // _BLOCK)
    tables = 4 * (16 + 256 + 1)  # the codes' and the scales' values, and the scales' mean
    return -(-weights // 2) + blocks + 4 * -(-blocks // _SCALES) + tables


def require_bitsandbytes() -> None:
    """Refuses where bitsandbytes is missing.

    Raises:
        ConfigError: The text says how to install it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.quantize_base needs bitsandbytes ({error}); `pip install 'fastpo[8bit]'`, or "
            "leave it out"
        ) from None
