"""The pair losses: validation, choice of implementation, named result. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastpo_kernels._shared.dispatch import MAX_ELEMENTS, choose
from fastpo_kernels._shared.target import PairTarget
from fastpo_kernels.pair_loss import cpu, fused, sides, validate
from fastpo_kernels.pair_loss import reference as oracle
from fastpo_kernels.pair_loss.objectives import OBJECTIVES
from fastpo_kernels.pair_loss.sides import Given
from fastpo_kernels.pair_loss.spec import (
    Adaptive,
    Layout,
    LossSpec,
    PairLoss,
    PairTensors,
    Reduce,
    Reduction,
)

Impl = Literal["triton", "cpu", "reference"]
Target = Given | PairTarget
_IMPLS = get_args(Impl)
_MAX_PAIRS = 2048
_EAGER = {"cpu": cpu, "reference": oracle}


def _chosen(impl: str | None, tensors: PairTensors) -> str:
    """`choose`, and the kernel's limits: vectors of all pairs, 32-bit positions in a sample."""
    policy, n_pairs = tensors.policy, tensors.n_pairs
    n_elements = policy.numel() // (2 * n_pairs)
    fits = n_pairs <= _MAX_PAIRS and n_elements <= MAX_ELEMENTS
    if impl is None and not (policy.is_cuda and fits):
        return "cpu"
    vectors = (tensors.minority, tensors.statistics, tensors.pair_weight, tensors.beta)
    others = [t for t in (*tensors.judges, *vectors) if t is not None]
    chosen = choose(impl, [policy, tensors.target, *others], _IMPLS)
    if chosen == "triton" and not fits:
        raise ValueError(
            f"impl='triton' takes at most {_MAX_PAIRS} pairs a call of at most {MAX_ELEMENTS} "
            f"elements each, got {n_pairs} of {n_elements}"
        )
    return chosen


def _ready(target: Target, policy: Tensor) -> Tensor:
    """The target as a tensor, checked and without a gradient; of sides, one for checks alone."""
    if isinstance(target, PairTarget):
        target.check(policy)
        return target.form(policy)
    rows = sides.whole("target", target)
    validate.check_target(rows, policy)
    return rows.detach() if rows.requires_grad else rows


