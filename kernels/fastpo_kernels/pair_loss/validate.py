"""The rules on what a pair loss is given. Torch only.

Every error names the rule and what it got: `TypeError` for a type or dtype, `ValueError` for a
shape, device or option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]

from fastpo_kernels.pair_loss.spec import (
    Adaptive,
    LossSpec,
    MarginKind,
    Normalize,
    PairTensors,
    Reduction,
    WeightKind,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_floating(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")


def number(name: str, value: float | Tensor) -> float:
    """An option as a number.

    Raises:
        ValueError: a tensor that wants a gradient, which no option gets, or of several elements.
    """
    if isinstance(value, Tensor):
        check_constant(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor {tuple(value.shape)}")
    return float(value)


def check_constant(name: str, value: Tensor) -> None:
    """Refuses an option that wants a gradient."""
    if value.requires_grad:
        raise ValueError(
            f"{name} is a constant of the loss, got a tensor that requires a gradient; detach it"
        )


def check_reduction(reduction: str) -> None:
    """A name in `Reduction`."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")


def check_policy(policy: Tensor) -> None:
    """Predictions `[2B, *dims]`."""
    check_predictions(policy)
    if policy.shape[0] % 2:
        raise ValueError(
            "policy must be [2B, *dims], winners first, then as many losers, and not empty; "
            f"got {tuple(policy.shape)}"
        )


def check_predictions(policy: Tensor) -> None:
    """Predictions `[N, *dims]`, not empty, of a dtype that is taken."""
    _check_floating("policy", policy)
    if policy.dtype not in _DTYPES:
        raise TypeError(f"policy must be float32, bfloat16 or float16, got {policy.dtype}")
    if not torch.compiler.is_compiling() and is_batchedtensor(policy):
        raise NotImplementedError(
            "the pair losses do not run under vmap: their first dimension is the batch already"
        )
    _, *dims = policy.shape or (1,)
    if not dims or policy.numel() == 0:
        raise ValueError(
            "policy must be [2B, *dims], winners first, then as many losers, and not empty; "
            f"got {tuple(policy.shape)}"
        )


def check_target(target: Tensor, policy: Tensor) -> None:
    """`[2B, *dims]`, or `[B, *dims]`, on the policy's device."""
    _check_floating("target", target)
    rows, *dims = policy.shape
    if target.shape != (rows // 2, *dims) and target.shape != policy.shape:
        raise ValueError(
            f"target must be {(rows, *dims)}, or {(rows // 2, *dims)} shared by the pair; "
            f"got {tuple(target.shape)}"
        )
    if target.device != policy.device:
        raise ValueError(f"target must be on policy's {policy.device}, got {target.device}")


def named_sources(tensors: PairTensors) -> dict[str, Tensor]:
    """Reference and annotators, by the names that errors call them."""
    if tensors.reference is None and not len(tensors.annotators):
        return {}
    named = {} if tensors.reference is None else {"reference": tensors.reference}
    for k, annotator in enumerate(tensors.annotators):
        named[f"annotators[{k}]"] = annotator
    return named


def named_vectors(tensors: PairTensors) -> dict[str, Tensor]:
    """Minority, pair weights, statistics and beta, where they are given."""
    minority, weight, statistics = tensors.minority, tensors.pair_weight, tensors.statistics
    if minority is weight is statistics is tensors.beta is None:
        return {}
    named = {"minority": minority, "pair_weight": weight, "statistics": statistics}
    named["beta"] = tensors.beta
    return {name: vector for name, vector in named.items() if vector is not None}


def _alike(a: object, policy: Tensor) -> bool:
    """Whether it is a tensor of the policy's shape, dtype and device."""
    if type(a) is not Tensor or a.dtype != policy.dtype or a.shape != policy.shape:
        return False
    return a.device == policy.device


def _check_source(name: str, source: Tensor, policy: Tensor) -> None:
    """Reference and annotators: predictions like the policy's, or errors `[2B]`."""
    if _alike(source, policy):
        return
    if not isinstance(source, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(source).__name__}")
    if source.ndim == 1:
        if source.shape[0] != policy.shape[0]:
            raise ValueError(
                f"{name}'s errors must be [{policy.shape[0]}], got {tuple(source.shape)}"
            )
        if source.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}'s errors must be float32, got {source.dtype}")
    elif source.shape != policy.shape:
        raise ValueError(
            f"{name} must have policy's shape {tuple(policy.shape)}, or be its errors "
            f"[{policy.shape[0]}]; got {tuple(source.shape)}"
        )
    elif not source.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {source.dtype}")
    if source.device != policy.device:
        raise ValueError(f"{name} must be on policy's {policy.device}, got {source.device}")


