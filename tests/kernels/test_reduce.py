"""Statistics over several processes: halves of a batch with a reduction are the whole batch."""

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_loss import ops
from fastpo_kernels.testing import PairInputs, assert_within_budget, pair_inputs

IMPLS = ("triton", "cpu", "reference")
CASES = {
    "kto": lambda x, **k: fl.kto(x.policy, x.reference, x.target, beta=20, **k),
    "sdpo": lambda x, **k: fl.sdpo(x.policy, x.reference, x.target, beta=20, mu=0.9, **k),
    "adaptive_dpo": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, annotators=x.annotators, margin_scale=20, **k
    ),
    "adaptive_dpo-l2": lambda x, **k: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=20, normalize="l2", rho=15.0, **k
    ),
    "adaptive_ipo": lambda x, **k: fl.adaptive_ipo(
        x.policy, x.reference, x.target, tau=5, beta=20, annotators=x.annotators[:1], **k
    ),
}
N_SUMS = {"kto": 2, "sdpo": 3, "adaptive_dpo": 5, "adaptive_dpo-l2": 3, "adaptive_ipo": 4}


def shares(x, sizes):
    """Every process's share of the pairs."""
    pairs = torch.arange(sum(sizes), device=x.policy.device).split(sizes)
    for own in pairs:
        rows = torch.cat([own, own + sum(sizes)])
        full = [t[rows].clone() for t in (x.policy, x.reference, *x.annotators)]
        yield PairInputs(*full[:2], x.target[own].clone(), full[2:])


def step(call, x, impl, **options):
    policy = x.policy.detach().requires_grad_()
    x.policy = policy
    out = call(x, impl=impl, **options)
    return out, torch.autograd.grad(out.loss, policy)[0]


def processes(call, parts, impl):
    """Every process's result where `reduce` adds the sums of all of them."""
    sums = []

    def gathered(own):
        sums.append(own.clone())
        return own

    for part in parts:
        step(call, part, impl, reduce=gathered)
    return [step(call, part, impl, reduce=lambda _: sum(sums)) for part in parts], sums


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_whole_batchs_loss_and_gradient(name, impl, device, small_tiles):
    sizes = [3, 5]
    x = pair_inputs(8, (4, 30), torch.float32, device, n_annotators=2)
    truth, truth_grad = step(CASES[name], x.double(), "reference")
    whole, whole_grad = step(CASES[name], x, "reference")
    found, sums = processes(CASES[name], list(shares(x, sizes)), impl)
    assert [len(s) for s in sums] == [N_SUMS[name]] * 2
    assert [s[-1].item() for s in sums] == sizes
    loss = sum(n * out.loss for n, (out, _) in zip(sizes, found, strict=True)) / sum(sizes)
    assert_within_budget(loss, [whole.loss], truth.loss, name="loss", scale=1.0)
    for k, field in enumerate(truth._fields):
        if field == "margin" or (field in ("minority", "weight") and truth[k] is not None):
            rows = torch.cat([out[k] for out, _ in found])
            assert_within_budget(rows, [whole[k]], truth[k], name=field, scale=1.0)
    grads = torch.empty_like(whole_grad)
    for own, n, (_, grad) in zip(torch.arange(8).split(sizes), sizes, found, strict=True):
        # Each process's mean is over its own pairs.
        grads[torch.cat([own, own + 8])] = grad * n / sum(sizes)
    scale = 2 * truth_grad.abs().max().item()
    assert_within_budget(grads, [whole_grad], truth_grad, name="gradient", scale=scale)


@pytest.mark.parametrize("name", CASES)
def test_one_process_alone_equals_the_batchs_own_statistics(name, device, small_tiles):
    x = pair_inputs(5, (4, 30), torch.bfloat16, device, n_annotators=2)
    own, own_grad = step(CASES[name], x, "triton")
    out, grad = step(CASES[name], x, "triton", reduce=lambda sums: sums)
    again, again_grad = step(CASES[name], x, "triton", reduce=lambda sums: sums)
    torch.testing.assert_close(out.loss, own.loss)
    torch.testing.assert_close(grad, own_grad)
    assert torch.equal(out.loss, again.loss) and torch.equal(grad, again_grad)
    for a, b in zip(out[1:4], own[1:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cached", [False, True], ids=["predictions", "errors"])
def test_a_running_estimate(impl, cached, device):
    """The hook may blend: here the baseline is twice the batch's mean gain."""
    x = pair_inputs(4, (30,), torch.float32, device)
    x.reference = x.target.repeat(2, 1) + 1.0
    if cached:
        x.reference = fl.pair_errors(x.reference, x.target)
    errors = fl.pair_errors(x.policy, x.target)
    baseline = 2 * (1.0 - errors).mean()
    doubled = torch.tensor([2.0, 1.0], device=device)
    found = fl.kto(x.policy, x.reference, x.target, beta=20.0, impl=impl,
                   reduce=lambda sums: sums * doubled)  # fmt: skip
    given = fl.kto(x.policy, x.reference, x.target, beta=20.0, impl=impl, baseline=baseline)
    torch.testing.assert_close(found.loss, given.loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl, device):
    x = pair_inputs(4, (30,), torch.float32, device, n_annotators=1)
    options = {"impl": impl, "reduce": lambda sums: 2 * sums}
    expected, expected_grad = step(CASES["adaptive_ipo"], x, **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(policy):
        y = PairInputs(policy, x.reference, x.target, x.annotators)
        return CASES["adaptive_ipo"](y, **options).loss

    policy = x.policy.detach().requires_grad_()
    loss = compiled(policy)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], expected_grad)


def test_operator_passes_opcheck(device):
    x = pair_inputs(2, (40,), torch.float32, device, n_annotators=1)
    common = (x.policy, x.target, x.reference, x.annotators, "dpo", True, True)
    torch.library.opcheck(ops.pair_loss_partials, common)
    partial = ops.pair_loss_partials(*common)
    errors, sums = [e.clone() for e in partial[:12].split(4)], partial[12:].clone()
    given = (errors[0], errors[1], [errors[2]], None, sums, None)
    adaptive = ("rms", "linear", "quadratic", 3.75, 10.0, 1.0, 1.0, 20.0, None, 0.0, False)
    policy = x.policy.requires_grad_()
    torch.library.opcheck(
        ops.pair_loss_finish, (policy, x.target, *given, "dpo", [20.0], 0.9, *adaptive)
    )


REFUSED = [
    ("got both", "kto", {"baseline": torch.zeros(()), "reduce": lambda sums: sums}),
    ("reduce must return a tensor, got float", "kto", {"reduce": lambda sums: 1.0}),
    (r"like its argument.*\(2,\).*got \(1,\)", "kto", {"reduce": lambda sums: sums[:1]}),
    ("got .*float64", "sdpo", {"reduce": lambda sums: sums.double()}),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("message", "name", "options"), REFUSED)
def test_refuses(message, name, options, impl, device):
    x = pair_inputs(2, (4,), torch.float32, device)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        CASES[name](x, impl=impl, **options)


def test_refuses_where_there_are_no_statistics():
    x = pair_inputs(2, (4,))
    from fastpo_kernels.pair_loss import pair_loss

    with pytest.raises(ValueError, match="dpo has no batch statistics"):
        pair_loss(x.policy, x.reference, x.target, "dpo", (1.0,), reduce=lambda sums: sums)
