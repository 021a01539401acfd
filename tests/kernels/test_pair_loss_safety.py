"""What surrounds the pair losses' arithmetic: operators, tracing, validation, import."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import cpu, ops, pair_loss
from fastpo_kernels.pair_loss.native import loss as native
from fastpo_kernels.pair_loss.spec import LossSpec, PairTensors
from fastpo_kernels.testing import pair_inputs

IMPLS = ("triton", "cpu", "reference", None)


def call(x, impl="triton", **options):
    return fl.dpo(x.policy, x.reference, x.target, beta=20.0, impl=impl, **options)


FURTHER = (None, 0.0, False)  # no beta of the pairs' own, no further term, their mean
NOT_ADAPTIVE = (None, None, None, 0.0, 0.0, 0.0, 0.0, 0.0, *FURTHER)
ADAPTIVE = ("rms", "linear", "quadratic", 3.75, 10.0, 1.0, 1.0, 20.0, *FURTHER)
# Minority, statistics and weights that are not given, and plain DPO.
PLAIN = (None, None, None, "dpo", [20.0, 0.0], None, *NOT_ADAPTIVE)


def gradient(x, impl="triton"):
    policy = x.policy.detach().requires_grad_()
    x.policy = policy
    return torch.autograd.grad(call(x, impl).loss, policy)[0]


def test_operators_pass_opcheck(device):
    x = pair_inputs(2, (40,), torch.float32, device, n_annotators=1)
    policy = x.policy.requires_grad_()
    weight = torch.ones(2, device=device)
    plain = (None, None, weight, "dpo", [20.0, 0.0], None, *NOT_ADAPTIVE)
    adapted = (None, None, None, "dpo", [20.0], None, *ADAPTIVE)
    for args in (
        (policy, x.target, x.reference, [], *plain),
        (policy, x.target, x.reference, x.annotators, *adapted),
    ):
        torch.library.opcheck(ops.pair_loss_fwd, args)
    torch.library.opcheck(ops.pair_errors_fwd, (policy, x.target))
    torch.library.opcheck(
        ops.pair_loss_bwd, (x.policy.detach(), x.target, ONES(4, device=device), None)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl, device):
    x = pair_inputs(2, (40,), torch.float32, device)
    expected = gradient(x, impl)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(policy):
        out = fl.dpo(policy, x.reference, x.target, beta=20.0, impl=impl)
        return out.loss, out.margin

    policy = x.policy.detach().requires_grad_()
    loss, margin = step(policy)
    loss.backward()
    torch.testing.assert_close(policy.grad, expected)
    assert margin.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    x = pair_inputs(2, (40,), torch.float32, device)
    plain = call(x, impl)
    with torch.autocast(device, torch.bfloat16):
        cast = call(x, impl)
    assert torch.equal(plain.loss, cast.loss) and cast.loss.dtype == torch.float32
    assert torch.equal(plain.margin, cast.margin)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradient(impl, device):
    x = pair_inputs(2, (40,), torch.float32, device)
    x.policy.requires_grad_()
    with torch.no_grad():
        assert not call(x, impl).loss.requires_grad
    out = call(x, impl)
    assert out.loss.requires_grad and out.margin.requires_grad and out.policy_error.requires_grad
    assert not any(t.requires_grad for t in out[3:] if t is not None)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_policy_gets_a_gradient(impl, device):
    x = pair_inputs(2, (40,), torch.float32, device)
    for t in x.tensors():
        t.requires_grad_()
    call(x, impl).loss.backward()
    assert x.policy.grad is not None
    assert x.reference.grad is None and x.target.grad is None
    x.policy = x.policy.detach()
    weight = torch.ones(2, device=device, requires_grad=True)
    assert not call(x, impl, pair_weight=weight).loss.requires_grad
    assert not fl.pair_errors(x.policy, x.target, impl=impl).requires_grad


def test_double_backward_is_refused(device):
    x = pair_inputs(2, (40,), torch.float32, device)
    policy = x.policy.requires_grad_()
    (grad,) = torch.autograd.grad(call(x).loss, policy, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
    loss, _ = ops.pair_loss_fwd(policy, x.target, x.reference, [], *PLAIN)
    (grad,) = torch.autograd.grad(loss, policy, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("shared_target", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_is_refused(impl, shared_target, device):
    x = pair_inputs(2, (40,), torch.float32, device, shared_target=shared_target)

    def loss(policy):
        return fl.dpo(policy, x.reference, x.target, beta=20.0, impl=impl).loss

    with pytest.raises(NotImplementedError, match="do not run under vmap"):
        torch.vmap(loss)(torch.stack([x.policy, x.policy]))


def test_the_ticket_is_zero_again(device):
    """Or the second launch with it would never finish."""
    from fastpo_kernels.pair_loss.gpu import launch

    x = pair_inputs(3, (40,), torch.float32, device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    tensors = PairTensors(x.policy, x.target, x.reference)
    found = []
    for _ in range(2):
        loss, _ = launch.launch_forward(tensors, LossSpec("dpo", (20.0,)), ticket)
        assert ticket.item() == 0
        found.append(loss.item())
    assert found[0] == found[1] == call(x).loss.item()


def test_the_kernel_works_in_no_more_memory_than_it_writes(device):
    """One partial a tile's program, side and stream that is read: ready errors need none."""
    from fastpo_kernels.pair_loss.gpu import launch

    x = pair_inputs(3, (40,), torch.float32, device)
    errors = torch.rand(6, device=device)
    plain, guarded = LossSpec("dpo", (20.0,)), LossSpec("dpo", (20.0,), safeguard=0.9)
    with launch.launches_as(launch.LaunchConfig(16, 2, 4)):
        found = {
            (ready, guard): launch._prepare_reduction(
                PairTensors(x.policy, x.target, errors if ready else x.reference),
                guarded if guard else plain,
                finishes=True,
            ).scratch
            for ready in (False, True)
            for guard in (False, True)
        }
    one = 2 * 2 * 3
    assert found == {
        (False, False): 2 * one, (False, True): 3 * one, (True, False): one, (True, True): 3 * one,
    }  # fmt: skip


