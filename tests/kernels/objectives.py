"""Every public objective with its options, and the check against float64. No tests."""

import torch

from fastpo import loss as fl
from fastpo_kernels.testing import PairInputs, assert_within_budget, rounding_scales

CASES = {
    "dpo": lambda x, **k: fl.dpo(x.policy, x.reference, x.target, beta=20, **k),
    "dpo-smoothed": lambda x, **k: fl.dpo(
        x.policy, x.reference, x.target, beta=20, label_smoothing=0.1, **k
    ),
    "robust_dpo": lambda x, **k: fl.robust_dpo(
        x.policy, x.reference, x.target, beta=20, label_smoothing=0.2, **k
    ),
    "poly_dpo": lambda x, **k: fl.poly_dpo(
        x.policy, x.reference, x.target, beta=20, alpha=8, **k
    ),
    "ipo": lambda x, **k: fl.ipo(x.policy, x.reference, x.target, tau=5, **k),
    "hinge": lambda x, **k: fl.hinge(x.policy, x.reference, x.target, beta=20, **k),
    "kto": lambda x, **k: fl.kto(x.policy, x.reference, x.target, beta=20, **k),
    "dmpo": lambda x, **k: fl.dmpo(x.policy, x.reference, x.target, beta=20, **k),
    "linear_dpo": lambda x, **k: fl.linear_dpo(x.policy, x.reference, x.target, beta=20, **k),
    "sdpo": lambda x, **k: fl.sdpo(x.policy, x.reference, x.target, beta=20, mu=0.9, **k),
    "sft": lambda x, **k: fl.sft(x.policy, x.target, rows="pairs", **k),
    "mapo": lambda x, **k: fl.mapo(x.policy, x.target, **k),
    "adaptive_dpo": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, margin_scale=20, **k
    ),
    "adaptive_dpo-annotators": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, annotators=x.annotators, **k
    ),
    "adaptive_dpo-l2-sqrt-linear": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, annotators=x.annotators,
        normalize="l2", rho=15.0, weight_kind="sqrt", margin_kind="linear", **k,
    ),
    "adaptive_dpo-exponential": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, weight_kind="exponential", **k
    ),
    "adaptive_dpo-ledger-gate": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20,
        minority=torch.linspace(0, 1, len(x.target)).to(x.target.device), weight_kind="gate", **k,
    ),
    "adaptive_ipo": lambda x, **k: fl.adaptive_ipo(
        x.policy, x.reference, x.target, tau=5, beta=20, annotators=x.annotators,
        weight_kind="quadratic", **k,
    ),
}  # fmt: skip
UPSTREAM = 3.25


def run(call, x, impl, **options):
    """Result and gradient under an upstream gradient that is not 1, through the loss."""
    x.policy = x.policy.detach().requires_grad_()
    out = call(x, impl=impl, **options)
    (UPSTREAM * out.loss).backward()
    return out, x.policy.grad


def eager_runs(call, x, **options):
    """Eager on the elements in four orders: one order's rounding error is a matter of luck."""
    n_elements = x.target[0].numel()
    rng = torch.Generator().manual_seed(0)
    orders = [torch.arange(n_elements), torch.arange(n_elements).flip(0)]
    for order in (*orders, *(torch.randperm(n_elements, generator=rng) for _ in range(2))):
        order = order.to(x.target.device)
        full = [t if t.ndim == 1 else t.detach().flatten(1)[:, order] for t in x.tensors()]
        out, grad = run(call, PairInputs(*full[:3], full[3:]), "reference", **options)
        yield out, grad[:, order.argsort()].reshape(x.policy.shape)


def check(call, x, impl="triton", probes=None, **options):
    """Every output and the gradient within the budget; `probes` as `rounding_scales` takes it."""
    truth, truth_grad = run(call, x.double(), "reference", **options)
    eager = list(eager_runs(call, x, **options))
    actual, grad = run(call, x, impl, **options)
    scales = rounding_scales(call, x.double(), truth_grad, probes, **options)
    for k, (name, a, t) in enumerate(zip(truth._fields, actual, truth, strict=True)):
        assert (a is None) == (t is None), name
        if t is not None:
            assert a.dtype == torch.float32
            found = [out[k] for out, _ in eager]
            assert_within_budget(a, found, t, name=name, scale=scales[name])
    assert grad.dtype == x.policy.dtype
    eager_grads = [g for _, g in eager]
    assert_within_budget(grad, eager_grads, truth_grad, name="gradient", scale=scales["gradient"])
