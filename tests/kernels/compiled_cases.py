"""Every kernel of the ahead-of-time table, executed on the PTX machine as it ships.

    PTX_MACHINE_SCHEDULES=1 python -m pytest -p tests.kernels.on_machine \
        tests/kernels/compiled_cases.py

The calls of `benchmarks/aot_cases.py` with their sizes, layouts and launch configurations, on
random tensors, against float64 within the budget of the kernel tests. `test_compiled.py` runs the
smallest of them.
"""

from dataclasses import dataclass
from typing import Any

import aot_cases
import pytest
import torch
from torch import Tensor

from fastpo_kernels.pair_noise import noised_pair
from fastpo_kernels.testing import PairInputs, assert_within_budget, rounding_scales


@dataclass
class Loss:
    """A loss of the table.

    Attributes:
        call: the objective, with its options bound but for those below.
        x: its inputs.
        options: of the call.
    """

    call: Any
    x: PairInputs
    has_reference: bool
    options: dict[str, Any]

    def __call__(self, x, **more):
        sources = [x.reference] if self.has_reference else []
        annotators = {"annotators": x.annotators} if x.annotators else {}
        return self.call(x.policy, *sources, x.target, **annotators, **self.options, **more)


def collected():
    """The table's losses and noise kernels by their names, as functions that make the tensors."""
    losses, noises = {}, {}

    def loss_case(variant, dtype, call, batch, *, target=None, sources=(), heavy=False, **options):
        shared = batch.shared() if target is None else target
        losses[f"{variant}, {dtype}"] = lambda: filled(call, batch, shared, sources, options)

    def noise_case(dtype, prediction, *, drawn, layout=None):
        laid = ", channels-last" if layout else ""
        noises[f"{prediction}, {'drawn' if drawn else 'means'}{laid}, {dtype}"] = (
            dtype, prediction, drawn, layout or (lambda t: t),
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot_cases, "loss_case", loss_case)
        patch.setattr(aot_cases, "noise_case", noise_case)
        for _ in aot_cases.cases():
            pass
    return losses, noises


def filled(call, batch, target, sources, options):
    """Predictions near their targets, ready errors near those of predictions, other vectors."""
    rng = torch.Generator().manual_seed(0)

    def like(t):
        return torch.randn(t.shape, generator=rng)

    def beside(t, values):
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return out.copy_(values)

    target = like(target).to(target.dtype)
    policy = batch.rows()
    center = target.float().repeat(len(policy) // len(target), *[1] * (target.ndim - 1))
    policy_values = center + 0.3 * like(policy)
    full = [
        beside(s, policy_values + 0.1 * like(s)) if s.ndim > 1 else 0.09 + 0.002 * like(s)
        for s in sources
    ]
    numbers = {
        k: torch.rand(v.shape, generator=rng) if isinstance(v, Tensor) else v
        for k, v in options.items()
    }
    first, *others = full or [policy]
    x = PairInputs(beside(policy, policy_values), first, target, others)
    return Loss(call, x, bool(full), numbers)


LOSSES, NOISES = collected()


def name_of(name):
    """As `-k` takes it."""
    return name.replace(", ", "-").replace(" ", "_")


def run(call, x, impl):
    policy = x.policy.detach().requires_grad_()
    out = call(PairInputs(policy, x.reference, x.target, x.annotators), impl=impl)
    total = out if isinstance(out, Tensor) else out.loss
    return out, torch.autograd.grad(3.25 * total.sum(), policy)[0]


@pytest.mark.parametrize("name", LOSSES, ids=name_of)
def test_loss_within_budget(name):
    call = LOSSES[name]()
    x = call.x
    truth, truth_grad = run(call, x.double(), "reference")
    eager, eager_grad = run(call, x, "reference")
    actual, grad = run(call, x, "triton")
    assert grad.dtype == x.policy.dtype
    if isinstance(truth, Tensor):
        assert_within_budget(actual, [eager], truth, name="errors")
        assert_within_budget(grad, [eager_grad], truth_grad, name="gradient")
        return
    scales = rounding_scales(call, x.double(), truth_grad)
    for field, a, e, t in zip(truth._fields, actual, eager, truth, strict=True):
        if t is not None:
            assert_within_budget(a, [e], t, name=field, scale=scales[field])
    assert_within_budget(grad, [eager_grad], truth_grad, name="gradient", scale=scales["gradient"])


@pytest.mark.parametrize("name", NOISES, ids=name_of)
def test_noise_is_the_references(name):
    dtype, prediction, drawn, layout = NOISES[name]
    rng = torch.Generator().manual_seed(0)
    latents, logvar = (
        layout(torch.randn(32, *aot_cases.SDXL, generator=rng).to(aot_cases.DTYPES[dtype]))
        for _ in range(2)
    )
    keys = torch.randint(0, 2**62, (16,), generator=rng)
    power = torch.linspace(0.99, 0.005, 1000)
    found, expected = (
        noised_pair(
            latents, keys, keys % 7, power.sqrt(), (1 - power).sqrt(), seed=1, low=0, high=1000,
            prediction=prediction, logvar=logvar - 3 if drawn else None, impl=impl,
        )
        for impl in ("triton", "reference")
    )  # fmt: skip
    assert torch.equal(found.timesteps, expected.timesteps)
    for a, e in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=4e-6)
