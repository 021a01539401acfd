"""The pair losses: validation, choice of implementation, named result. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]

from fastpo_kernels._shared.dispatch import MAX_ELEMENTS, Impl, choose
from fastpo_kernels._shared.target import EncodedTarget, PairTarget, encode_ready
from fastpo_kernels.pair_loss import cpu, ops
from fastpo_kernels.pair_loss import reference as eager
from fastpo_kernels.pair_loss.reference import (
    Adaptive,
    MarginKind,
    Normalize,
    Reduce,
    WeightKind,
)

_MAX_PAIRS = 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Target = Tensor | PairTarget


class PairLoss(NamedTuple):
    """Result of a pair loss. Only `loss` carries a gradient; the rest is detached.

    Attributes:
        loss: scalar, float32 (float64 for float64 predictions).
        margin: `[B]`, `(r_w - r_l) - (e_w - e_l)`; without a reference r is 0.
        policy_error: `[2B]`, mean squared error of every row, winners first.
        reference_error: `[2B]`, or None without a reference.
        minority: `[B]`, the minority metric u, or None where the objective has none.
        weight: `[B]`, what every pair's loss was multiplied by, or None if by nothing.
    """

    loss: Tensor
    margin: Tensor
    policy_error: Tensor
    reference_error: Tensor | None
    minority: Tensor | None
    weight: Tensor | None


def _chosen(impl: str | None, policy: Tensor, target: Target, others: Sequence[Tensor] = ()) -> str:
    """`choose`, and the kernel's limits: vectors of all pairs, 32-bit positions in a sample."""
    n_pairs = len(policy) // 2
    n_elements = policy.numel() // (2 * n_pairs)
    fits = n_pairs <= _MAX_PAIRS and n_elements <= MAX_ELEMENTS
    if impl is None and not (policy.is_cuda and fits):
        return "reference"
    parts = target.parts().values() if isinstance(target, PairTarget) else (target,)
    floats = (part for part in parts if part.is_floating_point())
    chosen = choose(impl, [policy, *floats, *others])
    if chosen == "triton" and not fits:
        raise ValueError(
            f"impl='triton' takes at most {_MAX_PAIRS} pairs a call of at most {MAX_ELEMENTS} "
            f"elements each, got {n_pairs} of {n_elements}"
        )
    return chosen


def _named_sources(reference: Tensor | None, annotators: Sequence[Tensor]) -> dict[str, Tensor]:
    """Who else judges the pairs, by the names that errors call them."""
    named = {} if reference is None else {"reference": reference}
    for k, annotator in enumerate(annotators):
        named[f"annotators[{k}]"] = annotator
    return named


def _named_vectors(minority, pair_weight, statistics) -> dict[str, Tensor]:
    """The given ones of the three."""
    if minority is None and pair_weight is None and statistics is None:
        return {}
    named = {"minority": minority, "pair_weight": pair_weight, "statistics": statistics}
    return {name: vector for name, vector in named.items() if vector is not None}


