"""Gradient checkpointing whose checkpoints wait in host memory.

A checkpointed block keeps its inputs and is run a second time before its backward pass. These
inputs, a tensor of the tokens' states for each block, are what then fills the device; copied to the
host behind each block and back before its second run they leave room there, for two copies a block
over the bus. The copies are exact, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser


class Place(Protocol):
    """Where checkpoints wait."""

    def pack(self, tensor: Tensor) -> Any:
        """Takes a tensor away and returns what stands for it."""

    def unpack(self, packed: Any) -> Tensor:
        """Gives it back, where it was."""
        ...


class HostMemory:
    """Memory of the host, pinned where there is a GPU, so that copies need not be waited for."""

    def __init__(self) -> None:
        """Allocates nothing yet."""
        self._copies = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(self, tensor: Tensor) -> Any:
        """Copies a tensor to the host; one that is there stays as it is."""
        return tensor if tensor.device.type == "cpu" else self._copies.pack_hook(tensor)

    def unpack(self, packed: Any) -> Tensor:
        """Copies it back to its device."""
        return packed if isinstance(packed, Tensor) else self._copies.unpack_hook(packed)


def checkpoint_into(place: Place, block: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Runs a block as `torch.utils.checkpoint.checkpoint`, its inputs in a place of their own.

    Inputs without a gradient, such as a frozen model's texts, are shared by all blocks, and stay.

    Args:
        place: Where the inputs wait.
        block: The block.
        args: Its inputs.
        options: Of torch's `checkpoint`.
    """
    shared = {
        arg.untyped_storage()._cdata
        for arg in args
        if isinstance(arg, Tensor) and not arg.requires_grad
    }

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        kept = tensor.untyped_storage()._cdata in shared
        return kept, tensor if kept else place.pack(tensor)

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        kept, value = packed
        return value if kept else place.unpack(value)

    # What the block itself saves goes through the checkpoint's own hooks, which lie above these.
    with saved_tensors_hooks(pack, unpack):
        return checkpoint(block, *args, use_reentrant=False, **options)


def enable_checkpointing(denoiser: Denoiser, *, offload: bool) -> None:
    """Lets a denoiser recompute its blocks in the backward pass.

    Args:
        denoiser: The denoiser.
        offload: Whether the blocks' inputs wait in host memory.
    """
    into_host = partial(checkpoint_into, HostMemory()) if offload else None
    denoiser.enable_gradient_checkpointing(into_host)
