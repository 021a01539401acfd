"""Targets named by their parts: the tensor that they stand for, and losses that take them."""

from dataclasses import replace

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import PairDraw, PairTarget
from fastpo_kernels.pair_noise import Stream, noised_pair, pair_normal
from fastpo_kernels.testing import pair_inputs

IMPLS = ("triton", "cpu", "reference", None)


def make(kind, dims=(3, 5, 5), dtype=torch.float32, device="cpu", n_pairs=2):
    """The target of `kind`."""
    rng = torch.Generator().manual_seed(1)

    def normal(rows):
        return torch.randn(rows, *dims, generator=rng).to(device, dtype)

    name, *how = kind.split("-")
    keys = (2**62 + 7 * torch.arange(n_pairs)).to(device)
    draw = PairDraw(2**32 - 5, keys, torch.arange(n_pairs, device=device))
    return PairTarget(
        {"v": "v_prediction"}.get(name, name),
        normal(n_pairs) if "stored" in how else None,
        None if name == "epsilon" else normal(2 * n_pairs),
        torch.linspace(0.2, 0.9, n_pairs, device=device) if name == "v" else None,
        torch.linspace(0.8, 0.1, n_pairs, device=device) if name == "v" else None,
        None if how == ["stored"] else draw,
        normal(2 * n_pairs) - 3 if "posterior" in how else None,
        shift=0.1,
        scale=0.7,
    )


def test_targets_are_formed_by_their_formulas():
    signal, sigma = torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.9])
    noise, latents = torch.randn(2, 3), torch.randn(4, 3)
    policy = torch.zeros(4, 3)
    x = (latents - 0.5) * 2.0
    v = PairTarget("v_prediction", noise, latents, signal, sigma, shift=0.5, scale=2.0)
    rows = [0, 1, 0, 1]
    expected = signal[rows, None] * noise[rows] - sigma[rows, None] * x
    torch.testing.assert_close(v.form(policy), expected)
    flow = PairTarget("flow", noise, latents, shift=0.5, scale=2.0)
    torch.testing.assert_close(flow.form(policy), noise[rows] - x)
    draw = PairDraw(3, torch.tensor([5, 6]), torch.tensor([0, 1]))
    drawn = PairTarget("epsilon", draw=draw).form(policy)
    assert torch.equal(drawn, pair_normal(draw.pair_key, draw.visit, (3,), seed=3))
    logvar = torch.full((4, 3), -1.0)
    posterior = PairTarget("flow", noise, latents, draw=draw, logvar=logvar).form(policy)
    sides = (Stream.POSTERIOR_WINNER, Stream.POSTERIOR_LOSER)
    extra = torch.cat(
        [pair_normal(draw.pair_key, draw.visit, (3,), seed=3, stream=s) for s in sides]
    )
    expected = noise[rows] - latents - torch.exp(torch.tensor(-0.5)) * extra
    torch.testing.assert_close(posterior, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_sides_may_have_noise_and_factors_of_their_own(prediction):
    """Trainers that draw for every image: each side is as if it were the pair's."""
    noise, latents, policy = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, 3)
    factors = torch.linspace(0.2, 0.9, 8).split(4) if prediction == "v_prediction" else ()
    latents = None if prediction == "epsilon" else latents
    found = PairTarget(prediction, noise, latents, *factors, shift=0.5, scale=2.0).form(policy)
    x = 0 if latents is None else (latents - 0.5) * 2
    expected = noise - x if prediction == "flow" else noise
    if factors:
        expected = factors[0][:, None] * noise - factors[1][:, None] * x
    torch.testing.assert_close(found, expected)
    both = [PairTarget(prediction, noise[:2].repeat(2, 1), latents,
                       *(f[:2].repeat(2) for f in factors)),
            PairTarget(prediction, noise[:2], latents, *(f[:2] for f in factors))]  # fmt: skip
    own, shared = (target.form(policy) for target in both)
    assert torch.equal(own, shared if len(shared) == 4 else shared.repeat(2, 1))
    policy = torch.randn(4, 3)
    losses = [fl.mapo(policy, t, impl=impl).loss for t in both for impl in ("reference", None)]
    assert torch.allclose(torch.stack(losses), losses[0])


