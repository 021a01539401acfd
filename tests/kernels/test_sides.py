"""Pairs that do not lie as two halves: interleaved, or winners and losers in tensors of their own.

Each gives what the halves give, to the bit where the same implementation reads them.
"""

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import PairTarget
from fastpo_kernels.testing import PairInputs, pair_inputs
from tests.kernels.objectives import CASES

IMPLS = ("triton", "cpu", "reference")
LAYOUTS = ("interleaved", "separate", "mixed")


def laid(t, layout):
    """`[2B, *dims]` in another layout."""
    winner, loser = t.chunk(2)
    if layout == "interleaved":
        return torch.stack([winner, loser], 1).flatten(0, 1)
    return winner.clone(), loser.clone()


def relaid(x, layout):
    """The inputs in another layout, and the policy's tensors that get a gradient."""
    full = [t if t.ndim == 1 else laid(t, layout) for t in (x.reference, *x.annotators)]
    policy, target = x.policy.detach(), x.target
    target = target if len(target) < len(policy) else laid(target, layout)
    if layout != "mixed":
        policy = laid(policy, layout)
    parts = policy if isinstance(policy, tuple) else (policy,)
    for part in parts:
        part.requires_grad_()
    return PairInputs(policy, full[0], target, full[1:]), parts


def as_halves(grads, layout):
    if len(grads) == 2:
        return torch.cat(grads)
    (grad,) = grads
    return torch.cat([grad[::2], grad[1::2]]) if layout == "interleaved" else grad


def both(call, x, layout, impl, **options):
    """Results and gradients of halves and of the layout."""
    policy = x.policy = x.policy.detach().requires_grad_()
    plain = call(x, impl=impl, **options)
    expected = torch.autograd.grad(total(plain), policy)[0]
    y, parts = relaid(x, layout)
    name = "interleaved" if layout == "interleaved" else "halves"
    found = call(y, impl=impl, layout=name, **options)
    grads = torch.autograd.grad(total(found), parts)
    return plain, expected, found, as_halves(grads, layout)


def total(out):
    n_pairs = len(out.margin)
    return 3 * out.loss.sum() + 0.1 * out.policy_error[:n_pairs].mean() + out.margin[0]


