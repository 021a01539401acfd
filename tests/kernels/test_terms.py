"""Further terms of a loss: on the errors and margins that a loss returns, and by its options."""

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, check

STATISTICS = ("kto", "sdpo", "adaptive_dpo-annotators")


@pytest.fixture(params=["triton", "reference", "compiled", "pieces"])
def impl(request, monkeypatch):
    """Every implementation."""
    return _way(request, monkeypatch)


@pytest.fixture(params=["triton", "reference", "compiled", "small", "long", "pieces"])
def way(request, monkeypatch):
    """The same; the default on a CPU has three ways besides the compiled one."""
    return _way(request, monkeypatch)


def _way(request, monkeypatch):
    if request.param in ("small", "long", "pieces"):
        monkeypatch.setattr(native, "takes", lambda _: False)
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
def test_a_term_on_errors_and_margins_has_its_gradient(name, way, device):
    x = inputs(device)
    extra = by_hand(pair_inputs(3, (2, 40), torch.float32))
    x.policy = x.policy.requires_grad_()
    out = CASES[name](x, impl=way)
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


WITH_TERMS = [name for name in CASES if name != "sft"]
WITH_SLOPES = (
    *("dpo", "robust_dpo", "poly_dpo", "hinge", "kto", "dmpo", "linear_dpo", "sdpo"),
    "adaptive_dpo",
)


@pytest.mark.parametrize("name", WITH_TERMS)
def test_the_winners_error_joins_every_objective(name, impl, device):
    """In the same launch, value and gradient within the budget; a pair's weight is its too."""
    x = inputs(device)
    weight = torch.tensor([0.5, 0.0, 2.0], device=device)
    check(CASES[name], x, impl, sft_weight=0.3, pair_weight=weight)
    plain = CASES[name](x, impl=impl, pair_weight=weight)
    joined = CASES[name](x, impl=impl, pair_weight=weight, sft_weight=0.3)
    extra = 0.3 * (joined.weight * joined.policy_error[:3]).mean()
    torch.testing.assert_close(joined.loss, plain.loss + extra, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("sft", "sdpo")])
def test_a_safeguard_scales_every_objectives_loser(name, impl, device):
    x = inputs(device)
    check(CASES[name], x, impl, safeguard=0.9)
    x.policy = x.policy.detach().requires_grad_()
    plain, guarded = (CASES[name](x, impl=impl, **o) for o in ({}, {"safeguard": 0.9}))
    own, scaled = (torch.autograd.grad(out.loss, x.policy)[0] for out in (plain, guarded))
    torch.testing.assert_close(guarded.loss, plain.loss)
    torch.testing.assert_close(scaled[:3], own[:3], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scaled[3:], guarded.safeguard * own[3:], rtol=1e-4, atol=1e-9)
    winner, loser = (x.policy.detach().double().unflatten(0, (2, 3)) - x.target.double()).unbind()
    factor = (0.1 * winner.square().sum() / (winner * loser).sum()).clamp(0, 1)
    assert 0 < factor < 1 and plain.safeguard is None
    torch.testing.assert_close(guarded.safeguard.double(), factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_pairs_own_loss(name, impl, device):
    """Their mean is the loss, and weights given to them are those of the pairs' gradients."""
    x = inputs(device)
    x.policy = x.policy.detach().requires_grad_()
    given = torch.tensor([0.5, 0.0, 2.0], device=device)
    mean, each = (CASES[name](x, impl=impl, reduction=r) for r in ("mean", "none"))
    assert each.loss.shape == (3,) and torch.equal(each.margin, mean.margin)
    torch.testing.assert_close(each.loss.mean(), mean.loss)
    found = torch.autograd.grad((given * each.loss).mean(), x.policy)[0]
    weighted = CASES[name](x, impl=impl, pair_weight=given)
    expected = torch.autograd.grad(weighted.loss, x.policy)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_losses_of_pairs_and_a_term_share_a_gradient(impl, device):
    x = inputs(device)
    total = lambda out: out.loss.square().sum() + term(out)  # noqa: E731
    found = gradient(CASES["dpo"], x, impl, total, reduction="none")
    x = x.double()
    expected = gradient(CASES["dpo"], x, "reference", total, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WITH_SLOPES)
def test_every_pairs_own_beta(name, impl, device):
    """What each pair would give alone, but for statistics, which are the batch's."""
    x, betas = inputs(device), [4.0, 20.0, 60.0]
    options = {"mu": 0.9} if name == "sdpo" else {}
    options |= {"label_smoothing": 0.2} if name == "robust_dpo" else {}
    options |= {"alpha": 8.0} if name == "poly_dpo" else {}

    def call(x, beta, impl):
        return getattr(fl, name)(
            x.policy, x.reference, x.target, beta=beta, reduction="none", impl=impl, **options
        )

    x.policy = x.policy.detach().requires_grad_()
    out = call(x, torch.tensor(betas, device=device), impl)
    found = torch.autograd.grad(out.loss.sum(), x.policy)[0]
    exact = x.double()
    for k, beta in enumerate(betas):
        exact.policy = exact.policy.detach().requires_grad_()
        own = call(exact, beta, "reference").loss[k]
        expected = torch.autograd.grad(own, exact.policy)[0][[k, k + 3]]
        torch.testing.assert_close(out.loss[k].double(), own, rtol=1e-5, atol=1e-6)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found[[k, k + 3]].double(), expected, rtol=1e-4, atol=1e-5 * scale
        )