def test_limits_of_the_kernel_are_named(device):
    x = pair_inputs(2049, (4,), torch.float32, device)
    with pytest.raises(ValueError, match=r"at most 2048 pairs a call .* got 2049 of 4"):
        call(x)
    torch.testing.assert_close(call(x, None).loss, call(x, "reference").loss)


def test_operator_and_eager_path_agree_bitwise(device):
    x = pair_inputs(2, (40,), torch.bfloat16, device)
    policy = x.policy.requires_grad_()
    loss, _ = ops.pair_loss_fwd(policy, x.target, x.reference, [], *PLAIN)
    assert torch.equal(loss, call(x).loss)
    assert torch.equal(torch.autograd.grad(loss, policy)[0], gradient(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice on a GPU is triton")
@pytest.mark.parametrize("impl", [None, "cpu"])
def test_none_is_the_cpus_own_implementation_on_a_cpu(impl, monkeypatch):
    x = pair_inputs(2, (40,))
    weight = torch.ones(2)
    expected = call(x, "reference").loss
    chosen = []
    for name in ("pair_loss", "large_loss"):
        real = getattr(cpu, name)
        counted = lambda *a, real=real, name=name, **k: chosen.append(name) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(cpu, name, counted)
    torch.testing.assert_close(call(x, impl).loss, expected)
    torch.testing.assert_close(call(x, impl, pair_weight=weight).loss, expected)
    call(x, "reference")
    compiled = native.takes(PairTensors(x.policy, x.target, x.reference))
    assert chosen == ["pair_loss", "pair_loss", *([] if compiled else ["large_loss"])]


WANTING = torch.tensor(0.1, requires_grad=True)
LEARNED = [
    (fl.dpo, {"beta": WANTING}),
    (fl.dpo, {"beta": torch.ones(2, requires_grad=True)}),
    (fl.dpo, {"beta": 1.0, "label_smoothing": WANTING}),
    (fl.dpo, {"beta": 1.0, "sft_weight": WANTING}),
    (fl.ipo, {"tau": WANTING}),
    (fl.hinge, {"beta": 1.0, "safeguard": WANTING}),
    (fl.kto, {"beta": 1.0, "liked_weight": WANTING}),
    (fl.dmpo, {"beta": 1.0, "alpha": WANTING}),
    (fl.linear_dpo, {"beta": 1.0, "eta": WANTING}),
    (fl.sdpo, {"beta": 1.0, "mu": WANTING}),
    (fl.adaptive_dpo, {"beta": 1.0, "rho": WANTING}),
    (fl.adaptive_dpo, {"beta": 1.0, "weight_scale": WANTING}),
    (fl.adaptive_ipo, {"beta": 1.0, "tau": 1.0, "margin_scale": WANTING}),
]


@pytest.mark.parametrize(("objective", "options"), LEARNED)
def test_an_option_that_wants_a_gradient_is_refused(objective, options):
    x = pair_inputs(2, (40,))
    with pytest.raises(ValueError, match="is a constant of the loss, got a tensor that requires"):
        objective(x.policy, x.reference, x.target, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_without_gradient_is_a_number(impl, device):
    x = pair_inputs(2, (40,), torch.float32, device)
    out = fl.dpo(x.policy, x.reference, x.target, beta=torch.tensor(20.0), impl=impl)
    assert torch.equal(out.loss, call(x, impl).loss)


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        (torch.ones(3), r"beta must be \[2\], got \(3,\)"),
        (torch.ones(2, dtype=torch.int64), "beta must be a floating-point tensor"),
        (torch.ones(2, device="meta"), "beta must be on policy's cpu"),
    ],
)
def test_refuses_betas_that_are_none_of_the_pairs(beta, message):
    x = pair_inputs(2, (40,))
    with pytest.raises((TypeError, ValueError), match=message):
        fl.dpo(x.policy, x.reference, x.target, beta=beta)
    with pytest.raises(ValueError, match="beta must be one number"):
        fl.adaptive_ipo(x.policy, x.reference, x.target, tau=1.0, beta=torch.ones(2))


@pytest.mark.parametrize("name", [n for n in fl.__all__ if n[0].islower() and n != "pair_errors"])
def test_every_objective_shows_its_keywords(name):
    parameters = inspect.signature(getattr(fl, name)).parameters
    assert {"pair_weight", "impl"} <= parameters.keys()
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


@pytest.mark.parametrize("impl", ["reference", None])
def test_adaptive_keywords_compile_as_one_graph(impl):
    x = pair_inputs(2, (40,), torch.float32, n_annotators=1)
    options = {"rho": 2.0, "weight_kind": "sqrt", "annotators": x.annotators, "impl": impl}

    def step(policy):
        return fl.adaptive_dpo(policy, x.reference, x.target, beta=20.0, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.policy), step(x.policy))


