"""The pair losses as custom operators: schema, fake implementation, autograd. Torch only.

Tracing goes through them; eager calls go round them (`fused.py`). Only here are a loss's options
flat, as schemas want them.

`gpu/launch.py` is imported inside, when an operator first runs on data: importing Triton costs a
second, and CPU users, tracing and documentation tools need none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo_kernels.pair_loss.spec import (
    Adaptive,
    LossSpec,
    PairTensors,
    PartialsLayout,
    StatsLayout,
)

# Where `safeguard` stands among the operators' arguments.
_SAFEGUARD, _FINISH_SAFEGUARD = 9, 10
# A pass that stops at the errors: sft's pairs do not depend on the batch.
ERRORS_ALONE = LossSpec("sft")


def _n_sources(reference: Tensor | None, annotators: Sequence[Tensor]) -> int:
    return 1 + (reference is not None) + len(annotators)


def _fake_results(
    policy: Tensor,
    reference: Tensor | None,
    annotators: Sequence[Tensor],
    safeguard: float | None,
    per_pair: bool,
):
    n_pairs = policy.shape[0] // 2
    layout = StatsLayout(n_pairs, _n_sources(reference, annotators), safeguard is not None)
    return (
        policy.new_empty((n_pairs,) if per_pair else (), dtype=torch.float32),
        policy.new_empty(layout.size, dtype=torch.float32),
    )


@torch.library.custom_op("fastpo::pair_loss_fwd", mutates_args=())
def pair_loss_fwd(
    policy: Tensor,
    target: Tensor,
    reference: Tensor | None,
    annotators: Sequence[Tensor],
    minority: Tensor | None,
    statistics: Tensor | None,
    pair_weight: Tensor | None,
    objective: str,
    options: Sequence[float],
    safeguard: float | None,
    normalize: str | None,
    weight_kind: str | None,
    margin_kind: str | None,
    rho: float,
    weight_scale: float,
    weight_intercept: float,
    shift_scale: float,
    margin_beta: float,
    beta: Tensor | None,
    sft_weight: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor]:
    """Loss `[]` and the vector of `StatsLayout`, both float32; without `normalize` not adaptive."""
    adaptive = None
    if normalize is not None:
        adaptive = Adaptive(
            beta=margin_beta,
            normalize=normalize,  # pyright: ignore[reportArgumentType]
            rho=rho,
            weight_kind=weight_kind,  # pyright: ignore[reportArgumentType]
            weight_scale=weight_scale,
            weight_intercept=weight_intercept,
            margin_kind=margin_kind,  # pyright: ignore[reportArgumentType]
            shift_scale=shift_scale,
        )
    tensors = PairTensors(
        policy, target, reference, annotators, minority, statistics, pair_weight, beta
    )
    spec = LossSpec(objective, tuple(options), adaptive, safeguard, sft_weight, per_pair)
    return launch_forward(tensors, spec, traced=True)


def launch_forward(tensors: PairTensors, spec: LossSpec, *, traced: bool) -> tuple[Tensor, Tensor]:
    """The launcher; `traced` where an operator's memory may be a CUDA graph's pool."""
    from fastpo_kernels.pair_loss.gpu import launch

    ticket = launch.ticket(tensors.policy.device, fresh=traced)
    return launch.launch_forward(tensors, spec, ticket)


@pair_loss_fwd.register_fake
def _(policy, target, reference, annotators, *others: Any):
    return _fake_results(policy, reference, annotators, others[_SAFEGUARD - 4], others[-1])


@torch.library.custom_op("fastpo::pair_loss_partials", mutates_args=())
def pair_loss_partials(
    policy: Tensor,
    target: Tensor,
    reference: Tensor | None,
    annotators: Sequence[Tensor],
    objective: str,
    adaptive: bool,
    safeguard: bool,
) -> Tensor:
    """The vector of `PartialsLayout`: errors of every source, and this batch's sums."""
    spec = _sums_alone(objective, adaptive=adaptive, safeguard=safeguard)
    return launch_partials(PairTensors(policy, target, reference, annotators), spec, traced=True)