def check_vector(name: str, vector: Tensor, size: int, policy: Tensor) -> None:
    """One number each of `size`, on the policy's device."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got {tuple(vector.shape)}")
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {vector.dtype}")
    if vector.device != policy.device:
        raise ValueError(f"{name} must be on policy's {policy.device}, got {vector.device}")


def _check_adaptive(
    adaptive: Adaptive, minority: Tensor | None, annotators: Sequence[Tensor]
) -> None:
    kinds = (
        ("normalize", adaptive.normalize, Normalize),
        ("weight_kind", adaptive.weight_kind, WeightKind),
        ("margin_kind", adaptive.margin_kind, MarginKind),
    )
    for name, value, allowed in kinds:
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
    if minority is not None and len(annotators):
        raise ValueError("give the minority metric or annotators to form it from, got both")


def check_tensors(tensors: PairTensors, spec: LossSpec) -> None:
    """Everything beside the policy, which is checked, and beside its target."""
    policy, adaptive = tensors.policy, spec.adaptive
    if adaptive is not None:
        _check_adaptive(adaptive, tensors.minority, tensors.annotators)
    elif tensors.minority is not None or len(tensors.annotators):
        raise ValueError(f"{spec.objective} without adaptive takes neither minority nor annotators")
    for name, source in named_sources(tensors).items():
        _check_source(name, source, policy)
    n_statistics = 1 if adaptive is None else 2 + len(tensors.annotators)
    for name, vector in named_vectors(tensors).items():
        size = n_statistics if name == "statistics" else tensors.n_pairs
        check_vector(name, vector, size, policy)


def check_reduce_alone(statistics: Tensor | None, reduce: object) -> None:
    """Statistics are given, or formed."""
    if statistics is not None and reduce:
        raise ValueError("give statistics or a reduce to form them with, got both")


def check_reduce(tensors: PairTensors, spec: LossSpec) -> None:
    """There are statistics to reduce, and none are given."""
    check_reduce_alone(tensors.statistics, reduce=True)
    if not spec.has_statistics:
        raise ValueError(
            f"{spec.objective} has no batch statistics for reduce to span processes with"
        )


def check_reduced(totals: Tensor, sums: Tensor) -> Tensor:
    """What `Reduce` returned for `sums`: a contiguous tensor like them."""
    if not isinstance(totals, Tensor):
        raise ValueError(f"reduce must return a tensor, got {type(totals).__name__}")
    same = (totals.shape, totals.dtype, totals.device) == (sums.shape, sums.dtype, sums.device)
    if not same or not totals.is_contiguous():
        raise ValueError(
            f"reduce must return a tensor like its argument, contiguous {tuple(sums.shape)} "
            f"{sums.dtype} on {sums.device}; got {tuple(totals.shape)} {totals.dtype} on "
            f"{totals.device}"
        )
    return totals


def check_kernel_vectors(tensors: PairTensors) -> None:
    """The kernels read vectors without a stride."""
    vectors = (tensors.minority, tensors.pair_weight, tensors.statistics, tensors.beta)
    given = (*tensors.judges, *vectors)
    if all(t is None or t.ndim > 1 or t.is_contiguous() for t in given):
        return
    for name, t in (named_sources(tensors) | named_vectors(tensors)).items():
        if t.ndim == 1 and not t.is_contiguous():
            raise ValueError(f"impl='triton' needs {name} contiguous, got stride {t.stride(0)}")
