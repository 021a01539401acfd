"""The compiled losses with their gradients. Plain tensors in a CPU's memory, nothing traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from fastpo_kernels.pair_loss.native import launch, module
from fastpo_kernels.pair_loss.ops import ERRORS_ALONE
from fastpo_kernels.pair_loss.spec import (
    LossSpec,
    PairLoss,
    PairTensors,
    PartialsLayout,
    Reduce,
)
from fastpo_kernels.pair_loss.validate import check_reduced

OBJECTIVES = launch.OBJECTIVES
_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_DIMS = 8  # of a sample, as in native/rows.h
Eager = Callable[[PairTensors, LossSpec, Reduce | None], PairLoss]
_Asked = tuple[LossSpec, Reduce | None, Eager]


def _nothing_watches() -> bool:
    """Whether operators would do nothing but compute: no transforms and no modes."""
    return not (
        _functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def takes(tensors: PairTensors) -> bool:
    """Whether the compiled module is there and reads what these tensors hold."""
    if torch.compiler.is_compiling():
        return False
    policy = tensors.policy
    if policy.dtype not in launch.KINDS or not policy.is_cpu or policy.ndim > _MOST_DIMS + 1:
        return False
    vectors = (tensors.minority, tensors.statistics, tensors.pair_weight, tensors.beta)
    for t in (*tensors.sources, tensors.target, tensors.mask, *(tensors.losers or ()), *vectors):
        if t is None:
            continue
        plain = type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided
        if (
            not plain
            or t.is_neg()
            or t.numel() == 0
            or (t.ndim > 1 and t.dtype not in launch.KINDS)
        ):
            return False
    return _nothing_watches() and module.loaded() is not None


def _reduced(tensors: PairTensors, spec: LossSpec, reduce: Reduce) -> PairTensors:
    """Errors in place of predictions, and the sums of all processes as `statistics`."""
    partials = launch.launch_partials(tensors, spec)
    n_annotators, n_sources = len(tensors.annotators), len(tensors.sources)
    layout = PartialsLayout(tensors.n_pairs, n_sources, spec.n_sums(n_annotators))
    errors = [layout.errors(k).of(partials) for k in range(n_sources)]
    sums = layout.sums.of(partials)
    return replace(
        tensors,
        policy=errors[0],
        reference=None if tensors.reference is None else errors[1],
        annotators=errors[n_sources - n_annotators :],
        losers=None,
        statistics=check_reduced(reduce(sums), sums),
    )


class _Loss(torch.autograd.Function):
    """The loss of `given`: the policy of both sides, or of winners and of losers.

    `eager` is the way that can be differentiated twice.
    """

    @staticmethod
    def forward(ctx, tensors: PairTensors, asked: _Asked, *given: Tensor):
        spec, reduce, _ = ctx.asked = asked
        losers, ctx.totals = tensors.losers, None
        if reduce is None:
            results = launch.launch_loss(tensors, spec)
        else:
            errors = _reduced(tensors, spec, reduce)
            ctx.totals = errors.statistics
            results = launch.launch_loss(errors, spec, sums=True)
        targets = (tensors.target,) if losers is None else (tensors.target, losers[-1])
        # Not the other predictions: their errors are kept.
        ctx.vectors = tensors.minority, tensors.statistics, tensors.pair_weight, tensors.beta
        ctx.mask, ctx.n_given = tensors.mask, len(given)
        ctx.n_others = tensors.reference is not None, len(tensors.annotators)
        ctx.save_for_backward(*given, *targets, results.rest)
        ctx.mark_non_differentiable(results.rest)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_loss, grad_margin, grad_errors, _):
        n, saved = ctx.n_given, ctx.saved_tensors
        given, targets = saved[:n], saved[n:-1]
        if grad_loss is grad_margin is grad_errors is None:
            return None, None, *(None for _ in given)
        if torch.is_grad_enabled():
            return None, None, *_twice(ctx, given, targets, (grad_loss, grad_margin, grad_errors))
        by = _slopes(_layout(ctx).coefficients(saved[-1]), grad_loss, grad_margin, grad_errors)
        return None, None, *_gradients(given, targets, ctx.mask, by)


def _layout(ctx) -> launch.NativeLayout:
    n_pairs = sum(map(len, ctx.saved_tensors[: ctx.n_given])) // 2
    return launch.NativeLayout(n_pairs, sum(ctx.n_others), ctx.asked[0].safeguard is not None)


def _slopes(
    coefficients: Tensor, by_loss: Tensor | None, by_margin: Tensor | None, by_errors: Tensor | None
) -> launch.Sides:
    """What multiplies each row's error, and a number that multiplies all, or None."""
    if by_margin is by_errors is None and by_loss is not None and by_loss.ndim == 0:
        return coefficients, by_loss
    found = torch.zeros_like(coefficients) if by_errors is None else by_errors
    if by_margin is not None:
        found = found + torch.cat([-by_margin, by_margin])
    if by_loss is not None:
        found = found + (torch.cat([by_loss, by_loss]) if by_loss.ndim else by_loss) * coefficients
    return found, None


