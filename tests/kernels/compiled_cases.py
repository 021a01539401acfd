"""Every kernel of the ahead-of-time table, executed on the PTX machine as it ships.

    python -m pytest -p tests.kernels.on_machine tests/kernels/compiled_cases.py
    PTX_MACHINE_FULL=1 python -m pytest -p tests.kernels.on_machine tests/kernels/compiled_cases.py

The calls of `benchmarks/aot_cases.py` on random tensors, against float64 within the budget of the
kernel tests. By default on a few pairs of two and a half tiles, by two programs a pair, with the
code of the full size, which is compared; with PTX_MACHINE_FULL in the full size, which takes hours.
"""

import os
from dataclasses import replace

import pytest
import torch
from aot_cases import LossCall, LossTensors, NoiseCall, calls
from aot_small import compiled_as, filled, full_shape, noise_inputs, small
from torch import Tensor

from fastpo_kernels.testing import PairInputs, assert_within_budget, rounding_scales
from tests.kernels.on_machine import orders

SCHEDULES = orders(2, 3)
FULL = bool(os.environ.get("PTX_MACHINE_FULL"))


def name_of(call):
    """As `-k` takes it."""
    return f"{call.variant}-{call.dtype}".replace(", ", "-").replace(" ", "_")


LOSSES = [call for call in calls() if isinstance(call, LossCall)]
NOISES = [call for call in calls() if isinstance(call, NoiseCall)]


class Loss:
    """A call of the table as a loss of `PairInputs`, which the budget's helpers take."""

    def __init__(self, call, x):
        self.call, self.vectors = call, x.vectors
        first, *others = x.sources or [x.policy]
        self.x, self.has_reference = PairInputs(x.policy, first, x.target, others), bool(x.sources)

    def __call__(self, x, impl="reference"):
        sources = [x.reference, *x.annotators] if self.has_reference else []
        # Rounding is followed from the errors on: predictions of one element, which have no mask.
        whole = x.policy.ndim > 2
        vectors = {k: v for k, v in self.vectors.items() if whole or k != "mask"}
        return self.call(LossTensors(x.policy, x.target, sources, vectors), impl)


def run(loss, x, impl):
    policy = x.policy.detach().requires_grad_()
    out = loss(PairInputs(policy, x.reference, x.target, x.annotators), impl=impl)
    total = out if isinstance(out, Tensor) else out.loss
    return out, torch.autograd.grad(3.25 * total.sum(), policy)[0]


def check(loss, actual, grad):
    """What the kernels gave, against float64 beside what eager does."""
    x = loss.x
    truth, truth_grad = run(loss, x.double(), "reference")
    eager, eager_grad = run(loss, x, "reference")
    assert grad.dtype == x.policy.dtype
    if isinstance(truth, Tensor):
        assert_within_budget(actual, [eager], truth, name="errors")
        assert_within_budget(grad, [eager_grad], truth_grad, name="gradient")
        return
    probes = 32 if x.policy.shape[0] > 64 else None
    scales = rounding_scales(loss, x.double(), truth_grad, probes)
    for field, a, e, t in zip(truth._fields, actual, eager, truth, strict=True):
        if t is not None:
            assert_within_budget(a, [e], t, name=field, scale=scales[field])
    assert_within_budget(grad, [eager_grad], truth_grad, name="gradient", scale=scales["gradient"])


def texts_of(hook, run):
    """Names and texts of the kernels that `run` launches, and its result."""
    found = []
    hook.edit = lambda name, text: found.append((name, text)) or text
    result = run()
    return found, result


def assert_same_code(small, full):
    """Without the texts in the message."""
    assert [name for name, _ in small] == [name for name, _ in full]
    for (name, text), (_, expected) in zip(small, full, strict=True):
        assert hash(text) == hash(expected), name


@pytest.mark.parametrize("call", LOSSES, ids=name_of)
def test_loss_within_budget(call, hook, without_executing):
    if FULL:
        loss = Loss(call, filled(call.empty(call.batch)))
        check(loss, *run(loss, loss.x, "triton"))
        return
    with without_executing():
        full, _ = texts_of(hook, lambda: call.gradient(call.empty(call.batch)))
    shape = full_shape(call)
    batch = small(call.batch, 5 * shape.config.block_size // 2)
    loss = Loss(call, filled(call.empty(batch)))
    with compiled_as(shape, 2):
        texts, result = texts_of(hook, lambda: run(loss, loss.x, "triton"))
    assert_same_code(texts, full)
    check(loss, *result)


@pytest.mark.parametrize("call", NOISES, ids=name_of)
def test_noise_is_the_references(call, hook, without_executing):
    if not FULL:
        with without_executing():
            full, _ = texts_of(hook, call.case().run)
        call = replace(call, batch=small(call.batch, 2560))
    inputs = noise_inputs(call.batch)
    texts, found = texts_of(hook, lambda: call(*inputs, "triton"))
    if not FULL:
        assert_same_code(texts, full)
    expected = call(*inputs, "reference")
    assert torch.equal(found.timesteps, expected.timesteps)
    torch.testing.assert_close(found.target, expected.target, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(found.noisy_latents, expected.noisy_latents)
