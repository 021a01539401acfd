"""Which attention the denoisers run: torch's own choice, its flash kernel alone, or xformers'.

diffusers' `set_attention_backend` does nothing to a `UNet2DConditionModel`; its processors decide.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastpo.errors import ConfigError

AttentionName = Literal["sdpa", "flash", "xformers"]


class FlashAttnProcessor(AttnProcessor2_0):
    """torch's flash kernel or an error: never the slower kernels that torch would fall back to."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As in `AttnProcessor2_0`."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )


def check_attention(
    denoiser: nn.Module,
    name: AttentionName,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Tries the attention once, forward and backward, at each head size of the model.

    Args:
        denoiser: The model.
        name: The attention of the configuration.
        device: Where the model will run.
        dtype: Of the queries, that is, the precision of the run.

    Raises:
        ConfigError: It does not run there; the text says why and what to do.
    """
    if name == "sdpa":
        return
    for size in sorted(head_sizes(denoiser)):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _try(name, torch.zeros(1, 8, 2, size, device=device, dtype=dtype))
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            # torch says why no kernel fits in warnings, the error itself only that none does.
            why = "; ".join([str(error), *(str(w.message) for w in caught)])
            raise ConfigError(
                f"train.attention: {name} does not run on {torch.device(device).type} in {dtype} "
                f"with heads of {size} ({' '.join(why.split()):.400}). {_HOW_TO_GET[name]}, or use "
                "train.attention: sdpa"
            ) from None


_HOW_TO_GET = {
    "flash": "It needs a CUDA device of compute capability 8.0 or newer and train.precision: bf16 "
    "or fp16",
    "xformers": "It needs a CUDA device and `pip install fastpo[xformers]`",
}


def _try(name: AttentionName, query: Tensor) -> None:
    query.requires_grad_()
    if name == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        out = memory_efficient_attention(query, query, query)
    else:
        heads_first = query.transpose(1, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(heads_first, heads_first, heads_first)
    out.sum().backward()


def use_processors(unet: Any, name: AttentionName) -> None:
    """Gives every attention layer of a UNet the processor of that name."""
    if name == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif name == "flash":
        unet.set_attn_processor(FlashAttnProcessor())


def head_sizes(denoiser: nn.Module) -> set[int]:
    """Features per head, over all attention layers: 64 in SDXL; 40, 80 and 160 in SD1.5."""
    kinds = (Attention, AttentionModuleMixin)
    layers: Any = (m for m in denoiser.modules() if isinstance(m, kinds))
    return {layer.inner_dim // layer.heads for layer in layers}
