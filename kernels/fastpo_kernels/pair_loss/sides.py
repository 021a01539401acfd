"""Winners and losers that do not lie as the two halves of one tensor: read where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastpo_kernels.pair_loss.spec import Layout, PairTensors

Given = Tensor | tuple[Tensor, Tensor]


def whole(name: str, given: Given) -> Tensor:
    """A tensor of both sides' rows for the checks: the one given, or a view that holds nothing.

    Raises:
        TypeError: a part of a tuple is no tensor, or of another dtype than the other.
        ValueError: a tuple is not one of two, or they differ in shape or device.
    """
    if not isinstance(given, tuple):
        return given
    if len(given) != 2:
        raise ValueError(f"{name} must be a tensor or (winner, loser), got {len(given)} parts")
    for part in given:
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be (winner, loser) of tensors, got {type(part).__name__}")
    winner, loser = given
    if winner.dtype != loser.dtype:
        raise TypeError(f"{name}'s sides must have one dtype, got {winner.dtype} and {loser.dtype}")
    if winner.shape != loser.shape or winner.device != loser.device or winner.numel() == 0:
        raise ValueError(
            f"{name}'s sides must be of one shape and device and not empty, got "
            f"{tuple(winner.shape)} on {winner.device} and {tuple(loser.shape)} on {loser.device}"
        )
    return winner[:1].detach().expand(2 * len(winner), *winner.shape[1:])


def split(given: Given, layout: Layout) -> tuple[Tensor, Tensor]:
    """Winners and losers `[B, *dims]`, views of what was given."""
    if isinstance(given, tuple):
        return given[0], given[1]
    if layout == "interleaved":
        winner, loser = given.unflatten(0, (-1, 2)).unbind(1)
    else:
        winner, loser = given.unflatten(0, (2, -1)).unbind()
    return winner, loser


def errors_in_order(errors: Given) -> Tensor:
    """Errors that are known, `[2B]`, winners first: a layout is one of predictions."""
    return torch.cat(list(errors)) if isinstance(errors, tuple) else errors


def weights_of(mask: Given, policy: Tensor, layout: Layout) -> Tensor:
    """What squared residuals are multiplied by: the mask, winners first, each row's mean 1.

    A row whose mask is zero everywhere has an error of zero.

    Raises:
        TypeError: not a tensor of truth values or floating-point numbers.
        ValueError: not one row for each pair or each prediction, or not of its dimensions.
    """
    rows = whole("mask", mask)
    if not isinstance(rows, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(rows).__name__}")
    if rows.dtype != torch.bool and not rows.is_floating_point():
        raise TypeError(f"mask must be bool or floating-point, got {rows.dtype}")
    n_rows, *dims = policy.shape
    fits = rows.ndim == policy.ndim and len(rows) in (n_rows, n_rows / 2)
    if not fits or any(m not in (1, d) for m, d in zip(rows.shape[1:], dims, strict=True)):
        raise ValueError(
            f"mask must be {(n_rows, *dims)}, or {n_rows // 2} rows that the pairs share, and 1 "
            f"where it is the same along a dimension; got {tuple(rows.shape)}"
        )
    if rows.device != policy.device:
        raise ValueError(f"mask must be on policy's {policy.device}, got {rows.device}")
    plain = isinstance(mask, Tensor) and (layout == "halves" or len(mask) < n_rows)
    given = rows if plain else torch.cat(split(mask, layout))
    dtype = torch.promote_types(policy.dtype, torch.float32)
    weights = given.detach().to(dtype)
    mean = weights.flatten(1).mean(1).view(-1, *[1] * len(dims))
    return (weights / torch.where(mean > 0, mean, 1.0)).expand(-1, *dims)


def halves(tensors: PairTensors, given: Sequence[Given], layout: Layout) -> PairTensors:
    """`tensors` with one tensor each, winners first: copies."""
    n_pairs = tensors.n_pairs
    found = []
    for source in given:
        rows = source[0] if isinstance(source, tuple) else source
        known = rows.ndim == 1 or (isinstance(source, Tensor) and len(source) == n_pairs)
        found.append(errors_in_order(source) if known else torch.cat(split(source, layout)))
    policy, *judges, target = found
    if not judges:
        return replace(tensors, policy=policy, target=target)
    reference = None if tensors.reference is None else judges.pop(0)
    return replace(tensors, policy=policy, target=target, reference=reference, annotators=judges)


def split_tensors(tensors: PairTensors, given: Sequence[Given], layout: Layout) -> PairTensors:
    """`tensors` with every prediction as winners, and `losers` as their counterparts.

    Args:
        tensors: of which the vectors are kept.
        given: policy, reference (if there is one) and annotators, then the target.
        layout: of those that are one tensor.
    """
    n_pairs = tensors.n_pairs
    winners, losers = [], []
    for source in given[:-1]:
        rows = source[0] if isinstance(source, tuple) else source
        if rows.ndim == 1:
            sides = (errors_in_order(source),) * 2
        else:
            sides = alike(*split(source, layout))
        winners.append(sides[0])
        losers.append(sides[1])
    target = given[-1]
    shared = isinstance(target, Tensor) and len(target) == n_pairs
    sides = (target, target) if shared else alike(*split(target, layout))
    policy, *judges = winners
    reference = None if tensors.reference is None else judges.pop(0)
    return replace(
        tensors,
        policy=policy,
        target=sides[0],
        reference=reference,
        annotators=judges,
        losers=(*losers, sides[1]),
    )


def alike(winner: Tensor, loser: Tensor) -> tuple[Tensor, Tensor]:
    """Both, lying alike: the kernels find a loser where its winner is in the other tensor."""
    if winner.stride() == loser.stride():
        return winner, loser
    return winner.contiguous(), loser.contiguous()
