"""How a pass on the meta device is watched: its precision, its FLOPs, and its memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_aten = torch.ops.aten
# The parts of CUDA's autocast lists that diffusion UNets, VAEs and text encoders meet.
_LOWER = frozenset(
    {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, Tensor.matmul}
)
_FLOAT32 = frozenset({F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax})


class CudaForward(TorchFunctionMode):
    """Makes a forward pass on the meta device allocate what it allocates on a CUDA device.

    Attention runs as one fused kernel, which keeps no scores. With a dtype, CUDA's autocast is
    imitated (torch has none for the meta device): matrix products and convolutions in that dtype,
    normalization in float32; casts of trainable float32 weights are kept until the region ends.

    Args:
        dtype: Autocast's dtype, or None for none.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._casts: dict[int, Tensor] = {}

    def __exit__(self, *exception: Any) -> None:
        """Ends the region: the casts of the weights are dropped."""
        self._casts.clear()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Casts as autocast does, then calls; attention goes to the fused kernel."""
        kwargs = {} if kwargs is None else kwargs
        attention = func is F.scaled_dot_product_attention
        if self.dtype is not None and (attention or func in _LOWER):
            args = tuple(self._lower(a) for a in args)
            kwargs = {key: self._lower(a) for key, a in kwargs.items()}
        elif self.dtype is not None and func in _FLOAT32:
            args = tuple(_float32(a) for a in args)
            kwargs = {key: _float32(a) for key, a in kwargs.items()}
        return _attention(*args, **kwargs) if attention else func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self.dtype)
        return self._casts[id(value)]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention; a mask neither costs FLOPs nor, in the models here, memory that matters."""
    return _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    """Four products against the forward's two, as unfused attention counts.

    The fused kernel computes the scores once more. That is left out, so that the counts are the
    model's own: at SDXL's 1024 x 1024 it is 2 % of forward and backward.
    """
    return 2 * sdpa_flop_count(query, key, value)


class _NoModules:
    """Stands in for the counter's tally by module, whose hooks keep recomputed tensors alive."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None


def flop_counter() -> FlopCounterMode:
    """torch's own counter, over everything at once."""
    counter = FlopCounterMode(
        display=False,
        custom_mapping={_aten._scaled_dot_product_flash_attention_backward: _attention_backward},
    )
    counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]
    return counter


class RepeatedOperators(TorchDispatchMode):
    """Looks up what an operator has made of arguments of the same kinds, instead of deriving it.

    A model calls a few hundred different operators some ten thousand times, and on the meta device
    each call runs Python that derives shapes and strides, and the modes around this one. What comes
    again is allocated as it was, and they are told of it; so they are of views, which cost nothing.
    Operators that write into their arguments and what is not on the meta device are called as ever.

    Args:
        counter: Is told the FLOPs of what is looked up.
        tracker: Is told the tensors that are made.
    """

    def __init__(self, counter: FlopCounterMode, tracker: StorageTracker | None = None) -> None:
        super().__init__()
        self._counter = counter
        self._tracker = tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allocates what the operator returns, or calls it and notes that."""
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func.is_view:
            with no_dispatch():
                out = func(*args, **kwargs)
            return self._told(out)
        key = _call_key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key in _RETURNED:
            flops, single, parts = _RETURNED[key]
            if flops:
                self._counter.flop_counts["Global"][func._overloadpacket] += flops
            with no_dispatch():
                made = tuple(_allocate(part) for part in parts)
            return self._told(made[0] if single else made)
        before = self._counter.get_total_flops()
        out = func(*args, **kwargs)
        single = not isinstance(out, tuple | list)
        parts = _fresh((out,) if single else tuple(out), (*args, *kwargs.values()))
        if parts is not None:
            _RETURNED[key] = self._counter.get_total_flops() - before, single, parts
        return out

    def _told(self, out: Any) -> Any:
        if self._tracker is not None:
            self._tracker.take_in(out)
        return out


_Part = tuple[torch.Size, tuple[int, ...], torch.dtype] | int | float | None
_RETURNED: dict[Any, tuple[int, bool, tuple[_Part, ...]]] = {}
"""FLOPs of a call, whether it returns one value, and sizes, strides and dtypes of its tensors."""


def _call_key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call's result depends on where tensors have no values; None where it is not fresh."""
    if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
        return None
    if any(value.alias_info is not None for value in func._schema.returns):
        return None
    key = func, _kind(args), *((name, _kind(kwargs[name])) for name in sorted(kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_kind(v) for v in value)
    return type(value), value


def _fresh(returned: tuple[Any, ...], arguments: Any) -> tuple[_Part, ...] | None:
    """How to allocate these values again; None where one shares its memory, or is no plain one."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    if any(tensor.device.type != "meta" for tensor in tensors):
        return None  # a result that depends on values
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    parts: list[_Part] = []
    for value in returned:
        if not isinstance(value, Tensor):
            if value is not None and not isinstance(value, int | float):
                return None
            parts.append(value)
            continue
        part = value.shape, value.stride(), value.dtype
        storage = value.untyped_storage()
        if value.device.type != "meta" or storage._cdata in storages:
            return None
        last = sum((size - 1) * step for size, step in zip(part[0], part[1], strict=True))
        whole = (last + 1) * value.element_size() if value.numel() else 0
        if storage.nbytes() != whole:
            return None
        storages.append(storage._cdata)
        parts.append(part)
    return tuple(parts)


def _allocate(part: _Part) -> Any:
    if not isinstance(part, tuple):
        return part
    shape, stride, dtype = part
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class StorageTracker(TorchDispatchMode):
    """Adds up the bytes of all live tensors that were made inside it, in the order of the run.

    Gradients of watched parameters count until they are whole; from then on they are the caller's.

    Args:
        parameters: Weights, which do not count, nor do their gradients.
        inputs: Other tensors that exist already.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] = (), inputs: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._outside = {t.untyped_storage()._cdata for t in inputs}
        self._hooks = []
        for parameter in parameters:
            self._outside.add(parameter.untyped_storage()._cdata)
            if parameter.requires_grad:
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(self._leave_gradient_out)
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and counts the storages it made."""
        out = func(*args, **(kwargs or {}))
        self.take_in(out)
        return out

    def take_in(self, out: Any) -> None:
        """Counts the storages of what an operator has returned, as far as they are new."""
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._outside or key in self._seen:
            return
        self._seen[key] = (storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        size, _ = self._seen.pop(key, (0, None))
        self.live -= size

    def _leave_gradient_out(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._forget(parameter.grad.untyped_storage()._cdata)