def test_maposs_own_beta(impl, device):
    x = inputs(device)
    betas = torch.tensor([0.1, 0.2, 0.4], device=device)
    found = fl.mapo(x.policy, x.target, beta=betas, reduction="none", impl=impl).loss
    for k in range(3):
        own = fl.mapo(x.policy, x.target, beta=betas[k].item(), reduction="none", impl=impl).loss
        torch.testing.assert_close(found[k], own[k])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_terms_compile_as_one_graph(impl, device):
    x = inputs(device)
    options = {"beta": torch.tensor([4.0, 20.0, 60.0]).to(device), "sft_weight": 0.3}
    options |= {"safeguard": 0.9, "reduction": "none", "impl": impl}

    def losses(policy):
        return fl.hinge(policy, x.reference, x.target, **options).loss

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    found, expected = (x.policy.detach().requires_grad_() for _ in range(2))
    compiled(found).sum().backward()
    losses(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("reduced", [False, True], ids=["own", "all processes"])
def test_ktos_weights_are_those_of_likes_and_dislikes(reduced, impl, device):
    x = inputs(device)
    options = {"reduce": lambda sums: 2 * sums} if reduced else {}
    check(CASES["kto"], x, impl, liked_weight=1.5, disliked_weight=0.25, **options)
    out = fl.kto(x.policy, x.reference, x.target, beta=20, liked_weight=1.5, disliked_weight=0.25,
                 impl=impl, reduction="none")  # fmt: skip
    gain = (out.reference_error - out.policy_error).double().detach()
    v = 20 * (gain - gain.mean().clamp(min=0))
    expected = 0.5 * (1.5 * torch.sigmoid(-v[:3]) + 0.25 * torch.sigmoid(v[3:]))
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["plain", "weights", "baseline", "reduce", "errors"])
def test_kto_of_labeled_images(case, impl, device):
    """Of an odd number of images, two of them liked, each against the formula in float64."""
    x = inputs(device)
    target = x.target.repeat(2, 1, 1)[:5]
    policy, reference = x.policy[:5].detach().requires_grad_(), x.reference[:5]
    labels = torch.tensor([True, False, False, True, False], device=device)
    weight = torch.linspace(0.5, 2, 5, device=device)
    options = {
        "plain": {},
        "weights": {"liked_weight": 1.5, "disliked_weight": 0.25, "pair_weight": weight},
        "baseline": {"baseline": torch.tensor(-0.1, device=device)},
        "reduce": {"reduce": lambda sums: sums * torch.tensor([3.0, 2.0], device=device)},
        "errors": {"beta": torch.linspace(5, 30, 5, device=device)},
    }[case]
    if case == "errors":
        reference = fl.pair_errors(reference, target)
    given = {"beta": 20.0} | options
    out = fl.kto(policy, reference, target, labels=labels, impl=impl, **given)
    grad = torch.autograd.grad(out.loss, policy)[0]
    exact = policy.detach().double().requires_grad_()
    e = (exact - target.double()).square().mean((1, 2))
    r = (x.reference[:5].double() - target.double()).square().mean((1, 2))
    gain, z0 = r - e, (r - e).mean().clamp(min=0).detach()
    z0 = {"baseline": -0.1, "reduce": (1.5 * gain.mean().detach()).clamp(min=0)}.get(case, z0)
    sign = labels.double() * 2 - 1
    losses = 1 - torch.sigmoid(sign * given["beta"] * (gain - z0))
    if case == "weights":
        losses = losses * torch.where(labels, 1.5, 0.25) * weight
    torch.testing.assert_close(out.loss.double(), losses.mean(), rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(losses.mean(), exact)[0]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)
    signs = fl.kto(policy, reference, target, labels=sign, impl=impl, reduction="none", **given)
    torch.testing.assert_close(signs.loss.mean(), out.loss)


