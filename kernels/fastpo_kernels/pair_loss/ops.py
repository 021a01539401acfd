"""The pair losses as custom operators: schema, fake implementation, autograd. Torch only.

`kernel.py` is imported inside the operators, when one first runs on data: importing Triton costs a
second, and CPU users, tracing and documentation tools need none of it.

`stats` is one float32 vector, so that a step allocates once:
`margin [B] | errors [S, 2B]: policy, reference, annotators | minority [B] | weight [B] | dloss/de
[2B]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stats_size(n_pairs: int, n_sources: int) -> int:
    """Length of `stats`."""
    return (5 + 2 * n_sources) * n_pairs


def _sources(policy: Tensor, reference: Tensor | None, annotators: Sequence[Tensor]):
    return [policy, *annotators] if reference is None else [policy, reference, *annotators]


@torch.library.custom_op("fastpo::pair_loss_fwd", mutates_args=())
def pair_loss_fwd(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    annotators: Sequence[Tensor],
    minority: Tensor | None,
    statistics: Tensor | None,
    pair_weight: Tensor | None,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: str,
    adaptive_scalars: Sequence[float],
    safeguard: float | None,
) -> tuple[Tensor, Tensor]:
    """Loss `[]` and `stats`, both float32. `adaptive_*` are empty without adaptive weights."""
    from fastpo_kernels.pair_loss import kernel

    sources = _sources(policy, reference, annotators)
    n_pairs = policy.shape[0] // 2
    loss = torch.empty((), dtype=torch.float32, device=policy.device)
    size = stats_size(n_pairs, len(sources))
    stats = torch.empty(size, dtype=torch.float32, device=policy.device)
    kernel.launch_forward(
        sources, target, minority, statistics, pair_weight, loss, stats,
        objective, options, adaptive_kinds.split(), adaptive_scalars, reference is not None,
    safeguard, )  # fmt: skip
    return loss, stats


@pair_loss_fwd.register_fake
def _(policy, reference, target, annotators, *_: Any):
    size = stats_size(policy.shape[0] // 2, len(_sources(policy, reference, annotators)))
    return (
        policy.new_empty((), dtype=torch.float32),
        policy.new_empty(size, dtype=torch.float32),
    )


@torch.library.custom_op("fastpo::pair_loss_bwd", mutates_args=())
def pair_loss_bwd(
    policy: Tensor, target: Tensor, coefficients: Tensor, grad_loss: Tensor | None
) -> Tensor:
    """`grad_loss * dloss/de * 2/N * (policy - target)`; `coefficients` is dloss/de, `[2B]`."""
    from fastpo_kernels.pair_loss import kernel

    return kernel.launch_backward(policy, target, coefficients, grad_loss)


@pair_loss_bwd.register_fake
def _(policy, target, coefficients, grad_loss):
    return torch.empty_like(policy)


@torch.library.custom_op("fastpo::pair_errors_fwd", mutates_args=())
def pair_errors_fwd(policy: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every row, `[2B]` float32."""
    from fastpo_kernels.pair_loss import kernel

    errors = torch.empty(policy.shape[0], dtype=torch.float32, device=policy.device)
    kernel.launch_forward(
        [policy], target, None, None, None, None, errors, None, (0.0,), (), (), False, None
    )
    return errors


@pair_errors_fwd.register_fake
def _(policy, target):
    return policy.new_empty(policy.shape[0], dtype=torch.float32)


def _loss_context(ctx, inputs, output) -> None:
    policy, _, target, annotators = inputs[:4]
    _, stats = output
    # A gradient has its input's structure, and an empty list counts as one of no tensors.
    ctx.no_grads = [
        [None] * len(x) if x is annotators or (isinstance(x, list) and not x) else None
        for x in inputs[1:]
    ]
    ctx.save_for_backward(policy, target, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad_loss, _):
    policy, target, stats = ctx.saved_tensors
    grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        coefficients = stats.narrow(0, stats.shape[0] - policy.shape[0], policy.shape[0])
        grad = pair_loss_bwd(policy, target, coefficients, grad_loss)
    return grad, *ctx.no_grads


def _errors_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _errors_backward(ctx, grad_errors):
    policy, target = ctx.saved_tensors
    return pair_loss_bwd(policy, target, grad_errors.contiguous(), None), None


def _no_context(ctx, inputs, output) -> None:
    return None


def _no_double_backward(ctx, grad):
    raise NotImplementedError(
        "the pair losses' triton implementation is differentiable once; "
        "use impl='reference' for higher derivatives"
    )


pair_loss_fwd.register_autograd(_loss_backward, setup_context=_loss_context)
pair_errors_fwd.register_autograd(_errors_backward, setup_context=_errors_context)
pair_loss_bwd.register_autograd(_no_double_backward, setup_context=_no_context)
