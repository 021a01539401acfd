"""Hands tensors to the compiled module: by address, dtype and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo_kernels._shared.layout import joint_layout
from fastpo_kernels.pair_loss.native.module import loaded
from fastpo_kernels.pair_loss.spec import LossSpec, PairTensors, PartialsLayout

# Orders of the module's enumerations.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NONE, _READY = (-1,), 3
_OBJECTIVE = {
    name: k
    for k, name in enumerate(
        "dpo robust_dpo ipo hinge kto dmpo linear_dpo sft mapo poly_dpo".split()
    )
}
OBJECTIVES = frozenset(_OBJECTIVE)  # that the module knows
_NORMALIZE = {None: -1, "none": 0, "rms": 1, "l2": 2}
_WEIGH = {None: 0, "linear": 0, "quadratic": 1, "sqrt": 2, "exponential": 3, "gate": 4}
Integers = tuple[int, ...]


def _flat(t: Tensor) -> Tensor:
    """As the module reads vectors: contiguous float32."""
    if t.dtype is torch.float32 and t.is_contiguous():
        return t
    return t.detach().to(torch.float32).contiguous()


def vector(t: Tensor | None) -> Tensor | None:
    """`_flat`, of what there is."""
    return None if t is None else _flat(t)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: Tensor, loser: Tensor | None, strides: Sequence[int], n_pairs: int) -> Integers:
    """`Rows`: of one tensor of winners and losers, or of winners, and losers that lie alike."""
    first = t.data_ptr()
    if loser is not None:
        second = loser.data_ptr()
    else:
        second = first + n_pairs * strides[0] * t.itemsize if t.shape[0] > n_pairs else first
    return KINDS[t.dtype], first, second, *strides


def _ready(errors: Tensor, n_pairs: int) -> Integers:
    first = errors.data_ptr()
    return _READY, first, first + 4 * n_pairs


def _errors_alone(sources: Sequence[Tensor]) -> Integers:
    """Shape, sources, target and mask where every source is errors `[2B]`."""
    n_pairs = len(sources[0]) // 2
    errors = [part for s in sources for part in _ready(s, n_pairs)]
    return n_pairs, 1, 0, len(sources), *errors, *_NONE, *_NONE


def _tensors(tensors: PairTensors, sources: Sequence[Tensor]) -> Integers:
    """Shape, sources, target and mask."""
    n_pairs, target, mask = tensors.n_pairs, tensors.target, tensors.mask
    full = [s for s in sources if s.ndim > 1]
    sizes, strides = joint_layout([*full, target] if mask is None else [*full, target, mask])
    found = [n_pairs, len(sizes), *sizes, len(sources)]
    losers = tensors.losers or (None,) * (len(sources) + 1)
    k = 0
    for source, loser in zip(sources, losers, strict=False):
        if source.ndim == 1:
            found += _ready(source, n_pairs)
        else:
            found += _rows(source, loser, strides[k], n_pairs)
            k += 1
    found += _rows(target, losers[-1], strides[k], n_pairs)
    found += _NONE if mask is None else _rows(mask, None, strides[k + 1], n_pairs)
    return tuple(found)


def _spec(spec: LossSpec, *, has_reference: bool) -> tuple[Integers, tuple[float, ...]]:
    adaptive, guarded = spec.adaptive, spec.safeguard is not None
    a, b, c = (*spec.options, 0.0, 0.0, 0.0)[:3]
    share = 1.0 - spec.safeguard if spec.safeguard is not None else 0.0
    flags = spec.has_baseline, guarded, spec.per_pair
    if adaptive is None:
        integers = _OBJECTIVE[spec.objective], has_reference, -1, 0, 0, *flags
        return integers, (a, b, c, 0.0, 0.0, 0.0, 0.0, 0.0, share, spec.sft_weight)
    kinds = _NORMALIZE[adaptive.normalize], _WEIGH[adaptive.weight_kind]
    quadratic = adaptive.margin_kind == "quadratic"
    numbers = (
        a,
        b,
        c,
        adaptive.rho,
        adaptive.weight_scale,
        adaptive.weight_intercept,
        adaptive.shift_scale,
        adaptive.beta,
        share,
        spec.sft_weight,
    )
    return (_OBJECTIVE[spec.objective], has_reference, *kinds, quadratic, *flags), numbers


class Results(NamedTuple):
    """What a loss gives, float32.

    Attributes:
        loss: `[]`, or `[B]` per pair.
        margin: `[B]`.
        errors: `[2B]`, the policy's.
        rest: the vector of `NativeLayout`.
    """

    loss: Tensor
    margin: Tensor
    errors: Tensor
    rest: Tensor


class NativeLayout(NamedTuple):
    """`errors [S - 1, 2B] | minority [B] | weight [B] | coefficients [2B] | safeguard [1]`.

    Of the sources but the policy; a coefficient is dloss/de of a row. The last is there with a
    safeguard.
    """

    n_pairs: int
    n_others: int
    guarded: bool

    @property
    def size(self) -> int:
        """Length of the vector."""
        return (4 + 2 * self.n_others) * self.n_pairs + self.guarded

    def errors(self, rest: Tensor, k: int) -> Tensor:
        """`[2B]`, of the reference and annotators from 0 on."""
        return rest.narrow(0, 2 * k * self.n_pairs, 2 * self.n_pairs)

    def minority(self, rest: Tensor) -> Tensor:
        """`[B]`."""
        return rest.narrow(0, 2 * self.n_others * self.n_pairs, self.n_pairs)

    def weight(self, rest: Tensor) -> Tensor:
        """`[B]`."""
        return rest.narrow(0, (2 * self.n_others + 1) * self.n_pairs, self.n_pairs)

    def coefficients(self, rest: Tensor) -> Tensor:
        """`[2B]`."""
        return rest.narrow(0, (2 * self.n_others + 2) * self.n_pairs, 2 * self.n_pairs)


def _run(
    tensors: PairTensors, spec: LossSpec, outputs: Sequence[Tensor | None], *, sums: bool
) -> None:
    """A pass over the predictions unless `sums`: then errors are given, and sums as statistics."""
    module = loaded()
    assert module is not None
    sources = [_flat(s) if s.ndim == 1 else s for s in tensors.sources]
    statistics = vector(tensors.statistics)
    minority, weight, beta = map(vector, (tensors.minority, tensors.pair_weight, tensors.beta))
    own, totals = (None, statistics) if sums else (statistics, None)
    integers, numbers = _spec(spec, has_reference=tensors.reference is not None)
    read = _errors_alone(sources) if sums else _tensors(tensors, sources)
    vectors = (minority, own, totals, weight, beta, *outputs)
    module.forward((*read, *map(_address, vectors), *integers), numbers)


def _empty(size: int | tuple[()]) -> Tensor:
    return torch.empty(size, dtype=torch.float32)


def launch_loss(tensors: PairTensors, spec: LossSpec, *, sums: bool = False) -> Results:
    """Loss and statistics; with `sums` from errors `[2B]`, all processes' sums as `statistics`."""
    n_pairs = tensors.n_pairs
    layout = NativeLayout(n_pairs, len(tensors.sources) - 1, spec.safeguard is not None)
    loss = _empty(n_pairs if spec.per_pair else ())
    results = Results(loss, _empty(n_pairs), _empty(2 * n_pairs), _empty(layout.size))
    _run(tensors, spec, results, sums=sums)
    return results


