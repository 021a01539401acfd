"""The way to the kernels: round the operators where nothing traces, and a named result.

Eager calls go through plain `autograd.Function`s over the launchers: at this size a loss costs what
its host work costs, and of that the operators' dispatcher would be the larger part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpo_kernels.pair_loss import ops
from fastpo_kernels.pair_loss.sides import Given, alike, split
from fastpo_kernels.pair_loss.spec import (
    Adaptive,
    Layout,
    LossSpec,
    PairLoss,
    PairTensors,
    PartialsLayout,
    Reduce,
    StatsLayout,
)
from fastpo_kernels.pair_loss.validate import check_reduced


def _eager_backward(mask: Tensor | None = None):
    # Under create_graph the operator, whose own backward refuses.
    if not torch.is_grad_enabled():
        return partial(ops.launch_backward, mask=mask) if mask is not None else ops.launch_backward
    if mask is not None:
        ops.refuse_double_backward()
    return ops.pair_loss_bwd


class _EagerLoss(torch.autograd.Function):
    """`pair_loss_fwd` without the dispatcher."""

    @staticmethod
    def forward(ctx, policy: Tensor, tensors: PairTensors, spec: LossSpec):
        loss, stats = ops.launch_forward(tensors, spec, traced=False)
        ops.keep_for_gradient(ctx, policy, tensors.target, stats, spec.safeguard)
        ctx.mask = tensors.mask
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, grad_stats):
        return (
            ops.policy_gradient(ctx, grad_loss, grad_stats, _eager_backward(ctx.mask)),
            None,
            None,
        )


class _EagerFinish(torch.autograd.Function):
    """`pair_loss_finish` without the dispatcher."""

    @staticmethod
    def forward(ctx, policy: Tensor, errors: PairTensors, spec: LossSpec):
        loss, stats = ops.launch_finish(errors, spec)
        ops.keep_for_gradient(ctx, policy, errors.target, stats, spec.safeguard)
        ctx.mask = errors.mask
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, grad_stats):
        return (
            ops.policy_gradient(ctx, grad_loss, grad_stats, _eager_backward(ctx.mask)),
            None,
            None,
        )


def _side_gradients(ctx, target: Tensor, target_loser: Tensor, slopes: Any, given: Any) -> tuple:
    """The gradients of what was given: of one tensor of both sides, or of each side's."""
    if torch.is_grad_enabled():  # under create_graph
        ops.refuse_double_backward()
    sides = alike(*split(given[0] if len(given) == 1 else tuple(given), ctx.layout))
    if len(given) == 1:
        grads = (torch.empty_like(given[0]),)
        outputs = split(grads[0], ctx.layout)
    else:
        grads = outputs = tuple(torch.empty_like(side) for side in sides)
    loser_target = target if ctx.shared else target_loser
    winners, losers = (sides[0], target, outputs[0]), (sides[1], loser_target, outputs[1])
    ops.launch_gradients(winners, losers, *slopes, ctx.mask)
    return grads


class _EagerSides(torch.autograd.Function):
    """The loss of winners and losers that are read where they lie, `given` as one tensor or two."""

    @staticmethod
    def forward(ctx, tensors: PairTensors, call: _SidesCall, *given: Tensor):
        spec, losers = call.spec, tensors.losers
        assert losers is not None
        if call.reduce is None:
            loss, stats = ops.launch_forward(tensors, spec, traced=False)
        else:
            loss, stats = ops.launch_finish(_reduced(tensors, spec, call.reduce), spec)
        ctx.layout, ctx.shared, ctx.mask = call.layout, losers[-1] is tensors.target, tensors.mask
        ctx.behind = int(spec.safeguard is not None)
        ctx.save_for_backward(*given, tensors.target, losers[-1], stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, grad_stats):
        *given, target, target_loser, stats = ctx.saved_tensors
        if grad_loss is None and grad_stats is None:
            return None, None, *(None for _ in given)
        n_rows = sum(map(len, given))
        coefficients = stats.narrow(0, stats.shape[0] - ctx.behind - n_rows, n_rows)
        slopes = ops.slopes(coefficients, grad_loss, grad_stats)
        return None, None, *_side_gradients(ctx, target, target_loser, slopes, given)