def test_float64_is_for_the_reference(device):
    x = pair_inputs(2, (40,), torch.float64, device)
    assert call(x, "reference").loss.dtype == torch.float64
    with pytest.raises(TypeError, match=r"takes float32, bfloat16 or float16, got torch\.float64"):
        call(x, "triton")


def bad(**changes):
    x = pair_inputs(2, (4, 3))
    arguments = {"policy": x.policy, "reference": x.reference, "target": x.target, "beta": 1.0}
    return {**arguments, **changes}


ONES = torch.ones
REFUSED = [
    ("odd rows", ValueError, r"policy must be \[2B.*got \(3, 4\)", {"policy": ONES(3, 4)}),
    ("empty batch", ValueError, r"not empty; got \(0, 4\)", {"policy": ONES(0, 4)}),
    ("one dimension", ValueError, r"policy must be \[2B", {"policy": ONES(4)}),
    ("integers", TypeError, "policy must be a floating", {"policy": ONES(4, 3, dtype=torch.int64)}),
    (
        "a dtype of 8 bits",
        TypeError,
        "policy must be float32, bfloat16 or float16, got torch.float8_e4m3fn",
        {"policy": ONES(4, 3).to(torch.float8_e4m3fn)},
    ),
    ("no tensor", TypeError, "target must be a tensor, got list", {"target": [1.0]}),
    ("target's rows", ValueError, r"target must be \(4, 4, 3\)", {"target": ONES(3, 4, 3)}),
    ("target's dims", ValueError, r"shared by the pair; got", {"target": ONES(2, 4, 4)}),
    ("reference's shape", ValueError, "reference must have policy's", {"reference": ONES(2, 4, 3)}),
    ("errors' length", ValueError, r"reference's errors must be \[4\]", {"reference": ONES(3)}),
    ("errors' dtype", TypeError, "must be float32", {"reference": ONES(4, dtype=torch.float16)}),
    ("device", ValueError, "target must be on policy's cpu", {"target": ONES(2, 4, 3).to("meta")}),
    ("weight's length", ValueError, r"pair_weight must be \[2\]", {"pair_weight": ONES(4)}),
    ("reference missing", ValueError, "dpo needs a reference", {"reference": None}),
    (
        "impl",
        ValueError,
        "impl must be None, 'triton', 'cpu' or 'reference', got 'cuda'",
        {"impl": "cuda"},
    ),
    ("smoothing", ValueError, r"label_smoothing must be in \[0, 0.5\]", {"label_smoothing": 0.6}),
    ("beta", ValueError, "beta must be positive and finite, got nan", {"beta": float("nan")}),
]