def assert_same(plain, expected, found, grad):
    for field, a, b in zip(plain._fields, found, plain, strict=True):
        assert (a is None) == (b is None), field
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dpo", "sdpo", "mapo", "sft", "adaptive_dpo-annotators"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_layout_gives_what_halves_give(impl, name, layout, device):
    x = pair_inputs(3, (2, 40), torch.float32, device, n_annotators=2)
    assert_same(*both(CASES[name], x, layout, impl))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_separate_targets_half_precision_and_small_tiles(impl, layout, device, small_tiles):
    x = pair_inputs(2, (3, 50), torch.bfloat16, device, shared_target=False)
    plain, expected, found, grad = both(CASES["sdpo"], x, layout, impl)
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["kto", "sdpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_over_processes_and_from_known_errors(impl, layout, name, device):
    x = pair_inputs(3, (2, 40), torch.float32, device)
    x.reference = fl.pair_errors(x.reference, x.target)
    options = {"reduce": lambda sums: 2 * sums, "reduction": "none", "sft_weight": 0.1}
    assert_same(*both(CASES[name], x, layout, impl, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_errors_are_winners_first(impl, layout, device):
    x = pair_inputs(3, (2, 40), torch.float32, device, shared_target=False)
    policy = x.policy.requires_grad_()
    weights = torch.linspace(-1, 2, 6, device=device)
    plain = fl.pair_errors(policy, x.target, impl=impl)
    expected = torch.autograd.grad((weights * plain).sum(), policy)[0]
    y, parts = relaid(x, layout)
    name = "interleaved" if layout == "interleaved" else "halves"
    found = fl.pair_errors(y.policy, y.target, layout=name, impl=impl)
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=1e-7)
    grads = torch.autograd.grad((weights * found).sum(), parts)
    torch.testing.assert_close(as_halves(grads, layout), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_formed_target_and_sides_that_lie_otherwise(impl, device):
    """A channels-last winner beside a contiguous loser."""
    x = pair_inputs(2, (4, 6, 10), torch.float32, device)
    latents, noise = (
        torch.randn(4, 4, 6, 10, device=device),
        torch.randn(2, 4, 6, 10, device=device),
    )
    target = PairTarget("flow", noise, latents)
    policy = x.policy.requires_grad_()
    plain = fl.hinge(policy, x.reference, target, beta=20.0, impl=impl)
    expected = torch.autograd.grad(plain.loss, policy)[0]
    winner, loser = x.policy.detach().chunk(2)
    winner = winner.to(memory_format=torch.channels_last).requires_grad_()
    loser = loser.clone().requires_grad_()
    found = fl.hinge((winner, loser), x.reference, target, beta=20.0, impl=impl)
    grads = torch.autograd.grad(found.loss, (winner, loser))
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-5, atol=1e-8)


def test_nothing_is_copied(device, monkeypatch):
    """The kernels get addresses inside of what was given, and fill the gradient in its layout."""
    from fastpo_kernels.pair_loss.gpu import launch

    seen = []
    real = launch.CachedLaunch.launch

    def watched(self, kernel, tensors, numbers):
        seen.append(tensors)
        return real(self, kernel, tensors, numbers)

    monkeypatch.setattr(launch.CachedLaunch, "launch", watched)
    x = pair_inputs(3, (2, 40), torch.float32, device)
    for layout in ("interleaved", "separate"):
        y, parts = relaid(x, layout)
        name = "interleaved" if layout == "interleaved" else "halves"
        loss = fl.dpo(y.policy, y.reference, y.target, beta=20.0, layout=name, impl="triton").loss
        grads = torch.autograd.grad(loss, parts)
        forward, backward = seen
        given = {
            p.data_ptr()
            for t in (y.policy, y.reference)
            for p in (t if isinstance(t, tuple) else (t,))
        }
        row = x.policy[0].numel() * x.policy.itemsize
        read = {t.data_ptr() for t in (*forward[0], *forward[2][:-1])}
        assert read == (given if layout == "separate" else given | {p + row for p in given})
        assert {backward[4].data_ptr()} <= {g.data_ptr() for g in grads}
        seen.clear()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_layouts_compile_as_one_graph(impl, device):
    x = pair_inputs(3, (2, 40), torch.float32, device)
    y, (policy,) = relaid(x, "interleaved")

    def loss(policy):
        return fl.dpo(
            policy, y.reference, y.target, beta=20.0, layout="interleaved", impl=impl
        ).loss

    expected = torch.autograd.grad(loss(policy), policy)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(policy), policy)[0], expected)


def test_double_backward_is_refused(device):
    y, (policy,) = relaid(pair_inputs(2, (40,), torch.float32, device), "interleaved")
    loss = fl.dpo(policy, y.reference, y.target, beta=1.0, layout="interleaved", impl="triton").loss
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(loss, policy, create_graph=True)


ONES = torch.ones
REFUSED = [
    (ValueError, "layout must be one of", {"layout": "pairs"}),
    (
        ValueError,
        r"policy must be a tensor or \(winner, loser\), got 3 parts",
        {"policy": (1, 2, 3)},
    ),
    (TypeError, r"must be \(winner, loser\) of tensors, got float", {"policy": (ONES(2, 3), 1.0)}),
    (TypeError, "must have one dtype", {"reference": (ONES(2, 3), ONES(2, 3).double())}),
    (ValueError, "one shape and device and not empty", {"target": (ONES(2, 3), ONES(1, 3))}),
    (ValueError, "reference must have policy's shape", {"reference": (ONES(3, 3), ONES(3, 3))}),
    (ValueError, r"target must be \(4, 3\)", {"target": (ONES(3, 3), ONES(3, 3))}),
    (ValueError, r"policy must be \[2B", {"policy": ONES(3, 3), "layout": "interleaved"}),
]


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED)
def test_refuses(error, message, changes):
    given = {"policy": ONES(4, 3), "reference": ONES(4, 3), "target": ONES(4, 3)} | changes
    with pytest.raises(error, match=message):
        fl.dpo(**given, beta=1.0)