def _is_plain(given: Sequence[object], layout: str) -> bool:
    """Whether every tensor holds the winners in its first half."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    return layout == "halves" and not any(isinstance(t, tuple) for t in given)


def _as_given(target: Target, ready: Tensor, n_pairs: int) -> Given:
    """The target for `sides`: what was given, without a gradient; a formed one holds halves."""
    if isinstance(target, PairTarget):
        return ready if len(ready) == n_pairs else (ready[:n_pairs], ready[n_pairs:])
    return (target[0].detach(), target[1].detach()) if isinstance(target, tuple) else ready


def _loss_of_sides(
    tensors: PairTensors, given: Sequence[Given], call: _Call, reduce: Reduce | None
) -> PairLoss:
    """Each side read where it lies; the oracle, and what is traced, read halves made of them."""
    policy = given[0]
    if call.chosen == "triton" and not fused.is_traced(sides.split(policy, call.layout)[0]):
        split = sides.split_tensors(tensors, given, call.layout)
        return fused.sides_loss(split, policy, call.layout, call.spec, reduce)
    if call.chosen == "cpu" and not torch.compiler.is_compiling():
        split = sides.split_tensors(tensors, given, call.layout)
        return cpu.sides_loss(split, call.spec, reduce)
    halves = sides.halves(tensors, given, call.layout)
    run = fused if call.chosen == "triton" else _EAGER[call.chosen]
    return run.pair_loss(halves, call.spec, reduce)


@dataclass(frozen=True)
class _Call:
    """How a loss of sides is computed."""

    chosen: str
    spec: LossSpec
    layout: Layout


def _options_of(
    objective: str, options: Sequence[float | Tensor], policy: Tensor
) -> tuple[tuple[float, ...], Tensor | None]:
    """The options as numbers, and the first of them as `[B]` where every pair has its own."""
    kind = OBJECTIVES.get(objective)
    if kind is None:
        raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {objective!r}")
    if not len(kind.options) - kind.n_optional <= len(options) <= len(kind.options):
        raise ValueError(f"{objective} takes options {kind.options}, got {len(options)}")
    beta, first = None, options[0] if options else None
    if isinstance(first, Tensor) and (first.ndim or first.device.type != "cpu"):
        # Its value is not read: that would wait for the GPU.
        validate.check_constant(kind.options[0], first)
        beta = first if first.ndim else first.expand(policy.shape[0] // 2).contiguous()
        options = (1.0, *options[1:])
    numbers = [validate.number(n, v) for n, v in zip(kind.options, options, strict=False)]
    return tuple(numbers), beta


def pair_loss(
    policy: Given,
    reference: Given | None,
    target: Target,
    objective: str,
    options: Sequence[float | Tensor] = (),
    *,
    annotators: Sequence[Given] = (),
    minority: Tensor | None = None,
    statistics: Tensor | None = None,
    pair_weight: Tensor | None = None,
    adaptive: Adaptive | None = None,
    safeguard: float | None = None,
    sft_weight: float = 0.0,
    reduce: Reduce | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> PairLoss:
    """Mean over pairs of `weight * (objective(e_w, e_l, r_w, r_l) + sft_weight * e_w)`.

    In one launch each way on a GPU.

    `e` and `r` are the policy's and the reference's mean squared errors; the scalar functions and
    their options are those of `objectives.py`. `fastpo.loss` names every combination; call that.

    Args:
        policy: `[2B, *dims]` float32, bfloat16 or float16, winners first; it alone gets a gradient.
        reference: `[2B, *dims]` predictions, or `[2B]` float32 errors; None where none is needed.
        target: `[2B, *dims]`, or `[B, *dims]` where the pair shares it; or a `PairTarget`, whose
            tensor is formed first.
        objective: a name in `OBJECTIVES`.
        options: numbers, in the order of `Objective.options`; the first may be `[B]`, one for
            every pair, on the policy's device.
        annotators: other judges of the same pairs, each like `reference`; needs `adaptive`.
        minority: `[B]`, the minority metric from outside; needs `adaptive`, excludes `annotators`.
        statistics: batch statistics from outside, float32: `[1]`, KTO's mean gain, or `[1 + M]`,
            the mean margin and then the M annotators' scales, the policy first.
        pair_weight: `[B]`, multiplies every pair's loss; the mean still divides by B.
        adaptive: weights and margins from the minority metric.
        safeguard: Diffusion-SDPO's mu: the loser's gradient is scaled so that the winner still
            gains.
        sft_weight: of the winner's error, added to every pair's loss before `weight`.
        reduce: maps this batch's sums, a float32 vector, to the sums over all processes, called
            once, between the pass over the predictions and the finish: for statistics beyond the
            batch, of objectives that have any. `LossSpec.n_sums` says what the vector holds.
        reduction: `mean` over the pairs, or `none`: every pair's loss, `[B]`.
        layout: of every `[2B, *dims]`: `halves`, winners first, or `interleaved`: winner, loser,
            winner, ... Any of these may instead be a tuple `(winner, loser)` of `[B, *dims]`, read
            where they lie. Vectors are winners first in any case.
        mask: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, dimensions along which it is
            the same being 1; bool, or weights that are not negative: errors are means weighed by
            it, `sum m (x - t)**2 / sum m`. Ready errors must be such means. Not with `safeguard`.
        impl: `triton`; `cpu`, torch operators in few passes; `reference`, the oracle, in plain
            ones. None is triton if every tensor is on a supported GPU (compute capability 8.0 or
            AMD) in a dtype it takes, with triton installed, at most 2048 pairs; else `cpu`. A name
            never falls back.

    Returns:
        `PairLoss`.

    Raises:
        TypeError: not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device, option or `impl` that breaks the rules above.
    """
    plain = _is_plain((policy, reference, target, *annotators), layout)
    given = [policy, *([] if reference is None else [reference]), *annotators]
    rows = sides.whole("policy", policy)
    validate.check_policy(rows)
    numbers, beta = _options_of(objective, options, rows)
    if reference is None and OBJECTIVES[objective].needs_reference:
        raise ValueError(f"{objective} needs a reference, got None")
    validate.check_reduction(reduction)
    ready = _ready(target, rows)
    known = None if reference is None else sides.whole("reference", reference)
    judges = [sides.whole(f"annotators[{k}]", a) for k, a in enumerate(annotators)]
    if mask is not None and safeguard is not None:
        raise ValueError("a safeguard compares gradients of whole samples and takes no mask")
    weights = None if mask is None else sides.weights_of(mask, rows, layout)
    tensors = PairTensors(
        rows, ready, known, judges, minority, statistics, pair_weight, beta, None, weights
    )
    per_pair = reduction == "none"
    spec = LossSpec(objective, numbers, adaptive, safeguard, float(sft_weight), per_pair)
    validate.check_tensors(tensors, spec)
    if reduce is not None:
        validate.check_reduce(tensors, spec)
    chosen = _chosen(impl, tensors)
    if chosen == "triton":
        validate.check_kernel_vectors(tensors)
    if not plain:
        given.append(_as_given(target, ready, tensors.n_pairs))
        return _loss_of_sides(tensors, given, _Call(chosen, spec, layout), reduce)
    return (fused if chosen == "triton" else _EAGER[chosen]).pair_loss(tensors, spec, reduce)


def _odd_errors(policy: Tensor, target: Target, mask: Given | None, impl: Impl | None) -> Tensor:
    """The even rows' errors, and the last one's, which is read as both sides of a pair."""
    if not isinstance(target, Tensor) or target.shape != policy.shape:
        shape = target.shape if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"an odd number of rows needs a target of policy's shape {tuple(policy.shape)}, got "
            f"{tuple(shape) if isinstance(target, Tensor) else shape}"
        )
    if mask is not None and (not isinstance(mask, Tensor) or len(mask) != len(policy)):
        raise ValueError(f"an odd number of rows needs a mask of as many, {len(policy)}")
    last, last_target = (torch.cat([t[-1:], t[-1:]]) for t in (policy, target))
    last_mask = None if mask is None else torch.cat([mask[-1:], mask[-1:]])
    last = pair_errors(last, last_target, mask=last_mask, impl=impl)[:1]
    if len(policy) == 1:
        return last
    most = None if mask is None else mask[:-1]
    return torch.cat([pair_errors(policy[:-1], target[:-1], mask=most, impl=impl), last])


def pair_errors(
    policy: Given,
    target: Target,
    *,
    layout: Layout = "halves",
    mask: Given | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Mean squared error of every row, the fused reduction alone; differentiable in `policy`.

    Args:
        policy: `[2B, *dims]` float32, bfloat16 or float16, winners first; or any number of rows,
            with a target of as many. The last of an odd number is a launch of its own.
        target: as in `pair_loss`.
        layout: as in `pair_loss`; the errors are winners first in any case.
        mask: as in `pair_loss`.
        impl: as in `pair_loss`.

    Returns:
        `[2B]` float32 (float64 for float64 predictions), or one of every row.

    Raises:
        TypeError: not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device or `impl` that breaks the rules above.
    """
    plain = _is_plain((policy, target), layout)
    rows = sides.whole("policy", policy)
    (validate.check_predictions if plain else validate.check_policy)(rows)
    if rows.shape[0] % 2:
        return _odd_errors(rows, target, mask, impl)
    ready = _ready(target, rows)
    weights = None if mask is None else sides.weights_of(mask, rows, layout)
    tensors = PairTensors(rows, ready, mask=weights)
    chosen = _chosen(impl, tensors)
    if not plain:
        return _errors_of_sides(
            tensors, [policy, _as_given(target, ready, tensors.n_pairs)], chosen, layout
        )
    return (fused if chosen == "triton" else _EAGER[chosen]).pair_errors(rows, ready, weights)


def _errors_of_sides(
    tensors: PairTensors, given: Sequence[Given], chosen: str, layout: Layout
) -> Tensor:
    """As `_loss_of_sides`."""
    policy = given[0]
    if chosen == "triton" and not fused.is_traced(sides.split(policy, layout)[0]):
        split = sides.split_tensors(tensors, given, layout)
        return fused.sides_errors(split, policy, layout)
    if chosen == "cpu" and not torch.compiler.is_compiling():
        return cpu.sides_errors(sides.split_tensors(tensors, given, layout))
    halves = sides.halves(tensors, given, layout)
    run = fused if chosen == "triton" else _EAGER[chosen]
    return run.pair_errors(halves.policy, halves.target, halves.mask)
