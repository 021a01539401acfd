"""Targets formed inside the losses, from noise that is read or drawn again."""

from dataclasses import replace

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import PairDraw, PairTarget, ops
from fastpo_kernels.pair_noise import Stream, noised_pair, pair_normal
from fastpo_kernels.testing import (
    DTYPES,
    PairInputs,
    assert_within_budget,
    pair_inputs,
    rounding_scales,
)

IMPLS = ("triton", "reference")
KINDS = (
    "epsilon-stored", "epsilon-drawn", "v-stored", "v-drawn", "v-posterior",
    "flow-stored", "flow-drawn", "flow-posterior", "flow-stored-posterior",
)  # fmt: skip
CALLS = {
    "dpo": lambda x, **k: fl.dpo(x.policy, x.reference, x.target, beta=20, **k),
    "sdpo": lambda x, **k: fl.sdpo(x.policy, x.reference, x.target, beta=20, mu=0.9, **k),
    "mapo": lambda x, **k: fl.mapo(x.policy, x.target, **k),
    "adaptive_dpo": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, annotators=x.annotators, margin_scale=20, **k
    ),
}


def make(kind, dims=(3, 5, 5), dtype=torch.float32, device="cpu", n_pairs=2):
    """Predictions near the target of `kind`, which is a `PairTarget`, and annotators."""
    rng = torch.Generator().manual_seed(1)

    def normal(rows):
        return torch.randn(rows, *dims, generator=rng).to(device, dtype)

    name, *how = kind.split("-")
    keys = (2**62 + 7 * torch.arange(n_pairs)).to(device)
    draw = PairDraw(2**32 - 5, keys, torch.arange(n_pairs, device=device))
    target = PairTarget(
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
    x = pair_inputs(n_pairs, dims, torch.float64, device, n_annotators=2)
    full = [x.policy, x.reference, *x.annotators]
    ready = target.form(x.policy)
    moved = ready.repeat(2 * n_pairs // len(ready), *[1] * len(dims)) - x.target.repeat(
        2, *[1] * len(dims)
    )
    full = [(t + moved).to(dtype) for t in full]
    return PairInputs(full[0], full[1], target, full[2:])


def double(x):
    """The same numbers in float64; the draws are made in float64 too."""
    names = ("noise", "latents", "logvar", "signal", "sigma")
    parts = {n: getattr(x.target, n) for n in names}
    target = replace(x.target, **{n: t.double() for n, t in parts.items() if t is not None})
    full = [t.detach().double() for t in (x.policy, x.reference, *x.annotators)]
    return PairInputs(full[0], full[1], target, full[2:])


def run(call, x, impl, **options):
    policy = x.policy.detach().requires_grad_()
    out = call(replace(x, policy=policy), impl=impl, **options)
    return out, torch.autograd.grad(3.25 * out.loss, policy)[0]


def check(call, x):
    """The kernel's outputs and gradient against float64, within the budget of the house."""
    truth, truth_grad = run(call, double(x), "reference")
    ready = replace(x, target=x.target.form(x.policy))
    orders = [slice(None), torch.arange(x.policy[0].numel() - 1, -1, -1)]
    eager = []
    for order in orders:
        full = [t.flatten(1)[:, order] for t in ready.tensors()]
        out, grad = run(call, PairInputs(*full[:3], full[3:]), "reference")
        eager.append((out, grad[:, order].reshape(x.policy.shape)))
    actual, grad = run(call, x, "triton")
    exact = double(x)
    formed = replace(exact, target=exact.target.form(exact.policy))
    scales = rounding_scales(call, formed, truth_grad)
    for k, (name, a, t) in enumerate(zip(truth._fields, actual, truth, strict=True)):
        assert (a is None) == (t is None), name
        if t is not None:
            found = [out[k] for out, _ in eager]
            assert_within_budget(a, found, t, name=name, scale=scales[name])
    eager_grads = [g for _, g in eager]
    assert_within_budget(grad, eager_grads, truth_grad, name="gradient", scale=scales["gradient"])


# Every part in every dtype: the first has no noise, the second no schedule, which is float32.
ALL_PARTS = ("v-posterior", "flow-stored-posterior")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for k in KINDS for d in (DTYPES if k in ALL_PARTS else DTYPES[:1])],
    ids=str,
)
def test_every_kind_within_budget(kind, dtype, device, small_tiles):
    check(CALLS["dpo"], make(kind, dtype=dtype, device=device))


