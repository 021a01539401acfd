"""The C++ module: threads and sums, conversions, layouts, and what goes through operators."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.pair_loss.native import launch, module
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.pair_loss.spec import PairTensors
from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, check, run

ROOT = Path(__file__).parents[2]
HALVES = (torch.bfloat16, torch.float16)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    BUILT = module.loaded() is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="built without a C++ compiler")


@pytest.fixture
def compiled(monkeypatch):
    """Says of every call whether the module took it."""
    taken, takes = [], native.takes
    monkeypatch.setattr(native, "takes", lambda t: taken.append(takes(t)) or taken[-1])
    return taken


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    x = pair_inputs(3, (4, 97, 101), torch.bfloat16, n_annotators=2)
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            found.append(run(CASES["adaptive_dpo-annotators"], x, None))
        finally:
            torch.set_num_threads(threads)
    (first, first_grad), *others = found
    for out, grad in others:
        assert torch.equal(grad, first_grad)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(out, first, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_converted_as_torch_does(dtype, compiled):
    """Errors against zero are squares; a gradient of slope 1 is the number itself."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    policy = every[:, None].clone().requires_grad_()
    target = torch.zeros(len(policy), 1, dtype=dtype)
    errors = fl.pair_errors(policy, target)
    torch.testing.assert_close(errors, policy.detach().float()[:, 0].square(), equal_nan=True)
    (grad,) = torch.autograd.grad(errors, policy, torch.full_like(errors, 0.5))
    assert torch.equal(grad.isnan(), policy.isnan())
    assert torch.equal(grad.nan_to_num(7.0), policy.detach().nan_to_num(7.0))
    assert all(compiled)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 2051])
def test_gradients_are_rounded_to_nearest(dtype, size):
    """By the processor's own conversion and otherwise; ties, overflow, subnormal numbers."""
    rng = torch.Generator().manual_seed(size)
    residual = torch.randn(2, size, generator=rng) * 10.0 ** torch.randint(
        -9, 6, (2, size), generator=rng
    )
    residual[0, 0], residual[1, -1] = 1 + 2**-8 + 2**-11, float("inf")
    policy = torch.zeros(2, size, dtype=dtype, requires_grad=True)
    target = -residual
    errors = fl.pair_errors(policy, target)
    (grad,) = torch.autograd.grad(errors, policy, torch.full((2,), size / 2))
    scale = torch.tensor(2 / size) * (size / 2)
    assert torch.equal(grad, (residual * scale).to(dtype))


def test_rows_far_apart():
    """Whose addresses differ by more than 2**31 elements: of an expanded pair, all the same row."""
    row = torch.randn(1, 4, 40)
    far = torch.empty(0).set_(row.untyped_storage(), 0, (2, 4, 40), (0, 40, 1))
    target = torch.zeros(1, 4, 40)
    assert torch.equal(fl.pair_errors(far, target), fl.pair_errors(row.repeat(2, 1, 1), target))
    strides = launch._rows(far[:1], far[1:], (2**33, 1), 1)
    assert strides[3:] == (2**33, 1)


@pytest.mark.parametrize("layout", ["narrow", "permuted", "expanded"])
def test_layouts_in_four_dimensions(layout, compiled):
    x = pair_inputs(2, (3, 6, 10), torch.float16)
    change = {
        "narrow": lambda t: torch.cat([t, t], 3)[..., 1:11].contiguous()[..., :9],
        "permuted": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "expanded": lambda t: t[:, :1].expand(-1, 3, -1, -1),
    }[layout]
    x.policy, x.reference, x.target = change(x.policy), change(x.reference), change(x.target)
    check(CASES["sdpo"], x, impl=None)
    assert any(compiled)


def test_a_gradient_of_the_gradient(compiled):
    """By operators, to rounding the reference's."""
    x = pair_inputs(3, (4, 5), torch.float32, n_annotators=2)

    def curvature(impl):
        policy = x.policy.detach().requires_grad_()
        out = fl.adaptive_dpo(
            policy, x.reference, x.target, beta=20, annotators=x.annotators, impl=impl,
            reduce=lambda sums: 2 * sums,
        )  # fmt: skip
        total = out.loss + out.margin.square().sum() + out.policy_error[:3].sum()
        (grad,) = torch.autograd.grad(total, policy, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), policy)[0]

    torch.testing.assert_close(curvature(None), curvature("reference"))
    assert compiled[0]


