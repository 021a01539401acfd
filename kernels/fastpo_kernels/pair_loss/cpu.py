"""The implementation for a CPU: compiled, or the same mathematics in fewer operators and bytes.

What `native` takes is computed there. The rest is written with torch's operators: float64, what is
traced or transformed, derivatives of the gradient, and everything where `native` was not built.

A loss on a CPU costs its number of operators while the batch is small, and the bytes that miss the
cache when it is large. So the squared residual is one `mse_loss` and its gradient one
`mse_loss_backward`, and large batches go through the reduction piece by piece, the float32 copy of
a half-precision piece staying in cache; nothing of the latents' size is kept for the backward pass.
Of a small plain batch the Python between the operators is the cost: `small_loss` leaves it out.
Only the reduction is written here; objectives and epilogue are those of the modules of these names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]

from fastpo_kernels.pair_loss.epilogue import PairErrors, from_errors, mean_squares, residual
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.pair_loss.objectives import OBJECTIVES, Judged, margin_of
from fastpo_kernels.pair_loss.spec import LossSpec, PairLoss, PairTensors, Reduce

# What `F.mse_loss` calls, without its checks in Python: half of its time on a small batch.
_squared_difference = _nn.mse_loss
_NO_REDUCTION = 0
_EXACT = (torch.float32, torch.float64)
# Elements of one side in a piece, for every core up to eight: what stays in its cache.
_PIECE, _MAX_CORES = 1 << 18, 8
# Elements of both sides up to which the mean's gradient, a tensor of their size where the sum's is
# a view, costs less than dividing the sum.
_TINY = 1 << 16


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _errors(policy: Tensor, target: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Mean squared errors `[2, B]` of every source, all at once; differentiable in `policy`."""
    dtype = policy.dtype if policy.dtype in _EXACT else torch.float32
    n_rows = len(policy)
    n_elements = policy.numel() // n_rows
    shape: tuple[int, ...] = (-1, n_rows // 2, n_elements)
    dims: int | list[int] = -1
    for t in (policy, target, *others):
        if not t.is_contiguous():
            shape = (-1, n_rows // 2, *policy.shape[1:])
            dims = list(range(2, len(shape)))
    target = (target if target.dtype == dtype else target.to(dtype)).view(shape)
    source = policy if policy.dtype == dtype else policy.to(dtype)
    square = _squared_difference(source.view(shape), target, _NO_REDUCTION)
    # The sum's backward is a view, the mean's a tensor of the latents' size.
    found = [square.sum(dims).div_(n_elements)]
    for source in others:
        source = source if source.dtype == dtype else source.to(dtype)
        found.append(_squared_difference(source.view(shape), target, _NO_REDUCTION).mean(dims))
    return found


def _dot(policy: Tensor, target: Tensor) -> Tensor:
    """Mean product `[B]` of winner's and loser's residual, all at once."""
    winner, loser = residual(policy, target)
    return winner.mul_(loser).flatten(1).mean(1)


_memory = threading.local()


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that a thread keeps: fresh pages cost as much as the arithmetic on them."""
    kept = getattr(_memory, "scratch", None)
    if kept is None or kept.dtype != dtype or len(kept) < size:
        kept = _memory.scratch = torch.empty(size, dtype=dtype)
    return kept[:size]


class _Pieces:
    """Cuts predictions `[2B, *dims]` and their target into parts that stay in cache."""

    def __init__(self, pred: Tensor, target: Tensor) -> None:
        self.n_pairs, self.n_elements = pred.shape[0] // 2, pred[0].numel()
        self.dtype = _accumulator(pred.dtype)
        piece = _PIECE * min(torch.get_num_threads(), _MAX_CORES)
        self.columns = min(self.n_elements, piece)
        self.rows = min(self.n_pairs, piece // self.columns)
        self.target = self.view(target)
        size = self.rows * self.columns
        scratch = _scratch(4 * size, self.dtype)
        self._buffers = [
            scratch[first : first + 2 * size].view(2, self.rows, self.columns)
            for first in (0, 2 * size)
        ]

    def view(self, t: Tensor) -> Tensor:
        """`[2, B, N]`, or `[1, B, N]` of a target that the pair shares."""
        return t.view(-1, self.n_pairs, self.n_elements)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Which part of a row it is, the piece of the target, and the slices that cut it."""
        for first in range(0, self.n_pairs, self.rows):
            pairs = slice(first, first + self.rows)
            for part, start in enumerate(range(0, self.n_elements, self.columns)):
                at = (slice(None), pairs, slice(start, start + self.columns))
                yield part, self.lifted(self.target[at], 1), at

    def lifted(self, piece: Tensor, buffer: int) -> Tensor:
        """The piece in float32 or better: itself, or a copy in one of the two buffers."""
        return piece if piece.dtype == self.dtype else self.like(piece, buffer).copy_(piece)

    def like(self, piece: Tensor, buffer: int) -> Tensor:
        """A buffer's part of the piece's shape."""
        sides, rows, columns = piece.shape
        return self._buffers[buffer][:sides, :rows, :columns]


def _errors_by_pieces(sources: Sequence[Tensor], target: Tensor) -> Tensor:
    """Mean squared errors of every source, `[S, 2, B]`."""
    pieces = _Pieces(sources[0], target)
    n_parts = -(-pieces.n_elements // pieces.columns)
    shape = (len(sources), 2, pieces.n_pairs, n_parts)
    sums = torch.empty(shape, dtype=pieces.dtype, device=target.device)
    views = [pieces.view(s) for s in sources]
    for part, piece, at in pieces:
        for k, view in enumerate(views):
            square = pieces.like(view[at], 0)
            _squared_difference(pieces.lifted(view[at], 0), piece, _NO_REDUCTION, out=square)
            torch.sum(square, 2, out=sums[k, :, at[1], part])
    return sums.sum(3).div_(pieces.n_elements)


def _dot_by_pieces(pred: Tensor, target: Tensor) -> Tensor:
    """`_dot`, by pieces."""
    pieces = _Pieces(pred, target)
    n_parts = -(-pieces.n_elements // pieces.columns)
    sums = torch.empty(pieces.n_pairs, n_parts, dtype=pieces.dtype, device=pred.device)
    view = pieces.view(pred)
    for part, piece, at in pieces:
        residual = pieces.like(view[at], 0)
        torch.sub(pieces.lifted(view[at], 0), piece, out=residual)
        torch.sum(residual[0].mul_(residual[1]), 1, out=sums[at[1], part])
    return sums.sum(1).div_(pieces.n_elements)


def _gradient_by_pieces(pred: Tensor, target: Tensor, grad_errors: Tensor) -> Tensor:
    """`2/N * grad_errors * (pred - target)` in the prediction's dtype."""
    pieces = _Pieces(pred, target)
    slopes = (grad_errors / pieces.n_elements)[..., None]
    grad = torch.empty_like(pred)
    view, grad_view = pieces.view(pred), pieces.view(grad)
    for _, piece, at in pieces:
        lifted, out = pieces.lifted(view[at], 0), grad_view[at]
        held = out if out.dtype == pieces.dtype else lifted
        torch.ops.aten.mse_loss_backward.grad_input(
            slopes[:, at[1]], lifted, piece, _NO_REDUCTION, grad_input=held
        )
        if held is not out:
            out.copy_(held)
    return grad


class _ErrorsByPieces(torch.autograd.Function):
    """Errors of the policy `[2, B]` and of the others `[S - 1, 2, B]`."""

    @staticmethod
    def forward(policy: Tensor, target: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        errors = _errors_by_pieces([policy, *others], target)
        return errors[0], errors[1:]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.mark_non_differentiable(output[1])
        ctx.n_inputs = len(inputs)

    @staticmethod
    def backward(ctx, grad_errors, _):
        policy, target = ctx.saved_tensors
        none = (None,) * (ctx.n_inputs - 1)
        if not torch.is_grad_enabled():
            return _gradient_by_pieces(policy, target, grad_errors), *none
        with torch.enable_grad():
            shape = (2, -1, *[1] * (policy.ndim - 1))
            slopes = (2 / policy[0].numel()) * grad_errors.view(shape)
            grad = (slopes * residual(policy, target)).to(policy.dtype)
        return grad.view_as(policy), *none


def _fits_pieces(policy: Tensor, target: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the batch is dense and in memory, and nothing traces."""
    if torch.compiler.is_compiling():
        return False
    tensors = (policy, target, *others)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous() for t in tensors)
    same = all(t.dtype == policy.dtype for t in others)
    return plain and same and policy.device.type == "cpu"


def pair_errors(policy: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over every dimension but the first of `mask (pred - target)**2`: `[2B]`."""
    tensors = PairTensors(policy, target, mask=mask)
    if native.takes(tensors):
        return native.pair_errors(tensors, eager_errors)
    return eager_errors(tensors)


def eager_errors(tensors: PairTensors) -> Tensor:
    """`pair_errors` by operators; of sides too."""
    if tensors.losers is not None:
        return _side_errors(tensors)[0].flatten()
    policy, target, mask = tensors.policy, tensors.target, tensors.mask
    if mask is not None:
        return mean_squares(policy, target, mask).flatten()
    if policy.numel() > 2 * _PIECE and _fits_pieces(policy, target, ()):
        return _ErrorsByPieces.apply(policy, target)[0].flatten()
    return _errors(policy, target, ())[0].flatten()


def _fits_small(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None) -> bool:
    """Whether the batch is small and dense, plain predictions and a loss without statistics."""
    policy, target, reference = tensors.policy, tensors.target, tensors.reference
    plain = tensors.minority is tensors.statistics is tensors.pair_weight is reduce is None
    plain = plain and tensors.beta is tensors.mask is None
    plain = plain and not spec.sft_weight and not spec.per_pair
    if not plain or spec.has_statistics or len(tensors.annotators):
        return False
    if policy.numel() > 2 * _PIECE or not policy.is_cpu or torch.compiler.is_compiling():
        return False
    for t in (target,) if reference is None else (target, reference):
        if type(t) is not Tensor or t.dtype is not policy.dtype or t.requires_grad:
            return False
    return reference is None or reference.ndim > 1


def small_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None) -> PairLoss | None:
    """`pair_loss` of a small batch of dense predictions, without weights and statistics; or None.

    There the Python between the operators would take a third of the time. The operators are those
    of `_errors`, written out.
    """
    if not _fits_small(tensors, spec, reduce):
        return None
    policy, target, reference = tensors.policy, tensors.target, tensors.reference
    n_rows, n = policy.shape[0], policy.numel()
    if policy.dtype not in _EXACT:
        policy, target = policy.float(), target.float()
        reference = None if reference is None else reference.float()
    n_elements = n // n_rows
    shape = (-1, n_rows // 2, n_elements)
    try:
        policy, target = policy.view(shape), target.view(shape)
        reference = None if reference is None else reference.view(shape)
    except RuntimeError:  # not dense
        return None
    square = _squared_difference(policy, target, _NO_REDUCTION)
    errors = square.mean(-1) if n <= _TINY else square.sum(-1).div_(n_elements)
    known = reference_error = None
    if reference is not None:
        known = _squared_difference(reference, target, _NO_REDUCTION).mean(-1)
        reference_error = known.view(-1)
    d = margin_of(errors, known)
    function = OBJECTIVES[spec.objective].function
    loss = function(Judged(d, errors, known, 0.0), *spec.options).mean()
    return PairLoss(loss, d, errors.view(-1), reference_error, None, None)


def pair_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None = None) -> PairLoss:
    """`loss = mean_i weight_i * objective(d, e, r)_i`; see `api.pair_loss`."""
    if spec.objective in native.OBJECTIVES and native.takes(tensors):
        return native.pair_loss(tensors, spec, reduce, large_loss)
    small = small_loss(tensors, spec, reduce)
    return small if small is not None else large_loss(tensors, spec, reduce)


def large_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None = None) -> PairLoss:
    """`pair_loss` of every batch."""
    policy, target, judges = tensors.policy, _constant(tensors.target), tensors.judges
    full = [_constant(s) for s in judges if s.ndim > 1]
    by_pieces = policy.numel() > 2 * _PIECE and _fits_pieces(policy, target, full)
    if tensors.mask is not None:
        errors = mean_squares(policy, target, tensors.mask)
        others = [mean_squares(s, target, tensors.mask) for s in full]
    elif by_pieces:
        errors, others = _ErrorsByPieces.apply(policy, target, *full)
    else:
        errors, *others = _errors(policy, target, full)
    if len(full) < len(judges):
        found = iter(others)
        others = [_ready(s, errors) if s.ndim == 1 else next(found) for s in judges]
    dot = None
    if spec.safeguard is not None:
        dot = (_dot_by_pieces if by_pieces else _dot)(policy.detach(), target)
    known, judged = (None, others) if tensors.reference is None else (others[0], others[1:])
    return from_errors(PairErrors(errors, known, judged, dot), tensors, spec, reduce)


def _side_error(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared errors `[B]` of one side, differentiable in `pred`."""
    dtype = _accumulator(pred.dtype)
    square = _squared_difference(pred.to(dtype), target.to(dtype), _NO_REDUCTION)
    if mask is not None:
        square = square * mask
    return square.flatten(1).sum(1) / pred[0].numel()


def sides_errors(tensors: PairTensors) -> Tensor:
    """Mean squared errors `[2B]` of the policy, where `tensors` has `losers`."""
    if native.takes(tensors):
        return native.pair_errors(tensors, eager_errors)
    return eager_errors(tensors)


def _side_errors(tensors: PairTensors) -> list[Tensor]:
    """Mean squared errors `[2, B]` of every source, where `tensors` has `losers`."""
    assert tensors.losers is not None
    target, *sources = tensors.target, *tensors.sources
    target_loser, found = tensors.losers[-1], []
    masks = (None,) if tensors.mask is None else tensors.mask.split(tensors.n_pairs)
    for winner, loser in zip(sources, tensors.losers, strict=False):
        if winner.ndim == 1:
            found.append(_ready(winner, found[0]))
        else:
            sides = (
                _side_error(winner, target, masks[0]),
                _side_error(loser, target_loser, masks[-1]),
            )
            found.append(torch.stack(sides))
    return [found[0], *(f.detach() for f in found[1:])]


def sides_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None) -> PairLoss:
    """`pair_loss` where `tensors` has `losers`, each side read where it lies."""
    if spec.objective in native.OBJECTIVES and native.takes(tensors):
        return native.pair_loss(tensors, spec, reduce, eager_sides_loss)
    return eager_sides_loss(tensors, spec, reduce)


def eager_sides_loss(tensors: PairTensors, spec: LossSpec, reduce: Reduce | None) -> PairLoss:
    """`sides_loss` by operators."""
    assert tensors.losers is not None
    errors, *others = _side_errors(tensors)
    dot = None
    if spec.safeguard is not None:
        dtype = errors.dtype
        with torch.no_grad():
            winner = tensors.policy.to(dtype) - tensors.target
            loser = tensors.losers[0].to(dtype) - tensors.losers[-1]
            dot = winner.mul_(loser).flatten(1).mean(1)
    known, judged = (None, others) if tensors.reference is None else (others[0], others[1:])
    return from_errors(PairErrors(errors, known, judged, dot), tensors, spec, reduce)


def _constant(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


def _ready(source: Tensor, errors: Tensor) -> Tensor:
    return source.detach().to(errors.dtype).view_as(errors)