@pytest.mark.parametrize(
    ("error", "message", "changes"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refuses(error, message, changes):
    """Small batches too, which take the shortest way on a CPU; and by every name."""
    for impl in (changes["impl"],) if "impl" in changes else IMPLS:
        with pytest.raises(error, match=message):
            fl.dpo(**bad(**{**changes, "impl": impl}))


def test_refuses_minority_beside_annotators():
    x = pair_inputs(2, (4,), n_annotators=1)
    with pytest.raises(ValueError, match="got both"):
        fl.adaptive_dpo(
            x.policy, x.reference, x.target, beta=1.0, annotators=x.annotators, minority=ONES(2)
        )
    with pytest.raises(ValueError, match="weight_kind must be one of"):
        fl.adaptive_dpo(x.policy, x.reference, x.target, beta=1.0, weight_kind="cubic")


@pytest.mark.parametrize("impl", IMPLS)
def test_refuses_too_many_and_too_few_options(impl):
    x = pair_inputs(2, (4,))
    for name, options in (("dpo", (1.0, 0.0, 0.0)), ("ipo", ()), ("mapo", (0.1,))):
        with pytest.raises(ValueError, match=rf"{name} takes options .* got {len(options)}"):
            pair_loss(x.policy, x.reference, x.target, name, options, impl=impl)


WEIGHTS = [
    ({"weight_scale": float("nan")}, "weight_scale must be finite and not negative, got nan"),
    ({"weight_intercept": 0.0}, "weight_intercept must be positive and finite, got 0.0"),
    ({"weight_intercept": -1.0, "weight_kind": "sqrt"}, "weight_intercept must be finite and not"),
    ({"margin_scale": float("inf")}, "margin_scale must be finite, got inf"),
    ({"rho": 0.0}, "rho must be positive"),
]


@pytest.mark.parametrize(("options", "message"), WEIGHTS)
def test_refuses_weights_that_could_be_infinite(options, message):
    x = pair_inputs(2, (4,))
    with pytest.raises(ValueError, match=message):
        fl.adaptive_dpo(x.policy, x.reference, x.target, beta=1.0, **options)


def test_refuses_a_baseline_that_is_no_number():
    x = pair_inputs(2, (4,))
    with pytest.raises(TypeError, match="baseline must be a tensor, got float"):
        fl.kto(x.policy, x.reference, x.target, beta=1.0, baseline=0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="baseline must have one element, got 2"):
        fl.kto(x.policy, x.reference, x.target, beta=1.0, baseline=ONES(2))


def test_refuses_strided_errors_in_the_kernel(device):
    x = pair_inputs(2, (4,), torch.float32, device)
    x.reference = torch.ones(8, device=device)[::2]
    with pytest.raises(ValueError, match="needs reference contiguous, got stride 2"):
        call(x)


def run_python(code, **env):
    """Runs in a fresh process without the interpreter's variable."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    clean["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


BLOCK = "import sys\nfor n in ('triton', 'diffusers', 'transformers'): sys.modules[n] = None\n"


def test_works_without_triton_and_loads_nothing_heavy():
    done = run_python(
        BLOCK + "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, fastpo.loss as L\n"
        "assert not torch.cuda.is_initialized()\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "L.dpo(x, torch.randn(4, 3), torch.randn(2, 3), beta=1.0).loss.backward()\n"
        "try: L.sft(x, torch.randn(2, 3), impl='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "which is not installed" in done.stdout


def test_cpu_tensors_are_refused_outside_the_interpreter():
    done = run_python(
        "import torch, fastpo.loss as L\n"
        "try: L.sft(torch.ones(2, 3), torch.ones(1, 3), impl='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    assert "needs tensors on a GPU, got cpu" in done.stdout, done.stderr


def test_import_is_free_of_triton_and_of_fastpo():
    done = run_python(
        "import sys, fastpo_kernels.pair_loss, torch\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
        "assert not [n for n in sys.modules if n == 'fastpo' or n.startswith('fastpo.')]\n"
    )
    assert done.returncode == 0, done.stderr


def test_kernels_never_import_fastpo():
    folder = Path(__file__).parents[2] / "kernels" / "fastpo_kernels"
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "import fastpo\n" not in text and "from fastpo " not in text, path
        assert "from fastpo." not in text and "import fastpo." not in text, path