class _EagerSideErrors(torch.autograd.Function):
    """The errors of sides that are read where they lie."""

    @staticmethod
    def forward(ctx, tensors: PairTensors, layout: Layout, *given: Tensor):
        assert tensors.losers is not None
        ctx.layout, ctx.shared = layout, tensors.losers[-1] is tensors.target
        ctx.mask = tensors.mask
        ctx.save_for_backward(*given, tensors.target, tensors.losers[-1])
        return ops.launch_partials(tensors, ops.ERRORS_ALONE, traced=False)

    @staticmethod
    def backward(ctx, grad_errors):
        *given, target, target_loser = ctx.saved_tensors
        slopes = (grad_errors.contiguous(), None)
        return None, None, *_side_gradients(ctx, target, target_loser, slopes, given)


@dataclass(frozen=True)
class _SidesCall:
    """What is asked of `_EagerSides`."""

    spec: LossSpec
    reduce: Reduce | None
    layout: Layout


class _EagerErrors(torch.autograd.Function):
    """`pair_errors_fwd` without the dispatcher."""

    @staticmethod
    def forward(ctx, policy: Tensor, target: Tensor, mask: Tensor | None):
        ctx.save_for_backward(policy, target)
        ctx.mask = mask
        read = PairTensors(policy, target, mask=mask)
        return ops.launch_partials(read, ops.ERRORS_ALONE, traced=False)

    @staticmethod
    def backward(ctx, grad_errors):
        return ops.errors_gradient(ctx, grad_errors, _eager_backward(ctx.mask)), None, None


def _adaptive_fields(adaptive: Adaptive | None) -> tuple[Any, ...]:
    """The last arguments of the schemas of `pair_loss_fwd` and `pair_loss_finish`."""
    if adaptive is None:
        return None, None, None, 0.0, 0.0, 0.0, 0.0, 0.0
    return (
        adaptive.normalize,
        adaptive.weight_kind,
        adaptive.margin_kind,
        adaptive.rho,
        adaptive.weight_scale,
        adaptive.weight_intercept,
        adaptive.shift_scale,
        adaptive.beta,
    )


def is_traced(policy: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(policy) not in (Tensor, torch.nn.Parameter)


def _constant(t: Tensor | None) -> Any:
    """A constant that wants a gradient would make an operator's loss want one."""
    return t.detach() if t is not None and t.requires_grad else t


def _loss_of(policy: Tensor, tensors: PairTensors, spec: LossSpec) -> PairLoss:
    if not is_traced(policy):
        loss, stats = _EagerLoss.apply(policy, tensors, spec)
        return _named(loss, stats, tensors, spec)
    loss, stats = ops.pair_loss_fwd(
        policy,
        tensors.target,
        _constant(tensors.reference),
        [_constant(a) for a in tensors.annotators],
        _constant(tensors.minority),
        _constant(tensors.statistics),
        _constant(tensors.pair_weight),
        spec.objective,
        list(spec.options),
        spec.safeguard,
        *_adaptive_fields(spec.adaptive),
        tensors.beta,
        spec.sft_weight,
        spec.per_pair,
    )
    return _named(loss, stats, tensors, spec)


def _loss_of_sums(policy: Tensor, errors: PairTensors, spec: LossSpec) -> PairLoss:
    if not is_traced(policy):
        loss, stats = _EagerFinish.apply(policy, errors, spec)
        return _named(loss, stats, errors, spec)
    assert errors.statistics is not None, "the sums of all processes"
    loss, stats = ops.pair_loss_finish(
        policy,
        errors.target,
        errors.policy,
        _constant(errors.reference),
        [_constant(a) for a in errors.annotators],
        _constant(errors.minority),
        errors.statistics,
        _constant(errors.pair_weight),
        spec.objective,
        list(spec.options),
        spec.safeguard,
        *_adaptive_fields(spec.adaptive),
        errors.beta,
        spec.sft_weight,
        spec.per_pair,
    )
    return _named(loss, stats, errors, spec)


def _named(loss: Tensor, stats: Tensor, tensors: PairTensors, spec: LossSpec) -> PairLoss:
    """Views of `stats`."""
    adaptive = spec.adaptive is not None
    weighted = adaptive or tensors.pair_weight is not None
    guarded = spec.safeguard is not None
    layout = StatsLayout(tensors.n_pairs, len(tensors.sources), guarded)
    constant = stats.detach()
    return PairLoss(
        loss,
        layout.margin.of(stats),
        layout.errors(0).of(stats),
        None if tensors.reference is None else layout.errors(1).of(constant),
        layout.minority.of(constant) if adaptive else None,
        layout.weight.of(constant) if weighted else None,
        layout.safeguard.of(constant)[0] if guarded else None,
    )


def pair_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None = None) -> PairLoss:
    """The loss in one launch, or in two with `reduce` between them; see `api.pair_loss`."""
    if tensors.mask is not None and is_traced(tensors.policy):
        tensors = masked(tensors)
    policy = tensors.policy
    if reduce is None:
        return _loss_of(policy, tensors, spec)
    return _loss_of_sums(policy, _reduced(tensors, spec, reduce), spec)


