"""The fused pair losses against the float64 oracle, within twice the error of eager."""

import numpy as np
import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.pair_loss.spec import LossSpec, PairTensors
from fastpo_kernels.testing import DTYPES, PairInputs, assert_within_budget, pair_inputs
from tests.kernels.objectives import CASES, check, run

SIZES = [(size, dtype) for size in (1, 7, 1000) for dtype in DTYPES]
# Many tiles, for which the interpreter takes seconds: of one type; the others in the long run.
SIZES += [(65537, torch.bfloat16)]
SIZES += [pytest.param(65537, dtype, marks=pytest.mark.long) for dtype in DTYPES[::2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_objective_within_budget(name, dtype, device, small_tiles):
    check(CASES[name], pair_inputs(3, (3, 7, 11), dtype, device, n_annotators=2))


@pytest.fixture
def rough_hardware(device, monkeypatch):
    """A GPU's `exp`, `exp2` and `log` are off by an eps or more, the interpreter's hardly."""
    if device != "cpu":
        pytest.skip("the device has its own")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    rng = np.random.default_rng(0)

    def rough(function, eps):
        def apply(_, x):
            exact = function(x.data.astype(np.float64))
            off = 1 + eps * torch.finfo(torch.float32).eps * rng.uniform(-1, 1, np.shape(exact))
            return TensorHandle((exact * off).astype(np.float32), x.dtype.scalar)

        return apply

    for name, function, eps in (("exp", np.exp, 9), ("exp2", np.exp2, 2), ("log", np.log, 1)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", rough(function, eps))


@pytest.mark.parametrize("n_pairs", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_objective_within_budget_on_rough_hardware(name, n_pairs, rough_hardware):
    check(CASES[name], pair_inputs(n_pairs, (40,), torch.float32, n_annotators=2))


@pytest.mark.parametrize(("size", "dtype"), SIZES, ids=str)
def test_size_within_budget(size, dtype, device):
    check(CASES["dpo"], pair_inputs(2, (size,), dtype, device))


@pytest.mark.parametrize("n_pairs", [1, 2, 33])
@pytest.mark.parametrize("name", ["dpo", "kto", "sdpo", "adaptive_dpo"])
def test_batch_sizes(name, n_pairs, device):
    check(CASES[name], pair_inputs(n_pairs, (30,), torch.float32, device))


@pytest.mark.parametrize("name", ["dpo", "sdpo", "mapo"])
def test_separate_targets(name, device, small_tiles):
    check(CASES[name], pair_inputs(3, (4, 50), torch.float32, device, shared_target=False))


def test_ready_errors_equal_predictions_bitwise(device, small_tiles):
    x = pair_inputs(3, (4, 50), torch.bfloat16, device, n_annotators=1)
    live, live_grad = run(CASES["adaptive_dpo-annotators"], x, "triton")
    x.reference = fl.pair_errors(x.reference, x.target, impl="triton")
    x.annotators = [fl.pair_errors(a, x.target, impl="triton") for a in x.annotators]
    cached, cached_grad = run(CASES["adaptive_dpo-annotators"], x, "triton")
    assert torch.equal(live.loss, cached.loss) and torch.equal(live.minority, cached.minority)
    assert torch.equal(live_grad, cached_grad)


@pytest.mark.parametrize("name", ["dpo", "adaptive_ipo", "mapo"])
def test_pair_weight(name, device):
    weight = torch.tensor([0.5, 0.0, 2.0], device=device)
    x = pair_inputs(3, (40,), torch.float32, device)
    check(CASES[name], x, pair_weight=weight)
    assert x.policy.grad[1].abs().max() == 0


def test_statistics_from_outside(device):
    x = pair_inputs(3, (40,), torch.float32, device, n_annotators=1)
    check(CASES["kto"], x, baseline=torch.tensor(0.01, device=device))
    statistics = torch.tensor([0.02, 0.03, 0.04], device=device)
    check(CASES["adaptive_dpo-annotators"], x, statistics=statistics)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair_errors_and_gradient(dtype, device, small_tiles):
    x = pair_inputs(3, (4, 50), dtype, device)
    weights = torch.linspace(-1, 2, 6, device=device)
    found = []
    for y, impl in ((x.double(), "reference"), (x, "reference"), (x, "triton")):
        policy = y.policy.detach().requires_grad_()
        errors = fl.pair_errors(policy, y.target, impl=impl)
        (weights.to(errors.dtype) * errors).sum().backward()
        found.append((errors, policy.grad))
    (truth, truth_grad), (eager, eager_grad), (actual, grad) = found
    assert_within_budget(actual, [eager], truth, name="errors")
    assert_within_budget(grad, [eager_grad], truth_grad, name="gradient")


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


STRIDED = {
    "channels-last": lambda x: [channels_last(t) for t in (x.policy, x.reference, x.target)],
    "mixed": lambda x: [channels_last(x.policy), x.reference, x.target],
    "sliced": lambda x: [x.policy[..., ::2], x.reference[..., ::2], x.target[..., 1::2]],
    "transposed": lambda x: [x.policy.mT, x.reference.mT.contiguous(), x.target.mT],
    "expanded": lambda x: [x.policy, x.reference, x.target[:1].expand_as(x.target)],
    "permuted": lambda x: [t.permute(0, 2, 3, 1) for t in (x.policy, x.reference, x.target)],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_inputs_are_read_as_they_are(layout, device, small_tiles):
    x = pair_inputs(2, (4, 6, 10), torch.float32, device)
    x.policy, x.reference, x.target = STRIDED[layout](x)
    strides = x.policy.stride()
    check(CASES["sdpo"], x)
    assert x.policy.stride() == strides


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_logits_stay_finite(name, gap, device):
    x = pair_inputs(2, (8,), torch.float32, device, n_annotators=1)
    rows = torch.tensor([1.0, 1.0, 1.0, 1.0], device=device)
    rows[2:] = 1 + gap / 20 if gap > 0 else 1
    rows[:2] = 1 - gap / 20 if gap < 0 else 1
    x.policy = x.target.repeat(2, 1) + rows.sqrt()[:, None]
    x.reference = x.target.repeat(2, 1) + 1
    out, grad = run(CASES[name], x, "triton")
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all()
    check(CASES[name], x)


def test_errors_of_zero_and_tiny_errors_in_mapo(device):
    x = pair_inputs(3, (8,), torch.float32, device)
    scale = torch.tensor([0.0, 1e-6, 1e-3, 0.0, 1e-5, 1.1e-3], device=device)[:, None]
    x.target = torch.zeros_like(x.target)
    x.policy = scale * torch.ones_like(x.policy)
    check(CASES["mapo"], x)


@pytest.mark.parametrize("name", CASES)
def test_oracle_passes_gradcheck(name):
    # Detached statistics are constants to autograd and variables to finite differences: give them.
    x = pair_inputs(3, (5,), torch.float64, n_annotators=1)
    options = {}
    if name == "kto":
        options["baseline"] = torch.tensor(0.01, dtype=torch.float64)
    if name in ("linear_dpo", "sdpo") or (name.startswith("adaptive") and "ledger" not in name):
        pytest.skip("its detached factor is checked against numbers worked by hand")
    if "ledger" in name:
        options["statistics"] = torch.tensor([0.01, 1.0], dtype=torch.float64)

    def loss(policy):
        y = PairInputs(policy, x.reference, x.target, x.annotators)
        return CASES[name](y, impl="reference", **options).loss

    assert torch.autograd.gradcheck(loss, (x.policy.requires_grad_(),))


@pytest.mark.parametrize("name", CASES)
def test_rerun_is_bitwise_equal_and_reads_nothing_unset(name, device, small_tiles, nan_poisoned):
    x = pair_inputs(3, (7, 31), torch.bfloat16, device, n_annotators=2)
    first, first_grad = run(CASES[name], x, "triton")
    again, again_grad = run(CASES[name], x, "triton")
    for a, b in zip(first, again, strict=True):
        assert a is b is None or (torch.equal(a, b) and torch.isfinite(a).all())
    assert torch.equal(first_grad, again_grad) and torch.isfinite(first_grad).all()


@pytest.fixture(params=["compiled", "whole", "pieces"])
def cpu_way(request, monkeypatch):
    """The default on a CPU, and its two long ways by operators; pieces of 32 elements cut rows."""
    if request.param == "compiled":
        return request.param
    monkeypatch.setattr(native, "takes", lambda _: False)
    monkeypatch.setattr(cpu, "small_loss", lambda *_: None)
    monkeypatch.setattr(cpu, "_PIECE", 32 if request.param == "pieces" else 1 << 40)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu_default_within_budget(name, dtype, cpu_way):
    check(CASES[name], pair_inputs(5, (4, 7, 11), dtype, n_annotators=2), impl=None)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [1, 7, 65537])
def test_cpu_default_sizes(size, shared, cpu_way, monkeypatch):
    if size > 1000 and cpu_way == "pieces":
        monkeypatch.setattr(cpu, "_PIECE", 1 << 14)
    check(CASES["sdpo"], pair_inputs(3, (size,), torch.bfloat16, shared_target=shared), impl=None)


@pytest.mark.parametrize("layout", STRIDED)
def test_cpu_default_takes_strided_inputs(layout, cpu_way):
    x = pair_inputs(2, (4, 6, 10), torch.float32)
    x.policy, x.reference, x.target = STRIDED[layout](x)
    check(CASES["sdpo"], x, impl=None)


def test_cpu_default_takes_ready_errors_and_mixed_dtypes(cpu_way):
    x = pair_inputs(3, (4, 50), torch.bfloat16, n_annotators=2)
    live, live_grad = run(CASES["adaptive_dpo-annotators"], x, None)
    x.annotators[0] = fl.pair_errors(x.annotators[0], x.target)
    x.reference, x.target = x.reference.float(), x.target.float()
    mixed, mixed_grad = run(CASES["adaptive_dpo-annotators"], x, None)
    torch.testing.assert_close(live.loss, mixed.loss)
    torch.testing.assert_close(live.minority, mixed.minority)
    torch.testing.assert_close(live_grad, mixed_grad)


@pytest.mark.parametrize("name", CASES)
def test_cpu_default_is_exact_in_float64(name, cpu_way):
    x = pair_inputs(3, (4, 50), torch.float64, n_annotators=2)
    expected, expected_grad = run(CASES[name], x, "reference")
    found, grad = run(CASES[name], x, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["dpo", "sdpo", "adaptive_dpo-annotators"])
def test_cpu_default_reruns_bitwise_and_reads_nothing_unset(name, cpu_way, nan_poisoned):
    x = pair_inputs(3, (7, 31), torch.bfloat16, n_annotators=2)
    first, first_grad = run(CASES[name], x, None)
    again, again_grad = run(CASES[name], x, None)
    for a, b in zip(first, again, strict=True):
        assert a is b is None or (torch.equal(a, b) and torch.isfinite(a).all())
    assert torch.equal(first_grad, again_grad) and torch.isfinite(first_grad).all()


def test_cpu_default_is_differentiable_twice(cpu_way):
    x = pair_inputs(2, (5, 10), torch.float64)

    def loss(policy):
        return fl.dpo(policy, x.reference, x.target, beta=20).loss

    policy = x.policy.requires_grad_()
    assert torch.autograd.gradcheck(loss, (policy,))
    assert torch.autograd.gradgradcheck(loss, (policy,))
    errors = torch.autograd.functional.jacobian(lambda p: fl.pair_errors(p, x.target), policy)
    assert errors.shape == (4, 4, 5, 10)


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", ["dpo", "dmpo", "mapo", "sdpo"])
def test_cpu_default_stays_finite_at_extreme_logits(name, gap, cpu_way):
    x = pair_inputs(2, (40,), torch.float32)
    rows = torch.ones(4)
    rows[: 2 if gap < 0 else 4][-2:] += abs(gap) / 20
    x.policy = x.target.repeat(2, 1) + rows.sqrt()[:, None]
    x.reference = x.target.repeat(2, 1) + 1
    out, grad = run(CASES[name], x, None)
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all()


PLAIN = [n for n in CASES if n != "kto" and not n.startswith(("sdpo", "adaptive"))]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_cpu_short_way_equals_the_long_bit_for_bit(name, dtype, shared, monkeypatch):
    x = pair_inputs(3, (4, 7, 11), dtype, shared_target=shared)
    monkeypatch.setattr(native, "takes", lambda _: False)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "large_loss", None)
        short, short_grad = run(CASES[name], x, None)
    monkeypatch.setattr(cpu, "small_loss", lambda *_: None)
    found, grad = run(CASES[name], x, None)
    for a, b in zip(short, found, strict=True):
        assert a is b is None or (torch.equal(a, b) and a.shape == b.shape and a.dtype == b.dtype)
    assert torch.equal(short_grad, grad)
    wanting = [t is not None and t.requires_grad for t in short]
    assert wanting[:3] == [True] * 3 and not any(wanting[3:])  # loss, margin, policy_error


LONG = {
    "a reference of ready errors": lambda x: x.policy[:, 0, 0].square(),
    "a reference of another dtype": lambda x: x.reference.double(),
    "a reference that wants a gradient": lambda x: x.reference.clone().requires_grad_(),
    "a strided reference": lambda x: x.reference.mT.contiguous().mT,
}


@pytest.mark.parametrize("change", LONG)
def test_cpu_takes_the_long_way_for_other_batches(change):
    x = pair_inputs(3, (7, 11), torch.float32)
    x.reference = LONG[change](x)
    tensors = PairTensors(x.policy, x.target, x.reference)
    assert cpu.small_loss(tensors, LossSpec("dpo", (20.0,)), None) is None
    found, grad = run(CASES["dpo"], x, None)
    expected, expected_grad = run(CASES["dpo"], x, "reference")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert x.reference.grad is None
