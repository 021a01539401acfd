"""Inputs and error budget that tests and benchmarks share. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    centre = target.repeat(2 if shared_target else 1, *[1] * len(dims))
    common = normal(n_pairs).repeat(2, *[1] * len(dims))
    policy = centre + 0.3 * (0.6 * normal(2 * n_pairs) + 0.8 * common)
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
