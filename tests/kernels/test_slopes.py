"""Every objective's gradient against its formula in float64, at logits from 0 to 60."""

import math

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.testing import DTYPES

LOGITS = torch.tensor([0, 0.5, 2, 5, 8, 13, 18, 20, 30, 36, 38, 45, 52, 60], dtype=torch.float64)
Z = torch.cat([LOGITS, -LOGITS[1:]])
ALPHA, SMOOTH, TAU = 0.01, 0.1, 5.0


def up(z):
    """The sigmoid."""
    return torch.exp(torch.minimum(z, z * 0)) / (1 + torch.exp(-z.abs()))


# dloss/de_w of one pair at beta = 1, from the logit z.
SLOPES = {
    "dpo": (fl.dpo, {"beta": 1.0}, lambda z: up(-z)),
    "dpo-smoothed": (
        fl.dpo,
        {"beta": 1.0, "label_smoothing": SMOOTH},
        lambda z: (1 - SMOOTH) * up(-z) - SMOOTH * up(z),
    ),
    "robust_dpo": (
        fl.robust_dpo,
        {"beta": 1.0, "label_smoothing": SMOOTH},
        lambda z: ((1 - SMOOTH) * up(-z) + SMOOTH * up(z)) / (1 - 2 * SMOOTH),
    ),
    "poly_dpo": (
        fl.poly_dpo,
        {"beta": 1.0, "alpha": 8.0},
        lambda z: up(-z) * (1 + 8.0 * up(z)),
    ),
    "ipo": (fl.ipo, {"tau": TAU}, lambda z: -2 * (z - 0.5 / TAU)),
    "hinge": (fl.hinge, {"beta": 1.0}, lambda z: (z < 1).double()),
    "kto": (
        fl.kto,
        {"beta": 1.0, "baseline": torch.zeros(())},
        lambda z: 0.5 * up(z) * up(-z),
    ),
    "dmpo": (
        fl.dmpo,
        {"beta": 1.0, "alpha": ALPHA},
        lambda z: -up(z) * up(-z) * (z - math.log((1 - ALPHA) / ALPHA)),
    ),
    "linear_dpo": (fl.linear_dpo, {"beta": 1.0}, lambda z: (0.5 - 0.2 * z).clamp(1e-3, 1 - 1e-3)),
    "adaptive_dpo": (
        fl.adaptive_dpo,
        {"beta": 1.0, "minority": torch.zeros(len(Z)), "margin_scale": 0.0},
        lambda z: up(-z),
    ),
    "adaptive_ipo": (
        fl.adaptive_ipo,
        {"tau": TAU, "beta": 1.0, "minority": torch.zeros(len(Z)), "margin_scale": 0.0},
        lambda z: -2 * (z - 0.5 / TAU),
    ),
}


def gradient(call, options, dtype, impl, device):
    """dloss/de of the winners: errors of 1, and a reference whose errors make the logits exact."""
    policy = torch.ones(2 * len(Z), 1, dtype=dtype, device=device, requires_grad=True)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    reference = torch.cat([1 + Z, torch.ones(len(Z))]).to(device, exact)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    target = torch.zeros(len(Z), 1, dtype=dtype, device=device)
    loss = call(policy, reference, target, impl=impl, **options).loss
    (grad,) = torch.autograd.grad(len(Z) * loss, policy)
    return grad[: len(Z), 0].double().cpu() / 2


@pytest.fixture(params=["triton", "reference", "compiled", "small", "long"])
def impl(request, monkeypatch):
    """Every implementation; the default on a CPU has two ways besides the compiled one."""
    if request.param in ("small", "long"):
        monkeypatch.setattr(native, "takes", lambda _: False)
    if request.param == "long":
        monkeypatch.setattr(cpu, "small_loss", lambda *_: None)
    return request.param if request.param in ("triton", "reference") else None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", SLOPES)
def test_gradient_keeps_its_digits_in_both_tails(name, dtype, impl, device):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("the kernels take no float64")
    call, options, slope = SLOPES[name]
    found, expected = gradient(call, options, dtype, impl, device), slope(Z)
    # A few roundings of the arithmetic, one of the result; the smallest half-precision numbers.
    arithmetic = max(torch.finfo(dtype).eps, 8e-16)
    rtol = (16 if dtype in (torch.float32, torch.float64) else 1.01) * arithmetic
    atol = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    near = (found - expected).abs() <= rtol * expected.abs() + atol
    assert near.all(), (Z[~near], found[~near], expected[~near])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mapo_keeps_its_digits_in_both_tails(dtype, impl, device):
    """Here the logit itself is a difference times 1000, rounded once."""
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("the kernels take no float64")
    roots = 1 + torch.arange(-10, 11, dtype=torch.float64) / 128
    policy = torch.cat([roots.flip(0), roots])[:, None]
    target = torch.zeros(len(roots), 1, dtype=torch.float64)

    def step(policy, target, impl):
        policy = policy.detach().clone().requires_grad_()
        loss = fl.mapo(policy, target, impl=impl).loss
        return torch.autograd.grad(len(roots) * loss, policy)[0].double().cpu()[:, 0]

    found = step(policy.to(device, dtype), target.to(device, dtype), impl)
    e = policy[:, 0].square()
    x = 0.5 * e
    decay = x / torch.expm1(x)
    slope = 0.5 * (decay / x) * (1 - decay * torch.exp(x))
    v = 1000 * (decay[: len(roots)] - decay[len(roots) :])
    assert v.abs().max() > 55
    pull = 0.1 * 1000 * up(-v)
    expected = torch.cat([1 - pull * slope[: len(roots)], pull * slope[len(roots) :]])
    expected = expected * 2 * policy[:, 0]
    # In float64 the formula above is rounded as well.
    rounding = (4000 if dtype == torch.float64 else 1000) * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * 1e-3)
