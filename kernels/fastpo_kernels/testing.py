"""Inputs and error budget that tests and benchmarks share. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpo_kernels.pair_loss import PairLoss
from fastpo_kernels.pair_loss.reference import pair_errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class PairInputs:
    """What a pair loss reads: predictions near their target, the reference near the policy."""

    policy: Tensor
    reference: Tensor
    target: Tensor
    annotators: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Policy, reference, target, then the annotators."""
        return [self.policy, self.reference, self.target, *self.annotators]

    def double(self) -> PairInputs:
        """The same numbers in float64: the oracle's inputs."""
        others = [a.double() for a in self.annotators]
        policy, reference, target = (
            t.detach().double() for t in (self.policy, self.reference, self.target)
        )
        return PairInputs(policy, reference, target, others)


def pair_inputs(
    n_pairs: int,
    dims: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    n_annotators: int = 0,
    shared_target: bool = True,
    seed: int = 0,
) -> PairInputs:
    """Standard normal targets, residuals of 0.3, reference and annotators 0.1 from the policy.

    A pair's residuals correlate by 0.64: its sides share noise and timestep. Drawn on the CPU, so
    that every device sees the same numbers.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, *dims, generator=rng)

    target = normal(n_pairs) if shared_target else normal(2 * n_pairs)
    center = target.repeat(2 if shared_target else 1, *[1] * len(dims))
    common = normal(n_pairs).repeat(2, *[1] * len(dims))
    policy = center + 0.3 * (0.6 * normal(2 * n_pairs) + 0.8 * common)
    others = [policy + 0.1 * normal(2 * n_pairs) for _ in range(1 + n_annotators)]
    reference, *annotators = [t.to(device, dtype) for t in others]
    return PairInputs(policy.to(device, dtype), reference, target.to(device, dtype), annotators)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return (actual.detach().double() - truth.detach().double()).abs().max().item()


def assert_within_budget(
    actual: Tensor,
    eager: Sequence[Tensor],
    truth: Tensor,
    *,
    name: str,
    scale: float | None = None,
) -> None:
    """`err(actual) <= 2 err(eager) + eps * scale`, both errors against float64.

    Args:
        actual: the kernel's result.
        eager: eager results in the same dtype, of equal inputs in one or several orders; the
            worst counts.
        truth: float64.
        name: for the message.
        scale: the largest |truth| unless given: a difference is rounded at its terms' scale.
    """
    assert actual.shape == truth.shape, f"{name}: {actual.shape} is not {truth.shape}"
    size = truth.detach().abs().max().item() if scale is None else scale
    worst = max(max_error(e, truth) for e in eager)
    budget = 2 * worst + torch.finfo(actual.dtype).eps * size
    error = max_error(actual, truth)
    assert error <= budget, f"{name}: error {error:.3e} over its budget {budget:.3e}"


def _one_by_one(errors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Directions in which one error of one source moves, by its own size."""
    for s, source in enumerate(errors):
        for row in range(len(source)):
            moved = [torch.zeros_like(e) for e in errors]
            moved[s][row] = source[row]
            yield moved


def _together(errors: Sequence[Tensor], probes: int) -> Iterator[list[Tensor]]:
    """Directions in which all errors move, up or down at random, which share the whole."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(probes):
        signs = [torch.randint(0, 2, e.shape, generator=rng) * 2 - 1 for e in errors]
        yield [e * s.to(e) / probes for e, s in zip(errors, signs, strict=True)]


def rounding_scales(
    call: Callable[..., PairLoss],
    x: PairInputs,
    gradient: Tensor,
    probes: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """Per result, what one eps of it is when every error of the batch is rounded once.

    A margin is a small difference of errors, and a minority metric divides it by the batch's scale:
    a float32 result cannot be nearer than the errors' own rounding puts it, and whether one run of
    eager is nearer is luck. To first order that is `|result| + sum_j |d result / d e_j| e_j / 2`,
    over the errors of policy, reference and annotators, by differences in float64.

    Args:
        call: the objective.
        x: float64 inputs, the target a tensor.
        gradient: the loss's gradient at `x`, however scaled.
        probes: instead of moving errors one by one, which takes long where pairs are many, move all
            of them at random, so often; the mean is smaller than the sum, so the budget is too.
        options: for the call.

    Returns:
        A scale for every field of the result that is not None, by its name, and `gradient`'s.
    """
    sources = [x.policy.detach(), x.reference, *x.annotators]
    errors = [t if t.ndim == 1 else pair_errors(t, x.target) for t in sources]
    target = errors[0].new_zeros(len(x.target), 1)

    def results(errors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of predictions of one element, which have these errors; and dloss/de."""
        policy = errors[0].sqrt()[:, None].requires_grad_()
        y = PairInputs(policy, errors[1], target, list(errors[2:]))
        out = call(y, impl="reference", **options)
        slope = torch.autograd.grad(out.loss.sum(), policy)[0]
        found = {name: t.detach() for name, t in out._asdict().items() if t is not None}
        return found | {"slope": slope[:, 0] / (2 * policy.detach()[:, 0]).clamp_min(1e-9)}

    base = results(errors)
    moved = {name: torch.zeros_like(t) for name, t in base.items()}
    for move in _one_by_one(errors) if probes is None else _together(errors, probes):
        changed = [e + 1e-6 * m for e, m in zip(errors, move, strict=True)]
        for name, t in results(changed).items():
            moved[name] += (t - base[name]).abs() / 1e-6
    scales = {n: (t.abs() + moved[n] / 2).max().item() for n, t in base.items() if n != "slope"}
    slope = base["slope"].abs()
    sensitivity = torch.where(slope > 0, moved["slope"] / slope / 2, 0.0)
    rows = gradient.flatten(1).abs().amax(1)
    return scales | {"gradient": (rows * (1 + sensitivity)).max().item()}