@pytest.mark.parametrize("posterior", [False, True], ids=["mean", "posterior"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_formed_targets_are_those_of_the_noise(impl, prediction, posterior, device):
    rng = torch.Generator().manual_seed(0)
    latents, logvar = (torch.randn(4, 2, 5, 9, generator=rng).to(device) for _ in range(2))
    keys = torch.tensor([2**62 + 3, 2**31 + 1], device=device)
    power = torch.linspace(0.99, 0.005, 50, device=device)
    signal, sigma = power.sqrt(), (1 - power).sqrt()
    logvar = logvar - 2 if posterior else None
    pair = noised_pair(
        latents, keys, keys % 7, signal, sigma, seed=9, low=3, high=47, prediction=prediction,
        logvar=logvar, shift=0.2, scale=0.5, impl=impl,
    )  # fmt: skip
    v = prediction == "v_prediction"
    target = PairTarget(
        prediction,
        latents=None if prediction == "epsilon" else latents,
        signal=signal[pair.timesteps] if v else None,
        sigma=sigma[pair.timesteps] if v else None,
        draw=PairDraw(9, keys, keys % 7),
        logvar=None if prediction == "epsilon" else logvar,
        shift=0.2,
        scale=0.5,
    )
    found = target.form(latents)
    # The kernel's normals and the reference's agree to the rounding of their functions.
    tolerance = {"rtol": 2e-6, "atol": 4e-6} if impl == "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, pair.target, **tolerance)


KINDS = ("epsilon-stored", "epsilon-drawn", "v-stored", "v-posterior", "flow-drawn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_takes_a_target_as_it_takes_the_tensor(impl, kind, dtype, device):
    target = make(kind, dtype=dtype, device=device)
    x = pair_inputs(2, (3, 5, 5), dtype, device)
    results = []
    for given in (target, target.form(x.policy)):
        policy = x.policy.detach().requires_grad_()
        out = fl.sdpo(policy, x.reference, given, beta=20.0, mu=0.9, impl=impl)
        (grad,) = torch.autograd.grad(out.loss, policy)
        errors = fl.pair_errors(policy.detach(), given, impl=impl)
        results.append((*out[:4], grad, errors))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_only_the_policy_gets_a_gradient():
    target = make("v-stored", (40,))
    target.latents.requires_grad_()
    policy = torch.randn(4, 40, requires_grad=True)
    fl.sft(policy, target).loss.backward()
    assert policy.grad is not None and target.latents.grad is None
    assert not fl.sft(policy.detach(), target).loss.requires_grad


def test_noise_and_loss_compile_as_one_graph(device):
    x, target = pair_inputs(2, (9,), device=device), make("v-stored", (9,), device=device)

    def step(policy):
        return fl.dpo(policy, x.reference, target, beta=20.0, impl="reference").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.policy), step(x.policy))


NOISE, LATENTS, HALF = torch.ones(2, 3), torch.ones(4, 3), torch.full((2,), 0.5)
DRAW = PairDraw(1, torch.arange(2), torch.arange(2))
REFUSED = [
    (ValueError, "prediction must be one of", ("x0", NOISE), {}),
    (ValueError, "v_prediction needs latents", ("v_prediction", NOISE), {}),
    (ValueError, "v_prediction needs sigma", ("v_prediction", NOISE, LATENTS, HALF), {}),
    (ValueError, "epsilon takes no latents", ("epsilon", NOISE, LATENTS), {}),
    (ValueError, "flow takes no signal", ("flow", NOISE, LATENTS, HALF), {}),
    (ValueError, "needs noise, or a draw", ("epsilon",), {}),
    (ValueError, "logvar needs latents", ("flow", NOISE, LATENTS), {"logvar": LATENTS}),
    (ValueError, r"noise must be \(2, 3\) or \(4, 3\)", ("epsilon", torch.ones(3, 3)), {}),
    (ValueError, r"latents must be \(4, 3\)", ("flow", NOISE, NOISE), {}),
    (
        ValueError,
        r"signal must be \(2,\) or \(4,\)",
        ("v_prediction", NOISE, LATENTS, LATENTS, HALF),
        {},
    ),
    (ValueError, "noise must be on policy's cpu", ("epsilon", NOISE.to("meta")), {}),
    (TypeError, "noise must be a floating-point tensor", ("epsilon", NOISE.long()), {}),
    (TypeError, "latents must be a tensor, got list", ("flow", NOISE, [1.0]), {}),
    (TypeError, "draw must be a PairDraw, got int", ("epsilon",), {"draw": 3}),
    (TypeError, "pair_key must be int64", ("epsilon",), {"draw": replace(DRAW, pair_key=HALF)}),
    (ValueError, r"seed must lie in \[0, 2\^32\)", ("epsilon",), {"draw": replace(DRAW, seed=-1)}),
]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), REFUSED)
def test_refuses(error, message, arguments, options):
    with pytest.raises(error, match=message):
        fl.sft(torch.ones(4, 3), PairTarget(*arguments, **options))
