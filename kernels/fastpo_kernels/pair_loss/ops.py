"""The pair losses as custom operators: schema, fake implementation, autograd. Torch only.

Eager calls go round the operators, through plain `autograd.Function`s over the same launchers: at
this size a loss costs what its host work costs. Forward and backward took 335 us through the
operators, 89 through a Function (one CPU core, launchers stubbed out, torch 2.13). Tracing goes
through the operators.

`launch.py` is imported inside the operators, when one first runs on data: importing Triton costs a
second, and CPU users, tracing and documentation tools need none of it.

A target is `pair_target.PairTarget.encode()`: tensors, a word list that names them, three numbers.

`stats` is one float32 vector, so that a step allocates once:
`margin [B] | errors of policy, reference, annotators [S, 2B] | minority [B] | weight [B] |
dloss/de [2B]`.

Where statistics span processes, `pair_loss_partials` gives the errors `[S, 2B]` and this batch's
sums, and `pair_loss_fwd` goes on from them:
`sum g (KTO) | sum d, sum d_m**2 of every annotator m (adaptive) | sum e_w, sum <residuals> / N
(safeguard) | pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stats_size(n_pairs: int, n_sources: int) -> int:
    """Length of `stats`."""
    return (5 + 2 * n_sources) * n_pairs


def n_sums(n_annotators: int, objective: str, adaptive: bool, safeguard: bool) -> int:
    """Length of the batch's sums, 0 where the objective has no batch statistics."""
    n = (2 + n_annotators if adaptive else objective == "kto") + (2 if safeguard else 0)
    return n + 1 if n else 0


def _sources(policy: Tensor, reference: Tensor | None, annotators: Sequence[Tensor]):
    return [policy, *annotators] if reference is None else [policy, reference, *annotators]