SIZES = [("v-posterior", 1), ("v-posterior", 7), ("epsilon-drawn", 1000), ("flow-stored", 65537)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_sizes_within_budget(kind, size, device):
    # A long row is many programs, and each costs the interpreter the same.
    n_pairs = 1 if size > 1000 else 2
    check(CALLS["dpo"], make(kind, (size,), torch.bfloat16, device, n_pairs=n_pairs))


# The safeguard's product has a path for a shared target and one for separate ones.
OTHERS = [("sdpo", "epsilon-drawn"), ("sdpo", "v-posterior"), ("mapo", "epsilon-drawn")]
OTHERS += [("adaptive_dpo", "v-posterior")]


@pytest.mark.parametrize(("name", "kind"), OTHERS)
def test_other_objectives_within_budget(name, kind, device, small_tiles):
    check(CALLS[name], make(kind, (5, 40), device=device))


def test_reference_forms_the_targets_by_their_formulas():
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


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_passes_gradcheck(kind):
    x = double(make(kind, (5,)))

    def loss(policy):
        return CALLS["dpo"](replace(x, policy=policy), impl="reference").loss

    assert torch.autograd.gradcheck(loss, (x.policy.requires_grad_(),))


def sources(device, dims=(2, 5, 9)):
    """Latents, log-variances, keys, and a schedule's two tables."""
    rng = torch.Generator().manual_seed(0)
    latents, logvar = (torch.randn(4, *dims, generator=rng).to(device) for _ in range(2))
    keys = torch.tensor([2**62 + 3, 2**31 + 1], device=device)
    power = torch.linspace(0.99, 0.005, 50, device=device)
    return latents, logvar - 2, keys, power.sqrt(), (1 - power).sqrt()


def noised(given, prediction, target, impl, *, posterior):
    """A `NoisedPair` as the trainer makes it."""
    latents, logvar, keys, signal, sigma = given
    return noised_pair(
        latents, keys, keys % 7, signal, sigma, seed=9, low=3, high=47, prediction=prediction,
        target=target, logvar=logvar if posterior else None, shift=0.2, scale=0.5, impl=impl,
    )  # fmt: skip


@pytest.mark.parametrize("posterior", [False, True], ids=["mean", "posterior"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("impl", IMPLS)
def test_stored_and_redrawn_equal_the_ready_target_bitwise(impl, prediction, posterior, device):
    """One device, one implementation: a draw is the same in the noise kernel and in the loss."""
    results = []
    for form in ("ready", "stored", "redrawn"):
        pair = noised(sources(device), prediction, form, impl, posterior=posterior)
        x = pair_inputs(2, (2, 5, 9), torch.bfloat16, device)
        x.target = pair.target
        assert isinstance(x.target, PairTarget) == (
            form == "redrawn" or (form, prediction == "epsilon") == ("stored", False)
        )
        out, grad = run(CALLS["sdpo"], x, impl)
        errors = fl.pair_errors(x.policy, x.target, impl=impl)
        results.append([pair.noisy_latents, pair.timesteps, *out[:4], grad, errors])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["epsilon-drawn", "v-posterior", "flow-stored-posterior"])
def test_rerun_is_bitwise_equal_and_reads_nothing_unset(kind, device, small_tiles, nan_poisoned):
    x = make(kind, (3, 31), torch.bfloat16, device, n_pairs=2)
    first, first_grad = run(CALLS["adaptive_dpo"], x, "triton")
    again, again_grad = run(CALLS["adaptive_dpo"], x, "triton")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()
    assert torch.equal(first_grad, again_grad) and torch.isfinite(first_grad).all()


LAYOUTS = {
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["v-posterior", "flow-stored"])
def test_strided_inputs_are_read_as_they_are(kind, layout, device, small_tiles):
    x = make(kind, (2, 6, 8), device=device, n_pairs=2)
    expected, expected_grad = run(CALLS["dpo"], x, "triton")
    moved = LAYOUTS[layout]
    parts = {n: getattr(x.target, n) for n in ("noise", "latents", "logvar")}
    target = replace(x.target, **{n: moved(t) for n, t in parts.items() if t is not None})
    y = PairInputs(moved(x.policy), x.reference, target)
    out, grad = run(CALLS["dpo"], y, "triton")
    torch.testing.assert_close(out.policy_error, expected.policy_error)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_rows_beyond_two_to_the_31_elements(device):
    """Only the pages that are read exist: two rows of each stream, 2^31 elements apart."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory: there every page exists")
    far = 2**31 + 1024
    x = make("flow-stored-posterior", (64,), torch.bfloat16, device, n_pairs=1)
    expected, expected_grad = run(CALLS["dpo"], x, "triton")

    def apart(t):
        spread = torch.empty(far + 64, dtype=t.dtype, device=device).as_strided((2, 64), (far, 1))
        return spread.copy_(t)

    target = replace(x.target, latents=apart(x.target.latents), logvar=apart(x.target.logvar))
    out, grad = run(CALLS["dpo"], PairInputs(apart(x.policy), x.reference, target), "triton")
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_operators_pass_opcheck(device):
    x = make("v-drawn", (16,), device=device, n_pairs=1)
    encoded, options = x.target.encode(), (None, None, None, "dpo", [20.0, 0.0, 0.0], "", [])
    policy = x.policy.requires_grad_()
    torch.library.opcheck(
        ops.pair_loss_fwd, (policy, x.reference, *encoded, [], *options, None, None)
    )
    torch.library.opcheck(ops.pair_errors_fwd, (policy, *encoded))
    ones = torch.ones(2, device=device)
    torch.library.opcheck(ops.pair_loss_bwd, (policy.detach(), *encoded, ones, None))


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_and_loss_compile_as_one_graph(impl, device):
    x, given = pair_inputs(2, (2, 5, 9), device=device), sources(device)

    def step(policy):
        # A draw is a hundred operators of the reference to trace, and one launch of ours.
        pair = noised(given, "v_prediction", "redrawn", impl, posterior=impl == "triton")
        return CALLS["dpo"](replace(x, policy=policy, target=pair.target), impl=impl).loss

    losses, grads = [], []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        policy = x.policy.detach().requires_grad_()
        losses.append(function(policy))
        grads.append(torch.autograd.grad(losses[-1], policy)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_composes(impl, device):
    """Autocast changes nothing, no_grad is honored, and only the policy gets a gradient."""
    x = make("v-stored", (40,), device=device)
    x.policy.requires_grad_()
    x.target.latents.requires_grad_()
    plain = CALLS["dpo"](x, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(CALLS["dpo"](x, impl=impl).loss, plain.loss)
    with torch.no_grad():
        assert not CALLS["dpo"](x, impl=impl).loss.requires_grad
    plain.loss.backward()
    assert x.policy.grad is not None and x.target.latents.grad is None


def test_double_backward_and_vmap_are_refused(device):
    x = make("v-drawn", (40,), device=device)
    policy = x.policy.requires_grad_()
    (grad,) = torch.autograd.grad(CALLS["dpo"](x, impl="triton").loss, policy, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda p: CALLS["dpo"](replace(x, policy=p), impl="triton").loss)(policy[None])


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
    (ValueError, r"noise must be \(2, 3\)", ("epsilon", LATENTS), {}),
    (ValueError, r"latents must be \(4, 3\)", ("flow", NOISE, NOISE), {}),
    (ValueError, r"signal must be \(2,\)", ("v_prediction", NOISE, LATENTS, LATENTS, HALF), {}),
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


def test_refuses_strided_vectors_and_float64_in_the_kernel(device):
    x = make("v-stored", (4,), device=device, n_pairs=2)
    strided = replace(x.target, signal=torch.ones(4, device=device)[::2])
    with pytest.raises(ValueError, match="needs target's signal contiguous"):
        fl.sft(x.policy, strided, impl="triton")
    with pytest.raises(TypeError, match="takes float32, bfloat16 or float16"):
        fl.sft(x.policy, replace(x.target, noise=x.target.noise.double()), impl="triton")