def launch_partials(tensors: PairTensors, spec: LossSpec) -> Tensor:
    """The vector of `PartialsLayout`, float32."""
    n_sums = spec.n_sums(len(tensors.annotators))
    partials = _empty(PartialsLayout(tensors.n_pairs, len(tensors.sources), n_sums).size)
    _run(tensors, spec, (None, None, None, partials), sums=False)
    return partials


Sides = tuple[Tensor, Tensor | None]  # both sides' rows and None, or winners and losers


def launch_gradient(
    policy: Sides, target: Sides, gradient: Sides, mask: Tensor | None, slopes: Sides
) -> None:
    """Fills the gradient: `slopes` are coefficients `[2B]`, and what multiplies all, or None."""
    module = loaded()
    assert module is not None
    n_pairs = policy[0].shape[0] // (2 if policy[1] is None else 1)
    masks = [] if mask is None else [mask]
    sizes, (*strides, last) = joint_layout([policy[0], target[0], *masks, gradient[0]])
    rows = [_rows(*policy, strides[0], n_pairs), _rows(*target, strides[1], n_pairs)]
    rows.append(_rows(masks[0], None, strides[2], n_pairs) if masks else _NONE)
    rows.append(_rows(*gradient, last, n_pairs))
    coefficients, scale = (vector(t) for t in slopes)
    parts = [part for one in rows for part in one]
    module.gradient((n_pairs, len(sizes), *sizes, *parts, _address(coefficients), _address(scale)))
