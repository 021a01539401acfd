"""Every objective against numbers worked by hand.

Two pairs, one element each, target 0, so an error is the prediction squared:
e_w = (0.25, 1), e_l = (1, 0.25); r_w = (0.5, 0.5), r_l = (0.5, 0.5), given as ready errors.
d = (r_w - r_l) - (e_w - e_l) = (0.75, -0.75); with beta = 2 the logits are z = (1.5, -1.5).
ls(1.5) = -0.2014133, ls(-1.5) = -1.7014133; sigmoid(1.5) = 0.8175745.
"""

import math

import pytest
import torch

from fastpo import loss as fl

IMPLS = (None, "reference", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = torch.tensor([[0.5], [1.0], [1.0], [0.5]], device=DEVICE)
REFERENCE = torch.full((4,), 0.5, device=DEVICE)
TARGET = torch.zeros(2, 1, device=DEVICE)
LS_UP, LS_DOWN, SIGMOID = -0.2014133, -1.7014133, 0.8175745
NEAR, FAR = 1 - SIGMOID, SIGMOID


@pytest.fixture(params=IMPLS)
def impl(request):
    """Every implementation; on a CPU Triton's is interpreted."""
    return request.param


def losses_and_slopes(call, *args, **options):
    """Per-pair losses, by weights that pick one pair, and dloss/de of every row."""
    policy = POLICY.clone().requires_grad_()
    out = call(policy, *args, TARGET, **options)
    (grad,) = torch.autograd.grad(out.loss, policy)
    picks = [
        2 * call(POLICY, *args, TARGET, **options, pair_weight=w).loss.item()
        for w in torch.eye(2, device=DEVICE)
    ]
    return out, picks, (grad / (2 * POLICY)).flatten().tolist()


BY_HAND = [
    (fl.dpo, {"beta": 2.0}, [-LS_UP, -LS_DOWN], [NEAR, FAR, -NEAR, -FAR]),
    (
        fl.dpo,
        {"beta": 2.0, "label_smoothing": 0.1},
        [-0.9 * LS_UP - 0.1 * LS_DOWN, -0.9 * LS_DOWN - 0.1 * LS_UP],
        [s * (0.9 * a - 0.1 * b) for s in (1, -1) for a, b in ((NEAR, FAR), (FAR, NEAR))],
    ),
    (
        fl.robust_dpo,
        {"beta": 2.0, "label_smoothing": 0.1},
        [(-0.9 * LS_UP + 0.1 * LS_DOWN) / 0.8, (-0.9 * LS_DOWN + 0.1 * LS_UP) / 0.8],
        [s * (0.9 * a + 0.1 * b) / 0.8 for s in (1, -1) for a, b in ((NEAR, FAR), (FAR, NEAR))],
    ),
    # -ls(z) + 2 (1 - p); slopes beta (1 - p) (1 + 2 p), shared out over two pairs.
    (
        fl.poly_dpo,
        {"beta": 2.0, "alpha": 2.0},
        [-LS_UP + 2 * NEAR, -LS_DOWN + 2 * FAR],
        [s * a * (1 + 2 * b) for s in (1, -1) for a, b in ((NEAR, FAR), (FAR, NEAR))],
    ),
    # 1 / (2 tau) = 0.25: gaps 0.5 and -1.
    (fl.ipo, {"tau": 2.0}, [0.25, 1.0], [-0.5, 1.0, 0.5, -1.0]),
    (fl.hinge, {"beta": 2.0}, [0.0, 2.5], [0.0, 1.0, 0.0, -1.0]),
    # g_w = (0.25, -0.5), g_l = (-0.5, 0.25): mean -0.125, so z0 = 0. sigmoid(0.5) = 0.6224593,
    # sigmoid(1) = 0.7310586; slopes beta s (1 - s) / 4: 0.1175019 and 0.0983060.
    (
        fl.kto,
        {"beta": 2.0},
        [(0.3775407 + 0.2689414) / 2, (0.7310586 + 0.6224593) / 2],
        [0.1175019, 0.0983060, -0.0983060, -0.1175019],
    ),
    # p = sigmoid(z), q = 0.9: p (ls(z) - log 0.9) + (1 - p) (ls(-z) - log 0.1).
    (
        fl.dmpo,
        {"beta": 2.0, "alpha": 0.1},
        [
            FAR * (LS_UP - math.log(0.9)) + NEAR * (LS_DOWN - math.log(0.1)),
            NEAR * (LS_DOWN - math.log(0.9)) + FAR * (LS_UP - math.log(0.1)),
        ],
        [-FAR * NEAR * (z - math.log(9)) * side for side in (1, -1) for z in (1.5, -1.5)],
    ),
    # 0.5 - 0.2 z = 0.2 and 0.8; e_w - e_l = -0.75 and 0.75.
    (fl.linear_dpo, {"beta": 2.0}, [-0.15, 0.6], [0.1, 0.4, -0.1, -0.4]),
    # Sums of residual products: winners 1.25, dot 0.5 + 0.5; lambda = 0.5 * 1.25 / 1 = 0.625.
    (
        fl.sdpo,
        {"beta": 2.0, "mu": 0.5},
        [-LS_UP, -LS_DOWN],
        [NEAR, FAR, -0.625 * NEAR, -0.625 * FAR],
    ),
]


@pytest.mark.parametrize(("call", "options", "losses", "slopes"), BY_HAND)
def test_with_reference(call, options, losses, slopes, impl):
    out, found, found_slopes = losses_and_slopes(call, REFERENCE, **options, impl=impl)
    assert out.margin.tolist() == [0.75, -0.75]
    assert out.policy_error.tolist() == [0.25, 1.0, 1.0, 0.25]
    assert out.minority is None and out.weight is None
    assert out.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-6)
    if call is not fl.sdpo:
        assert found == pytest.approx(losses, abs=1e-6)
    assert found_slopes == pytest.approx(slopes, abs=1e-6)


