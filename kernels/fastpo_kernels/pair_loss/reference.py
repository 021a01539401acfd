"""Eager oracle of the pair losses: torch only, any device, float64-capable.

Its reduction is the plain one; objectives and epilogue are those of the modules of these names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo_kernels.pair_loss.epilogue import PairErrors, from_errors, mean_squares, residual
from fastpo_kernels.pair_loss.spec import LossSpec, PairLoss, PairTensors, Reduce


def pair_errors(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over every dimension but the first of `mask (pred - target)**2`: `[2B]`."""
    return mean_squares(pred, target, mask).flatten()


def _errors_of(source: Tensor, target: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    source = source.detach()
    return (source if source.ndim == 1 else pair_errors(source, target, mask)).to(dtype)


def pair_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None = None) -> PairLoss:
    """`loss = mean_i weight_i * objective(d, e, r)_i`; see `api.pair_loss`."""
    target = tensors.target.detach()
    errors, mask = mean_squares(tensors.policy, target, tensors.mask), tensors.mask
    judged = [_errors_of(s, target, mask, errors.dtype).view_as(errors) for s in tensors.judges]
    reference = None if tensors.reference is None else judged.pop(0)
    dot = None
    if spec.safeguard is not None:
        winner, loser = residual(tensors.policy.detach(), target)
        dot = (winner * loser).flatten(1).mean(1)
    return from_errors(PairErrors(errors, reference, judged, dot), tensors, spec, reduce)