def _forward(
    policy: Tensor,
    reference: Tensor | None,
    target: Sequence[Tensor],
    target_kind: str,
    target_scalars: Sequence[float],
    annotators: Sequence[Tensor],
    minority: Tensor | None,
    statistics: Tensor | None,
    pair_weight: Tensor | None,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: str,
    adaptive_scalars: Sequence[float],
    safeguard: float | None,
    policy_error: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss `[]` and `stats`, both float32. `adaptive_*` are empty without adaptive weights.

    With `policy_error` `[2B]` reference and annotators are errors too, `statistics` are sums, and
    no prediction is read.
    """
    return _launch_forward(
        True, policy, reference, target, target_kind, target_scalars, annotators, minority,
        statistics, pair_weight, objective, options, adaptive_kinds, adaptive_scalars, safeguard,
        policy_error,
    )  # fmt: skip


def _launch_forward(
    traced, policy, reference, target, target_kind, target_scalars, annotators, minority,
    statistics, pair_weight, objective, options, adaptive_kinds, adaptive_scalars, safeguard,
    policy_error,
):  # fmt: skip
    """`pair_loss_fwd`; `traced` where an operator's memory may be a CUDA graph's pool."""
    from fastpo_kernels.pair_loss.gpu import launch

    first = policy if policy_error is None else policy_error
    sources = _sources(first, reference, annotators)
    n_pairs = policy.shape[0] // 2
    loss = torch.empty((), dtype=torch.float32, device=policy.device)
    size = stats_size(n_pairs, len(sources))
    stats = torch.empty(size, dtype=torch.float32, device=policy.device)
    if policy_error is not None:
        launch.launch_finish(
            sources, minority, statistics, pair_weight, loss, stats, objective, options,
            adaptive_kinds.split(), adaptive_scalars, reference is not None, safeguard,
        )  # fmt: skip
        return loss, stats
    launch.launch_forward(
        sources, (target, target_kind, target_scalars), minority, statistics, pair_weight, loss,
        stats,
        objective, options, adaptive_kinds.split(), adaptive_scalars, reference is not None,
        safeguard, launch.ticket(policy.device, fresh=traced),
    )  # fmt: skip
    return loss, stats


pair_loss_fwd = torch.library.custom_op("fastpo::pair_loss_fwd", _forward, mutates_args=())


@pair_loss_fwd.register_fake
def _(policy, reference, target, target_kind, target_scalars, annotators, *_: Any):
    size = stats_size(policy.shape[0] // 2, len(_sources(policy, reference, annotators)))
    return (
        policy.new_empty((), dtype=torch.float32),
        policy.new_empty(size, dtype=torch.float32),
    )


def _partials(
    policy: Tensor,
    reference: Tensor | None,
    target: Sequence[Tensor],
    target_kind: str,
    target_scalars: Sequence[float],
    annotators: Sequence[Tensor],
    objective: str,
    adaptive_kinds: str,
    safeguard: float | None,
) -> Tensor:
    """Errors of policy, reference and annotators `[S, 2B]`, flat, and this batch's sums."""
    return _launch_partials(
        True, policy, reference, target, target_kind, target_scalars, annotators, objective,
        adaptive_kinds, safeguard,
    )  # fmt: skip


def _launch_partials(
    traced, policy, reference, target, target_kind, target_scalars, annotators, objective,
    adaptive_kinds, safeguard,
):  # fmt: skip
    from fastpo_kernels.pair_loss.gpu import launch

    sources = _sources(policy, reference, annotators)
    size = _partials_size(sources, annotators, objective, adaptive_kinds, safeguard)
    results = torch.empty(size, dtype=torch.float32, device=policy.device)
    launch.launch_forward(
        sources, (target, target_kind, target_scalars), None, None, None, None, results,
        objective, (0.0,), adaptive_kinds.split(), (), reference is not None, safeguard,
        launch.ticket(policy.device, fresh=traced),
    )  # fmt: skip
    return results


def _partials_size(sources, annotators, objective, adaptive_kinds, safeguard):
    sums = n_sums(len(annotators), objective, bool(adaptive_kinds), safeguard is not None)
    return len(sources) * sources[0].shape[0] + sums


pair_loss_partials = torch.library.custom_op(
    "fastpo::pair_loss_partials", _partials, mutates_args=()
)


@pair_loss_partials.register_fake
def _(policy, reference, target, target_kind, target_scalars, annotators, *options):
    size = _partials_size(_sources(policy, reference, annotators), annotators, *options)
    return policy.new_empty(size, dtype=torch.float32)


def _backward(
    policy: Tensor,
    target: Sequence[Tensor],
    target_kind: str,
    target_scalars: Sequence[float],
    coefficients: Tensor,
    grad_loss: Tensor | None,
) -> Tensor:
    """`grad_loss * dloss/de * 2/N * (policy - target)`; `coefficients` is dloss/de, `[2B]`."""
    from fastpo_kernels.pair_loss.gpu import launch

    encoded = (target, target_kind, target_scalars)
    return launch.launch_backward(policy, encoded, coefficients, grad_loss)


pair_loss_bwd = torch.library.custom_op("fastpo::pair_loss_bwd", _backward, mutates_args=())


@pair_loss_bwd.register_fake
def _(policy, *_: Any):
    return torch.empty_like(policy)


def _errors(
    policy: Tensor, target: Sequence[Tensor], target_kind: str, target_scalars: Sequence[float]
) -> Tensor:
    """Mean squared error of every row, `[2B]` float32."""
    return _launch_errors(True, policy, target, target_kind, target_scalars)


def _launch_errors(traced: bool, policy: Tensor, *target: Any) -> Tensor:
    from fastpo_kernels.pair_loss.gpu import launch

    errors = torch.empty(policy.shape[0], dtype=torch.float32, device=policy.device)
    launch.launch_forward(
        [policy], target, None, None, None, None, errors, "sft", (0.0,), (), (), False, None,
        launch.ticket(policy.device, fresh=traced),
    )  # fmt: skip
    return errors


pair_errors_fwd = torch.library.custom_op("fastpo::pair_errors_fwd", _errors, mutates_args=())


@pair_errors_fwd.register_fake
def _(policy, *_: Any):
    return policy.new_empty(policy.shape[0], dtype=torch.float32)


def _save(ctx, policy, target, target_kind, target_scalars, *others: Tensor) -> None:
    ctx.save_for_backward(policy, *others, *target)
    ctx.target_kind, ctx.target_scalars = target_kind, target_scalars


def _no_grads(inputs: Sequence[Any]) -> list[Any]:
    """A gradient has its input's structure, and an empty list counts as one of no tensors."""
    lists = [isinstance(x, (list, tuple)) and all(isinstance(t, Tensor) for t in x) for x in inputs]
    return [[None] * len(x) if is_list else None for x, is_list in zip(inputs, lists, strict=True)]


def _loss_context(ctx, inputs, output) -> None:
    policy, _, *target = inputs[:5]
    _, stats = output
    ctx.no_grads = _no_grads(inputs[1:])
    _save(ctx, policy, *target, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _policy_gradient(ctx, grad_loss, backward):
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None
    policy, stats, *target = ctx.saved_tensors
    coefficients = stats.narrow(0, stats.shape[0] - policy.shape[0], policy.shape[0])
    return backward(policy, target, ctx.target_kind, ctx.target_scalars, coefficients, grad_loss)


def _loss_backward(ctx, grad_loss, _):
    return _policy_gradient(ctx, grad_loss, pair_loss_bwd), *ctx.no_grads


def _errors_context(ctx, inputs, output) -> None:
    ctx.no_grads = _no_grads(inputs[1:])
    _save(ctx, *inputs)


def _errors_gradient(ctx, grad_errors, backward):
    policy, *target = ctx.saved_tensors
    kind, scalars = ctx.target_kind, ctx.target_scalars
    return backward(policy, target, kind, scalars, grad_errors.contiguous(), None)


def _errors_backward(ctx, grad_errors):
    return _errors_gradient(ctx, grad_errors, pair_loss_bwd), *ctx.no_grads


def _no_context(ctx, inputs, output) -> None:
    pass


def _no_double_backward(ctx, grad):
    raise NotImplementedError(
        "the pair losses' triton implementation is differentiable once; "
        "use impl='reference' for higher derivatives"
    )


pair_loss_fwd.register_autograd(_loss_backward, setup_context=_loss_context)
pair_errors_fwd.register_autograd(_errors_backward, setup_context=_errors_context)
pair_loss_bwd.register_autograd(_no_double_backward, setup_context=_no_context)


def _eager_backward():
    # Under create_graph the operator, whose own backward refuses.
    return pair_loss_bwd if torch.is_grad_enabled() else _backward


class _EagerLoss(torch.autograd.Function):
    """`pair_loss_fwd` without the dispatcher."""

    @staticmethod
    def forward(ctx, policy, reference, target, target_kind, target_scalars, *rest):
        encoded = (target, target_kind, target_scalars)
        loss, stats = _launch_forward(False, policy, reference, *encoded, *rest)
        _save(ctx, policy, *encoded, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.n_others = 4 + len(rest)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _):
        return _policy_gradient(ctx, grad_loss, _eager_backward()), *[None] * ctx.n_others


class _EagerErrors(torch.autograd.Function):
    """`pair_errors_fwd` without the dispatcher."""

    @staticmethod
    def forward(ctx, policy, target, target_kind, target_scalars):
        _save(ctx, policy, target, target_kind, target_scalars)
        return _launch_errors(False, policy, target, target_kind, target_scalars)

    @staticmethod
    def backward(ctx, grad_errors):
        return _errors_gradient(ctx, grad_errors, _eager_backward()), None, None, None


def _is_traced(policy: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(policy) not in (Tensor, torch.nn.Parameter)


def pair_loss(policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`pair_loss_fwd`, by the shorter way where nothing traces."""
    return pair_loss_fwd(policy, *rest) if _is_traced(policy) else _EagerLoss.apply(policy, *rest)


def pair_errors(policy: Tensor, *target: Any) -> Tensor:
    """`pair_errors_fwd`, by the shorter way where nothing traces."""
    if _is_traced(policy):
        return pair_errors_fwd(policy, *target)
    return _EagerErrors.apply(policy, *target)


def pair_partials(policy: Tensor, *rest: Any) -> Tensor:
    """`pair_loss_partials`, by the shorter way where nothing traces."""
    if _is_traced(policy):
        return pair_loss_partials(policy, *rest)
    return _launch_partials(False, policy, *rest)