def test_the_safeguard_leaves_alone_what_helps_the_winner(impl):
    """Against the winners' residuals lambda is 1, and it is never more: 1.25 / 1 with mu = 0."""
    against = POLICY * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], device=DEVICE)
    for policy, mu in ((against, 0.9), (POLICY, 0.0)):
        policy = policy.clone().requires_grad_()
        grads = [
            torch.autograd.grad(loss(policy, REFERENCE, TARGET, impl=impl, **o).loss, policy)[0]
            for loss, o in ((fl.sdpo, {"beta": 2.0, "mu": mu}), (fl.dpo, {"beta": 2.0}))
        ]
        torch.testing.assert_close(*grads)


def test_kto_baseline_is_the_mean_gain_not_below_zero(impl):
    reference = torch.full(
        (4,), 1.5, device=DEVICE
    )  # g_w = (1.25, 0.5), g_l = (0.5, 1.25): z0 = 0.875
    loss = fl.kto(POLICY, reference, TARGET, beta=2.0, impl=impl).loss.item()
    # v = beta (g - z0) = 0.75 and -0.75: sigmoid(-0.75) = 0.3208213, sigmoid(0.75) = 0.6791787
    assert loss == pytest.approx(0.5, abs=1e-6)
    baseline = torch.tensor(0.5, device=DEVICE)
    given = fl.kto(POLICY, reference, TARGET, beta=2.0, baseline=baseline, impl=impl).loss.item()
    # v = 1.5 and 0: winners (sigmoid(-1.5), 0.5), losers (0.5, sigmoid(1.5))
    assert given == pytest.approx((NEAR + 0.5 + 0.5 + FAR) / 4, abs=1e-6)


def test_sft_and_mapo(impl):
    out, found, slopes = losses_and_slopes(fl.sft, impl=impl)
    assert found == pytest.approx([0.25, 1.0]) and slopes == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert out.reference_error is None and out.margin.tolist() == [0.75, -0.75]

    def decay(e):
        return e / math.expm1(e)

    gap = 2 * (decay(0.25) - decay(1.0))
    expected = [0.25 + 0.1 * math.log1p(math.exp(-gap)), 1 + 0.1 * math.log1p(math.exp(gap))]
    _, found, _ = losses_and_slopes(fl.mapo, snr=1.0, num_timesteps=2, impl=impl)
    assert found == pytest.approx(expected, abs=1e-6)


