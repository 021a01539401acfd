"""The dtype of each precision that a configuration names, and computing in it."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Returns the dtype that autocast computes in, None for `fp32`, where it is off."""
    return None if precision == "fp32" else DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns torch's autocast for a precision; use it in a `with` statement.

    Args:
        device: Where the block computes.
        precision: `fp32`, `bf16` or `fp16`.
    """
    dtype = autocast_dtype(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
