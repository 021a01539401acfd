"""KTO on images that are labeled one by one, without partners: what `kto(labels=)` runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo_kernels.pair_loss import Given, Impl, PairLoss, Reduce, Reduction, pair_errors
from fastpo_kernels.pair_loss.objectives import sigmoid
from fastpo_kernels.pair_loss.validate import (
    check_reduce_alone,
    check_reduced,
    check_reduction,
    check_vector,
)


@dataclass(frozen=True)
class Likes:
    """How N labeled images are judged.

    Attributes:
        labels: `[N]`, truth values, or numbers of which the positive ones are likes.
        liked: weight of the liked ones' terms.
        disliked: of the others'.
        weight: `[N]`, of each image, or None.
        baseline: z0, `[1]`, or None: the batch's mean gain, not below zero.
        reduce: forms it over all processes from `sum g | images`.
        reduction: `mean` or `none`.
        mask: `[N, *dims]`, or None; as in `pair_errors`.
    """

    labels: Tensor
    liked: float
    disliked: float
    weight: Tensor | None
    baseline: Tensor | None
    reduce: Reduce | None
    reduction: Reduction
    mask: Given | None


def kto_of_images(
    policy: Tensor, reference: Tensor, target: Tensor, beta: Tensor | float, likes: Likes,
    impl: Impl | None,
) -> PairLoss:  # fmt: skip
    """Mean of `w (1 - sigmoid(s beta (g - z0)))`, `s` being 1 of a like and -1 of a dislike."""
    check_reduction(likes.reduction)
    _check(policy, reference, target, likes)
    errors = pair_errors(policy, target, mask=likes.mask, impl=impl)
    with torch.no_grad():
        known = reference.to(errors.dtype)
        if reference.ndim > 1:
            known = pair_errors(reference, target, mask=likes.mask, impl=impl)
    gain = known - errors
    baseline = _baseline(gain.detach(), likes)
    liked = likes.labels if likes.labels.dtype == torch.bool else likes.labels > 0
    if isinstance(beta, Tensor) and beta.ndim:
        check_vector("beta", beta, len(policy), policy)
        beta = beta.to(errors.dtype)
    values = beta * (gain - baseline)
    losses = sigmoid(torch.where(liked, -values, values))
    weight = None
    if (likes.liked, likes.disliked) != (1, 1) or likes.weight is not None:
        weight = torch.where(liked, float(likes.liked), float(likes.disliked)).to(errors.dtype)
        if likes.weight is not None:
            weight = weight * likes.weight.detach()
        losses = weight * losses
    loss = losses if likes.reduction == "none" else losses.mean()
    return PairLoss(loss, gain, errors, known, None, weight)


def _baseline(gain: Tensor, likes: Likes) -> Tensor:
    if likes.baseline is not None:
        return likes.baseline.to(gain.dtype)
    if likes.reduce is None:
        return gain.mean().clamp(min=0)
    own = torch.stack([gain.sum(), torch.full_like(gain[0], len(gain))])
    total, count = check_reduced(likes.reduce(own), own)
    return (total / count).clamp(min=0)


def _check(policy: Tensor, reference: Tensor, target: Tensor, likes: Likes) -> None:
    parts = {"policy": policy, "reference": reference, "target": target, "labels": likes.labels}
    for name, part in parts.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"with labels {name} must be a tensor, got {type(part).__name__}")
    n_images = policy.shape[:1].numel()
    if likes.labels.shape != (n_images,):
        raise ValueError(f"labels must be [{n_images}], got {tuple(likes.labels.shape)}")
    if target.shape != policy.shape:
        raise ValueError(
            f"with labels target must have policy's shape {tuple(policy.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if reference.shape not in (policy.shape, (n_images,)):
        raise ValueError(
            f"with labels reference must have policy's shape {tuple(policy.shape)}, or be errors "
            f"[{n_images}]; got {tuple(reference.shape)}"
        )
    if likes.weight is not None:
        check_vector("pair_weight", likes.weight, n_images, policy)
    check_reduce_alone(likes.baseline, likes.reduce)