def test_adaptive_dpo_alone(impl):
    """rms of d is 0.75, so x = (2, -2); u = sigmoid(-x) = (0.1192029, 0.8807971); mean d = 0."""
    out = fl.adaptive_dpo(POLICY, REFERENCE, TARGET, beta=2.0, rho=2.0, margin_scale=2.0, impl=impl)
    u = [0.1192029, 0.8807971]
    weight = [1 / (1 + 10 * v) for v in u]
    z = [1.5 + u[0] ** 2, -1.5 + u[1] ** 2]
    losses = [w * math.log1p(math.exp(-v)) for w, v in zip(weight, z, strict=True)]
    assert out.minority.tolist() == pytest.approx(u, abs=1e-6)
    assert out.weight.tolist() == pytest.approx(weight, abs=1e-6)
    assert out.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-6)


def test_adaptive_dpo_with_an_annotator(impl):
    """The annotator sees d = (0.5, 0.5), x = (1, 1), the policy x = (1, -1)."""
    annotator = torch.tensor([0.25, 0.25, 0.75, 0.75], device=DEVICE)
    out = fl.adaptive_dpo(
        POLICY, REFERENCE, TARGET, beta=2.0, rho=1.0, annotators=[annotator], weight_kind="gate",
        impl=impl,
    )  # fmt: skip
    # Equal judgments: spread 0. Opposite ones: std(1, -1) = 1.414, clipped to 1, mean sigmoid 1/2.
    assert out.minority.tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert out.weight.tolist() == [1.0, 0.0]


def test_adaptive_ipo_subtracts_the_margin(impl):
    """u = (0.5, 1): gamma = 0 - u**2 / 2 = (-0.125, -0.5), gamma / beta = (-0.0625, -0.25)."""
    minority = torch.tensor([0.5, 1.0], device=DEVICE)
    out = fl.adaptive_ipo(
        POLICY, REFERENCE, TARGET, tau=2.0, beta=2.0, minority=minority, impl=impl
    )
    losses = [(0.75 + 0.0625 - 0.25) ** 2 / 6, (-0.75 + 0.25 - 0.25) ** 2 / 11]
    assert out.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-7)
    assert out.minority.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("linear", 1 / 6),
        ("quadratic", 1 / 3.5),
        ("sqrt", 1 / (1 + math.exp(10 * math.sqrt(0.5)))),
        ("exponential", 1 / (1 + math.exp(5))),
        ("gate", 0.0),
    ],
)
def test_weight_kinds_at_one_half(kind, weight, impl):
    half = torch.full((2,), 0.5, device=DEVICE)
    out = fl.adaptive_dpo(
        POLICY, REFERENCE, TARGET, beta=2.0, minority=half, weight_kind=kind, impl=impl
    )
    assert out.weight.tolist() == pytest.approx([weight, weight])


def test_l2_at_sixteen_pairs_is_rms_with_a_quarter_of_rho():
    torch.manual_seed(0)
    policy, reference, target = torch.randn(32, 4), torch.randn(32, 4), torch.randn(16, 4)
    released = fl.adaptive_dpo(policy, reference, target, beta=2.0, normalize="l2", rho=15.0)
    ours = fl.adaptive_dpo(policy, reference, target, beta=2.0)
    torch.testing.assert_close(released.minority, ours.minority)


def test_pair_errors_are_means_over_the_elements():
    predictions = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])
    assert fl.pair_errors(predictions, torch.zeros(1, 1, 2)).tolist() == [5.0, 2.0]


def test_half_precision_reference_is_summed_in_float32():
    torch.manual_seed(0)
    target = torch.randn(1, 4096)
    predictions = (target + 0.1 * torch.randn(2, 4096)).bfloat16()
    errors = fl.pair_errors(predictions, target.bfloat16())
    truth = (predictions.double() - target.bfloat16().double()).square().mean(1)
    torch.testing.assert_close(errors.double(), truth, rtol=1e-6, atol=0)
