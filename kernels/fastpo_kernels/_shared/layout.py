"""How tensors of one shape lie in memory, in as few dimensions as describe all. Torch only."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def joint_layout(
    tensors: Sequence[Tensor], *, in_order: bool = False
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of one sample and, per tensor, (row stride, inner strides).

    With as few dimensions as describe all tensors: one where they are equally permuted and dense.
    `in_order` keeps the dimensions' order, so that positions are those in row-major order.
    """
    if all(t.is_contiguous() for t in tensors):
        n_elements = tensors[0][0].numel()
        return (n_elements,), [(t.stride(0) if t.shape[0] > 1 else n_elements, 1) for t in tensors]
    shape, first = tensors[0].shape, tensors[0]
    dims = [k for k in range(1, first.ndim) if shape[k] > 1]
    if not in_order:
        dims.sort(key=lambda k: -first.stride(k))
    sizes: list[int] = []
    inner: list[list[int]] = [[] for _ in tensors]
    for k in dims:
        strides = [t.stride(k) for t in tensors]
        if sizes and all(s[-1] == shape[k] * t for s, t in zip(inner, strides, strict=True)):
            sizes[-1] *= shape[k]
            for s, t in zip(inner, strides, strict=True):
                s[-1] = t
        else:
            sizes.append(shape[k])
            for s, t in zip(inner, strides, strict=True):
                s.append(t)
    if not sizes:
        sizes, inner = [1], [[1] for _ in tensors]
    rows = [(t.stride(0), *s) for t, s in zip(tensors, inner, strict=True)]
    return tuple(sizes), rows


_HERE = contextlib.nullcontext()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, if it is not; nothing on a CPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