def _reduced(tensors: PairTensors, spec: LossSpec, reduce: Reduce) -> PairTensors:
    """Errors in place of predictions, and the sums of all processes as `statistics`."""
    policy = tensors.policy
    adaptive, guarded = spec.adaptive is not None, spec.safeguard is not None
    with torch.no_grad():
        if is_traced(policy):
            partials = ops.pair_loss_partials(
                policy,
                tensors.target,
                _constant(tensors.reference),
                [_constant(a) for a in tensors.annotators],
                spec.objective,
                adaptive,
                guarded,
            )
        else:
            read = replace(tensors, minority=None, statistics=None, pair_weight=None, beta=None)
            partials = ops.launch_partials(read, spec, traced=False)
    n_annotators = len(tensors.annotators)
    first = len(tensors.sources) - n_annotators
    layout = PartialsLayout(tensors.n_pairs, first + n_annotators, spec.n_sums(n_annotators))
    sums = layout.sums.of(partials)
    return replace(
        tensors,
        policy=layout.errors(0).of(partials),
        reference=None if tensors.reference is None else layout.errors(1).of(partials),
        annotators=[layout.errors(first + k).of(partials) for k in range(n_annotators)],
        losers=None,
        statistics=check_reduced(reduce(sums), sums),
    )


def pair_errors(policy: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of every row in one launch."""
    if not is_traced(policy):
        return _EagerErrors.apply(policy, target, mask)
    if mask is not None:
        read = masked(PairTensors(policy, target, mask=mask))
        policy, target = read.policy, read.target
    return ops.pair_errors_fwd(policy, target)


def masked(tensors: PairTensors) -> PairTensors:
    """Predictions and targets times the mask's root, for operators, which take no mask."""
    assert tensors.mask is not None
    root = tensors.mask.sqrt()

    def scaled(t: Tensor) -> Tensor:
        if t.ndim == 1:
            return t
        both = torch.cat([root, root]) if len(root) < len(t) else root
        return (t if len(t) == len(both) else torch.cat([t, t])) * both

    return replace(
        tensors,
        policy=scaled(tensors.policy),
        target=scaled(tensors.target),
        reference=None if tensors.reference is None else scaled(tensors.reference),
        annotators=[scaled(a) for a in tensors.annotators],
        mask=None,
    )


def _parts(given: Given) -> tuple[Tensor, ...]:
    return tuple(given) if isinstance(given, tuple) else (given,)


def sides_loss(
    tensors: PairTensors, given: Given, layout: Layout, spec: LossSpec, reduce: Reduce | None
) -> PairLoss:
    """`pair_loss` where `tensors` has `losers`; `given` is the policy as it was handed over."""
    call = _SidesCall(spec, reduce, layout)
    loss, stats = _EagerSides.apply(tensors, call, *_parts(given))
    return _named(loss, stats, tensors, spec)


def sides_errors(tensors: PairTensors, given: Given, layout: Layout) -> Tensor:
    """`pair_errors` where `tensors` has `losers`."""
    return _EagerSideErrors.apply(tensors, layout, *_parts(given))