def _gradients(given: Sequence[Tensor], targets: Any, mask: Tensor | None, by: Any) -> list[Tensor]:
    """Of each given part of the policy."""
    found = [torch.empty_like(t) for t in given]

    def sides(parts: Sequence[Tensor]) -> launch.Sides:
        return parts[0], parts[1] if len(parts) > 1 else None

    launch.launch_gradient(sides(given), sides(targets), sides(found), mask, by)
    return found


def _twice(ctx, given: Any, targets: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The gradient as operators that are differentiated in turn."""
    spec, _, eager = ctx.asked
    layout, rest, totals = _layout(ctx), ctx.saved_tensors[-1], ctx.totals
    others = [layout.errors(rest, k) for k in range(layout.n_others)]
    has_reference = ctx.n_others[0]
    minority, statistics, pair_weight, beta = ctx.vectors
    tensors = PairTensors(
        given[0],
        targets[0],
        others[0] if has_reference else None,
        others[int(has_reference) :],
        minority,
        statistics,
        pair_weight,
        beta,
        None if len(given) == 1 else (given[1], *others, targets[1]),
        ctx.mask,
    )
    with torch.enable_grad():
        out = eager(tensors, spec, None if totals is None else lambda _: totals)
        outputs = out.loss, out.margin, out.policy_error
        chosen = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        return torch.autograd.grad(
            [o for o, _ in chosen], given, [g for _, g in chosen], create_graph=True
        )


def _named(results: Sequence[Tensor], tensors: PairTensors, spec: LossSpec) -> PairLoss:
    loss, margin, errors, rest = results
    adaptive, guarded = spec.adaptive is not None, spec.safeguard is not None
    n_others = (tensors.reference is not None) + len(tensors.annotators)
    layout = launch.NativeLayout(len(margin), n_others, guarded)
    return PairLoss(
        loss,
        margin,
        errors,
        None if tensors.reference is None else layout.errors(rest, 0),
        layout.minority(rest) if adaptive else None,
        layout.weight(rest) if adaptive or tensors.pair_weight is not None else None,
        rest[-1] if guarded else None,
    )


def _given(tensors: PairTensors) -> tuple[Tensor, ...]:
    losers = tensors.losers
    return (tensors.policy,) if losers is None else (tensors.policy, losers[0])


def pair_loss(
    tensors: PairTensors, spec: LossSpec, reduce: Reduce | None, eager: Eager
) -> PairLoss:
    """As `cpu.pair_loss`, of tensors that the module `takes`; `eager` is differentiable twice."""
    results = _Loss.apply(tensors, (spec, reduce, eager), *_given(tensors))
    return _named(results, tensors, spec)


class _Errors(torch.autograd.Function):
    """The errors `[2B]` of the policy alone."""

    @staticmethod
    def forward(ctx, tensors: PairTensors, eager: Callable[[PairTensors], Tensor], *given: Tensor):
        losers = tensors.losers
        targets = (tensors.target,) if losers is None else (tensors.target, losers[-1])
        ctx.mask, ctx.n_given, ctx.eager = tensors.mask, len(given), eager
        ctx.save_for_backward(*given, *targets)
        return launch.launch_partials(tensors, ERRORS_ALONE)

    @staticmethod
    def backward(ctx, grad_errors):
        given, targets = ctx.saved_tensors[: ctx.n_given], ctx.saved_tensors[ctx.n_given :]
        if not torch.is_grad_enabled():
            return None, None, *_gradients(given, targets, ctx.mask, (grad_errors, None))
        losers = None if len(given) == 1 else (given[1], targets[1])
        tensors = PairTensors(given[0], targets[0], losers=losers, mask=ctx.mask)
        with torch.enable_grad():
            errors = ctx.eager(tensors)
            grads = torch.autograd.grad(errors, given, grad_errors, create_graph=True)
        return None, None, *grads


def pair_errors(tensors: PairTensors, eager: Callable[[PairTensors], Tensor]) -> Tensor:
    """As `cpu.pair_errors`, of tensors that the module `takes`: the policy and its target alone."""
    return _Errors.apply(tensors, eager, *_given(tensors))
