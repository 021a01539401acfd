"""Every kernel of the ahead-of-time table, executed on the PTX machine; run by test_compiled.py.

    TRITON_INTERPRET=0 python -m pytest -p tests.kernels.on_machine tests/kernels/compiled_cases.py

The calls of `aot_cases.py` as they are, sizes, layouts and launch configurations included, on
random tensors, against float64 within the budget of the kernel tests.
"""

from dataclasses import dataclass
from typing import Any

import aot_cases
import pytest
import torch

from fastpo_kernels.testing import (
    PairInputs,
    assert_within_budget,
    pair_inputs,
    rounding_scales,
)

RNG = torch.Generator()


def normal(*size, dtype=torch.float32, **_):
    """Stands for `torch.empty` where the cases make their tensors."""
    return torch.randn(size[0] if len(size) == 1 and not isinstance(size[0], int) else size,
                       generator=RNG).to(dtype)  # fmt: skip


@dataclass
class Call:
    """A loss of the table, for any inputs."""

    variant: str
    dtype: str
    call: Any
    batch: aot_cases.Batch
    target: Any
    sources: list
    options: dict

    def inputs(self):
        """Predictions near their target, in the case's layouts."""
        batch = self.batch
        shared = self.target is None or len(self.target) == batch.pairs
        x = pair_inputs(
            batch.pairs, batch.dims, torch.float32, shared_target=shared,
            n_annotators=max(0, len(self.sources) - 1),
        )  # fmt: skip
        full = [self._laid(x.policy)] + [self._laid(t) for t in [x.reference, *x.annotators]]
        target = x.target.to(batch.dtype)
        target = target[..., :: target.shape[-1] // full[0].shape[-1]].contiguous()
        ready = [s for s in self.sources if s.ndim == 1]
        return PairInputs(full[0], ready[0].abs() if ready else full[1], target, full[2:])

    def _laid(self, t):
        return self.batch.layout(t.to(self.batch.dtype))

    def __call__(self, x, **more):
        sources = [x.reference] if self.sources else []
        options = self.options | more
        if x.annotators:
            options["annotators"] = x.annotators
        out = self.call(x.policy, *sources, x.target, **options)
        return out


def collected():
    """The table's calls, losses and noise apart."""
    losses, noises = [], []

    def loss_case(variant, dtype, call, batch, *, target=None, sources=(), heavy=False, **options):
        losses.append(Call(variant, dtype, call, batch, target, list(sources), options))

    def noise_case(dtype, prediction, target, *, drawn, pairs=16, layout=None):
        noises.append((dtype, prediction, target, drawn, layout))

    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(aot_cases, "loss_case", loss_case)
        patch.setattr(aot_cases, "noise_case", noise_case)
        for _ in aot_cases.cases():
            pass
    return losses, noises


LOSSES, NOISES = collected()
READY = [c for c in LOSSES if c.target is None or isinstance(c.target, torch.Tensor)]


def run(call, x, impl):
    policy = x.policy.detach().requires_grad_()
    out = call(PairInputs(policy, x.reference, x.target, x.annotators), impl=impl)
    total = out if isinstance(out, torch.Tensor) else out.loss
    return out, torch.autograd.grad(3.25 * total.sum(), policy)[0]


@pytest.mark.parametrize("call", READY, ids=lambda c: f"{c.variant}, {c.dtype}")
def test_case_within_budget(call):
    x = call.inputs()
    truth, truth_grad = run(call, x.double(), "reference")
    eager, eager_grad = run(call, x, "reference")
    actual, grad = run(call, x, "triton")
    assert grad.dtype == x.policy.dtype and grad.stride() == eager_grad.stride()
    if isinstance(truth, torch.Tensor):
        assert_within_budget(actual, [eager], truth, name="errors")
        assert_within_budget(grad, [eager_grad], truth_grad, name="gradient")
        return
    scales = rounding_scales(call, x.double(), truth_grad)
    for name, a, e, t in zip(truth._fields, actual, eager, truth, strict=True):
        if t is not None:
            assert_within_budget(a, [e], t, name=name, scale=scales[name])
    assert_within_budget(grad, [eager_grad], truth_grad, name="gradient", scale=scales["gradient"])
