"""The choice of implementation, one rule for every operation. Imports no Triton, touches no GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a sample: kernels count them in 32 bits, up to the end of the last tile.
MAX_TILE = 2**16
MAX_ELEMENTS = 2**31 - MAX_TILE


def _gpu_supported(device: torch.device) -> bool:
    # A property that torch.compile folds to a constant.
    hip = torch.version.hip is not None
    return hip or torch.cuda.get_device_properties(device).major >= 8


def _triton_runs_on_cpu() -> bool:
    """Whether kernels are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(impl: str | None, tensors: Sequence[Tensor], known: Sequence[str]) -> str:
    """Returns `impl`, checked, or what None stands for. An explicit choice never falls back.

    None is triton if the floating-point `tensors` are on a supported GPU, in a dtype it takes, with
    triton installed, else the second of `known`, whose first is triton.

    Raises:
        TypeError: impl='triton' and a tensor's dtype is not taken.
        ValueError: `impl` is not among `known`, or triton cannot run where the tensors are.
    """
    device = tensors[0].device
    if impl is None:
        fits = _TRITON_INSTALLED and device.type == "cuda"
        fits = fits and all(t.dtype in _TRITON_DTYPES for t in tensors)
        return "triton" if fits and _gpu_supported(device) else known[1]
    if impl not in known:
        names = ", ".join(map(repr, known[:-1]))
        raise ValueError(f"impl must be None, {names} or {known[-1]!r}, got {impl!r}")
    if impl == "triton":
        _check_triton(tensors)
    return impl


def _check_triton(tensors: Sequence[Tensor]) -> None:
    device = tensors[0].device
    if not _TRITON_INSTALLED:
        raise ValueError("impl='triton' needs the package triton, which is not installed")
    for t in tensors:
        if t.dtype not in _TRITON_DTYPES:
            raise TypeError(f"impl='triton' takes float32, bfloat16 or float16, got {t.dtype}")
    if device.type != "cuda" and not _triton_runs_on_cpu():
        raise ValueError(f"impl='triton' needs tensors on a GPU, got {device}")
    if device.type == "cuda" and not _gpu_supported(device):
        raise ValueError("impl='triton' needs a GPU of compute capability 8.0 or newer")