def test_labels_of_pairs_are_the_pairs(impl, device):
    x = inputs(device)
    target = x.target.repeat(2, 1, 1)
    labels = torch.arange(6, device=device) < 3
    single = fl.kto(x.policy, x.reference, target, beta=20.0, labels=labels, impl=impl)
    pairs = fl.kto(x.policy, x.reference, x.target, beta=20.0, impl=impl)
    torch.testing.assert_close(single.loss, pairs.loss)


LABELS_REFUSED = [
    ({"labels": torch.ones(3)}, r"labels must be \[4\], got \(3,\)"),
    ({"safeguard": 0.5}, "kto with labels takes no safeguard, sft_weight or layout"),
    ({"target": torch.ones(2, 3)}, r"target must have policy's shape \(4, 3\)"),
    ({"reference": torch.ones(3, 3)}, "reference must have policy's shape"),
    ({"pair_weight": torch.ones(2)}, r"pair_weight must be \[4\]"),
    ({"beta": torch.ones(2)}, r"beta must be \[4\]"),
    ({"baseline": torch.ones(()), "reduce": lambda sums: sums}, "got both"),
]


@pytest.mark.parametrize(("changes", "message"), LABELS_REFUSED)
def test_labels_refuse(changes, message):
    ones = torch.ones(4, 3)
    given = {"policy": ones, "reference": ones, "target": ones, "labels": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        fl.kto(**{**given, "beta": 1.0, **changes})


def test_a_given_baseline_is_taken_as_it_is(impl, device):
    """Below zero too; the batch's own mean is not let below it."""
    x = inputs(device)
    given = torch.tensor(-0.5, device=device)
    out = fl.kto(x.policy, x.reference, x.target, beta=2.0, baseline=given, impl=impl)
    gain = (out.reference_error - out.policy_error).double().detach()
    v = 2 * (gain + 0.5)
    expected = 0.5 * (torch.sigmoid(-v[:3]) + torch.sigmoid(v[3:])).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-7)


def test_margins_that_are_not_normalized(impl, device):
    """The metric of one judge is sigmoid(-rho d)."""
    x = inputs(device)
    options = {"beta": 20, "normalize": "none", "rho": 30.0, "impl": impl}
    out = fl.adaptive_dpo(x.policy, x.reference, x.target, **options)
    torch.testing.assert_close(out.minority, torch.sigmoid(-30 * out.margin))
    check(lambda x, **k: fl.adaptive_dpo(x.policy, x.reference, x.target, beta=20, rho=30.0,
                                         annotators=x.annotators, normalize="none", **k),
          inputs(device), impl)  # fmt: skip