def _check_predictions(policy: Tensor, target: Target) -> None:
    """The rules on policy and target."""
    _check_floating("policy", policy)
    if policy.dtype not in _DTYPES:
        raise TypeError(f"policy must be float32, bfloat16 or float16, got {policy.dtype}")
    if not torch.compiler.is_compiling() and is_batchedtensor(policy):
        raise NotImplementedError(
            "the pair losses do not run under vmap: their first dimension is the batch already"
        )
    rows, *dims = policy.shape or (1,)
    if not dims or rows % 2 or policy.numel() == 0:
        raise ValueError(
            "policy must be [2B, *dims], winners first, then as many losers, and not empty; "
            f"got {tuple(policy.shape)}"
        )
    if isinstance(target, PairTarget):
        target.check(policy)
        return
    _check_floating("target", target)
    if target.shape != (rows // 2, *dims) and target.shape != policy.shape:
        raise ValueError(
            f"target must be {(rows, *dims)}, or {(rows // 2, *dims)} shared by the pair; "
            f"got {tuple(target.shape)}"
        )
    if target.device != policy.device:
        raise ValueError(f"target must be on policy's {policy.device}, got {target.device}")


def _alike(a: object, policy: Tensor) -> bool:
    """Whether it is a tensor of the policy's shape, dtype and device."""
    if type(a) is not Tensor or a.dtype != policy.dtype or a.shape != policy.shape:
        return False
    return a.device == policy.device


def _check_floating(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")


def _constant(t: Tensor | None) -> Tensor | None:
    return t.detach() if t is not None and t.requires_grad else t


def _encoded(target: Target, n_pairs: int) -> EncodedTarget:
    """What the operators take."""
    if not isinstance(target, PairTarget):
        return encode_ready(target.detach() if target.requires_grad else target, n_pairs)
    for name, part in target.parts().items():
        _check_kernel_vector(f"target's {name}", part)
    tensors, kind, numbers = target.encode()
    return [t.detach() if t.requires_grad else t for t in tensors], kind, numbers


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


def _check_vector(name: str, vector: Tensor, size: int, policy: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got {tuple(vector.shape)}")
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {vector.dtype}")
    if vector.device != policy.device:
        raise ValueError(f"{name} must be on policy's {policy.device}, got {vector.device}")


def _check_adaptive(adaptive: Adaptive, minority: Tensor | None, annotators) -> None:
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


def pair_loss(
    policy: Tensor,
    reference: Tensor | None,
    target: Target,
    objective: str,
    options: Sequence[float] = (),
    *,
    annotators: Sequence[Tensor] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    pair_weight: Tensor | None = None,
    adaptive: Adaptive | None = None,
    safeguard: float | None = None,
    reduce: Reduce | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Mean over pairs of `weight * objective(e_w, e_l, r_w, r_l)`, in one launch each way on a GPU.

    `e` and `r` are the policy's and the reference's mean squared errors; the scalar functions and
    their options are those of `reference.py`. `fastpo.loss` names every combination; call that.

    Args:
        policy: `[2B, *dims]` float32, bfloat16 or float16, winners first; it alone gets a gradient.
        reference: `[2B, *dims]` predictions, or `[2B]` float32 errors; None where none is needed.
        target: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, or a `PairTarget`: formed
            inside the kernels, never written.
        objective: a name in `reference.OBJECTIVES`.
        options: up to three numbers, in the order of the scalar function.
        annotators: other judges of the same pairs, each like `reference`; needs `adaptive`.
        minority: `[B]`, the minority metric from outside; needs `adaptive`, excludes `annotators`.
        statistics: batch statistics from outside, float32: `[1]`, KTO's mean gain, or `[1 + M]`,
            the mean margin and then the M annotators' scales, the policy first.
        pair_weight: `[B]`, multiplies every pair's loss; the mean still divides by B.
        adaptive: weights and margins from the minority metric.
        safeguard: Diffusion-SDPO's mu: the loser's gradient is scaled so that the winner still
            gains.
        reduce: maps this batch's sums, a float32 vector, to the sums over all processes, called
            once, between the pass over the predictions and the finish: for statistics beyond the
            batch, of objectives that have any. The vector is `sum g` for KTO, `sum d` and
            `sum d_m**2` of every annotator, the policy first, for adaptive, then `sum e_w` and
            `sum <pred_w - target, pred_l - target> / N` with a safeguard, last the pairs.
        impl: None is triton if every tensor is on a supported GPU (compute capability 8.0 or AMD)
            in a dtype it takes, with triton installed, at most 2048 pairs; else `cpu.py`, the
            reference's mathematics in fewer passes. A name never falls back.

    Returns:
        `PairLoss`.

    Raises:
        TypeError: not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device, option or `impl` that breaks the rules above.
    """
    kind = eager.OBJECTIVES.get(objective)
    if kind is None:
        raise ValueError(f"objective must be one of {list(eager.OBJECTIVES)}, got {objective!r}")
    if reference is None and kind.needs_reference:
        raise ValueError(f"{objective} needs a reference, got None")
    options = [float(x) for x in (*options, 0.0, 0.0, 0.0)[:3]]
    plain = adaptive is minority is statistics is pair_weight is safeguard is reduce is None
    if plain and impl is None and objective != "kto" and not len(annotators):
        small = cpu.small_loss(policy, reference, target, kind.function, options)
        if small is not None:
            return PairLoss(*small)
    _check_predictions(policy, target)
    if adaptive is not None:
        _check_adaptive(adaptive, minority, annotators)
    elif minority is not None or len(annotators):
        raise ValueError(f"{objective} without adaptive takes neither minority nor annotators")
    sources = _named_sources(reference, annotators)
    for name, source in sources.items():
        _check_source(name, source, policy)
    vectors = _named_vectors(minority, pair_weight, statistics)
    n_pairs = len(policy) // 2
    for name, vector in vectors.items():
        n_statistics = 1 if adaptive is None else 2 + len(annotators)
        _check_vector(name, vector, n_statistics if name == "statistics" else n_pairs, policy)
    if reduce is not None:
        _check_reduce(objective, adaptive, safeguard, statistics)
    if _chosen(impl, policy, target, (*sources.values(), *vectors.values())) == "reference":
        module = cpu if impl is None else eager
        return PairLoss(
            *module.pair_loss(
                policy,
                reference,
                target.form(policy) if isinstance(target, PairTarget) else target,
                objective=objective,
                options=options,
                annotators=annotators,
                minority=minority,
                statistics=statistics,
                pair_weight=pair_weight,
                adaptive=adaptive,
                safeguard=safeguard,
                reduce=reduce,
            )
        )
    for name, vector in (*sources.items(), *vectors.items()):
        _check_kernel_vector(name, vector)
    return _fused(
        policy,
        [_constant(t) for t in (reference, minority, statistics, pair_weight)],
        _encoded(target, n_pairs),
        [_constant(a) for a in annotators],
        (objective, options, adaptive, safeguard, reduce),
    )


def _fused(policy, constants, target, annotators, choices) -> PairLoss:
    """The operators' way; constants that want a gradient would make the loss want one."""
    reference, minority, statistics, pair_weight = constants
    objective, options, adaptive, safeguard, reduce = choices
    kinds, error = "" if adaptive is None else adaptive.kinds, None
    if reduce is not None:
        error, reference, annotators, statistics = _globally(
            reduce, policy, reference, target, annotators, objective, kinds, safeguard
        )
    loss, stats = ops.pair_loss(
        policy, reference, *target, annotators, minority, statistics, pair_weight, objective,
        options, kinds, [] if adaptive is None else adaptive.scalars, safeguard, error,
    )  # fmt: skip
    n_sources = 1 + (reference is not None) + len(annotators)
    return _unpack(loss, stats, len(policy) // 2, n_sources, reference, adaptive, pair_weight)


def _check_reduce(objective, adaptive, safeguard, statistics) -> None:
    if statistics is not None:
        raise ValueError("give statistics or a reduce to form them with, got both")
    if adaptive is None and safeguard is None and objective != "kto":
        raise ValueError(f"{objective} has no batch statistics for reduce to span processes with")


def _globally(reduce, policy, reference, target, annotators, objective, kinds, safeguard):
    """Errors of policy, reference and annotators, and the sums of all processes; one launch."""
    with torch.no_grad():
        partial = ops.pair_partials(
            policy, reference, *target, annotators, objective, kinds, safeguard
        )
    n_sources = 1 + (reference is not None) + len(annotators)
    errors = partial.narrow(0, 0, n_sources * len(policy)).split(len(policy))
    totals = eager.reduced(reduce, partial[n_sources * len(policy) :])
    first = 1 if reference is None else 2
    return errors[0], None if reference is None else errors[1], errors[first:], totals


def _check_kernel_vector(name: str, vector: Tensor) -> None:
    if vector.ndim == 1 and not vector.is_contiguous():
        raise ValueError(f"impl='triton' needs {name} contiguous, got stride {vector.stride(0)}")


def _unpack(loss, stats, n_pairs, n_sources, reference, adaptive, pair_weight) -> PairLoss:
    """Views of `stats`, in the layout of `ops.py`."""
    tail = (1 + 2 * n_sources) * n_pairs
    weighted = adaptive is not None or pair_weight is not None
    return PairLoss(
        loss,
        stats.narrow(0, 0, n_pairs),
        stats.narrow(0, n_pairs, 2 * n_pairs),
        None if reference is None else stats.narrow(0, 3 * n_pairs, 2 * n_pairs),
        None if adaptive is None else stats.narrow(0, tail, n_pairs),
        stats.narrow(0, tail + n_pairs, n_pairs) if weighted else None,
    )


def pair_errors(policy: Tensor, target: Target, *, impl: Impl | None = None) -> Tensor:
    """Mean squared error of every row, the fused reduction alone; differentiable in `policy`.

    Args:
        policy: `[2B, *dims]` float32, bfloat16 or float16, winners first.
        target: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, or a `PairTarget`: formed
            inside the kernels, never written.
        impl: as in `pair_loss`.

    Returns:
        `[2B]` float32 (float64 for float64 predictions).

    Raises:
        TypeError: not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device or `impl` that breaks the rules above.
    """
    _check_predictions(policy, target)
    if _chosen(impl, policy, target) == "reference":
        formed = target.form(policy) if isinstance(target, PairTarget) else target
        return (cpu if impl is None else eager).pair_errors(policy, formed.detach())
    return ops.pair_errors(policy, *_encoded(target, policy.shape[0] // 2))