def _sums_alone(objective: str, *, adaptive: bool, safeguard: bool) -> LossSpec:
    """An objective whose sums are those of the one asked for, and whose numbers nobody reads."""
    judged = Adaptive(beta=1.0) if adaptive else None
    return LossSpec(objective, (), judged, 0.0 if safeguard else None)


def launch_partials(tensors: PairTensors, spec: LossSpec, *, traced: bool) -> Tensor:
    """The launcher; `traced` as in `launch_forward`."""
    from fastpo_kernels.pair_loss.gpu import launch

    ticket = launch.ticket(tensors.policy.device, fresh=traced)
    return launch.launch_partials(tensors, spec, ticket)


@pair_loss_partials.register_fake
def _(policy, target, reference, annotators, objective, adaptive, safeguard):
    n_sums = _sums_alone(objective, adaptive=adaptive, safeguard=safeguard).n_sums(len(annotators))
    n_sources = _n_sources(reference, annotators)
    layout = PartialsLayout(policy.shape[0] // 2, n_sources, n_sums)
    return policy.new_empty(layout.size, dtype=torch.float32)


@torch.library.custom_op("fastpo::pair_loss_finish", mutates_args=())
def pair_loss_finish(
    policy: Tensor,
    target: Tensor,
    policy_error: Tensor,
    reference_error: Tensor | None,
    annotator_errors: Sequence[Tensor],
    minority: Tensor | None,
    sums: Tensor,
    pair_weight: Tensor | None,
    objective: str,
    options: Sequence[float],
    safeguard: float | None,
    normalize: str | None,
    weight_kind: str | None,
    margin_kind: str | None,
    rho: float,
    weight_scale: float,
    weight_intercept: float,
    shift_scale: float,
    margin_beta: float,
    beta: Tensor | None,
    sft_weight: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor]:
    """`pair_loss_fwd` from errors `[2B]` and the sums of all processes.

    Policy and target are read by the gradient alone.
    """
    adaptive = None
    if normalize is not None:
        adaptive = Adaptive(
            beta=margin_beta,
            normalize=normalize,  # pyright: ignore[reportArgumentType]
            rho=rho,
            weight_kind=weight_kind,  # pyright: ignore[reportArgumentType]
            weight_scale=weight_scale,
            weight_intercept=weight_intercept,
            margin_kind=margin_kind,  # pyright: ignore[reportArgumentType]
            shift_scale=shift_scale,
        )
    errors = PairTensors(
        policy_error, target, reference_error, annotator_errors, minority, sums, pair_weight, beta
    )
    spec = LossSpec(objective, tuple(options), adaptive, safeguard, sft_weight, per_pair)
    return launch_finish(errors, spec)


def launch_finish(errors: PairTensors, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """The launcher; `errors` as there."""
    from fastpo_kernels.pair_loss.gpu import launch

    return launch.launch_finish(errors, spec)


@pair_loss_finish.register_fake
def _(policy, target, policy_error, reference_error, annotator_errors, *others: Any):
    guard = others[_FINISH_SAFEGUARD - 5]
    return _fake_results(policy, reference_error, annotator_errors, guard, others[-1])


@torch.library.custom_op("fastpo::pair_loss_bwd", mutates_args=())
def pair_loss_bwd(
    policy: Tensor, target: Tensor, coefficients: Tensor, grad_loss: Tensor | None
) -> Tensor:
    """`grad_loss * dloss/de * 2/N * (policy - target)`; `coefficients` is dloss/de, `[2B]`."""
    return launch_backward(policy, target, coefficients, grad_loss)


def launch_backward(
    policy: Tensor,
    target: Tensor,
    coefficients: Tensor,
    grad_loss: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """The launcher."""
    from fastpo_kernels.pair_loss.gpu import launch

    return launch.launch_backward(policy, target, coefficients, grad_loss, mask)


def launch_gradients(winners: Any, losers: Any, *others: Any) -> None:
    """The launcher."""
    from fastpo_kernels.pair_loss.gpu import launch

    launch.launch_gradients(winners, losers, *others)


@pair_loss_bwd.register_fake
def _(policy, *_: Any):
    return torch.empty_like(policy)


@torch.library.custom_op("fastpo::pair_errors_fwd", mutates_args=())
def pair_errors_fwd(policy: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every row, `[2B]` float32."""
    return launch_partials(PairTensors(policy, target), ERRORS_ALONE, traced=True)


@pair_errors_fwd.register_fake
def _(policy, target):
    return policy.new_empty(policy.shape[0], dtype=torch.float32)


def _no_grads(inputs: Sequence[Any]) -> list[Any]:
    """A gradient has its input's structure, and an empty list counts as one of no tensors."""
    lists = [isinstance(x, (list, tuple)) and all(isinstance(t, Tensor) for t in x) for x in inputs]
    return [[None] * len(x) if is_list else None for x, is_list in zip(inputs, lists, strict=True)]


def keep_for_gradient(
    ctx, policy: Tensor, target: Tensor, stats: Tensor, safeguard: float | None
) -> None:
    """What the gradient reads; `stats` is `StatsLayout`'s vector."""
    ctx.behind = int(safeguard is not None)  # numbers behind the coefficients
    ctx.save_for_backward(policy, target, stats)
    ctx.set_materialize_grads(False)


def _loss_context(ctx, inputs, output) -> None:
    ctx.no_grads = _no_grads(inputs[1:])
    keep_for_gradient(ctx, inputs[0], inputs[1], output[1], inputs[_SAFEGUARD])


def _finish_context(ctx, inputs, output) -> None:
    ctx.no_grads = _no_grads(inputs[1:])
    keep_for_gradient(ctx, inputs[0], inputs[1], output[1], inputs[_FINISH_SAFEGUARD])


def policy_gradient(ctx, grad_loss, grad_stats, backward):
    """The policy's gradient through `backward`, the operator or its launcher.

    Of `stats`, margin and policy's errors hand theirs on: a row's error has one slope in the end.
    """
    unused = grad_loss is None and grad_stats is None
    if unused or not ctx.needs_input_grad[0]:
        return None
    policy, target, stats = ctx.saved_tensors
    n_rows = policy.shape[0]
    coefficients = stats.narrow(0, stats.shape[0] - ctx.behind - n_rows, n_rows)
    return backward(policy, target, *slopes(coefficients, grad_loss, grad_stats))


def slopes(
    coefficients: Tensor, grad_loss: Tensor | None, grad_stats: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What multiplies each row's error, and a number on the device that multiplies all, or None."""
    n_rows = len(coefficients)
    if grad_loss is not None and grad_loss.ndim:
        grad_loss = torch.cat([grad_loss, grad_loss])
        if grad_stats is None:
            return grad_loss * coefficients, None
    if grad_stats is None:
        return coefficients, grad_loss
    by_margin, by_errors = grad_stats[: 3 * n_rows // 2].split([n_rows // 2, n_rows])
    found = by_errors + torch.cat([-by_margin, by_margin])
    return (found if grad_loss is None else found + grad_loss * coefficients), None


def _loss_backward(ctx, grad_loss, grad_stats):
    return policy_gradient(ctx, grad_loss, grad_stats, pair_loss_bwd), *ctx.no_grads


def _errors_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def errors_gradient(ctx, grad_errors, backward):
    """The policy's gradient where the errors' is given."""
    policy, target = ctx.saved_tensors
    return backward(policy, target, grad_errors.contiguous(), None)


def _errors_backward(ctx, grad_errors):
    return errors_gradient(ctx, grad_errors, pair_loss_bwd), None


def _no_context(ctx, inputs, output) -> None:
    pass


def refuse_double_backward() -> None:
    """Raises `NotImplementedError`."""
    raise NotImplementedError(
        "the pair losses' triton implementation is differentiable once; "
        "use impl='reference' for higher derivatives"
    )


def _no_double_backward(ctx, grad):
    refuse_double_backward()


pair_loss_fwd.register_autograd(_loss_backward, setup_context=_loss_context)
pair_loss_finish.register_autograd(_loss_backward, setup_context=_finish_context)
pair_errors_fwd.register_autograd(_errors_backward, setup_context=_errors_context)
pair_loss_bwd.register_autograd(_no_double_backward, setup_context=_no_context)
