"""Errors over a part of the latents: value and gradient against float64."""

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES
from tests.kernels.test_sides import laid, relaid

IMPLS = ("triton", "cpu", "reference")
DIMS = (4, 6, 10)


def masks(device="cpu"):
    """Shared by the channels and the pair, of each side, soft, and one that keeps nothing."""
    rng = torch.Generator().manual_seed(5)
    keep = torch.rand(6, *DIMS, generator=rng).to(device)
    shared = keep[:3, :1] > 0.4
    empty = shared.clone()
    empty[1] = False
    return {"shared": shared, "own": keep[:, :1] > 0.4, "soft": keep, "empty": empty}


def exact_errors(pred, target, mask):
    """Float64, `[6]`."""
    mask = mask.double().expand(len(mask), *DIMS)
    mask = mask if len(mask) == 6 else mask.repeat(2, 1, 1, 1)
    target = target.double() if len(target) == 6 else target.double().repeat(2, 1, 1, 1)
    sums = (mask * (pred.double() - target).square()).flatten(1).sum(1)
    return sums / mask.flatten(1).sum(1).clamp(min=1e-9)


@pytest.mark.parametrize("shared_target", [True, False])
@pytest.mark.parametrize("kind", ["shared", "own", "soft", "empty"])
@pytest.mark.parametrize("impl", IMPLS)
def test_errors_are_means_over_what_is_kept(impl, kind, shared_target, device, small_tiles):
    x = pair_inputs(3, DIMS, torch.float32, device, shared_target=shared_target)
    mask, weights = masks(device)[kind], torch.linspace(-1, 2, 6, device=device)
    policy, exact = x.policy.requires_grad_(), x.policy.detach().double().requires_grad_()
    found, expected = (
        fl.pair_errors(policy, x.target, mask=mask, impl=impl),
        exact_errors(exact, x.target, mask),
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-8)
    grad = torch.autograd.grad((weights * found).sum(), policy)[0]
    truth = torch.autograd.grad((weights.double() * expected).sum(), exact)[0]
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-8)
    kept = mask.expand(len(mask), *DIMS)
    assert grad[0][kept[0] == 0].eq(0).all()


MASKED = [(name, torch.float32) for name in CASES if name != "sdpo"]
MASKED += [(name, torch.bfloat16) for name in ("dpo", "mapo", "kto")]


@pytest.mark.parametrize(("name", "dtype"), MASKED)
@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_every_objective_takes_a_mask(impl, name, dtype, device):
    x = pair_inputs(3, (40,), dtype, device, n_annotators=2)
    keep = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)).to(device)
    results = []
    for y, way in ((x, impl), (x.double(), "reference")):
        y.policy = y.policy.detach().requires_grad_()
        out = CASES[name](y, mask=keep, impl=way)
        results.append((out, torch.autograd.grad(out.loss, y.policy)[0].double()))
    (masked, grad), (truth, expected) = results
    scale = expected.abs().max().item() * (1e-2 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(grad, expected, rtol=0, atol=scale)
    torch.testing.assert_close(masked.loss.double(), truth.loss, rtol=2e-3, atol=1e-5)
    exact = [exact_of(t, x.target, keep) for t in (x.policy, x.reference)]
    torch.testing.assert_close(masked.policy_error.double(), exact[0], rtol=2e-5, atol=1e-7)
    if masked.reference_error is not None:
        torch.testing.assert_close(masked.reference_error.double(), exact[1], rtol=2e-5, atol=1e-7)


def exact_of(pred, target, mask):
    mask, target = mask.double().repeat(2, 1), target.double().repeat(2, 1)
    return (mask * (pred.double() - target).square()).sum(1) / mask.sum(1)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_of_ones_changes_nothing(impl, device):
    x = pair_inputs(3, DIMS, torch.float32, device)
    policy = x.policy.requires_grad_()
    found = []
    for options in ({}, {"mask": torch.ones(3, 1, 1, 1, device=device)}):
        out = fl.hinge(policy, x.reference, x.target, beta=20.0, impl=impl, **options)
        found.append((out.loss, torch.autograd.grad(out.loss, policy)[0]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("layout", ["interleaved", "separate"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_lies_as_the_predictions_do(impl, layout, device, monkeypatch):
    x = pair_inputs(3, DIMS, torch.float32, device, shared_target=False)
    monkeypatch.setattr(cpu, "_PIECE", 32)
    mask = masks(device)["own"]
    policy = x.policy.requires_grad_()
    options = {"reduce": lambda sums: 2 * sums, "beta": 20.0, "impl": impl}
    plain = fl.kto(policy, x.reference, x.target, mask=mask, **options)
    expected = torch.autograd.grad(plain.loss, policy)[0]
    y, parts = relaid(x, layout)
    name = "interleaved" if layout == "interleaved" else "halves"
    found = fl.kto(y.policy, y.reference, y.target, mask=laid(mask, layout), layout=name, **options)
    grads = torch.autograd.grad(found.loss, parts)
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(found.policy_error, plain.policy_error)
    back = torch.cat(grads) if len(grads) == 2 else torch.cat([grads[0][::2], grads[0][1::2]])
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_as_one_graph(impl, device):
    x, mask = pair_inputs(3, DIMS, torch.float32, device), masks(device)["own"]

    def step(policy):
        return fl.dpo(policy, x.reference, x.target, beta=20.0, mask=mask, impl=impl).loss

    policy = x.policy.requires_grad_()
    expected = torch.autograd.grad(step(policy), policy)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(policy), policy)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_single_images_take_one_too(impl, device):
    x, mask = pair_inputs(3, DIMS, torch.float32, device), masks(device)["soft"][:5]
    policy, target = x.policy[:5], x.target.repeat(2, 1, 1, 1)[:5]
    padded = torch.cat([mask, mask[:1]])
    exact = exact_errors(x.policy, x.target, padded)[:5]
    out = fl.sft(policy, target, rows="winners", mask=mask, impl=impl)
    torch.testing.assert_close(out.policy_error.double(), exact, rtol=2e-6, atol=1e-8)
    labels = torch.arange(5, device=device) < 2
    liked = fl.kto(policy, x.reference[:5], target, beta=1.0, labels=labels, mask=mask, impl=impl)
    torch.testing.assert_close(liked.policy_error, out.policy_error)


def test_double_backward_is_refused(device):
    x, mask = pair_inputs(3, DIMS, torch.float32, device), masks(device)["shared"]
    policy = x.policy.requires_grad_()
    loss = fl.dpo(policy, x.reference, x.target, beta=1.0, mask=mask, impl="triton").loss
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(loss, policy, create_graph=True)


ONES = torch.ones
REFUSED = [
    (ValueError, r"mask must be \(4, 3\), or 2 rows", {"mask": ONES(3, 3)}),
    (ValueError, r"mask must be \(4, 3\), or 2 rows", {"mask": ONES(2, 2)}),
    (ValueError, r"mask must be \(4, 3\), or 2 rows", {"mask": ONES(4)}),
    (TypeError, "mask must be bool or floating-point", {"mask": ONES(2, 3).long()}),
    (TypeError, "mask must be a tensor, got float", {"mask": 1.0}),
    (ValueError, "mask must be on policy's cpu", {"mask": ONES(2, 3, device="meta")}),
    (ValueError, "takes no mask", {"mask": ONES(2, 3), "safeguard": 0.9}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSED)
def test_refuses(error, message, options):
    with pytest.raises(error, match=message):
        fl.dpo(ONES(4, 3), ONES(4, 3), ONES(2, 3), beta=1.0, **options)
