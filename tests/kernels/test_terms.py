"""Further terms of a loss: on the errors and margins that a loss returns, and by its options."""

import pytest
import torch

from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES

STATISTICS = ("kto", "sdpo", "adaptive_dpo-annotators")


@pytest.fixture(params=["triton", "reference", "small", "long", "pieces"])
def impl(request, monkeypatch):
    """Every implementation; the default on a CPU has three ways."""
    if request.param in ("long", "pieces"):
        monkeypatch.setattr(cpu, "small_loss", lambda *_: None)
    if request.param == "pieces":
        monkeypatch.setattr(cpu, "_PIECE", 32)
    return request.param if request.param in ("triton", "reference") else None


def inputs(device="cpu", n_pairs=3):
    return pair_inputs(n_pairs, (2, 40), torch.float32, device, n_annotators=2)


def term(out):
    """The winners' mean error, and every margin by a weight of its own."""
    n_pairs = len(out.margin)
    weights = torch.linspace(-1, 2, n_pairs).to(out.margin)
    return 0.1 * out.policy_error[:n_pairs].mean() + (weights * out.margin).sum()


def gradient(call, x, impl, total, **options):
    policy = x.policy = x.policy.detach().requires_grad_()
    out = call(x, impl=impl, **options)
    return torch.autograd.grad(total(out), policy)[0]


def by_hand(x):
    """The gradient of `term`, in float64 from the predictions."""
    policy = x.policy.detach().double().requires_grad_()
    target = x.target.double().repeat(2, 1, 1)
    e = (policy - target).square().flatten(1).mean(1)
    r = (x.reference.double() - target).square().flatten(1).mean(1)
    n_pairs = len(e) // 2
    d = (r - e)[:n_pairs] - (r - e)[n_pairs:]
    weights = torch.linspace(-1, 2, n_pairs, dtype=torch.float64)
    total = 0.1 * e[:n_pairs].mean() + (weights * d).sum()
    return torch.autograd.grad(total, policy)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_term_on_errors_and_margins_has_its_gradient(name, impl, device):
    x = inputs(device)
    extra = by_hand(pair_inputs(3, (2, 40), torch.float32))
    x.policy = x.policy.requires_grad_()
    out = CASES[name](x, impl=impl)
    own, both, alone = (
        torch.autograd.grad(total, x.policy, retain_graph=True)[0]
        for total in (2 * out.loss, 2 * out.loss + term(out), term(out))
    )
    torch.testing.assert_close(alone.double().cpu(), extra, rtol=1e-5, atol=1e-7)
    scale = own.abs().max().item()
    torch.testing.assert_close(
        both.double().cpu(), own.double().cpu() + extra, rtol=1e-5, atol=2e-6 * scale
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_a_term_beside_a_reduction_over_processes(name, impl, device):
    x = inputs(device)
    options = {"reduce": lambda sums: 2 * sums}
    alone = gradient(CASES[name], x, impl, term, **options)
    extra = by_hand(pair_inputs(3, (2, 40), torch.float32))
    torch.testing.assert_close(alone.double().cpu(), extra, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_term_compiles_with_the_loss(impl, device):
    x = inputs(device)
    expected = gradient(CASES["dpo"], x, impl, lambda out: out.loss + term(out))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(policy):
        x.policy = policy
        out = CASES["dpo"](x, impl=impl)
        return out.loss + term(out)

    policy = x.policy.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(total(policy), policy)[0], expected)


def test_a_term_costs_no_launch(monkeypatch, device):
    from fastpo_kernels.pair_loss.gpu import launch

    launched = []
    for name in ("launch_forward", "launch_backward"):
        real = getattr(launch, name)
        counted = lambda *a, real=real, name=name: launched.append(name) or real(*a)  # noqa: E731
        monkeypatch.setattr(launch, name, counted)
    gradient(CASES["dpo"], inputs(device), "triton", lambda out: out.loss + term(out))
    assert launched == ["launch_forward", "launch_backward"]