def test_the_released_sign_by_its_name(impl, device):
    x = inputs(device)
    options = {"tau": 5, "beta": 20, "impl": impl}
    named = fl.adaptive_ipo(x.policy, x.reference, x.target, released_sign=True, **options)
    turned = fl.adaptive_ipo(x.policy, x.reference, x.target, margin_scale=-1.0, **options)
    plain = fl.adaptive_ipo(x.policy, x.reference, x.target, **options)
    assert torch.equal(named.loss, turned.loss) and named.loss != plain.loss


@pytest.mark.parametrize("n_rows", [1, 4, 7])
def test_errors_and_fine_tuning_take_any_number_of_rows(n_rows, impl, device):
    """All of them count: half of an even number would be taken for losers."""
    rng = torch.Generator().manual_seed(0)
    policy, target = (torch.randn(n_rows, 3, 5, generator=rng).to(device) for _ in range(2))
    weight = torch.linspace(0.5, 2, n_rows, device=device)
    policy.requires_grad_()
    exact = policy.detach().double().requires_grad_()
    errors = (exact - target.double()).square().mean((1, 2))
    found = fl.pair_errors(policy, target, impl=impl)
    torch.testing.assert_close(found.double(), errors, rtol=1e-5, atol=1e-7)
    out = fl.sft(policy, target, rows="winners", pair_weight=weight, impl=impl)
    loss = (weight.double() * errors).mean()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-7)
    grads = torch.autograd.grad(out.loss, policy)[0], torch.autograd.grad(loss, exact)[0]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-7)
    each = fl.sft(policy, target, rows="winners", reduction="none", impl=impl)
    assert torch.equal(each.loss, each.policy_error) and torch.equal(each.margin, -each.loss)


def test_fine_tuning_on_pairs_or_winners_is_not_guessed(impl, device):
    x = pair_inputs(3, (4, 5), torch.float32, device, shared_target=False)
    with pytest.raises(ValueError, match="give rows='winners' to train on all 6, or rows='pairs'"):
        fl.sft(x.policy, x.target, impl=impl)
    pairs = fl.sft(x.policy, x.target, rows="pairs", impl=impl)
    alone = fl.sft(x.policy[:3], x.target[:3], rows="winners", impl=impl)
    torch.testing.assert_close(pairs.loss, alone.loss)


SFT_REFUSED = [
    ({"rows": "all"}, "rows must be one of"),
    ({"rows": "winners", "target": torch.ones(2, 3)}, r"needs a target of policy's shape \(4, 3\)"),
    (
        {"rows": "winners", "target": fl.PairTarget("epsilon", torch.ones(2, 3))},
        "needs policy and target to be tensors",
    ),
    ({"rows": "winners", "pair_weight": torch.ones(2)}, r"pair_weight must be \[4\]"),
    ({"rows": "winners", "reduction": "sum"}, "reduction must be one of"),
]


@pytest.mark.parametrize(("options", "message"), SFT_REFUSED)
def test_fine_tuning_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fl.sft(torch.ones(4, 3), **{"target": torch.ones(4, 3), **options})
    with pytest.raises(ValueError, match="an odd number of rows needs a target"):
        fl.pair_errors(torch.ones(3, 3), torch.ones(2, 3))


REFUSED = [
    ({"sft_weight": -0.1}, "sft_weight must be finite and not negative"),
    ({"sft_weight": float("nan")}, "sft_weight must be finite and not negative"),
    ({"safeguard": 1.5}, r"safeguard \(mu\) must be in \[0, 1\]"),
    ({"reduction": "sum"}, r"reduction must be one of \('mean', 'none'\), got 'sum'"),
    ({"reduce": lambda sums: sums}, "dpo has no batch statistics"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refuses(options, message):
    x = inputs()
    with pytest.raises(ValueError, match=message):
        fl.dpo(x.policy, x.reference, x.target, beta=1.0, **options)


def test_dpo_without_a_reference_is_one_of_errors_of_zero(impl, device):
    x = inputs(device)
    out = fl.dpo(x.policy, torch.zeros(6, device=device), x.target, beta=20.0, impl=impl)
    e = (x.policy.double().unflatten(0, (2, 3)) - x.target.double()).square().mean((2, 3))
    expected = torch.nn.functional.softplus(20 * (e[0] - e[1])).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-7)