def test_what_operators_see_goes_through_operators(compiled):
    x = pair_inputs(2, (4, 5), torch.float32)

    def loss(policy):
        return fl.dpo(policy, x.reference, x.target, beta=20).loss

    expected = run(CASES["dpo"], x, "reference")[1] / 3.25
    torch.testing.assert_close(torch.func.grad(loss)(x.policy.detach()), expected)
    tangent = torch.ones_like(x.policy)
    with torch.no_grad():
        _, along = torch.func.jvp(loss, (x.policy.detach(),), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    assert not any(compiled)


@pytest.mark.parametrize("name", ["dpo", "sdpo", "adaptive_dpo-annotators"])
def test_by_operators_and_compiled_agree(name, monkeypatch):
    x = pair_inputs(3, (4, 70, 30), torch.bfloat16, n_annotators=2)
    found, grad = run(CASES[name], x, None)
    monkeypatch.setattr(native, "takes", lambda _: False)
    expected, expected_grad = run(CASES[name], x, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad)


def test_tensors_it_does_not_read():
    x = pair_inputs(2, (4,), torch.float32)
    assert native.takes(PairTensors(x.policy, x.target, x.reference))
    assert not native.takes(PairTensors(x.policy.double(), x.target, x.reference))
    assert not native.takes(PairTensors(x.policy, x.target.double(), x.reference))
    assert not native.takes(PairTensors(x.policy.to("meta"), x.target, x.reference))
    assert cpu.pair_errors(x.policy.double(), x.target.double()).dtype == torch.float64


def test_without_the_module_one_warning_and_the_same_loss():
    code = f"""
import sys, warnings; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
sys.modules["fastpo_kernels.pair_loss.native._native"] = None
import torch, fastpo.loss
x = torch.arange(8.).view(2, 4)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for _ in range(2): out = fastpo.loss.dpo(x, x + 1, x[:1], beta=1.0)
print(len(found), "were not built" in str(found[0].message), float(out.loss))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, said, loss = done.stdout.split()
    x = torch.arange(8.0).view(2, 4)
    assert (count, said) == ("1", "True")
    assert float(loss) == pytest.approx(float(fl.dpo(x, x + 1, x[:1], beta=1.0).loss))


@pytest.fixture
def anew():
    """The module is looked for again, in the test and after it."""
    module.loaded.cache_clear()
    yield
    module.loaded.cache_clear()
    assert module.loaded() is not None


@pytest.fixture
def threads():
    """`threads(n)` until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def warned():
    """The losses of two calls, which are alike, and what was said, by those of this package."""
    x = pair_inputs(3, (4, 97, 101), torch.float32)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first, second = (fl.dpo(x.policy, x.reference, x.target, beta=20).loss for _ in range(2))
    assert torch.equal(first, second)
    return first, [str(w.message) for w in found if "fastpo's C++" in str(w.message)]


def test_torchs_loop_is_found_by_macos_name_too(anew, monkeypatch, tmp_path):
    expected = module._parallel_loop()
    library = next(path for name in module._LIBRARIES if (path := module._folder() / name).exists())
    (tmp_path / "libtorch_cpu.dylib").symlink_to(library)
    monkeypatch.setattr(module, "_folder", lambda: tmp_path)
    assert module._parallel_loop() == expected != 0
    assert warned()[1] == []


@pytest.mark.parametrize("count", [1, 3])
def test_without_torchs_loop_one_warning_of_the_one_thread(
    anew, monkeypatch, threads, tmp_path, count, compiled
):
    """And the same bits."""
    threads(count)
    expected, said = warned()
    assert said == []
    module.loaded.cache_clear()
    monkeypatch.setattr(module, "_folder", lambda: tmp_path)
    loss, said = warned()
    assert torch.equal(loss, expected)
    assert all(compiled)
    if count == 1:
        assert said == []
    else:
        (text,) = said
        assert f"run on one thread, not on torch's 3: torch {torch.__version__} has no " in text
        assert f"{tmp_path}/libtorch_cpu.so or libtorch_cpu.dylib" in text


def test_a_module_that_cannot_be_loaded_is_told_from_one_that_was_not_built(
    anew, monkeypatch, tmp_path
):
    (tmp_path / "no_such_native.abi3.so").write_text("of another machine")
    monkeypatch.setattr(module, "_NAME", "no_such_native")
    (text,) = warned()[1]
    assert "were not built when it was installed (No module named 'no_such_native'; a C++" in text
    module.loaded.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    (text,) = warned()[1]
    assert f"cannot be loaded ({tmp_path}/no_such_native.abi3.so: " in text
    assert "not built" not in text and "\n" not in text


FIRST_CALL = """
import time
import torch
from fastpo import loss

policy, reference, target = (torch.full((4, 4, 64, 64), x, dtype=torch.bfloat16) for x in (1, 2, 3))
policy.requires_grad_()
started = time.process_time()
loss.dpo(policy, reference, target, beta=100.0).loss.backward()
print(time.process_time() - started)
"""


def test_the_first_call_of_a_process_takes_a_moment():
    """Nothing is compiled for it: under 50 ms of the processor, with the gradient."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert float(done.stdout) < 0.05
